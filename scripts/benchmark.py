"""Measure training beside a plain loop, the loader, and generation beside transformers.

    python scripts/benchmark.py                                  everything but gpu
    python scripts/benchmark.py pretrain sft --device cpu --json benchmark.json
    python scripts/benchmark.py gpu                              some eight minutes of a GPU: what its steps take
    python scripts/benchmark.py checks                           its steps: no syncs, same losses, same bits, ...

The data are synthetic, in the shape of the published set: 128 x 128 JPEG images, captions of 20 to 80 tokens (pretrain)
or dialogues of 200 to 1500 (sft); tower and decoder have their full size, and random weights. "useful" is the share of
tokens that are no padding, "product" that of a matrix product's GFLOP/s, which stands at the end (bfloat16 on CUDA).
"""

import copy
import itertools
import json
import multiprocessing
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median_low

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tqdm import tqdm

from common.cli import ArgumentParser, file_path, number
from common.errors import UsageError, first_line, run_script
from common.files import write_atomically
from dataset.file_kinds import quiet_libraries
from scripts.bench import speed
from trainer.setup import be_deterministic
from trainer.support.processes import cores, pick_device

CHECKED = 4  # steps


class Few(speed.Steps):
    """A few steps over the same batches, without clipping: the norm would carry one weight's difference into all."""

    def __init__(self, args: Namespace, how: str = ""):
        dtype = torch.float32 if args.device == "cpu" else None
        super().__init__(Namespace(**vars(args) | {"num_workers": 0}), how, dtype, grad_clip=0.0)
        self.few = list(itertools.islice(self.batches(), CHECKED))

    def losses(self, numbers: Iterable[int]) -> list[float]:
        return [float(loss / learned) for loss, learned in [self.take(self.few[number]) for number in numbers]]

    def require_weights_of(self, others: "Few"):
        theirs = others.model.state_dict()
        different = [name for name, tensor in self.model.state_dict().items() if not torch.equal(tensor, theirs[name])]
        if different:
            raise RuntimeError(f"{len(different)} tensors differ, {different[0]} first")


def compare_losses_with_cpu(args: Namespace) -> str:
    on_cpu = Namespace(**vars(args) | {"device": "cpu"})  # in float32
    ours, expected = Few(args).losses(range(CHECKED)), Few(on_cpu).losses(range(CHECKED))
    differences = [abs(a - b) / b for a, b in zip(ours, expected, strict=True)]
    if not all(difference < 0.01 for difference in differences):  # the error of the device's precision; NaN fails
        raise RuntimeError(f"losses differ: {ours}, on the CPU {expected}")
    return f"they differ by {max(differences):.1e} at most"


def compile_once(args: Namespace) -> str:
    steps = Few(args, "compiled")
    with torch.compiler.set_stance("fail_on_recompile"):
        steps.losses(range(CHECKED))
    return f"{CHECKED} steps"


def step_without_sync(args: Namespace) -> str:
    steps = Few(args)
    steps.take(steps.few[0])
    if steps.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")  # for the rest of this process
    for batch in steps.few:
        steps.take(batch)
    return f"{CHECKED} steps" + ("" if steps.device.type == "cuda" else " (only CUDA can tell)")


