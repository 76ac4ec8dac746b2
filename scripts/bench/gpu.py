"""Five minutes of a GPU: its ceiling, steps over batches that lie on it, steps fed by the loader, the loader alone.

Every line is printed as soon as it is known, so that a run that is cut off leaves what it found.
"""

import gc
import itertools
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.bench.measuring import timed
from scripts.bench.steps import Steps
from scripts.bench.synthetic import STAGES
from scripts.bench.training import load_batches_alone, matrix_product_flops, model_flops, peak_bytes, plain_loop

# Batches that fill the GPU, in every way; and those of a run without --batch_size, which the host's launches bound.
LARGE, SMALL = {"pretrain": 256, "sft": 64}, {"pretrain": 16, "sft": 4}
WAYS = ("ordinary", "captured", "compiled", "compiled, captured")
ON_DEVICE, TIMED, FED = 12, 48, 300  # batches that lie on the GPU, and steps
PEAK = 790e12  # FLOP/s of an H100's bfloat16 matrix products, as measured
# Kinds of kernels by parts of their names, the first that fits.
KERNELS = {
    "attention": ("flash", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90_"),
    "fused": ("triton",),
    "copies": ("memcpy", "memset"),
    "pointwise": ("",),
}


def measure_gpu(args):
    """Prints large batches in every way, with the kernels of a step and a plain loop; small ones; the loader alone."""
    started, device = time.perf_counter(), torch.device(args.device)

    def report(text: str):
        print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)

    report(f"a matrix product makes {matrix_product_flops(device) / 1e12:.0f} TFLOP/s")
    for sizes, ways in ((LARGE, ("plain", *WAYS)), (SMALL, WAYS[::3])):
        for (stage, batch_size), way in itertools.product(sizes.items(), ways):
            longest = STAGES[stage].defaults["max_seq_len"]
            settings = vars(args) | {"stage": stage, "batch_size": batch_size, "max_seq_len": longest}
            free(device)
            try:
                measure_way(Namespace(**settings), way, report, is_large=sizes is LARGE)
            except (RuntimeError, OSError) as error:  # too little memory, no compiler: the others are measured
                report(f"{stage} of {batch_size}, {way}: failed: {str(error).splitlines()[0]}")
    for workers in sorted({args.num_workers, args.num_workers // 2}, reverse=True):
        settings = vars(args) | {"stage": "pretrain", "batch_size": LARGE["pretrain"], "num_workers": workers}
        settings["max_seq_len"] = STAGES["pretrain"].defaults["max_seq_len"]
        rate = load_batches_alone(Namespace(**settings), "loader", FED // 3)
        report(f"the loader alone, {workers} workers: {rate:,.0f} images/s")


def free(device: torch.device):
    """Frees what the line before held: models refer to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()


def measure_way(args, way: str, report: Callable, is_large: bool):
    """Reports steps taken one way."""
    device, name = torch.device(args.device), f"{args.stage} of {args.batch_size}, {way}"
    if way == "plain":
        fed, take = plain_loop(args)
    else:
        seconds, steps = timed(device, Steps, args, way)
        fed, take = steps.batches(), steps.take
        name += f" (compiled in {seconds:.0f} s)" if "compiled" in way else ""
    kept = list(itertools.islice(fed, ON_DEVICE))
    take_all(take, kept * 2)  # a shape is captured at its second batch
    line = measure_steps(args, take, itertools.islice(itertools.cycle(kept), TIMED))
    report(f"{name:<44}{line} {peak_bytes(device) / 1e9:5.1f} GB")
    if is_large and device.type == "cuda" and way != "plain":
        report(f"      kernels a step: {count_kernels(take, kept)}")
    if is_large and way == WAYS[-1]:
        take_all(take, itertools.islice(fed, 5 * args.num_workers))  # what the loader had ready
        report(f"{'      fed by the loader':<44}{measure_steps(args, take, itertools.islice(fed, FED))}")


def take_all(take: Callable, batches: Iterable[dict]) -> Counter:
    """Takes the steps without a sync between them; returns what was computed, as if a batch's rows were alike."""
    total = Counter()
    for batch in batches:
        samples, tokens = len(batch["input_ids"]), batch["tokens"]
        total.update(samples=samples, useful=tokens, learned=batch["units"], squares=tokens**2 // samples)
        take(batch)
    return total


def measure_steps(args, take: Callable, batches: Iterable[dict]) -> str:
    seconds, total = timed(torch.device(args.device), take_all, take, batches)
    flops = model_flops(args, total, False) / seconds
    return f"{total['samples'] / seconds:8,.0f} samples/s {flops / 1e12:4.0f} TFLOP/s ({flops / PEAK:3.0%})"


def count_kernels(take: Callable, batches: list[dict]) -> str:
    """Returns the time and number of a step's kernels by kind."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        take_all(take, batches)
        torch.cuda.synchronize()
    spent, numbers = Counter(), Counter()
    for event in profiled.key_averages():
        kind = next(kind for kind, parts in KERNELS.items() if any(part in event.key.lower() for part in parts))
        spent[kind] += event.self_device_time_total / 1e3 / len(batches)
        numbers[kind] += event.count / len(batches)
    return ", ".join(f"{kind} {ms:.1f} ms ({numbers[kind]:.0f})" for kind, ms in spent.most_common())
