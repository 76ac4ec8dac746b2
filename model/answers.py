"""Generating from a model: the one way, for descriptions during training, for grading and for eval_vlm.py."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import CompileConfig, PreTrainedTokenizerBase, StaticCache

from model.model_minimind import CACHE_NAME
from model.model_vlm import MiniMindVLM

CACHE_MULTIPLE = 256  # sizes of compiled steps' caches: one compilation serves prompts of many lengths


@contextlib.contextmanager
def answering(model: MiniMindVLM) -> Iterator[None]:
    """Puts the model into eval mode, in the precision it is held in, and back; nothing is kept for a backward pass."""
    was_training = model.training
    model.eval()
    # While it trains, a model may hold its frozen matrices in half precision, and the rest in float32.
    half = next((weight.dtype for weight in model.parameters() if weight.dtype != torch.float32), None)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
            yield
    finally:
        model.train(was_training)


def compiled_step(model: MiniMindVLM, positions: int) -> dict:
    """Returns the settings with which transformers compiles the step of one token: a cache of fixed size."""
    config = CompileConfig(mode=None if model.device.type == "cpu" else "reduce-overhead")
    config._compile_all_devices = True  # on a CPU it does so only if it is told to
    positions = min(-(-positions // CACHE_MULTIPLE) * CACHE_MULTIPLE, model.config.max_position_embeddings)
    return {CACHE_NAME: StaticCache(config=model.config, max_cache_len=positions), "compile_config": config}


def generate(model: MiniMindVLM, inputs: dict, max_new_tokens: int, compiles: bool = False, **settings) -> torch.Tensor:
    """Returns the new token ids (B, at most max_new_tokens); greedy unless `settings` say otherwise.

    Args:
        inputs: Left-padded prompts, see `dataset.prompts`; None values are left out.
        compiles: Whether to compile the step of one token, which takes half a minute.
        settings: For transformers' `generate`.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if tensor is not None}
    if compiles:
        settings |= compiled_step(model, inputs["input_ids"].shape[1] + max_new_tokens)
    with answering(model):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False} | settings)
    return ids[:, inputs["input_ids"].shape[1] :]


def generate_answers(
    model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase, inputs: dict, max_new_tokens: int
) -> list[str]:
    """Returns the greedy answers as text."""
    return tokenizer.batch_decode(generate(model, inputs, max_new_tokens), skip_special_tokens=True)
