"""Measures answering: one prompt or several beside transformers' Llama, and a folder of pictures."""

from functools import partial
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.chat import ChatEncoder
from dataset.prompts import prompt_batch
from dataset.tokenizer import load_tokenizer
from model.model_vlm import MiniMindVLM
from scripts.measure.made_up import load_model, model_config, timed
from trainer.watch.answers import generate
from trainer.watch.assistant import in_precision

PROMPT_TOKENS, NEW_TOKENS, TURNS, FOLDER_PICTURES = 230, 64, 5, 64
GENERATE_LINES = {  # samples at once, and how
    "batch 1": (1,),
    "batch 1, compiled": (1, "compiled"),
    "batch 1, int8": (1, "int8"),
    "batch 1, int8, compiled": (1, "int8", "compiled"),
    "batch 16": (16,),
    "batch 16, compiled": (16, "compiled"),
}
FOLDER_LINES = {  # tokens of an answer, precision
    f"64 pictures, {tokens} tokens, {dtype}": (tokens, dtype)
    for dtype in ("float32", "bfloat16")
    for tokens in (64, 256)
}


@torch.inference_mode()
def measure_generate(args, name: str) -> dict:
    """Returns new tokens per second, greedy, and how many times those of transformers' own Llama of the same shape.

    The two take turns, so that both run under the same load. Ours decodes as eval_vlm.py does.
    """
    device, config, [batch, *how] = torch.device(args.device), model_config(args), GENERATE_LINES[name]
    torch.manual_seed(0)
    ours, llama = MiniMindVLM(config).to(device), LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).to(device)
    ours, llama = in_precision(ours, "int8" if "int8" in how else "float32").eval(), llama.eval()
    prompt = torch.randint(300, config.vocab_size, (batch, PROMPT_TOKENS), device=device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    fixed = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    describe = partial(generate, ours, inputs, compiles="compiled" in how, **fixed)
    calls = [describe, partial(llama.generate, **inputs, **fixed)]
    turns = [[timed(device, call)[0] for call in calls] for _ in range(1 + TURNS)][1:]
    return {
        "tokens/s": median(NEW_TOKENS * batch / ours for ours, _ in turns),
        "x Llama": median(llama / ours for ours, llama in turns),
    }


def measure_folder(args, name: str) -> dict:
    """Returns pictures per second of describing FOLDER_PICTURES at once and one by one, and their ratio."""
    device, model, [answer, dtype] = torch.device(args.device), load_model(args).eval(), FOLDER_LINES[name]
    encoder = ChatEncoder(load_tokenizer(BUILTIN_TOKENIZER_DIR), model.config.image_tokens)
    in_precision(model.to(device), dtype)
    size = model.vision_encoder.config.image_size
    pictures = torch.randint(0, 256, (FOLDER_PICTURES, 3, size, size), dtype=torch.uint8)
    asked = [{"role": "user", "content": "<image>\n描述这张图片"}]

    def describe(at_once: int):
        inputs = prompt_batch(encoder, [asked] * at_once, [[picture] for picture in pictures[:at_once]])
        generate(model, inputs, max_new_tokens=answer, min_new_tokens=answer)

    def rate(at_once: int, times: int = 1) -> float:
        return at_once / median(timed(device, describe, at_once)[0] for _ in range(times))

    describe(1)
    one_by_one, together = rate(1, TURNS), rate(FOLDER_PICTURES)
    return {"pictures/s": together, "one by one": one_by_one, "x one": together / one_by_one}
