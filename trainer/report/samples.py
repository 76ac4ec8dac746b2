"""Descriptions of a few fixed images, generated again and again while the model learns."""

import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from common.schema import Range, parse_json
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate
from model.model_vlm import MiniMindVLM
from model.word_maps import word_maps

IMAGES = 8
LONGEST = 64  # tokens of a description
LOOKING_SECONDS = 20.0  # from which on `look` begins no further image: a large model on a CPU takes many for each
LOOKS, LOOK_KEYS = "looking.jsonl", ("step", "picture", "prompt")
ABOUT = {"step": Range(int, 0, 1 << 53), "picture": str, "prompt": str}
SAMPLE = ABOUT | {"reference": str, "description": str}
LOOK = ABOUT | {"words": [{"word": str, "map": [[(float, int)]]}]}


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
        self.last: list[tuple[dict, torch.Tensor]] = []  # the newest descriptions, with their token ids

    def describe(self, model: MiniMindVLM, step: int) -> list[dict]:
        """Writes and returns greedy answers: {"step", "picture", "prompt", "reference", "description"} each."""
        if not self.rows:
            return []
        if self.generated is None:
            self._begin()
        ids = generate(model, row_prompts(self.rows, model.config.pad_token_id), LONGEST)
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        generated = []
        for number, (row, answer) in enumerate(zip(self.rows, answers, strict=True)):
            start, end = first_answer(row["labels"])
            prompt = self.tokenizer.decode(row["input_ids"][:start], skip_special_tokens=True)
            reference = self.tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
            sample = {"step": step, "picture": f"{number}.jpg", "prompt": last_question(prompt, self.image_tokens)}
            generated.append(sample | {"reference": reference.strip(), "description": answer.strip()})
        self.generated += generated
        self.last = list(zip(generated, ids, strict=True))
        self._write()
        return generated

    def look(self, model: MiniMindVLM):
        """Writes how much each word of the newest descriptions depends on each patch, to `folder`/looking.jsonl.

        A row of it is {"step", "picture", "prompt", "words": [{"word", "map"}, ...]}; see `looking.patch_maps`.
        """
        lines, started = [], time.perf_counter()
        for row, (sample, ids) in zip(self.rows, self.last, strict=False):
            if time.perf_counter() - started > LOOKING_SECONDS:
                break
            prompt = row_prompts([row], model.config.pad_token_id)
            if prompt["pixel_values"] is None:  # its images come after the first answer
                continue
            found = word_maps(model, self.tokenizer, prompt, ids)
            # Of the first image, which is the one that is kept.
            words = [{"word": word, "map": rounded(maps[0])} for word, maps in found]
            lines.append(json.dumps({key: sample[key] for key in LOOK_KEYS} | {"words": words}, ensure_ascii=False))
        if lines:
            text = "".join(f"{line}\n" for line in lines)
            write_atomically(self.folder / LOOKS, lambda file: file.write(text.encode("utf-8")))

    def _begin(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(self.rows):
            pixels = row["pixel_values"][0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((160, 160)).save(self.folder / f"{number}.jpg", quality=88)
        self.generated = []
        path = self.folder / "samples.jsonl"
        if self.done_steps and path.is_file():
            try:
                rows = read_lines(path, SAMPLE)
            except (OSError, ValueError) as error:
                raise UsageError(f"{display_path(path)} cannot be read ({error}): move it away") from error
            self.generated = [row for row in rows if row["step"] <= self.done_steps]

    def _write(self):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.generated)
        write_atomically(self.folder / "samples.jsonl", lambda file: file.write(lines.encode("utf-8")))
        page = page_of(self.generated, self.folder.name)
        write_atomically(self.folder.with_name(f"{self.folder.name}.md"), lambda file: file.write(page.encode("utf-8")))


def rounded(values: torch.Tensor) -> list:
    """Returns a matrix as lists, in hundredths."""
    return [[round(value, 2) + 0.0 for value in row] for row in values.tolist()]  # + 0.0: no -0.0


def read_looks(path: Path) -> dict[tuple, list[tuple[str, np.ndarray]]]:
    """Reads a looking.jsonl: {(step, picture, prompt): [(word, map (side, side) in nats), ...]}.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds something else.
    """
    looks = {}
    for row in read_lines(path, LOOK):
        words = [(word["word"], np.array(word["map"], dtype=np.float32)) for word in row["words"]]
        looks[tuple(row[key] for key in LOOK_KEYS)] = words
        shapes = {values.shape for _, values in words}
        if len(shapes) > 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise ValueError(f"maps of the shapes {shapes}")
    return looks


def read_lines(path: Path, schema) -> list[dict]:
    """Reads a samples.jsonl or looking.jsonl; raises OSError or ValueError if it holds something else."""
    with open(path, "rb") as file:
        return [parse_json(line, schema) for line in file]


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
