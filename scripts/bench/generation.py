"""Measures generation beside transformers' own Llama."""

from functools import partial
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.answers import generate
from model.model_vlm import MiniMindVLM
from scripts.bench.synthetic import model_config, timed
from trainer.answering.assistant import in_precision

PROMPT_TOKENS, NEW_TOKENS, TURNS = 230, 64, 5
GENERATE_LINES = (
    "batch 1",
    "batch 1, compiled",
    "batch 1, int8",
    "batch 1, int8, compiled",
    "batch 16",
    "batch 16, compiled",
)


@torch.inference_mode()
def measure_generate(args, line: str) -> dict:
    """Returns new tokens per second, greedy, and how many times those of transformers' own Llama of the same shape.

    The two take turns, so that both run under the same load. Ours decodes as eval_vlm.py does.
    """
    device, config, batch = torch.device(args.device), model_config(args), int(line.split(",")[0].split()[1])
    torch.manual_seed(0)
    ours, llama = MiniMindVLM(config).to(device), LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).to(device)
    ours, llama = in_precision(ours, "int8" if "int8" in line else "float32").eval(), llama.eval()
    prompt = torch.randint(300, config.vocab_size, (batch, PROMPT_TOKENS), device=device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    fixed = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    calls = [
        partial(generate, ours, inputs, compiles="compiled" in line, **fixed),
        partial(llama.generate, **inputs, **fixed),
    ]
    turns = [[timed(device, call)[0] for call in calls] for _ in range(1 + TURNS)][1:]
    return {
        "tokens/s": median(NEW_TOKENS * batch / ours for ours, _ in turns),
        "x Llama": median(llama / ours for ours, llama in turns),
    }
