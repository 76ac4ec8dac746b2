"""Generates answers, in eight bits too, and measures how much each word of one depends on each patch of the images."""

import contextlib
import copy
import math
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CompileConfig, DynamicCache, PreTrainedTokenizerBase, StaticCache

from model.model_minimind import CACHE_NAME, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

CACHE_MULTIPLE = 256  # sizes of compiled steps' caches: one compilation serves prompts of many lengths
KERNEL_ROWS = 8  # up to here the int8 kernel is faster than a product with the matrix written out in float32
PATCHES_AT_A_TIME = 28
MOST_LOGITS = 2**23  # computed at a time: 32 MB in float32


@contextlib.contextmanager
def answering(model: MiniMindVLM) -> Iterator[None]:
    """Runs a block in eval mode, without gradients, under autocast if weights are in half precision."""
    was_training = model.training
    model.eval()
    # While it trains, a model may hold its frozen matrices in half precision, and the rest in float32.
    half = next((weight.dtype for weight in model.parameters() if weight.dtype != torch.float32), None)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
            yield
    finally:
        model.train(was_training)


def generate(model: MiniMindVLM, inputs: dict, max_new_tokens: int, compiles: bool = False, **settings) -> torch.Tensor:
    """Returns the new token ids (B, at most max_new_tokens) of left-padded prompts, see `dataset.prompts`.

    They are greedy unless `settings`, of transformers' `generate`, say otherwise. None values of `inputs` are left out.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if tensor is not None}
    length = inputs["input_ids"].shape[1]
    if compiles:  # transformers compiles the step of one token in half a minute, over a cache of fixed size
        config = CompileConfig(mode=None if model.device.type == "cpu" else "reduce-overhead")
        config._compile_all_devices = True  # on a CPU, transformers compiles only with this
        size = -(-(length + max_new_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        cache = StaticCache(config=model.config, max_cache_len=min(size, model.config.max_position_embeddings))
        settings |= {CACHE_NAME: cache, "compile_config": config}
    with answering(model):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False} | settings)
    return ids[:, length:]


def generate_answers(model: MiniMindVLM, tokenizer, inputs: dict, max_new_tokens: int) -> list[str]:
    """Returns the greedy answers as text."""
    return tokenizer.batch_decode(generate(model, inputs, max_new_tokens), skip_special_tokens=True)


class Int8Linear(nn.Module):
    """`nn.Linear` without a bias, its (N, K) weight in int8 with a scale per row; for inference on a CPU.

    Reading the weights bounds how fast a CPU answers a small batch; torch has a kernel that multiplies these.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        scale = scale.bfloat16()  # what the kernel takes; the integers are computed with this rounded scale
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Multiplies (..., K) to (..., N), few rows in bfloat16, many in float32."""
        rows = states.flatten(0, -2)
        if len(rows) <= KERNEL_ROWS:
            product = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
        else:
            product = F.linear(rows.float(), self.weight.float() * self.scale.float()[:, None])
        return product.to(states.dtype).unflatten(0, states.shape[:-1])


def quantize(model: MiniMindForCausalLM):
    """Replaces the matrices of the decoder's blocks and its head by `Int8Linear`, in place."""
    for block in [*model.base_model.modules(), model]:
        for name, child in block.named_children():
            if isinstance(child, nn.Linear) and name != "gate":  # a router decides between near-equal scores
                setattr(block, name, Int8Linear(child))


