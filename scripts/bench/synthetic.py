"""Synthetic rows and models of the published size; their weights are random, which does not affect speed."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.lm_dataset import VLMDataset
from dataset.tokenizer import load_tokenizer
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.setup import freeze
from trainer.train_pretrain_vlm import STAGE as PRETRAIN
from trainer.train_sft_vlm import STAGE as SFT

STAGES = {stage.name: stage for stage in (PRETRAIN, SFT)}
LAYERS = {512: 8, 768: 16}
TOWER = CLIPVisionConfig(patch_size=16)  # ViT-B/16
FOLDER = Path(tempfile.gettempdir()) / "minimind-v-benchmark"  # written once, for all measurements
BATCHES, IMAGES = 40, 64


def load_data(args) -> VLMDataset:
    """Returns BATCHES batches of synthetic rows, as training reads them."""
    rows = BATCHES * args.batch_size
    images, path = FOLDER / "images", FOLDER / f"{args.stage}-{rows}.jsonl"
    tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    if not path.is_file():
        images.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(IMAGES):
            noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            noise.resize((128, 128)).save(images / f"{number}.jpg", quality=90)
        words = [tokenizer.decode([index]) for index in range(300, tokenizer.vocab_size)]
        words = [word for word in words if word.isalpha() and "\u4e00" <= word[0]]
        lines = (json.dumps(synthetic_row(args.stage, f"{n % IMAGES}.jpg", words, rng)) for n in range(rows))
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return VLMDataset(path, images, tokenizer, args.max_seq_len, VLMConfig().image_tokens)


def synthetic_row(stage: str, image: str, words: list[str], rng: np.random.Generator) -> dict:
    """Returns a caption of 20 to 80 tokens, or a dialogue of 200 to 1500."""
    if stage == "pretrain":
        lengths = [6, rng.integers(20, 81)]
    else:
        turns = 2 * rng.integers(1, 5)
        # An image and the prompt's frame take about 220 of a dialogue's tokens.
        lengths = [max(10, (rng.integers(200, 1501) - 220) // turns)] * turns
    texts = ["".join(rng.choice(words, length)) for length in lengths]
    texts[0] = f"<image>\n{texts[0]}"
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"conversations": turns, "image": image}


def load_model(args) -> MiniMindVLM:
    """Returns a model with random weights, on the CPU, frozen as the stage does."""
    tower = FOLDER / "tower"
    if not (tower / "model.safetensors").is_file():
        CLIPVisionModel(TOWER).save_pretrained(tower)
    torch.manual_seed(0)  # after the tower's random numbers, so that every model has the same weights
    model = MiniMindVLM(model_config(args), tower)
    freeze(model, STAGES[args.stage].defaults["freeze_llm"])
    return model.train()


def model_config(args) -> VLMConfig:
    return VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size])
