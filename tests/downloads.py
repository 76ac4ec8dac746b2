"""Small published files for the stand-ins, and scripts/download.py run as a process against them."""

import os
import subprocess
import sys
from pathlib import Path

from common.paths import ROOT

TOWER, LLM = "models/openai/clip-vit-base-patch16", "models/jingyaogong/MiniMind2-V-PyTorch"
TOKENIZER, DATA = "models/jingyaogong/MiniMind2-V", "datasets/jingyaogong/minimind-v_dataset"
WEIGHTS = bytes(range(256)) * 1200  # 307,200 bytes: enough for several reads of a socket
TOWER_FOLDER = "model/vision_model/clip-vit-base-patch16"


def repos() -> dict[str, dict[str, bytes]]:
    """The four repositories with a few bytes in each file, and files that nobody asked for."""
    return {
        TOWER: {
            "config.json": b"{}",
            "preprocessor_config.json": b'{"size": 224}',
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"bin",
            "flax_model.msgpack": b"flax",
            "tokenizer.json": b"not this one",
        },
        LLM: {"llm_512.pth": WEIGHTS[::-1], "llm_768.pth": b"768", "sft_vlm_512.pth": b"other"},
        TOKENIZER: {"tokenizer.json": b'{"v": 6400}', "tokenizer_config.json": b"{ }", "model.safetensors": b"x"},
        DATA: {
            "README.md": b"read me",
            "pretrain_i2t.parquet": b"PAR1" + WEIGHTS,
            "pretrain_data.parquet": b"an older form",
            "sft_data.parquet": b"PAR1",
        },
    }


def command(endpoint: str, dest: Path, *arguments: str) -> dict:
    """What to give to subprocess: the real script, from a folder that is not the project's."""
    quiet = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(dest.parent / "hf"), "HF_HUB_OFFLINE": "0"}
    hub["MODELSCOPE_ENDPOINT"] = endpoint
    environment = {**quiet, **hub, "HF_HUB_DOWNLOAD_TIMEOUT": "40"}  # seconds: the stand-in may have to wait for a core
    return {
        "args": [sys.executable, str(ROOT / "scripts" / "download.py"), "--dest", str(dest), *arguments],
        "env": environment,
        "cwd": dest.parent,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def tree(folder: Path) -> dict[str, bytes]:
    """All files under a folder with their contents."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
