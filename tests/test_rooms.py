"""The house: imports go one way, the path of a row to the step is short, and the total stays small."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Lowest first: a module imports from its own room and from lower ones.
ROOMS = ("common", "model", "dataset", "trainer", "scripts", "eval_vlm")
MOST_LINES = 11_880
FILES = [
    path for path in ROOT.rglob("*.py") if not {".git", "tests", ".venv", "venv"} & set(path.relative_to(ROOT).parts)
]


def room(module: str) -> int | None:
    """The number of a module's room; None for a module that is not ours. A package's __init__ is empty."""
    fitting = [i for i, name in enumerate(ROOMS) if module == name or module.startswith((f"{name}.", name))]
    return max(fitting, default=None, key=lambda i: len(ROOMS[i]))


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if path.name == "__init__.py":
        assert path.read_text() == ""
        return
    ours = {name: room(name) for name in imports(path) if room(name) is not None}
    assert {name for name, number in ours.items() if number > room(module)} == set()


def test_training_shows_at_most_twelve_files():
    files = {path.name for path in (ROOT / "trainer").iterdir() if path.is_file()}
    assert len(files - {"__init__.py", "README_zh.md"}) <= 12  # the recipe is one file, in two languages


def test_a_step_fits_on_a_screen():
    tree = ast.parse((ROOT / "trainer" / "step.py").read_text(encoding="utf-8"))
    [step] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    docstring = step.body[0]
    assert step.end_lineno - docstring.end_lineno <= 45


def test_the_project_stays_small():
    """The total without tests; whoever adds lines looks for others that are not needed any more."""
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= MOST_LINES


def test_the_reading_path_names_files_that_are_there():
    section = README.split("## Reading order")[1].split("\n## ")[0]
    names = re.findall(r"\[`([\w/]+\.py)`\]\(\1\)", section)
    assert len(names) >= 10 and all((ROOT / name).is_file() for name in names)


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
