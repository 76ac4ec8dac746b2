"""A whole optimizer step as one CUDA graph, which a GPU replays without waiting for the host to launch its kernels.

A graph repeats the same kernels over the same memory (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs):
batches are padded to a few shapes and copied into buffers, and learning rate and token count are tensors.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# The inputs of answers; batches with others take the ordinary step.
INPUTS = {"input_ids", "labels", "image_starts", "learned_positions"}
IMAGE_INPUTS = ("pixel_values", "image_features")
MOST_GRAPHS = 128  # each holds a copy of every kernel's parameters, in the driver's memory


@dataclass
class Shape:
    """The buffers of one padded shape, and its graph once there is one."""

    inputs: dict[str, torch.Tensor]
    graph: "torch.cuda.CUDAGraph | None" = None
    warm: bool = False


class CapturedStep:
    """Takes the optimizer steps of a context: full batches of one image a row as CUDA graphs, others as usual.

    The first batch of a shape runs over the buffers without a graph, which prepares what kernels need; the graph of the
    second has the same kernels. So a step computes the same bits whether its shape has a graph yet or not.

    Args:
        plain: `train_step`.
        context: What it works on: one rank, without experts, gradient scaler or dropout.
        batch_size: Samples of a full batch.
    """

    def __init__(self, plain: Callable, context, batch_size: int):
        self.plain, self.context, self.batch_size = plain, context, batch_size
        device = self.device = context.processes.device
        self.units, self.rate = torch.ones((), device=device), torch.zeros((), device=device)
        self.losses, self.is_bad = torch.zeros(2, device=device), torch.zeros((), dtype=torch.bool, device=device)
        self.shapes, self.images, self.pool = {}, {}, ()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, micro_batches: list[dict], counts, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `train_step` does."""
        batch = micro_batches[0]
        images = [name for name in IMAGE_INPUTS if name in batch]
        tensors = {name for name, part in batch.items() if isinstance(part, torch.Tensor)} - {"unencoded"}
        is_usual = len(micro_batches) == len(images) == 1 and tensors == INPUTS | set(images) and counts.units > 0
        if not (is_usual and len(batch["input_ids"]) == len(batch["image_starts"]) == self.batch_size):
            return self.plain(self.context, micro_batches, counts, learning_rate)
        shape = self.fill(batch, images[0])
        self.units.fill_(counts.units)
        self.rate.fill_(learning_rate)
        try:
            self.take(shape, counts)
        except torch.OutOfMemoryError:  # graphs hold memory of their own, beside that of steps that are not captured
            if self.stream is None:
                raise
            is_full = True
        else:
            is_full = False
        if is_full:  # not inside the except: its traceback keeps what the failed step had allocated
            self.give_up()
            self.compute(shape, counts)
        return self.losses.clone(), self.is_bad.clone()

    def take(self, shape: Shape, counts):
        """Takes the step by its graph, capturing it first where that is due."""
        has_room = self.stream is not None and sum(of.graph is not None for of in self.shapes.values()) < MOST_GRAPHS
        if shape.graph is None and shape.warm and has_room:
            self.capture(shape, counts)
        if shape.graph is not None:
            shape.graph.replay()
        else:
            self.compute(shape, counts)
            shape.warm = True

    def give_up(self):
        """Frees all graphs with their memory, and what the failed step left; from here on nothing is captured."""
        for shape in self.shapes.values():
            shape.graph = None
        self.pool, self.stream = (), None
        self.context.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def fill(self, batch: dict, name: str) -> Shape:
        """Copies a batch, and what it has of its images, into the buffers of its padded shape."""
        length, learned = batch["input_ids"].shape[1], batch["learned_positions"]
        padded = round_up(length, 32)
        key = padded, round_up(len(learned), 8), name, batch[name].shape
        if key[2:] not in self.images:
            self.images[key[2:]] = torch.empty_like(batch[name])
        image = self.images[key[2:]]
        if key not in self.shapes:
            ids = torch.empty(self.batch_size, padded, dtype=torch.int64, device=self.device)
            inputs = {"input_ids": ids, "labels": ids.clone(), "image_starts": torch.empty_like(batch["image_starts"])}
            inputs |= {"learned_positions": ids.new_empty(key[1]), "units": key[1], name: image}
            self.shapes[key] = Shape(inputs)
        inputs = self.shapes[key].inputs
        for field, pad in (("input_ids", 0), ("labels", -100)):
            inputs[field][:, length:].fill_(pad)
            inputs[field][:, :length].copy_(batch[field])
        # Positions among all of the batch move with its length. Unused ones name the first, which is never learned.
        inputs["learned_positions"][len(learned) :].zero_()
        inputs["learned_positions"][: len(learned)].copy_(learned // length * padded + learned % length)
        for field in ("image_starts", name):
            inputs[field].copy_(batch[field])
        return self.shapes[key]

    def compute(self, shape: Shape, counts):
        """Takes the step, as launches or, while capturing, as the graph's."""
        counts = replace(counts, units=self.units)
        losses, is_bad = self.plain(self.context, [shape.inputs], counts, self.rate)
        self.losses.copy_(losses)
        self.is_bad.copy_(is_bad)

    def capture(self, shape: Shape, counts):
        """Records the step as the shape's graph, without taking it."""
        graph = torch.cuda.CUDAGraph()
        with self.aside():
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
        shape.graph, self.pool = graph, (graph.pool(),)

    @contextlib.contextmanager
    def aside(self):
        """Computes on a stream of its own, as capturing needs, in turn with the current one."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def round_up(number: int, parts: int) -> int:
    """Rounds up to one of `parts` sizes between two powers of two, multiples of 8."""
    multiple = max(8, 2 ** (number.bit_length() - 1) // parts)
    return -(-number // multiple) * multiple
