"""Descriptions of a few fixed images, generated again and again while the model learns."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from common.files import write_atomically
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.model_vlm import MiniMindVLM
from trainer.watch.answers import generate_answers

IMAGES = 8
LONGEST = 64  # tokens of a description


class Samples:
    """Describes up to 8 images and keeps every description, in `folder`/samples.jsonl and `folder`.md.

    Args:
        data: The rows whose images are described.
        tokenizer: The model's.
        folder: Where the images and samples.jsonl go; `folder`.md shows them.
        done_steps: Steps done before a resume; descriptions of later ones are dropped.
    """

    def __init__(self, data: VLMDataset, tokenizer: PreTrainedTokenizerBase, folder: Path, done_steps: int):
        self.tokenizer, self.folder, self.done_steps = tokenizer, folder, done_steps
        self.image_tokens = data.image_tokens
        with_images = np.flatnonzero(data.image_counts > 0)[: 4 * IMAGES].tolist()  # some may be broken
        samples = data.__getitems__(with_images)
        self.rows = [sample for sample in samples if not isinstance(sample, PictureError)][:IMAGES]
        self.generated: list[dict] | None = None

    def describe(self, model: MiniMindVLM, step: int) -> list[dict]:
        """Writes and returns greedy answers: {"step", "picture", "prompt", "reference", "description"} each."""
        if not self.rows:
            return []
        if self.generated is None:
            self._begin()
        answers = generate_answers(model, self.tokenizer, row_prompts(self.rows, model.config.pad_token_id), LONGEST)
        generated = []
        for number, (row, answer) in enumerate(zip(self.rows, answers, strict=True)):
            start, end = first_answer(row["labels"])
            prompt = self.tokenizer.decode(row["input_ids"][:start], skip_special_tokens=True)
            reference = self.tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
            sample = {"step": step, "picture": f"{number}.jpg", "prompt": last_question(prompt, self.image_tokens)}
            generated.append(sample | {"reference": reference.strip(), "description": answer.strip()})
        self.generated += generated
        self._write()
        return generated

    def _begin(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(self.rows):
            pixels = row["pixel_values"][0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((160, 160)).save(self.folder / f"{number}.jpg", quality=88)
        self.generated = []
        path = self.folder / "samples.jsonl"
        if self.done_steps and path.is_file():
            self.generated = [row for row in read_descriptions(path) if row["step"] <= self.done_steps]

    def _write(self):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.generated)
        write_atomically(self.folder / "samples.jsonl", lambda file: file.write(lines.encode("utf-8")))
        page = page_of(self.generated, self.folder.name)
        write_atomically(self.folder.with_name(f"{self.folder.name}.md"), lambda file: file.write(page.encode("utf-8")))


def read_descriptions(path: Path) -> list[dict]:
    """Reads a samples.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def last_question(prompt: str, image_tokens: int) -> str:
    """Returns the question of a decoded prompt, without the chat template and the image placeholders."""
    question = prompt.split("user\n")[-1].removesuffix("assistant\n")
    return question.replace("@" * image_tokens, "").strip()


def page_of(generated: list[dict], folder: str) -> str:
    """Returns each image with its descriptions, step by step, as Markdown."""
    parts = [f"# What the model says: {folder.removesuffix('_samples')}\n"]
    for picture in dict.fromkeys(row["picture"] for row in generated):
        rows = [row for row in generated if row["picture"] == picture]
        parts.append(f"\n![{picture}]({folder}/{picture})\n\n**{as_text(rows[0]['prompt'])}**\n")
        parts.append(f"\n| step | |\n|---|---|\n| expected | {as_text(rows[0]['reference'])} |\n")
        parts += [f"| {row['step']:,} | {as_text(row['description'])} |\n" for row in rows]
    return "".join(parts)


def as_text(text: str) -> str:
    """Escapes text for a cell of a Markdown table: one line, no markup."""
    return " ".join(re.sub(r"[\\`*_{}\[\]<>#|~]", r"\\\g<0>", text).split())
