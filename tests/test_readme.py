"""The README's commands name scripts and flags that exist."""

import re
import shlex
from pathlib import Path

import pytest

import eval_vlm
from dataset import check
from scripts import download
from trainer import train_pretrain_vlm, train_sft_vlm
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
        if re.match(r"python|torchrun", part)
    ]


def script_and_flags(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)[1:]
    while words[0].startswith("-"):
        del words[: 2 if words[0] in TORCHRUN_FLAGS_WITH_VALUE else 1]
    return words[0], words[1:]


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command):
    script, flags = script_and_flags(command)
    if script == "pytest":
        return
    if script == "dataset.check":
        check.parse_arguments(flags)
        return
    assert (ROOT / script).is_file()
    stages = {
        "trainer/train_pretrain_vlm.py": train_pretrain_vlm.STAGE,
        "trainer/train_sft_vlm.py": train_sft_vlm.STAGE,
    }
    if script in stages:
        build_parser(stages[script], "").parse_args(flags)
    elif script == "eval_vlm.py":
        eval_vlm.parse_arguments(flags)
    elif script == "scripts/download.py":
        download.parse_args(flags)
    else:
        pytest.fail(f"no test knows the flags of {script}")


def test_ci_finds_the_test_command():
    block = README.split("<!-- test command -->")[1].split("<!-- end -->")[0]
    commands = [line.strip() for line in block.splitlines() if line.strip()]
    assert commands == ["pip install -r requirements.txt -r tests/requirements.txt", "python -m pytest"]
