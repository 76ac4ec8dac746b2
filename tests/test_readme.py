"""The README's commands name scripts and flags that exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checks import check_llama_cpp, check_looking

import eval_vlm
from dataset import check
from scripts import download, export, make_dataset, publish, web_demo_vlm
from trainer import train_pretrain_vlm, train_sft_vlm, train_tower
from trainer.flags import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TORCHRUN_FLAGS_WITH_VALUE = {"--max-restarts", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}


def commands() -> list[str]:
    """Every `python ...` and `torchrun ...` of the indented blocks."""
    lines = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    return [
        part.split("  #")[0].strip()
        for line in lines
        for part in line.split(" && ")
        if re.match(r"python (?!-m venv)|torchrun", part)
    ]


def script_and_flags(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)[1:]
    while words[0].startswith("-"):
        del words[: 2 if words[0] in TORCHRUN_FLAGS_WITH_VALUE else 1]
    return words[0], words[1:]


PARSERS = {
    "dataset.check": check.parse_arguments,
    "trainer/train_pretrain_vlm.py": build_parser(train_pretrain_vlm.STAGE, "").parse_args,
    "trainer/train_sft_vlm.py": build_parser(train_sft_vlm.STAGE, "").parse_args,
    "trainer/train_tower.py": train_tower.parse_arguments,
    "eval_vlm.py": eval_vlm.parse_arguments,
    "tests/checks/check_llama_cpp.py": check_llama_cpp.parse_arguments,
    "tests/checks/check_looking.py": check_looking.parse_arguments,
    "scripts/download.py": download.parse_args,
    "scripts/export.py": export.parse_arguments,
    "scripts/make_dataset.py": make_dataset.parse_arguments,
    "scripts/publish.py": publish.parse_arguments,
    "scripts/web_demo_vlm.py": web_demo_vlm.parse_arguments,
}


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command):
    script, flags = script_and_flags(command)
    if script == "pytest":
        return
    if script == "lmms_eval":  # another project's command, with our tasks
        values = dict(zip(flags[::2], flags[1::2], strict=True))
        for task in values["--tasks"].split(","):
            assert (ROOT / values["--include_path"] / f"{task}.yaml").is_file()
        return
    assert script in PARSERS, f"no test knows the flags of {script}"
    PARSERS[script](flags)


def test_ci_finds_the_test_command():
    block = README.split("<!-- test command -->")[1].split("<!-- end -->")[0]
    commands = [line.strip() for line in block.splitlines() if line.strip()]
    assert commands == ["pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_own_photos_are_learned_and_described_as_the_readme_says(tmp_path):
    """Its three commands, as written but for the folder that is written to."""
    lines = [line.strip() for line in section("Your own photos in ten minutes").splitlines() if line.startswith("    ")]
    assert lines[0] in (ROOT / "dataset/example/photos.jsonl").read_text(encoding="utf-8").splitlines()
    out = []
    for command in lines[1:]:
        words = shlex.split(command)
        save_dir = ["--save_dir", str(tmp_path)] if "dataset.check" not in words else []
        done = subprocess.run(
            [sys.executable, *words[1:], *save_dir], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        out.append(done.stdout)
    assert "Training would start with this file" in out[0]
    assert "your data, learned by the small built-in language model" in out[1]
    assert "8 of 8 pictures that were trained on are described word for word" in out[1]
    rows = [json.loads(line) for line in (ROOT / "dataset/example/photos.jsonl").read_text().splitlines()]
    for row in rows:
        assert f"\n{row['conversations'][1]['content']}\n" in out[2]
