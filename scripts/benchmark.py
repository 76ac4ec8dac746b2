"""Measure training, the loader, answering and several processes, technique by technique, against plain baselines.

    python scripts/benchmark.py                                  everything but growth and gpu
    python scripts/benchmark.py gpu                              five minutes of a GPU: what its steps take, and why
    python scripts/benchmark.py checks                           its steps: no syncs, same losses, same bits, ...
    python scripts/benchmark.py pretrain sft --device cpu --json benchmark.json
    python scripts/benchmark.py data --num_workers 16
    python scripts/benchmark.py generate folder
    python scripts/benchmark.py growth                           start-up, memory, steps: 10,000 to 1,000,000 rows
    python scripts/benchmark.py cost                             hours on GPUs that were not at hand, on paper

The data are made up, in the shape of the published set: 128 x 128 JPEG images, captions of 20 to 80 tokens (pretrain)
or dialogues of 200 to 1500 (sft). Tower and decoder have their full size and random weights, which do not affect speed.
In training, each line of a table adds one technique to the line above it. The lines take turns, and the whole round is
repeated, every measurement in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from scripts.measure.checks import CHECKS, check  # noqa: E402
from scripts.measure.cost import COST_LINES, GPUS, estimate_cost  # noqa: E402
from scripts.measure.generation import FOLDER_LINES, GENERATE_LINES, measure_folder, measure_generate  # noqa: E402
from scripts.measure.gpu import Report, measure_gpu  # noqa: E402
from scripts.measure.growth import GROWTH_LINES, measure_growth  # noqa: E402
from scripts.measure.made_up import LAYERS, STAGES  # noqa: E402
from scripts.measure.training import (  # noqa: E402
    LOADER_LINES,
    NOT_COMPILED,
    TRAINING_LINES,
    measure_largest_batch,
    measure_loader,
    measure_training,
)
from trainer.support.processes import cores, cpu_has_bfloat16, pick_device  # noqa: E402

MEASUREMENTS = {
    "pretrain": (measure_training, TRAINING_LINES),
    "sft": (measure_training, TRAINING_LINES),
    "data": (measure_loader, LOADER_LINES),
    "generate": (measure_generate, tuple(GENERATE_LINES)),
    "folder": (measure_folder, tuple(FOLDER_LINES)),
    "batch": (measure_largest_batch, tuple(STAGES)),
    "checks": (check, tuple(CHECKS)),
    "cost": (estimate_cost, tuple(COST_LINES)),
    "growth": (measure_growth, tuple(GROWTH_LINES)),
}
ONCE = ("batch", "checks", "cost", "growth")
NAMED_ONLY = ("growth",)  # it takes half an hour
BATCH_SIZES = {"pretrain": 16, "sft": 4}
# The columns of the tables, those that a measurement has.
FORMATS = {"samples": ",.0f", "samples/s": ",.2f", "images/s": ",.0f", "tokens/s": ",.0f", "pictures/s": ",.2f"}
FORMATS |= {"x plain": ".2f", "x Llama": ".2f", "one by one": ",.2f", "x one": ".2f"}
FORMATS |= {"useful": ".1%", "product": ".0%", "waits": ".0%"}
FORMATS |= {"s": ".2f", "MB": ",.0f", "link s": ".2f", "waited s": ".2f", "hidden": ".0%", "GB": ".2f"}
FORMATS |= {"first s": ".0f", "start s": ".1f", "step s": ".2f", "peak GB": ".2f", "own GB": ".2f"}
FORMATS |= {"GFLOP": ",.0f"} | {f"h, {gpu}": ",.2f" for gpu in GPUS} | {"cores": ".0f"}


def lines_of(what: str, args: Namespace) -> list[str]:
    """Returns what is measured of one kind on this device."""
    is_cuda = args.device.startswith("cuda")
    if what == "batch" and not is_cuda:
        return []
    elsewhere = ["int8"] if is_cuda else [NOT_COMPILED] if cpu_has_bfloat16() else [NOT_COMPILED, "bfloat16"]
    return [name for name in MEASUREMENTS[what][1] if not any(part in name for part in elsewhere)]


def settings_of(what: str, name: str, args: Namespace) -> Namespace:
    """Returns the flags of one measurement, with the stage's batch size and length where none is given."""
    stage = next((stage for stage in (name, what) if stage in STAGES), None)
    stage = stage or ("sft" if what in ("checks", "growth") else "pretrain")
    batch_size, longest = (
        args.batch_size or BATCH_SIZES[stage],
        args.max_seq_len or STAGES[stage].defaults["max_seq_len"],
    )
    return Namespace(**vars(args) | {"stage": stage, "batch_size": batch_size, "max_seq_len": longest})


