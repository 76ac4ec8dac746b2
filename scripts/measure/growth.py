"""Measures what grows with the work: start-up, memory and a step's time, by rows, processes, width and pictures."""

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from scripts.check_parquet import write_published_form
from scripts.measure import made_up
from scripts.measure.made_up import load_model
from scripts.measure.memory import peak_memory

# Each line changes one thing of the second one.
BASE = {"rows": 100_000, "processes": 1, "hidden_size": 512, "pictures": 1}
GROWTH_LINES = {
    "10,000 rows": {"rows": 10_000},
    "100,000 rows": {},
    "1,000,000 rows": {"rows": 1_000_000},
    "100,000 rows, 2 processes": {"processes": 2},
    "100,000 rows, hidden_size 768": {"hidden_size": 768},
    "100,000 rows, 2 pictures each": {"pictures": 2},
    "100,000 rows, 4 pictures each": {"pictures": 4},
    "100,000 rows, 8 pictures each": {"pictures": 8},
}
LONGEST_SAMPLE = 2048  # tokens: eight pictures and a question
STEP = re.compile(r"epoch +\d+ +step +(\d+)/")


def measure_growth(args: Namespace, name: str) -> dict:
    """Starts fine-tuning twice on rows of the published form, and stops it after a few steps.

    Returns:
        Seconds until the first step's end, with nothing and with everything in the cache; seconds of a step; and the
        second start's peak memory, with mapped files and without.
    """
    line = Namespace(**BASE | GROWTH_LINES[name])
    settings = Namespace(**vars(args) | {"stage": "sft", "hidden_size": line.hidden_size})
    with tempfile.TemporaryDirectory(prefix="minimind-v-") as folder:
        data, weights = Path(folder) / "rows.parquet", Path(folder) / f"llm_{line.hidden_size}.pth"
        write_published_form(data, line.rows, per_row=line.pictures)
        model = load_model(settings)
        torch.save({key: value for key, value in model.state_dict().items() if "vision_encoder" not in key}, weights)
        command = [sys.executable, *launcher(line.processes), str(ROOT / "trainer" / "train_sft_vlm.py")]
        command += ["--data_path", data, "--from_weight", weights]
        command += ["--vision_model_path", made_up.FOLDER / "tower", "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
        command += ["--cache_vision", "off", "--eval_data", "none", "--ignore_high_loss", "--log_interval", "1"]
        command += ["--max_seq_len", LONGEST_SAMPLE, "--batch_size", args.batch_size, "--device", args.device]
        first, again = (
            run_until(
                [*map(str, command), "--save_dir", f"{folder}/out_{start}"], 1 + args.steps, Path(folder) / "cache"
            )
            for start in ("first", "again")
        )
    return {"first s": first["start s"]} | again


def launcher(processes: int) -> list[str]:
    return [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run_until(command: list[str], step: int, cache: Path) -> dict:
    """Runs a training script until a step has been logged; returns its times and its memory."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    started, ends, printed = time.perf_counter(), {}, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process, peak_memory(process.pid) as peak:
        for line in process.stdout:
            printed.append(line)
            if found := STEP.match(line):
                ends[int(found[1])] = time.perf_counter() - started
            if step in ends:
                process.terminate()
                process.communicate()
                break
    if step not in ends:
        raise RuntimeError(f"training ended before step {step}: " + "".join(printed[-20:]))
    return {"start s": ends[1], "step s": (ends[step] - ends[1]) / (step - 1)} | peak
