"""Checks of what only a device can show: a CPU's losses, runs resumed bit by bit, no recompilation, no syncs."""

import copy
import itertools
from argparse import Namespace

import torch

from scripts.bench.synthetic import Steps, settings_of
from trainer.setup import be_deterministic

STEPS = 4


class Few(Steps):
    """A few steps over the same batches, without clipping: the norm would carry one weight's difference into all."""

    def __init__(self, args, how: str = ""):
        dtype = torch.float32 if args.device == "cpu" else None
        super().__init__(Namespace(**vars(args) | {"num_workers": 0}), how, dtype, grad_clip=0.0)
        self.few = list(itertools.islice(self.batches(), STEPS))

    def losses(self, numbers) -> list[float]:
        """Takes the steps with these numbers; returns the mean loss of each."""
        return [float(loss / learned) for loss, learned in [self.take(self.few[number]) for number in numbers]]

    def require_weights_of(self, others: "Few"):
        """Raises RuntimeError where their weights are not equal."""
        theirs = others.model.state_dict()
        different = [name for name, tensor in self.model.state_dict().items() if not torch.equal(tensor, theirs[name])]
        if different:
            raise RuntimeError(f"{len(different)} tensors differ, {different[0]} first")


def same_losses_as_on_the_cpu(args) -> str:
    """Compares the losses of a few steps with those of float32 on the CPU."""
    on_cpu = Namespace(**vars(args) | {"device": "cpu"})
    ours, expected = Few(args).losses(range(STEPS)), Few(on_cpu).losses(range(STEPS))
    differences = [abs(a - b) / b for a, b in zip(ours, expected, strict=True)]
    if not all(difference < 0.01 for difference in differences):  # the error of the device's precision; NaN fails
        raise RuntimeError(f"losses differ: {ours}, on the CPU {expected}")
    return f"they differ by {max(differences):.1e} at most"


def compiles_once(args) -> str:
    """Takes steps that may compile nothing after the warm-up."""
    steps = Few(args, "compiled")
    with torch.compiler.set_stance("fail_on_recompile"):
        steps.losses(range(STEPS))
    return f"{STEPS} steps"


def does_not_sync(args) -> str:
    """Takes steps that may not wait for the GPU."""
    steps = Few(args)
    steps.take(steps.few[0])
    if steps.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")  # for the rest of this process
    for batch in steps.few:
        steps.take(batch)
    return f"{STEPS} steps" + ("" if steps.device.type == "cuda" else " (only CUDA can tell)")


def resumes_bit_by_bit(args) -> str:
    """Compares the weights of a resumed run with those of one that went on, with --deterministic 1."""
    be_deterministic()
    straight, first, second = (Few(args) for _ in range(3))
    straight.losses(range(STEPS))
    first.losses(range(STEPS // 2))
    second.model.load_state_dict(first.model.state_dict())
    second.context.load_state_dict(copy.deepcopy(first.context.state_dict()))
    second.losses(range(STEPS // 2, STEPS))
    second.require_weights_of(straight)
    return "the same weights"


def captures_the_step(args) -> str:
    """Compares the weights after steps replayed as graphs with those after the same steps launched one by one."""
    be_deterministic()
    graphs, launched = (Few(args, "captured") for _ in range(2))
    launched.step.stream = None  # without a stream to capture on, nothing is captured
    for steps in (graphs, launched):
        steps.losses([*range(STEPS)] * 3)
    graphs.require_weights_of(launched)
    return f"{sum(graph is not None for graph in graphs.step.graphs.values())} graphs, the same weights"


CHECKS = {
    "losses equal the CPU's": same_losses_as_on_the_cpu,
    "no recompilation after the warm-up": compiles_once,
    "no sync in a step": does_not_sync,
    "a resumed run is bit-identical": resumes_bit_by_bit,
    "a captured step is the step": captures_the_step,
}


def check(args, line: str) -> dict:
    """Returns what a check found; raises RuntimeError where it fails."""
    return {"found": CHECKS[line](settings_of(args, "sft"))}