def patch_maps(model: MiniMindVLM, inputs: dict, ids: torch.Tensor, stops=lambda: False) -> torch.Tensor | None:
    """Returns how much more probable each token of an answer becomes when one patch of a blank image is shown.

    In a blank image, every projected feature is their mean. `inputs` are one prompt (see `dataset.prompts`), not
    padded, with images and text before them; `ids` (T,) the answer without its end token. Returns the rise of each
    token's log-probability in nats, (T, images, side, side), float32 on the CPU; None once `stops()` is true.

    Of ten measures, this one's map peaks most often on the object that a word describes (112 words for 28 objects of
    held-out scenes, built-in model; tests/checks/check_looking.py): 95.5 %, by chance 6.0; integrated gradients 94.6
    with 8 backward passes a token, attention 89.3, and hiding one patch 89.3, as its neighbours carry the same
    information.
    """
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "pixel_values", "image_starts")}
    ids, starts, patches = ids.to(model.device), inputs["image_starts"], model.config.image_tokens
    size = min(PATCHES_AT_A_TIME, max(1, MOST_LOGITS // (len(ids) * model.config.vocab_size)))
    with answering(model):
        embeds = model.get_input_embeddings()(torch.cat((inputs["input_ids"], ids[None]), dim=1))
        embeds = model.splice_images(embeds, model.encode_images(inputs["pixel_values"]), starts)
        places = (starts[:, 1:] + torch.arange(patches, device=model.device)).flatten()
        shown_ND = embeds[0, places]
        embeds[0, places] = shown_ND.view(len(starts), patches, -1).mean(dim=1).repeat_interleave(patches, dim=0)
        rises, blank, cache, done = [], log_probabilities(model, embeds, ids), DynamicCache(), 0
        for some, shown in zip(places.split(size), shown_ND.split(size), strict=True):
            if stops():
                return None
            first = int(some[0])
            # Attention is causal: what is before these patches is computed once, for all rows.
            model(inputs_embeds=embeds[:, done:first], cache=cache, logits_to_keep=1)
            rows, before, done = embeds[:, first:].repeat(len(some), 1, 1), copy.deepcopy(cache), first
            before.batch_repeat_interleave(len(some))
            rows[torch.arange(len(some), device=model.device), some - first] = shown
            rises.append(log_probabilities(model, rows, ids, before) - blank)
    side = math.isqrt(patches)
    return torch.cat(rises).T.reshape(len(ids), len(starts), side, side).cpu()


def log_probabilities(model: MiniMindVLM, embeds: torch.Tensor, ids: torch.Tensor, cache=None) -> torch.Tensor:
    """Returns the log-probabilities (B, T) of the answer (T,) at the end of each row of (B, L, D) embeddings."""
    logits = model(inputs_embeds=embeds, logits_to_keep=len(ids) + 1, cache=cache).logits[:, :-1]
    return logits.float().log_softmax(dim=-1)[:, torch.arange(len(ids), device=ids.device), ids]


def split_words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int, int]]:
    """Splits an answer's tokens into words: (text, first token, end) each; the texts joined are the decoded answer.

    A token is a word, but tokens that share a character, or a word of Latin letters, stay together.
    """
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
    words, start = [], 0
    for end in range(1, len(ids) + 1):
        text = texts[end][len(texts[start]) :]
        following = texts[end + 1][len(texts[end]) :] if end < len(ids) else ""
        is_cut = text.endswith("\ufffd") or re.match("[A-Za-z0-9]{2}", text[-1:] + following[:1])
        if text and (end == len(ids) or not is_cut):
            words.append((text, start, end))
            start = end
    return words


def word_maps(
    model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase, inputs: dict, ids: torch.Tensor, stops=lambda: False
) -> list[tuple[str, torch.Tensor]] | None:
    """Returns the words of an answer, each with its map: the sum of its tokens' `patch_maps`, (images, side, side).

    `ids` (T,) are what `generate` returned for the prompt; tokens after the end token do not count. Returns [] where
    nothing was answered, or the projection's tokens are no grid over the image; None once `stops` is true.
    """
    ids = ids[(ids == tokenizer.eos_token_id).cumsum(dim=0) == 0]
    if not len(ids) or not model.vision_proj.is_grid:
        return []
    maps = patch_maps(model, inputs, ids, stops)
    if maps is None:
        return None
    return [(text, maps[start:end].sum(dim=0)) for text, start, end in split_words(tokenizer, ids.tolist())]
