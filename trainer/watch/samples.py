"""A few fixed pictures and what the model says about them, again and again while it learns."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from common.files import write_atomically
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import left_padded
from model.model_vlm import MiniMindVLM

PICTURES = 8
LONGEST = 64  # tokens of a description


class Samples:
    """Describes up to 8 pictures of held-out rows, and keeps all it said: `folder`/samples.jsonl, and a page to scroll.

    Args:
        data: The held-out rows.
        tokenizer: The model's.
        folder: Where the pictures and samples.jsonl go; the page is `folder`.md.
        done_steps: Steps that a resumed run did before: what was said later is dropped.
    """

    def __init__(self, data: VLMDataset, tokenizer: PreTrainedTokenizerBase, folder: Path, done_steps: int):
        self.tokenizer, self.folder, self.done_steps = tokenizer, folder, done_steps
        pictured = np.flatnonzero(data.image_counts > 0)[: 4 * PICTURES].tolist()  # some may be broken
        samples = data.__getitems__(pictured)
        self.rows = [sample for sample in samples if not isinstance(sample, PictureError)][:PICTURES]
        self.said: list[dict] | None = None

    def describe(self, model: MiniMindVLM, step: int) -> list[dict]:
        """Greedy answers of the model as it is now, after their questions; written down, and returned.

        Each is {"step", "picture", "prompt", "reference", "description"}.
        """
        if not self.rows:
            return []
        if self.said is None:
            self._begin()
        answers = first_answers(model, self.tokenizer, self.rows, LONGEST)
        said = [self._told(number, step, answer) for number, answer in enumerate(answers)]
        self.said += said
        self._write()
        return said

    def _told(self, number: int, step: int, answer: str) -> dict:
        row = self.rows[number]
        start, end = first_answer(row["labels"])
        question = self.tokenizer.decode(row["input_ids"][:start], skip_special_tokens=True)
        reference = self.tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
        return {
            "step": step,
            "picture": f"{number}.jpg",
            "prompt": asked_last(question),
            "reference": reference.strip(),
            "description": answer.strip(),
        }

    def _begin(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(self.rows):
            pixels = row["pixel_values"][0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((160, 160)).save(self.folder / f"{number}.jpg", quality=88)
        self.said = []
        path = self.folder / "samples.jsonl"
        if self.done_steps and path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.said = [row for row in rows if row["step"] <= self.done_steps]

    def _write(self):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.said)
        write_atomically(self.folder / "samples.jsonl", lambda file: file.write(lines.encode("utf-8")))
        page = page_of(self.said, self.folder.name)
        write_atomically(self.folder.with_name(f"{self.folder.name}.md"), lambda file: file.write(page.encode("utf-8")))


@torch.no_grad()
def first_answers(model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict], longest: int) -> list[str]:
    """Greedy answers, of at most `longest` tokens, to the first question of each row (as `VLMDataset` gives them)."""
    prompts = [row["input_ids"][: first_answer(row["labels"])[0]] for row in rows]
    asked = [
        [start for start in row["image_starts"].tolist() if start < len(prompt)]
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    inputs = left_padded(prompts, asked, model.config.pad_token_id)
    length = inputs["input_ids"].shape[1]
    pixels = [row["pixel_values"][: len(starts)] for row, starts in zip(rows, asked, strict=True)]
    inputs["pixel_values"] = torch.cat(pixels) if any(asked) else None
    was_training = model.training
    model.eval()
    try:
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if tensor is not None}
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    finally:
        model.train(was_training)
    return tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)


def first_answer(labels: torch.Tensor) -> tuple[int, int]:
    """The first learned stretch [start, end) of (L,) labels."""
    learned = labels != -100
    start = int(learned.int().argmax())
    rest = (~learned[start:]).nonzero()
    return start, start + int(rest[0]) if len(rest) else len(labels)


def asked_last(prompt: str) -> str:
    """The question in a decoded prompt, without its frame and the pictures' placeholders."""
    question = prompt.split("user\n")[-1].removesuffix("assistant\n")
    return question.replace("@" * 196, "").strip()


def page_of(said: list[dict], folder: str) -> str:
    """Markdown: each picture with what was said about it, step by step."""
    parts = [f"# What the model says: {folder.removesuffix('_samples')}\n"]
    for picture in dict.fromkeys(row["picture"] for row in said):
        rows = [row for row in said if row["picture"] == picture]
        parts.append(f"\n![{picture}]({folder}/{picture})\n\n**{as_text(rows[0]['prompt'])}**\n")
        parts.append(f"\n| step | |\n|---|---|\n| expected | {as_text(rows[0]['reference'])} |\n")
        parts += [f"| {row['step']:,} | {as_text(row['description'])} |\n" for row in rows]
    return "".join(parts)


def as_text(text: str) -> str:
    """For a cell of a Markdown table: on one line, nothing of it markup."""
    for character in "\\`*_{}[]<>#|~":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
