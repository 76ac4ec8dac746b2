"""Measure training beside a plain loop, the loader, and generation beside transformers.

    python scripts/benchmark.py                                  everything but gpu
    python scripts/benchmark.py pretrain sft --device cpu --json benchmark.json
    python scripts/benchmark.py gpu                              some six minutes of a GPU: what its steps take, and why
    python scripts/benchmark.py checks                           its steps: no syncs, same losses, same bits, ...
    python scripts/benchmark.py data --num_workers 16
    python scripts/benchmark.py generate

The data are synthetic, in the shape of the published set: 128 x 128 JPEG images, captions of 20 to 80 tokens (pretrain)
or dialogues of 200 to 1500 (sft). Tower and decoder have their full size and random weights, which do not affect speed.
Lines take turns, and the whole round is repeated, every measurement in a process of its own. "useful" tokens are not
padding, "product" is the share of a matrix product's GFLOP/s, which stands at the end (bfloat16 on CUDA, else float32).
"""

import json
import platform
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from common.cli import ArgumentParser, HelpFormatter, file_path, number
from common.errors import UsageError, run_script
from common.files import write_atomically
from scripts.bench.checks import CHECKS, check
from scripts.bench.generation import GENERATE_LINES, measure_generate
from scripts.bench.gpu import GPU_LINES, measure_gpu
from scripts.bench.measuring import measure_rounds, print_table
from scripts.bench.synthetic import LAYERS
from scripts.bench.training import LOADER_LINES, TRAINING_LINES, measure_loader, measure_training
from trainer.support.processes import cores, pick_device

# Lines, and the function that takes the flags and a line, and returns the line's figures.
MEASUREMENTS = {
    "pretrain": (TRAINING_LINES, partial(measure_training, "pretrain")),
    "sft": (TRAINING_LINES, partial(measure_training, "sft")),
    "data": (LOADER_LINES, measure_loader),
    "generate": (GENERATE_LINES, measure_generate),
    "checks": (CHECKS, check),
    "gpu": (GPU_LINES, measure_gpu),
}


def measure(what: str, args: Namespace) -> dict[str, dict]:
    """Takes a measurement, prints its table, and returns the figures of each line."""
    lines, function = MEASUREMENTS[what]
    lines = [line for line in lines if not (args.device.startswith("cuda") and "int8" in line)]
    table = measure_rounds(function, lines, args, 1 if what in ("checks", "gpu") else args.repeats)
    plain = table.get("plain", {}).get("samples/s")
    for row in table.values():
        if plain and "failed" not in row:
            row["x plain"] = row["samples/s"] / plain
    print_table(what, table)
    return table


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", choices=["all", *MEASUREMENTS], default="all", help="what to measure; all does without gpu")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--hidden_size", type=int, choices=tuple(LAYERS), default=512, help="512: 8 layers, 768: 16")
    add("--batch_size", type=number(int, 1), help="samples a step (default: 16 in pretraining, 4 in SFT)")
    add("--max_seq_len", type=number(int, 1), help="what the plain loop pads to (default: the stage's)")
    add("--steps", type=number(int, 1), help="timed steps of each line (default: 3; 50 on CUDA)")
    add("--repeats", type=number(int, 1), default=3, help="rounds through all lines; medians are shown")
    what = "of the loader (default: one per core, two fewer on CUDA, at most 16)"
    add("--num_workers", type=number(int, 0), help=what)
    add("--json", type=file_path, help="write the figures there")
    args = parser.parse_args(argv)
    args.device = str(pick_device(args.device, 0, 1))
    is_cuda = args.device.startswith("cuda")
    args.steps = args.steps or (50 if is_cuda else 3)
    if args.num_workers is None:
        args.num_workers = min(16, max(1, cores() - 2 * is_cuda))
    args.what = [what for what in MEASUREMENTS if what != "gpu"] if "all" in args.what else args.what
    return args


def main():
    args = parse_arguments()
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "json")}
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{cores()} CPU cores"
    print(
        f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n" + ", ".join(f"{name} {value}" for name, value in settings.items())
    )
    results = {"settings": settings}
    for what in args.what:
        results[what] = measure(what, args)
        if args.json:
            write_atomically(args.json, lambda file: file.write(json.dumps(results, indent=2).encode() + b"\n"))
    failed = sum("failed" in row for what in args.what for row in results[what].values())
    if failed:
        raise UsageError(f"{failed} line(s) failed")


if __name__ == "__main__":
    run_script(main)
