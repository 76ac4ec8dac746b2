"""What only a GPU can show: the speed of a step in every way and its kernels; and checks, which run on a CPU too."""

import copy
import itertools
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.bench import speed
from scripts.bench.speed import Steps, settings_of, take_all, timed
from trainer.setup import be_deterministic

WAYS = ("ordinary", "compiled, captured")
# Batches that fill the GPU; and those of a run without --batch_size, which the host's launches bound.
GPU_LINES = {
    f"{stage} of {size}, {way}": (stage, size, way)
    for stage, size, ways in (("sft", 64, WAYS), ("pretrain", 256, ("plain", *WAYS)), ("pretrain", 16, WAYS))
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
CHECKED = 4  # steps


def measure_gpu(args: Namespace, line: str) -> dict:
    """Measures steps taken one way over batches that lie on the device, and what a matrix product makes (ceiling).

    Prints what it finds at once, so that a run that is cut off leaves it.
    """
    stage, batch_size, way = GPU_LINES[line]
    args, device, seconds = settings_of(args, stage, batch_size), torch.device(args.device), 0.0
    if way == "plain":
        fed, take = speed.plain_loop(args)
    else:
        seconds, steps = timed(device, Steps, args, way)
        fed, take = steps.batches(), steps.take

    def measure_steps(name: str, batches: Iterable[dict]) -> dict:
        seconds, total = timed(device, take_all, take, batches)
        flops = speed.model_flops(args, total, False) / seconds
        figures = {"samples/s": total["samples"] / seconds, "TFLOP/s": flops / 1e12, "of peak": flops / PEAK}
        print(f"{name}: " + ", ".join(f"{figure} {value:,.2f}" for figure, value in figures.items()), flush=True)
        return figures

    on_device = list(itertools.islice(fed, ON_DEVICE))
    take_all(take, on_device * 2)  # a shape is captured at its second batch
    figures = measure_steps(line, itertools.islice(itertools.cycle(on_device), TIMED))
    figures |= {"GB": speed.peak_bytes(device) / 1e9, "set up in s": seconds}
    if batch_size >= LARGE and device.type == "cuda" and way != "plain":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            take_all(take, on_device)
            torch.cuda.synchronize()
        spent, numbers = Counter(), Counter()
        for event in profiled.key_averages():
            kind = next(kind for kind, parts in KERNELS.items() if any(part in event.key.lower() for part in parts))
            spent[kind] += event.self_device_time_total / 1e3 / len(on_device)
            numbers[kind] += event.count / len(on_device)
        kernels = ", ".join(f"{kind} {ms:.1f} ms ({numbers[kind]:.0f})" for kind, ms in spent.most_common())
        print(f"{line}, kernels a step: {kernels}", flush=True)
    if batch_size >= LARGE and way == WAYS[-1]:
        take_all(take, itertools.islice(fed, 5 * args.num_workers))  # what the loader had ready
        measure_steps(f"{line}, fed by the loader", itertools.islice(fed, FED))
    return figures | {"ceiling": speed.matrix_product_flops(device) / 1e12}


class Few(Steps):
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
    """Returns what a check found; raises RuntimeError where it fails."""
    return {"found": CHECKS[line](settings_of(args, "sft"))}