def resume_bit_by_bit(args: Namespace) -> str:
    be_deterministic()
    straight, first, second = (Few(args) for _ in range(3))
    straight.losses(range(CHECKED))
    first.losses(range(CHECKED // 2))
    second.model.load_state_dict(first.model.state_dict())
    second.context.load_state_dict(copy.deepcopy(first.context.state_dict()))
    second.losses(range(CHECKED // 2, CHECKED))
    second.require_weights_of(straight)
    return "the same weights"


def replay_graphs(args: Namespace) -> str:
    be_deterministic()
    graphs, launched = (Few(args, "captured") for _ in range(2))
    launched.step.stream = None  # without a stream to capture on, nothing is captured
    for steps in (graphs, launched):
        steps.losses([*range(CHECKED)] * 3)
    graphs.require_weights_of(launched)
    return f"{sum(graph is not None for graph in graphs.step.graphs.values())} graphs, the same weights"


CHECKS = {
    "losses equal the CPU's": compare_losses_with_cpu,
    "no recompilation after the warm-up": compile_once,
    "no sync in a step": step_without_sync,
    "a resumed run is bit-identical": resume_bit_by_bit,
    "a captured step is the step": replay_graphs,
}


def check(args: Namespace, line: str) -> dict:
    return {"found": CHECKS[line](speed.settings_of(args, "sft"))}


# Lines, and the function that takes the flags and a line, and returns the line's figures.
MEASUREMENTS = {
    "pretrain": (speed.TRAINING_LINES, partial(speed.measure_training, "pretrain")),
    "sft": (speed.TRAINING_LINES, partial(speed.measure_training, "sft")),
    "data": (speed.LOADER_LINES, speed.measure_loader),
    "generate": (speed.GENERATE_LINES, speed.measure_generate),
    "checks": (CHECKS, check),
    "gpu": (speed.GPU_LINES, speed.measure_gpu),
}


def measure(what: str, args: Namespace) -> dict[str, dict]:
    """Prints and returns each line's medians of all rounds, or {"failed": why}."""
    lines, function = MEASUREMENTS[what]
    lines = [line for line in lines if not (args.device.startswith("cuda") and "int8" in line)]
    # The lines take turns, so that another program slows all of them alike.
    rows, table = {line: [] for line in lines}, {}
    for line in tqdm(lines * (1 if what in ("checks", "gpu") else args.repeats), leave=False):
        try:
            rows[line].append(alone(function, args, line))
        except (RuntimeError, OSError, ValueError, UsageError) as error:  # a crash, too little memory: RuntimeError
            table[line] = {"failed": first_line(error)}
    for line in lines:
        if line not in table:
            table[line] = {name: median_low(row[name] for row in rows[line]) for name in rows[line][0]}
            if "samples/s" in table.get("plain", {}):
                table[line]["x plain"] = table[line]["samples/s"] / table["plain"]["samples/s"]
    columns = next((row for row in table.values() if "failed" not in row), {})
    print(f"{what:<38}" + "".join(f"{name:>12}" for name in columns))
    for line in lines:
        cells = [f"{value:>12,.2f}" if isinstance(value, float) else f"{value:>12}" for value in table[line].values()]
        failed = "failed" in table[line]
        print(f"  {line:<36}" + (f"  failed: {table[line]['failed']}" if failed else "".join(cells)), flush=True)
    return table


def alone(function: Callable, *arguments):
    """Calls a function in a fresh process, so that its peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=quiet_libraries, initargs=(False,)) as pool:
        return pool.submit(function, *arguments).result()


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("what", nargs="*", choices=["all", *MEASUREMENTS], default="all", help="what to measure; all does without gpu")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--hidden_size", type=int, choices=tuple(speed.LAYERS), default=512, help="512: 8 layers, 768: 16")
    add("--batch_size", type=number(int, 1), help="samples a step (default: 16 in pretraining, 4 in SFT)")
    add("--max_seq_len", type=number(int, 1), help="what the plain loop pads to (default: the stage's)")
    add("--steps", type=number(int, 1), help="timed steps of each line (default: 3; 50 on CUDA)")
    add("--repeats", type=number(int, 1), default=3, help="rounds through all lines; medians are shown")
    add("--num_workers", type=number(int, 0), help="of the loader (default: a core each, on CUDA less 2; at most 16)")
    add("--json", type=file_path, help="write the figures there")
    args = parser.parse_args(argv)
    args.device = str(pick_device(args.device, 0, 1))
    is_cuda = args.device.startswith("cuda")
    args.steps = args.steps or (50 if is_cuda else 3)
    if args.num_workers is None:
        args.num_workers = min(16, max(1, cores() - 2 * is_cuda))
    if "all" in args.what:
        args.what = [what for what in MEASUREMENTS if what != "gpu"]
    return args


def main():
    args = parse_arguments()
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "json")}
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{cores()} CPU cores"
    print(f"{platform.machine()}, {device}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
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
