"""Faster steps: torch.compile for a model's blocks, made before the first step, and whole steps as CUDA graphs."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import mark_dynamic
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UsageError, first_line
from model.model_vlm import MiniMindVLM
from model.vision_tower import normalise, pixel_constants
from trainer.step import TrainContext
from trainer.support.processes import tensors_of

# Batches are padded to a multiple of this when compiled: kernels for odd sizes are slower.
LENGTH_MULTIPLE = 8
# The fastest first: cuDNN's attention plans anew for each length, and sums in no fixed order.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MOST_GRAPHS = 128  # each CUDA graph holds a copy of every kernel's parameters, in the driver's memory


class CompiledVLM:
    """A model's `forward`, `encode_images` and `config` with compiled blocks: one graph for full batches of any length.

    All blocks of the decoder but the last, which computes fewer positions, share one graph, and so do the tower's:
    compiling the whole takes twice as long. Rare batches run uncompiled: an epoch's last, smaller one, and those
    with fewer than two images or learned tokens, for which torch.compile would make graphs of their own. The model, on
    its device and without experts, is left as it is, and shares its weights. `options` are torch.compile's.
    """

    def __init__(self, model: MiniMindVLM, **options):
        self.model, self.config, self.rows = model, model.config, None
        parts = (model, model.vision_encoder)
        tensors = [tensor for part in parts for tensor in itertools.chain(part.parameters(), part.buffers())]
        self.compiled = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        decoder, tower = self.compiled.model.layers, self.compiled.vision_encoder
        try:
            [tower_blocks] = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
            [embeddings] = [part for name, part in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]
            [patches] = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
        except ValueError as error:
            raise RuntimeError(f"{type(tower).__name__} has other parts than blocks and embedded patches") from error
        patches.forward = functools.partial(embed_patches, patches)
        for parts, mark in ((decoder, mark_length), ([*tower_blocks, embeddings], mark_images)):
            for part in parts:
                part.forward = torch.compile(part.forward, **options)
                part.register_forward_pre_hook(mark)
        self.normalise = torch.compile(normalise, **options)
        loss = torch.compile(self.compiled.compute_loss, **options)

        def loss_of_any_number(logits, targets, reduction):
            for part in (logits, targets):
                mark_dynamic(part, 0)
            return loss(logits, targets, reduction)

        self.compiled.compute_loss = loss_of_any_number

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Does what `MiniMindVLM.encode_images` does."""
        if len(pixel_values) < 2:
            return self.model.encode_images(pixel_values)
        constants = pixel_constants(self.model.vision_encoder, pixel_values)
        mark_dynamic(pixel_values, 0)
        return self.compiled.encode_images(self.normalise(pixel_values, *constants))

    def __call__(self, **inputs):
        """Does what `MiniMindVLM.forward` does, given features."""
        rows = len(inputs["input_ids"])
        self.rows = self.rows or rows  # of a full batch, which the warm-up's are
        if rows != self.rows or min(len(inputs.get(name, ())) for name in ("image_starts", "learned_positions")) < 2:
            return self.model(**inputs)
        return self.compiled(**inputs)


def embed_patches(convolution: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
    """Computes a convolution with a stride equal to its kernel size as one matrix product."""
    size = convolution.kernel_size[0]
    patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (images, 3, rows, size, columns, size)
    rows, columns = patches.shape[2], patches.shape[4]
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    embedded = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    return embedded.transpose(1, 2).unflatten(2, (rows, columns))


def mark_length(block: nn.Module, inputs: tuple):
    # A block of the decoder gets any length, and its last one any number of positions.
    hidden_states, rotary, *_, positions = inputs
    mark_dynamic(hidden_states, 1)
    for part in rotary:
        mark_dynamic(part, 2)
    if positions is not None:
        mark_dynamic(positions, 0)


def mark_images(block: nn.Module, inputs: tuple):
    mark_dynamic(inputs[0], 0)


def compile_or_not(
    model: MiniMindVLM, loss: Callable, batches: list[dict], dtype: torch.dtype, log: Callable, **options
) -> CompiledVLM | MiniMindVLM:
    """Compiles a stage's loss, forward and backward; leaves gradients and random state as they are.

    `batches` are full ones on the model's device, among them the shortest and the longest: a compiled graph may hold
    only for sizes on one side of a threshold. `options` are torch.compile's. Returns the model itself where
    torch.compile does not work: it needs a C++ compiler, and Triton on CUDA. Raises UsageError if a batch does not fit
    in the device's memory.
    """
    device, attention = model.device, contextlib.nullcontext()
    log("compiling tower and decoder ... (--compile 0 does without)")
    if not torch.are_deterministic_algorithms_enabled():
        attention = sdpa_kernel(ATTENTION, set_priority=True)
    try:
        compiled = CompiledVLM(model, **options)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), attention:
            for batch in batches:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss_sum, _ = loss(compiled, tensors_of(batch))
                loss_sum.backward()
    except torch.OutOfMemoryError as error:
        longest = max(batches, key=lambda batch: batch["tokens"])
        raise UsageError(
            f"{device} has too little memory for a batch of the {longest['samples']} longest samples "
            f"({longest['tokens']:,} tokens): a smaller --batch_size with more --accumulation_steps computes the same"
        ) from error
    except (RuntimeError, NameError) as error:  # NameError: torch 2.6's compiler in transformers' tower
        log(f"warning: torch.compile does not work here, so this run continues without it ({first_line(error)})")
        return model
    finally:  # also if compiling failed: the run goes on
        model.zero_grad(set_to_none=True)
    return compiled


