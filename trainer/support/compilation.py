"""torch.compile for a model's step: one graph for batches of every length, made before the first step."""

import contextlib
import copy
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import mark_dynamic
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UsageError
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM
from model.vision_tower import normalise, pixel_constants

# Batches are padded to a multiple of this when compiled: kernels for odd sizes are slower.
LENGTH_MULTIPLE = 8


class CompiledVLM:
    """`MiniMindVLM.forward` and `encode_images` with compiled blocks, for full batches of any length.

    All blocks of the decoder but the last, which computes fewer positions, share one graph, and so do the tower's:
    compiling the whole takes twice as long. Rare batches run uncompiled: an epoch's last, smaller one, and those
    with fewer than two images or learned tokens, for which torch.compile would make graphs of their own.

    Args:
        model: A model without experts, on its device. It is left as it is; the compiled one shares its weights.
        batch_size: Samples of a full batch.
        options: For torch.compile.
    """

    def __init__(self, model: MiniMindVLM, batch_size: int, **options):
        self.model, self.batch_size = model, batch_size
        parts = (model, model.vision_encoder)
        tensors = [tensor for part in parts for tensor in itertools.chain(part.parameters(), part.buffers())]
        self.compiled = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        decoder, tower = self.compiled.model.layers, self.compiled.vision_encoder
        [tower_blocks] = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
        [embeddings] = [part for name, part in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]
        [patches] = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
        patches.forward = functools.partial(embed_patches, patches)
        for parts, mark in ((decoder, mark_length), ([*tower_blocks, embeddings], mark_images)):
            for part in parts:
                part.forward = torch.compile(part.forward, **options)
                part.register_forward_pre_hook(mark)
        self.normalise = torch.compile(normalise, **options)
        self.compiled.compute_loss = compiled_loss(self.compiled.compute_loss, **options)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Does what `MiniMindVLM.encode_images` does."""
        if len(pixel_values) < 2:
            return self.model.encode_images(pixel_values)
        constants = pixel_constants(self.model.vision_encoder, pixel_values)
        mark_dynamic(pixel_values, 0)
        return self.compiled.encode_images(self.normalise(pixel_values, *constants))

    def __call__(self, **inputs):
        """Does what `MiniMindVLM.forward` does, given features."""
        is_full = len(inputs["input_ids"]) == self.batch_size
        if not is_full or len(inputs["image_starts"]) < 2 or len(inputs["learned_positions"]) < 2:
            return self.model(**inputs)
        return self.compiled(**inputs)

    def warm_up(self, shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype):
        """Compiles forward and backward with made-up batches; leaves gradients and random state as they are.

        Args:
            shapes: (length, images, learned tokens) of each.

        Raises:
            RuntimeError: If torch.compile does not work here (it needs a C++ compiler, and Triton on CUDA), or the
                batch does not fit in the device's memory.
        """
        size = self.model.vision_encoder.settings.size
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), fastest_attention():
                for length, images, learned in shapes:
                    pixel_values = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
                    inputs = {
                        "input_ids": torch.ones(self.batch_size, length, dtype=torch.int64, device=device),
                        "labels": torch.ones(self.batch_size, length, dtype=torch.int64, device=device),
                        "image_starts": torch.zeros(images, 2, dtype=torch.int64, device=device),
                        "learned_positions": torch.ones(learned, dtype=torch.int64, device=device),
                        "image_features": self.encode_images(pixel_values),
                    }
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss = self(**inputs, reduction="sum").loss
                    loss.backward()
        finally:  # a run goes on where compiling failed
            self.model.zero_grad(set_to_none=True)


def fastest_attention():
    """Prefers cuDNN's attention for what is compiled inside: faster than flash, but it plans anew for each length.

    It sums in no fixed order.
    """
    if torch.are_deterministic_algorithms_enabled():
        return contextlib.nullcontext()
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(backends), set_priority=True)


def embed_patches(convolution: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
    """Does what a convolution does whose stride is its kernel size, as one matrix product."""
    size = convolution.kernel_size[0]
    patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (images, 3, rows, size, columns, size)
    rows, columns = patches.shape[2], patches.shape[4]
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    embedded = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    return embedded.transpose(1, 2).unflatten(2, (rows, columns))


def compiled_loss(loss, **options):
    """Returns the compiled loss of any number of learned tokens."""
    compiled = torch.compile(loss, **options)

    def call(logits, targets, reduction):
        for part in (logits, targets):
            mark_dynamic(part, 0)
        return compiled(logits, targets, reduction)

    return call


def mark_length(block: nn.Module, inputs: tuple):
    """Tells the compiler that a block of the decoder gets any length, and its last one any number of positions."""
    hidden_states, rotary, *_, positions = inputs
    mark_dynamic(hidden_states, 1)
    for part in rotary:
        mark_dynamic(part, 2)
    if positions is not None:
        mark_dynamic(positions, 0)


def mark_images(block: nn.Module, inputs: tuple):
    """Tells the compiler that a block of the tower gets any number of images."""
    mark_dynamic(inputs[0], 0)


def compile_or_not(
    model: MiniMindVLM, data: VLMDataset, batch_size: int, device, dtype, log
) -> CompiledVLM | MiniMindVLM:
    """Returns the compiled model, or the model where torch.compile does not work here.

    Raises:
        UsageError: If the largest batch does not fit in the device's memory.
    """
    compiled = CompiledVLM(model, batch_size)
    log("compiling tower and decoder ... (--compile 0 does without)")
    try:
        compiled.warm_up(extreme_shapes(data, batch_size), device, dtype)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device} has too little memory for a batch of {batch_size} samples of the longest row's "
            f"{int(max(data.lengths))} tokens: a smaller --batch_size with more --accumulation_steps computes the same"
        ) from error
    except (RuntimeError, NameError) as error:  # NameError: torch 2.6's compiler in transformers' tower
        reason = str(error).strip().splitlines()[0]
        log(f"warning: torch.compile does not work here, so this run continues without it ({reason})")
        return model
    return compiled


def extreme_shapes(data: VLMDataset, batch_size: int) -> list[tuple[int, int, int]]:
    """Returns the least and the most (length, images, learned tokens) of a full batch, in all combinations.

    A compiled graph may hold only for sizes on one side of a threshold; trying the extremes finds that out in advance.
    """
    # At least as long as an image: only batches with images are compiled.
    lengths = (max(int(length), data.image_tokens) for length in (min(data.lengths), max(data.lengths)))
    lengths = [-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for length in lengths]
    images, learned = (
        [max(2, batch_size * int(count)) for count in (min(counts), max(counts))]
        for counts in (data.image_counts, data.learned_tokens)
    )
    return sorted(set(itertools.product(lengths, images, learned)))
