"""torch.compile for a model's step: one graph for batches of every length, made before the first step."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import mark_dynamic
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UsageError
from model.model_vlm import MiniMindVLM
from model.vision_tower import normalise, pixel_constants
from trainer.support.processes import first_line, tensors_of

# Batches are padded to a multiple of this when compiled: kernels for odd sizes are slower.
LENGTH_MULTIPLE = 8
# The fastest first: cuDNN's attention plans anew for each length, and sums in no fixed order.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CompiledVLM:
    """A model's `forward`, `encode_images` and `config` with compiled blocks, for full batches of any length.

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
        [tower_blocks] = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
        [embeddings] = [part for name, part in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]
        [patches] = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
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
    torch.compile does not work: it needs a C++ compiler, and Triton on CUDA.
    """
    compiled, device, attention = CompiledVLM(model, **options), model.device, contextlib.nullcontext()
    log("compiling tower and decoder ... (--compile 0 does without)")
    if not torch.are_deterministic_algorithms_enabled():
        attention = sdpa_kernel(ATTENTION, set_priority=True)
    try:
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
    finally:
        model.zero_grad(set_to_none=True)
    return compiled
