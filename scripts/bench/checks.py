"""Checks of what only a device can show: a CPU's losses, runs resumed bit by bit, no recompilation, no syncs."""

import contextlib
import copy
import itertools

import torch

from scripts.bench.steps import Steps
from trainer.setup import be_deterministic

STEPS = 4


class Few(Steps):
    """A few steps over the same batches, without clipping: the norm would carry one weight's difference into all."""

    def __init__(self, args, how: str = "", device=None):
        dtype = torch.float32 if (device or args.device) == "cpu" else None
        super().__init__(args, how, device, dtype, grad_clip=0.0)
        self.workers = 0
        self.kept = list(itertools.islice(self.batches(), STEPS))

    def losses(self, numbers) -> list[float]:
        """Takes the steps with these numbers; returns the mean loss of each."""
        return [float(loss / learned) for loss, learned in [self.take(self.kept[number]) for number in numbers]]


def same_losses_as_on_the_cpu(args) -> str:
    """Compares the losses of a few steps with those of float32 on the CPU."""
    ours, expected = Few(args).losses(range(STEPS)), Few(args, device="cpu").losses(range(STEPS))
    differences = [abs(a - b) / b for a, b in zip(ours, expected, strict=True)]
    if not all(difference < 0.01 for difference in differences):  # the error of the device's precision; NaN fails
        raise RuntimeError(f"losses differ: {ours}, on the CPU {expected}")
    return f"they differ by {max(differences):.1e} at most"


def captures_the_step(args) -> str:
    """Compares the weights after steps replayed as graphs with those after the same steps launched one by one."""
    be_deterministic()
    graphs, launched = (Few(args, "captured") for _ in range(2))
    launched.step.stream = None  # without a stream to capture on, nothing is captured
    for steps in (graphs, launched):
        steps.losses([*range(STEPS)] * 3)
    require_same(graphs, launched)
    return f"{sum(shape.graph is not None for shape in graphs.step.shapes.values())} graphs, the same weights"


def resumes_bit_by_bit(args) -> str:
    """Compares the weights of a resumed run with those of one that went on, with --deterministic 1."""
    be_deterministic()
    straight, first, second = (Few(args) for _ in range(3))
    straight.losses(range(STEPS))
    first.losses(range(STEPS // 2))
    second.model.load_state_dict(first.model.state_dict())
    second.context.load_state_dict(copy.deepcopy(first.context.state_dict()))
    second.losses(range(STEPS // 2, STEPS))
    require_same(straight, second)
    return "the same weights"


def require_same(ours: Few, others: Few):
    """Raises RuntimeError where their weights are not equal."""
    pairs = zip(ours.model.state_dict().items(), others.model.state_dict().values(), strict=True)
    different = [name for (name, tensor), other in pairs if not torch.equal(tensor, other)]
    if different:
        raise RuntimeError(f"{len(different)} tensors differ, {different[0]} first")


def compiles_once(args) -> str:
    """Takes steps that may compile nothing after the warm-up."""
    steps = Few(args, "compiled")
    with torch.compiler.set_stance("fail_on_recompile"):
        steps.losses(range(STEPS))
    return f"{STEPS} steps"


def does_not_sync(args) -> str:
    """Takes steps that may not wait for the GPU."""
    steps = Few(args)
    steps.take(steps.kept[0])
    with contextlib.ExitStack() as stack:
        if steps.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        for batch in steps.kept:
            steps.take(batch)
    return f"{STEPS} steps" + ("" if steps.device.type == "cuda" else " (only CUDA can tell)")


CHECKS = {
    "losses equal the CPU's": same_losses_as_on_the_cpu,
    "no recompilation after the warm-up": compiles_once,
    "no sync in a step": does_not_sync,
    "a resumed run is bit-identical": resumes_bit_by_bit,
    "a captured step is the step": captures_the_step,
}


def check(args, line: str) -> dict:
    """Returns what a check found; raises RuntimeError where it fails."""
    return {"found": CHECKS[line](args)}