class CapturedStep:
    """Takes the optimizer steps of a context: as CUDA graphs if the stage can pad the batch, else as usual.

    A GPU replays a graph without waiting for the host to launch its kernels. It repeats the same kernels over the same
    memory (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs): batches are padded to a few shapes and
    copied into buffers, and learning rate and token count are tensors.

    The first batch of a shape runs over the buffers without a graph, which prepares what kernels need; the graph of the
    second has the same kernels. So a step computes the same bits whether its shape has a graph yet or not.

    `plain` is `train_step`, `context` that of one rank without experts, gradient scaler or dropout, `pad` the stage's.
    """

    def __init__(self, plain: Callable, context: TrainContext, pad: Callable[[dict], dict | None]):
        self.plain, self.context, self.pad = plain, context, pad
        device = self.device = context.processes.device
        self.units, self.rate = torch.ones((), device=device), torch.zeros((), device=device)
        self.losses, self.is_bad = torch.zeros(2, device=device), torch.zeros((), dtype=torch.bool, device=device)
        self.buffers, self.pool = {}, ()
        self.graphs = {}  # by padded shape; None for one that has run, but not as a graph
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, micro_batches: list[dict], counts, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `train_step` does."""
        padded = self.pad(micro_batches[0]) if len(micro_batches) == 1 and counts.units > 0 else None
        if padded is None:
            return self.plain(self.context, micro_batches, counts, learning_rate)
        tensors = tensors_of(padded)
        shape = tuple((name, tensor.shape) for name, tensor in tensors.items())
        for key in shape:  # shapes share buffers of the same key
            if key not in self.buffers:
                self.buffers[key] = torch.empty_like(tensors[key[0]])
            self.buffers[key].copy_(tensors[key[0]])
        inputs = {key[0]: self.buffers[key] for key in shape}
        self.units.fill_(counts.units)
        self.rate.fill_(learning_rate)
        graph, is_warm, is_full = self.graphs.get(shape), shape in self.graphs, False
        has_room = self.stream is not None and sum(graph is not None for graph in self.graphs.values()) < MOST_GRAPHS
        try:
            if graph is None and is_warm and has_room:
                graph = self.graphs[shape] = self.capture(inputs, counts)
            if graph is not None:
                graph.replay()
            else:
                self.compute(inputs, counts)
                self.graphs[shape] = None
        except torch.OutOfMemoryError:  # graphs need memory besides that of uncaptured steps
            if self.stream is None:
                raise
            is_full = True
        if is_full:  # not inside the except: its traceback keeps what the failed step had allocated
            graph, self.graphs, self.pool, self.stream = None, {}, (), None  # from here on nothing is captured
            self.context.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.compute(inputs, counts)
        return self.losses.clone(), self.is_bad.clone()

    def compute(self, inputs: dict[str, torch.Tensor], counts):
        """Takes the step, or while capturing records it in the graph."""
        # `counts` holds the batch's units as a tensor: a number would be fixed in the graph. True: the batch has some.
        batch, counts = inputs | {"units": True}, replace(counts, units=self.units)
        losses, is_bad = self.plain(self.context, [batch], counts, self.rate)
        self.losses.copy_(losses)
        self.is_bad.copy_(is_bad)

    def capture(self, inputs: dict[str, torch.Tensor], counts) -> "torch.cuda.CUDAGraph":
        """Records the step over these buffers, without taking it."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)  # capturing needs a stream of its own
        with torch.cuda.stream(self.stream):
            # thread_local: the loader's pinning thread may allocate meanwhile. Not torch.cuda.graph(), which collects
            # garbage and empties the allocator's cache for each graph.
            graph.capture_begin(*self.pool, capture_error_mode="thread_local")
            try:
                self.compute(inputs, counts)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of the capture that the error has ended
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self.stream)
        self.pool = (graph.pool(),)
        return graph
