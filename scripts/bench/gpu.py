"""Measures steps on a GPU in every way, over batches that lie on it and fed by the loader, and counts their kernels."""

import itertools
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.bench.synthetic import Steps, settings_of, timed
from scripts.bench.training import matrix_product_flops, model_flops, peak_bytes, plain_loop, take_all

WAYS = ("ordinary", "compiled, captured")
# Batches that fill the GPU; and those of a run without --batch_size, which the host's launches bound.
GPU_LINES = {
    f"{stage} of {size}, {way}": (stage, size, way)
    for (stage, size), ways in {
        ("sft", 64): WAYS,
        ("pretrain", 256): ("plain", *WAYS),
        ("pretrain", 16): WAYS,
    }.items()
    for way in ways
}
LARGE = 64  # from this batch size on, kernels are counted, and the fastest way is fed by the loader too
ON_DEVICE, TIMED, FED = 12, 48, 100  # batches that lie on the GPU, and steps
PEAK = 790e12  # FLOP/s of an H100's bfloat16 matrix products, as measured
# Kinds of kernels by parts of their names, the first that fits.
KERNELS = {
    "attention": ("flash", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90_"),
    "fused": ("triton",),
    "copies": ("memcpy", "memset"),
    "pointwise": ("",),
}


def measure_gpu(args: Namespace, line: str) -> dict:
    """Measures steps taken one way over batches that lie on the device, and what a matrix product makes (ceiling).

    Prints what it finds at once, so that a run that is cut off leaves it; of large batches also a step's kernels and
    the speed where the loader feeds it.
    """
    stage, batch_size, way = GPU_LINES[line]
    args, device, seconds = settings_of(args, stage, batch_size), torch.device(args.device), 0.0
    if way == "plain":
        fed, take = plain_loop(args)
    else:
        seconds, steps = timed(device, Steps, args, way)
        fed, take = steps.batches(), steps.take

    def measure_steps(name: str, batches: Iterable[dict]) -> dict:
        seconds, total = timed(device, take_all, take, batches)
        flops = model_flops(args, total, False) / seconds
        figures = {"samples/s": total["samples"] / seconds, "TFLOP/s": flops / 1e12, "of peak": flops / PEAK}
        print(f"{name}: " + ", ".join(f"{figure} {value:,.2f}" for figure, value in figures.items()), flush=True)
        return figures

    on_device = list(itertools.islice(fed, ON_DEVICE))
    take_all(take, on_device * 2)  # a shape is captured at its second batch
    figures = measure_steps(line, itertools.islice(itertools.cycle(on_device), TIMED))
    figures |= {"GB": peak_bytes(device) / 1e9, "set up in s": seconds}
    if batch_size >= LARGE and device.type == "cuda" and way != "plain":
        print(f"{line}, kernels a step: {count_kernels(take, on_device)}", flush=True)
    if batch_size >= LARGE and way == WAYS[-1]:
        take_all(take, itertools.islice(fed, 5 * args.num_workers))  # what the loader had ready
        measure_steps(f"{line}, fed by the loader", itertools.islice(fed, FED))
    return figures | {"ceiling": matrix_product_flops(device) / 1e12}


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
