"""A whole optimizer step as one CUDA graph, which a GPU replays without waiting for the host to launch its kernels.

A graph repeats the same kernels over the same memory (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs):
batches are padded to a few shapes and copied into buffers, and learning rate and token count are tensors.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from trainer.step import TrainContext
from trainer.support.processes import tensors_of

MOST_GRAPHS = 128  # each holds a copy of every kernel's parameters, in the driver's memory


@dataclass
class Shape:
    """The buffers of one padded shape, and its graph once there is one."""

    inputs: dict[str, torch.Tensor]
    graph: "torch.cuda.CUDAGraph | None" = None
    warm: bool = False


class CapturedStep:
    """Takes the optimizer steps of a context: as CUDA graphs if the stage can pad the batch, else as usual.

    The first batch of a shape runs over the buffers without a graph, which prepares what kernels need; the graph of the
    second has the same kernels. So a step computes the same bits whether its shape has a graph yet or not.

    `plain` is `train_step`, `context` that of one rank without experts, gradient scaler or dropout, `pad` the stage's.
    """

    def __init__(self, plain: Callable, context: TrainContext, pad: Callable[[dict], dict | None]):
        self.plain, self.context, self.pad = plain, context, pad
        device = self.device = context.processes.device
        self.units, self.rate = torch.ones((), device=device), torch.zeros((), device=device)
        self.losses, self.is_bad = torch.zeros(2, device=device), torch.zeros((), dtype=torch.bool, device=device)
        self.shapes, self.buffers, self.pool = {}, {}, ()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, micro_batches: list[dict], counts, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `train_step` does."""
        padded = self.pad(micro_batches[0]) if len(micro_batches) == 1 and counts.units > 0 else None
        if padded is None:
            return self.plain(self.context, micro_batches, counts, learning_rate)
        tensors = tensors_of(padded)
        keys = [(name, tensor.shape) for name, tensor in tensors.items()]  # shapes share buffers
        for key, tensor in zip(keys, tensors.values(), strict=True):
            if key not in self.buffers:
                self.buffers[key] = torch.empty_like(tensor)
            self.buffers[key].copy_(tensor)
        shape = self.shapes.setdefault(tuple(keys), Shape({key[0]: self.buffers[key] for key in keys}))
        self.units.fill_(counts.units)
        self.rate.fill_(learning_rate)
        has_room = self.stream is not None and sum(of.graph is not None for of in self.shapes.values()) < MOST_GRAPHS
        is_full = False
        try:
            if shape.graph is None and shape.warm and has_room:
                self.capture(shape, counts)
            if shape.graph is not None:
                shape.graph.replay()
            else:
                self.compute(shape, counts)
                shape.warm = True
        except torch.OutOfMemoryError:  # graphs need memory besides that of uncaptured steps
            if self.stream is None:
                raise
            is_full = True
        if is_full:  # not inside the except: its traceback keeps what the failed step had allocated
            for captured in self.shapes.values():
                captured.graph = None
            self.pool, self.stream = (), None  # from here on nothing is captured
            self.context.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.compute(shape, counts)
        return self.losses.clone(), self.is_bad.clone()

    def compute(self, shape: Shape, counts):
        """Takes the step, or while capturing records it in the graph."""
        # `counts` holds the batch's units as a tensor: a number would be fixed in the graph.
        batch, counts = shape.inputs | {"units": True}, replace(counts, units=self.units)
        losses, is_bad = self.plain(self.context, [batch], counts, self.rate)
        self.losses.copy_(losses)
        self.is_bad.copy_(is_bad)

    def capture(self, shape: Shape, counts):
        """Records the step as the shape's graph, without taking it."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)  # capturing needs a stream of its own
        with torch.cuda.stream(self.stream):
            # thread_local: the loader's pinning thread may allocate meanwhile. Not torch.cuda.graph(), which collects
            # garbage and empties the allocator's cache for each graph.
            graph.capture_begin(*self.pool, capture_error_mode="thread_local")
            try:
                self.compute(shape, counts)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of the capture that the error has ended
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self.stream)
        shape.graph, self.pool = graph, (graph.pool(),)


def round_up(number: int, parts: int) -> int:
    """Rounds up to one of `parts` sizes between two powers of two, multiples of 8."""
    multiple = max(8, 2 ** (number.bit_length() - 1) // parts)
    return -(-number // multiple) * multiple
