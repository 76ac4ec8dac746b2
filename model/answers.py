"""Generates answers: descriptions during training, grading, and eval_vlm.py."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import CompileConfig, PreTrainedTokenizerBase, StaticCache

from model.model_minimind import CACHE_NAME
from model.model_vlm import MiniMindVLM

CACHE_MULTIPLE = 256  # sizes of compiled steps' caches: one compilation serves prompts of many lengths


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
    """Returns the new token ids (B, at most max_new_tokens); greedy unless `settings` say otherwise.

    Args:
        inputs: Left-padded prompts, see `dataset.prompts`; None values are left out.
        compiles: Whether to compile the step of one token, which takes half a minute.
        settings: For transformers' `generate`.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if tensor is not None}
    length = inputs["input_ids"].shape[1]
    if compiles:  # transformers then compiles the step of one token, over a cache of fixed size
        config = CompileConfig(mode=None if model.device.type == "cpu" else "reduce-overhead")
        config._compile_all_devices = True  # on a CPU, transformers compiles only with this
        size = -(-(length + max_new_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        cache = StaticCache(config=model.config, max_cache_len=min(size, model.config.max_position_embeddings))
        settings |= {CACHE_NAME: cache, "compile_config": config}
    with answering(model):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False} | settings)
    return ids[:, length:]


def generate_answers(
    model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase, inputs: dict, max_new_tokens: int
) -> list[str]:
    """Returns the greedy answers as text."""
    return tokenizer.batch_decode(generate(model, inputs, max_new_tokens), skip_special_tokens=True)
