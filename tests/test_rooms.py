"""The house: imports go one way, the path of a row to the step is short, and the README's numbers are right."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Lowest first: a module imports from its own room and from lower ones.
ROOMS = (
    *(
        "common",
        "model",
        "dataset",
        "trainer.support",
        "trainer.weights",
        "trainer.assets",
        "trainer.flags",
        "trainer.setup",
        "trainer.support.trained",
    ),
    *("trainer.watch", "trainer.resume", "trainer.loop", "trainer.train_", "scripts", "eval_vlm"),
)
PATH_FILES, PATH_LINES = 10, 2000
FILES = [
    path for path in ROOT.rglob("*.py") if not {".git", "tests", ".venv", "venv"} & set(path.relative_to(ROOT).parts)
]


def room(module: str) -> int | None:
    """The number of a module's room; None for a module that is not ours. A package's __init__ is empty."""
    fitting = [i for i, name in enumerate(ROOMS) if module == name or module.startswith((f"{name}.", name + "_" * 0))]
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


def test_training_shows_at_most_ten_files():
    files = {path.name for path in (ROOT / "trainer").iterdir() if path.is_file()}
    assert len(files - {"__init__.py", "README_zh.md"}) <= 10  # the recipe is one file, in two languages


def test_a_step_fits_on_a_screen():
    tree = ast.parse((ROOT / "trainer" / "loop.py").read_text(encoding="utf-8"))
    [step] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    docstring = step.body[0]
    assert step.end_lineno - docstring.end_lineno <= 45


def lines_of(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_the_path_from_a_row_to_the_step_is_as_the_readme_says():
    section = README.split("## Reading order")[1].split("\n## ")[0]
    path = re.findall(r"^\d+\. \[`([\w/]+\.py)`\]\(\1\), (\d+) lines", section, re.MULTILINE)
    assert 5 <= len(path) <= PATH_FILES
    assert [(name, int(lines)) for name, lines in path] == [(name, lines_of(name)) for name, _ in path]
    assert sum(lines_of(name) for name, _ in path) <= PATH_LINES


def test_the_readmes_tree_names_every_file_with_its_lines():
    tree = README.split("## Where things are")[1].split("```")[1]
    folder, found = "", {}
    for line in tree.splitlines():
        match = re.match(r"( *)([\w./]+)(?: +(\d+))?", line)
        if match and match[2].endswith("/") and not match[1]:
            folder = match[2]
        elif match and match[3]:
            found[folder * bool(match[1]) + match[2]] = int(match[3])
    assert found == {name: lines_of(name) for name in found}
    shown = {path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py"}
    assert found.keys() == shown


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
