"""How fast training, the data loader and generation are, technique by technique, against a plain baseline.

    python scripts/benchmark.py                                  all three, on the best device there is
    python scripts/benchmark.py train --stage sft --batch_size 4
    python scripts/benchmark.py train --device cpu --hidden_size 512 --batch_size 16 --json benchmark.json --svg benchmark.svg
    python scripts/benchmark.py data --num_workers 16
    python scripts/benchmark.py generate

The data are made up in the published data's shape: 128 x 128 JPEG pictures, captions of 20 to 80 tokens (pretrain) or dialogues of 200
to 1500 (sft). Tower and decoder are of full size with random weights: speed does not depend on them. Each line of the table is one more
technique switched on, each in a process of its own (so that its peak memory is its own), all in turn and the whole round repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import (
    UsageError,  # noqa: E402
    run_script,  # noqa: E402
)
from scripts.benchmark_report import print_generate, print_loader, print_train, write_svg  # noqa: E402
from scripts.benchmark_steps import TECHNIQUES, measure  # noqa: E402
from trainer.support.processes import cores, pick_device  # noqa: E402


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help="train, data, generate (default: all three)")
    add("--stage", choices=("pretrain", "sft"), default="pretrain", help="which stage's step (default: %(default)s)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add(
        "--hidden_size", type=int, choices=(512, 768), default=512, help="512: 8 layers, 768: 16 (default: %(default)s)"
    )
    add("--batch_size", type=int, default=16, help="samples a step (default: %(default)s)")
    add("--max_seq_len", type=int, help="what the baseline pads to (default: 640 in pretraining, 1536 in SFT)")
    add("--steps", type=int, default=3, help="timed steps of each measurement (default: %(default)s)")
    add("--repeats", type=int, default=3, help="rounds through all lines; medians are shown (default: %(default)s)")
    add("--num_workers", type=int, default=min(16, cores()), help="of the loader (default: one per core)")
    add("--json", type=Path, help="write the figures there")
    add("--svg", type=Path, help="draw the table there")
    add("--one", help=argparse.SUPPRESS)  # a single measurement, printed as JSON: what this script starts itself
    args = parser.parse_args(argv)
    unknown = set(args.what) - {"train", "data", "generate"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from train, data, generate")
    args.what = args.what or ["train", "data", "generate"]
    args.device = str(pick_device(args.device, 0, 1))
    args.max_seq_len = args.max_seq_len or (640 if args.stage == "pretrain" else 1536)
    return args


def measure_in_process(args, name: str) -> dict:
    """One measurement in a fresh process."""
    flags = [
        *("--one", name, "--stage", args.stage, "--device", args.device, "--hidden_size", str(args.hidden_size)),
        *("--batch_size", str(args.batch_size), "--max_seq_len", str(args.max_seq_len), "--steps", str(args.steps)),
        *("--num_workers", str(args.num_workers)),
    ]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode != 0:
        raise UsageError(f"measuring {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_rounds(args, names: list[str]) -> dict[str, dict]:
    """Each measurement `repeats` times, in turn; medians of every figure."""
    rounds = []
    for number in range(args.repeats):
        figures = {}
        for name in names:
            print(f"\rround {number + 1} of {args.repeats}: {name:<40}", end="", file=sys.stderr, flush=True)
            figures[name] = measure_in_process(args, name)
        rounds.append(figures)
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return {
        name: {key: statistics.median(figures[name][key] for figures in rounds) for key in rounds[0][name]}
        for name in names
    }


def main():
    args = parse_arguments()
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    results = {"settings": {key: value for key, value in vars(args).items() if key not in ("json", "svg", "one")}}
    if "train" in args.what:
        names = [name for name in TECHNIQUES if args.device.startswith("cuda") or not TECHNIQUES[name].cuda_only]
        results["train"] = measure_rounds(args, names)
        print_train(args, results["train"])
        if args.svg:
            write_svg(args, results["train"])
    if "data" in args.what:
        results["data"] = measure_rounds(args, ["loader, plain", "loader"])
        print_loader(args, results["data"])
    if "generate" in args.what:
        results["generate"] = measure_rounds(args, ["generate"])["generate"]
        print_generate(args, results["generate"])
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
