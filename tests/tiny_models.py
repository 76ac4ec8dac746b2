"""Tiny vision towers and models, and prompts with images."""

import json
import tempfile
from pathlib import Path

import plain_model
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.model_vlm import MiniMindVLM, VLMConfig

TOWER_SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 224}
IMAGE = "image"
AT = plain_model.PLACEHOLDER


def save_tower(folder: Path, width: int = 32, prefix: str = "vision_model.", **shape) -> Path:
    """Writes a tower with the published names and the weights behind the recorded figures."""
    shape = TOWER_SHAPE | {"hidden_size": width, "intermediate_size": width} | shape
    return write_tower(folder, CLIPVisionModel(CLIPVisionConfig(**shape)), prefix)


def save_siglip(folder: Path, width: int = 32, **shape) -> Path:
    """Writes a tower as minimind-3v's, 64 patches of 32 pixels, with its preprocessor file."""
    shape = (
        TOWER_SHAPE | {"hidden_size": width, "intermediate_size": width, "patch_size": 32, "image_size": 256} | shape
    )
    write_tower(folder, SiglipVisionModel(SiglipVisionConfig(**shape)))
    settings = {"do_resize": True, "size": {"height": 256, "width": 256}, "resample": 2}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def save_tokenizer_3v(folder: Path) -> Path:
    """Writes a byte-level tokenizer of minimind-3v's form: `<|image_pad|>` is token 12, think marks are 25 and 26."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|buffer{number}|>" for number in range(3, 25))]
    special[12] = "<|image_pad|>"
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate([*special, "<think>", "</think>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<think>", "</think>"])
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0], "unk_token": special[0]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def write_tower(folder: Path, tower, prefix: str = "vision_model.") -> Path:
    plain_model.fill_tower(tower)
    tower.config.save_pretrained(folder)
    tensors = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny_vlm(tower: Path | None = None, **shape) -> MiniMindVLM:
    """Makes two layers of width 32, without near-ties between tokens; generation never stops early."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128} | shape
    with tempfile.TemporaryDirectory() as folder:
        tower = tower or save_tower(Path(folder))
        model = MiniMindVLM(VLMConfig(eos_token_id=127, **shape), vision_model_path=tower).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return model


def prompt(*parts) -> tuple[list[int], list[int]]:
    """Returns token ids and image starts of a prompt given in parts: lists of ids, and IMAGE."""
    ids, starts = [], []
    for part in parts:
        if part == IMAGE:
            starts.append(len(ids))
            part = [AT] * plain_model.PATCHES
        ids += part
    return ids, starts


def batch(prompts, pad="right") -> dict[str, torch.Tensor]:
    """Returns prompts as input_ids and attention_mask (B, L) and image_starts (images, 2)."""
    longest = max(len(ids) for ids, _ in prompts)
    rows, masks, image_starts = [], [], []
    for sample, (ids, starts) in enumerate(prompts):
        pads = longest - len(ids)
        before, after = (pads, 0) if pad == "left" else (0, pads)
        rows.append([0] * before + ids + [0] * after)
        masks.append([0] * before + [1] * len(ids) + [0] * after)
        image_starts += [[sample, before + start] for start in starts]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "image_starts": torch.tensor(image_starts, dtype=torch.long).view(-1, 2),
    }


def pictures(number: int, seed: int = 0) -> torch.Tensor:
    """Returns (number, 3, 224, 224) uint8 noise, each image of another brightness."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 100, (number, 3, 224, 224), generator=generator)
    return (noise + torch.randint(0, 156, (number, 3, 1, 1), generator=generator)).to(torch.uint8)


# Of different lengths and numbers of images, with the user's own @ before, between and after images.
PROMPTS = [
    prompt([1, 50, 60, 70]),
    prompt([1, 5, AT, 7], IMAGE, [9, 8]),
    prompt([1], IMAGE, IMAGE, [6, AT]),
    prompt([1, 77], IMAGE, [3, AT, 4], IMAGE, [50, 51, 52]),
    prompt([AT]),
]
IMAGES = [len(starts) for _, starts in PROMPTS]
