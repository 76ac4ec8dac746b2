"""The scripts that made the built-in models run, and write what training loads."""

import os
import subprocess
import sys
from pathlib import Path

from common.paths import ROOT
from model.model_vlm import load_vision_tower
from model.weights import read_weights


def build(script: str, out_dir: Path) -> str:
    flags = ["--steps", "1", "--batch_size", "2", "--threads", "1", "--out_dir", str(out_dir)]
    command = [sys.executable, str(ROOT / "scripts" / "builtin" / script), *flags]
    done = subprocess.run(
        command, cwd=out_dir.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_tower(tmp_path):
    assert "held-out scenes" in build("build_tower.py", tmp_path / "tower")
    built, shipped = (load_vision_tower(path) for path in (tmp_path / "tower", ROOT / "model" / "builtin" / "tower"))
    assert built.config.hidden_size == shipped.config.hidden_size


def test_build_llm(tmp_path):
    assert "held-out scenes" in build("build_llm.py", tmp_path / "llm")
    built, shipped = (read_weights(path / "llm_128.pth") for path in (tmp_path / "llm", ROOT / "model" / "builtin"))
    assert built.tensors.keys() == shipped.tensors.keys()
    for weights in (built, shipped):
        assert weights.sidecar["assets"] == "built-in"
        assert weights.sidecar["tokenizer_sha256"] == shipped.sidecar["tokenizer_sha256"]


def test_the_built_in_weights_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "model" / "builtin").rglob("*") if path.is_file()) < 10_000_000