def measure_one(args: Namespace) -> dict:
    """Takes the measurement that --one names."""
    what, name = args.one.split("/", 1)
    return MEASUREMENTS[what][0](settings_of(what, name, args), name)


def measure_alone(one: str) -> dict:
    """Takes a measurement in a fresh process; {"failed": why} if it fails."""
    done = subprocess.run([sys.executable, *sys.argv, "--one", one], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}


def measure_rounds(what: str, args: Namespace) -> dict[str, dict]:
    """Takes each measurement of a kind `repeats` times, in turn.

    Returns:
        The medians of every figure, by line; {"failed": why} for a line that failed.
    """
    names = lines_of(what, args)
    rounds = {name: [] for name in names}
    for name in (bar := tqdm(names * (1 if what in ONCE else args.repeats), leave=False)):
        bar.set_description(f"{what}: {name}")
        rounds[name].append(measure_alone(f"{what}/{name}"))
    medians = {}
    for name, rows in rounds.items():
        whole = next((row for row in rows if "failed" in row or "passed" in row), None)
        medians[name] = whole or {key: median(row[key] for row in rows) for key in rows[0]}
    plain = next(iter(medians.values()), {})
    if "plain" in next(iter(medians), "") and "failed" not in plain:
        speed = next(iter(plain))
        for row in medians.values():
            if speed in row:
                row["x plain"] = row[speed] / plain[speed]
    return medians


def print_table(what: str, results: dict[str, dict]):
    """Prints a line for each measurement, as wide as a terminal."""
    columns = {name: form for name, form in FORMATS.items() if any(name in row for row in results.values())}
    widths = {name: max(10, len(name) + 1) for name in columns}
    print(f"{what:<34}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for name, row in results.items():
        if "failed" in row:
            print(f"  {name:<32}  failed: {row['failed']}")
        elif "passed" in row:
            print(f"  {name:<36} {'yes' if row['passed'] else 'NO'}: {row['found']}")
        else:
            print(
                f"  {name:<32}"
                + "".join(f"{row[column]:>{max(10, len(column) + 1)}{form}}" for column, form in columns.items())
            )
    product = max((row.get("GFLOP/s", 0) for row in results.values()), default=0)
    if product:
        print(f"  product: of a matrix product's FLOP/s, here {product:,.0f} GFLOP/s; waits: for data")
        print("  (the matrix product is in bfloat16 on CUDA, in float32 elsewhere)")


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"gpu, {', '.join(MEASUREMENTS)} (default: all but gpu, growth)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--hidden_size", type=int, choices=tuple(LAYERS), default=512, help="512: 8 layers, 768: 16")
    add("--batch_size", type=int, help="samples a step (default: 16 in pretraining, 4 in SFT)")
    add("--max_seq_len", type=int, help="what the baseline pads to (default: the stage's)")
    add("--steps", type=int, default=3, help="timed steps of each measurement (default: 3)")
    add("--repeats", type=int, default=3, help="rounds through all lines; medians are shown (default: 3)")
    add("--num_workers", type=int, help="of the loader (default: one per core, two fewer on CUDA, at most 16)")
    add("--json", type=file_path, help="write the figures there")
    add("--one", help=argparse.SUPPRESS)  # a single measurement, printed as JSON: how this script runs itself
    args = parser.parse_args(argv)
    args.device = str(pick_device(args.device, 0, 1))
    if args.num_workers is None:
        args.num_workers = min(16, max(1, cores() - 2 * args.device.startswith("cuda")))
    args.what = args.what or [what for what in MEASUREMENTS if what not in NAMED_ONLY]
    unknown = set(args.what) - MEASUREMENTS.keys() - {"gpu"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from gpu, {', '.join(MEASUREMENTS)}")
    return args


def main():
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    if args.one:
        print(json.dumps(measure_one(args)))
        return
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "json", "one")}
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{cores()} CPU cores"
    print(
        f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n" + ", ".join(f"{name} {value}" for name, value in settings.items())
    )
    results, failed = {"settings": settings}, 0
    if "gpu" in args.what:
        measure_gpu(args, Report())
    for what in args.what:
        if what == "gpu" or not lines_of(what, args):
            continue
        started = time.perf_counter()
        results[what] = measure_rounds(what, args)
        print_table(what, results[what])
        print(f"  ({time.perf_counter() - started:.0f} s)\n", flush=True)
        failed += sum("failed" in row or row.get("passed") is False for row in results[what].values())
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise UsageError(f"{failed} line(s) failed")


if __name__ == "__main__":
    run_script(main)
