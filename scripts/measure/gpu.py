"""Five minutes of a GPU: its ceilings, steps over batches that lie on it, steps fed by the loader, the loader alone.

Every line is printed as soon as it is known, so that a run that is cut off leaves what it found.
"""

import contextlib
import gc
import itertools
import time
from argparse import Namespace
from collections import Counter
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from dataset.lm_dataset import VLMCollator
from dataset.sampler import BatchSampler
from scripts.measure import training
from scripts.measure.made_up import STAGES, load_data, load_model, timed
from trainer.loop import load_batches
from trainer.setup import round_frozen_weights
from trainer.stage import answer_loss
from trainer.step import count, make_context, train_step
from trainer.support.capture import CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.processes import Processes, pick_dtype

# Batches that fill the GPU, in every way; and those of a run without --batch_size, which the host's launches bound.
LARGE, SMALL = {"pretrain": 256, "sft": 64}, {"pretrain": 16, "sft": 4}
HOWS = ("ordinary", "captured", "compiled", "compiled, captured")
ON_DEVICE, TIMED, FED = 12, 48, 300  # batches that lie on the GPU, and steps
PEAK = 790e12  # FLOP/s of an H100's bfloat16 matrix products, as measured
# Kinds of kernels by parts of their names, the first that fits.
KINDS = {
    "attention": ("flash", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90_"),
    "fused": ("triton",),
    "copies": ("memcpy", "memset"),
    "pointwise": ("",),
}


class Report:
    """Prints lines with the seconds since the start."""

    def __init__(self):
        self.started = time.perf_counter()

    def __call__(self, text: str):
        print(f"{time.perf_counter() - self.started:5.0f} s  {text}", flush=True)


def measure_gpu(args, report: Report):
    """Measures on one device: large batches in every way, then as the loader feeds them; small ones; the loader alone.

    Large ones come with the kernels of a step by kind, and with a plain loop beside them.
    """
    device = torch.device(args.device)
    report(f"matrix product {training.matrix_product_flops(device) / 1e12:.0f} TFLOP/s, {args.num_workers} workers")
    for sizes, hows in ((LARGE, HOWS), (SMALL, HOWS[::3])):
        for stage, batch_size in sizes.items():
            settings = vars(args) | {"stage": stage, "batch_size": batch_size}
            settings = Namespace(**settings | {"max_seq_len": STAGES[stage].defaults["max_seq_len"]})
            for how in hows:
                free(device)
                try:
                    measure_steps(settings, how, report, is_large=sizes is LARGE)
                except Exception as error:  # the other lines are measured all the same
                    report(f"{stage:<9}{how}: failed: {type(error).__name__}: {error}".splitlines()[0])
            if sizes is LARGE:
                free(device)
                measure_plain(settings, report)
    for workers in sorted({args.num_workers, args.num_workers // 2}, reverse=True):
        measure_loader(args, workers, report)


def free(device: torch.device):
    """Frees what the line before held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()


def measure_steps(args, how: str, report: Report, is_large: bool):
    """Reports steps over batches that lie on the device; of large ones also those that the loader feeds."""
    device, dtype = torch.device(args.device), pick_dtype(None, torch.device(args.device))
    processes, data, model = Processes(0, 1, device), load_data(args, 40 * args.batch_size), load_model(args)
    round_frozen_weights(model, dtype)
    forward, seconds = model.to(device), 0.0
    if "compiled" in how:
        seconds, forward = timed(device, compile_or_not, model, data, args.batch_size, device, dtype, print)
        if forward is model:  # it says why
            return
    context = make_context(model, answer_loss, processes, dtype, 1.0, forward)
    step = CapturedStep(train_step, context, args.batch_size) if "captured" in how else partial(train_step, context)
    sampler = BatchSampler(data.lengths, args.batch_size, epochs=99)
    multiple = LENGTH_MULTIPLE if forward is not model else 1
    fed = load_batches(data, sampler, VLMCollator(0, multiple), device, args.num_workers)
    kept = list(itertools.islice(fed, ON_DEVICE))

    def take(batches) -> Counter:
        total = Counter()
        for batch in batches:
            total.update(figures_of(batch))
            step([batch], count([batch], processes), 1e-4)
        return total

    def line(label: str, batches):
        seconds, total = timed(device, take, batches)
        flops = training.model_flops(args, total, False) / seconds
        memory = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0
        report(
            f"{args.stage:<9}{label:<30} {total['samples'] / seconds:7,.0f} samples/s {flops / 1e12:4.0f} TFLOP/s "
            f"({flops / PEAK:3.0%}) {memory:5.1f} GB"
        )

    take(kept * 2)  # a shape is captured at its second batch
    compiling = f", compiling took {seconds:.0f} s" if seconds else ""
    report(f"{args.stage} of {args.batch_size}, {how}{compiling}")
    line("  batches on the device", itertools.islice(itertools.cycle(kept), TIMED))
    if is_large and device.type == "cuda":
        report_kernels(lambda: take(kept), report)
    if is_large and how == HOWS[-1]:
        take(itertools.islice(fed, 5 * args.num_workers))  # what the loader had ready
        line("  fed by the loader", itertools.islice(fed, FED))
    fed.close()


def figures_of(batch: dict) -> dict:
    """Returns a batch's samples, tokens and squared lengths, as if its rows were of one length: that needs no sync."""
    samples = len(batch["input_ids"])
    return {
        "samples": samples,
        "useful": batch["tokens"],
        "learned": len(batch["learned_positions"]),
        "squares": batch["tokens"] ** 2 // samples,
    }


def report_kernels(take, report: Report):
    """Reports the kernels of a step by kind, the mean of the batches on the device."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        take()
        torch.cuda.synchronize()
    milliseconds, numbers = Counter(), Counter()
    for event in profiled.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts))
        milliseconds[kind] += event.self_device_time_total / 1e3 / ON_DEVICE
        numbers[kind] += event.count / ON_DEVICE
    kinds = (f"{kind} {spent:.1f} ms ({numbers[kind]:.0f})" for kind, spent in milliseconds.most_common())
    report("           " + ", ".join(kinds))


def measure_plain(args, report: Report):
    """Reports the plain loop, which the loader feeds."""
    device = torch.device(args.device)
    data, model = load_data(args, 40 * args.batch_size), load_model(args)
    with contextlib.closing(training.plain_steps(args, device, data, model, 0)) as steps:
        list(itertools.islice(steps, 3))
        seconds, taken = timed(device, lambda: sum(len(batch["input_ids"]) for batch, *_ in itertools.islice(steps, 8)))
    report(f"{args.stage:<9}{'plain loop':<30} {taken / seconds:7,.0f} samples/s")


def measure_loader(args, workers: int, report: Report):
    """Reports what the loader alone gives."""
    size, longest = LARGE["pretrain"], STAGES["pretrain"].defaults["max_seq_len"]
    data = load_data(Namespace(stage="pretrain", max_seq_len=longest), 40 * size).leaving_small_pictures()
    batches = iter(
        DataLoader(
            data,
            batch_sampler=BatchSampler(data.lengths, size, epochs=99),
            collate_fn=VLMCollator(),
            num_workers=workers,
            pin_memory=args.device.startswith("cuda"),
        )
    )
    list(itertools.islice(batches, 5 * workers))  # until all workers are at work
    seconds, images = timed(torch.device("cpu"), lambda: sum(len(next(batches)["input_ids"]) for _ in range(FED // 3)))
    report(f"the loader alone, {workers} workers: {images / seconds:,.0f} images/s")
