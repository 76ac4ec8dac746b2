"""Checks of what only a device can show: a CPU's losses, runs resumed bit by bit, no recompilation, no syncs."""

import contextlib
import copy
import gc
from argparse import Namespace
from functools import partial

import torch

from dataset.lm_dataset import VLMCollator
from scripts.measure.made_up import load_data, load_model
from trainer.setup import be_deterministic, round_frozen_weights
from trainer.stage import answer_loss
from trainer.step import count, make_context, train_step
from trainer.support.capture import CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.processes import Processes, pick_dtype

STEPS, RATE = 4, 1e-4


class Steps:
    """Optimizer steps over the same made-up batches, on a device."""

    def __init__(self, args: Namespace, device: str, compiles: bool = False):
        self.device, self.data = torch.device(device), load_data(args, STEPS * args.batch_size)
        self.model, self.processes = load_model(args), Processes(0, 1, self.device)
        dtype = pick_dtype(None, self.device)
        round_frozen_weights(self.model, dtype)
        forward = self.model.to(self.device)
        if compiles:
            forward = compile_or_not(self.model, self.data, args.batch_size, self.device, dtype, print)
        self.compiles, self.step = forward is not self.model, None
        # Gradients are not clipped: the norm would carry one weight's difference into all others.
        self.context = make_context(self.model, answer_loss, self.processes, dtype, 0.0, forward)
        collate = VLMCollator(0, LENGTH_MULTIPLE if self.compiles else 1)
        size = args.batch_size
        self.batches = [
            collate([self.data[row] for row in range(step * size, (step + 1) * size)]) for step in range(STEPS)
        ]
        self.batches = [
            {name: part.to(self.device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
            for batch in self.batches
        ]

    def capture(self):
        """Makes the following steps CUDA graphs."""
        self.step = CapturedStep(train_step, self.context, len(self.batches[0]["input_ids"]))

    def take(self, numbers) -> list[float]:
        """Takes these steps; returns the mean loss of each."""
        step, losses = self.step or partial(train_step, self.context), []
        for number in numbers:
            batch = [self.batches[number]]
            loss, learned = step(batch, count(batch, self.processes), RATE)[0].tolist()
            losses.append(loss / learned)
        return losses


def same_losses_as_on_the_cpu(args) -> tuple[bool, str]:
    """Tells whether a few steps have the losses of float32 on the CPU, within the error of the device's precision."""
    ours, expected = Steps(args, args.device).take(range(STEPS)), Steps(args, "cpu").take(range(STEPS))
    difference = max(abs(a - b) / b for a, b in zip(ours, expected, strict=True))
    return difference < 0.01, f"they differ by {difference:.1e} at most (limit 1e-2)"


def captures_the_step(args) -> tuple[bool, str]:
    """Tells whether steps replayed as graphs give the weights of the same steps launched one by one."""
    be_deterministic()
    graphs, launched = (Steps(args, args.device) for _ in range(2))
    for steps in (graphs, launched):
        steps.capture()
    launched.step.stream = None  # without a stream to capture on, nothing is captured
    for steps in (graphs, launched):
        steps.take([*range(STEPS)] * 3)
    number = sum(shape.graph is not None for shape in graphs.step.shapes.values())
    pairs = zip(graphs.model.state_dict().values(), launched.model.state_dict().values(), strict=True)
    same = all(torch.equal(weight, other) for weight, other in pairs)
    return same, f"{'all' if same else 'not all'} weights are equal after {3 * STEPS} steps, {number} graphs"


def resumes_bit_by_bit(args) -> tuple[bool, str]:
    """Compares the gradients of a step taken twice, then the weights of a resumed run and of one that went on.

    With the algorithms of --deterministic 1.
    """
    be_deterministic()
    straight, again, first, second = (Steps(args, args.device) for _ in range(4))
    for steps in (straight, again):
        steps.take([0])
    # After one step, AdamW's running mean is that step's gradient, scaled.
    ours, others = (steps.context.optimizer.state for steps in (straight, again))
    pairs = zip(straight.model.named_parameters(), again.model.parameters(), strict=True)
    other = [name for (name, a), b in pairs if a in ours and not torch.equal(ours[a]["exp_avg"], others[b]["exp_avg"])]
    if other:
        return False, f"the same step gives other gradients of {len(other)} weights: {', '.join(other[-4:])}"
    straight.take(range(1, STEPS))
    first.take(range(STEPS // 2))
    state = copy.deepcopy((first.model.state_dict(), first.context.state_dict()))
    second.model.load_state_dict(state[0])
    second.context.load_state_dict(state[1])
    second.take(range(STEPS // 2, STEPS))
    pairs = zip(straight.model.state_dict().items(), second.model.state_dict().values(), strict=True)
    other = [name for (name, weight), resumed in pairs if not torch.equal(weight, resumed)]
    return not other, "all weights are equal" if not other else f"{len(other)} tensors differ, {other[0]} first"


def compiles_once(args) -> tuple[bool, str]:
    """Tells whether no step compiles anything after the warm-up."""
    steps = Steps(args, args.device, compiles=True)
    if not steps.compiles:
        return False, "torch.compile does not work here"
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            steps.take(range(STEPS))
    except RuntimeError as error:
        return False, str(error).strip().splitlines()[0]
    return True, f"{STEPS} steps without a recompilation"


def does_not_sync(args) -> tuple[bool, str]:
    """Tells whether a step never waits for the GPU."""
    steps = Steps(args, args.device)
    steps.take([0])
    counts = [count([batch], steps.processes) for batch in steps.batches]
    try:
        with sync_is_an_error(steps.device):
            for batch, counted in zip(steps.batches, counts, strict=True):
                train_step(steps.context, [batch], counted, RATE)
    except RuntimeError as error:
        return False, str(error).strip().splitlines()[0]
    return True, f"{STEPS} steps" + ("" if steps.device.type == "cuda" else " (only CUDA can tell)")


@contextlib.contextmanager
def sync_is_an_error(device: torch.device):
    """Makes torch raise where the host would wait for the GPU; does nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS = {
    "losses equal the CPU's": same_losses_as_on_the_cpu,
    "no recompilation after the warm-up": compiles_once,
    "no sync in a step": does_not_sync,
    # These two make torch deterministic, for all that follows in this process.
    "a resumed run is bit-identical": resumes_bit_by_bit,
    "a captured step is the step": captures_the_step,
}


def check(args, name: str) -> dict:
    """Returns whether a check passes, and what it found."""
    passed, found = CHECKS[name](args)
    gc.collect()  # models refer to themselves
    return {"passed": passed, "found": found}
