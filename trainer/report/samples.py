"""Descriptions of a few fixed images at every evaluation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from common.schema import Range, parse_json
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM

IMAGES = 8
LONGEST = 64  # tokens of a description
SAMPLE = {"step": Range(int, 0, 1 << 53)} | dict.fromkeys(("picture", "prompt", "reference", "description"), str)


class Samples:
    """Describes up to 8 images and writes every description to `folder`/samples.jsonl.

    Args:
        data: Its first rows with different pictures are described.
        tokenizer: The model's.
        folder: Where the images and samples.jsonl go.
        done_steps: Steps done before a resume; descriptions of later ones are dropped.
    """

    def __init__(self, data: VLMDataset, tokenizer: PreTrainedTokenizerBase, folder: Path, done_steps: int):
        self.tokenizer, self.folder, self.done_steps = tokenizer, folder, done_steps
        pictures, rows = np.unique(data.first_pictures, return_index=True)
        samples = data.__getitems__(np.sort(rows[pictures >= 0])[: 4 * IMAGES].tolist())  # some may be broken
        self.rows = [sample for sample in samples if not isinstance(sample, PictureError)][:IMAGES]
        self.questions = []
        for number, row in enumerate(self.rows):
            start, end = first_answer(row["labels"])
            prompt = tokenizer.decode(row["input_ids"][:start], skip_special_tokens=True)
            reference = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
            question = prompt.split("user\n")[-1].removesuffix("assistant\n").replace("@" * data.image_tokens, "")
            sample = {"picture": f"{number}.jpg", "prompt": question.strip(), "reference": reference.strip()}
            self.questions.append(sample)
        self.generated: list[dict] | None = None

    def describe(self, model: MiniMindVLM, step: int) -> list[dict]:
        """Writes and returns greedy answers: {"step", "picture", "prompt", "reference", "description"} each."""
        if not self.rows:
            return []
        if self.generated is None:
            self.generated = self._begin()
        prompts = row_prompts(self.rows, model.config.pad_token_id)
        answers = generate_answers(model, self.tokenizer, prompts, LONGEST)
        described = zip(self.questions, answers, strict=True)
        generated = [{"step": step, **sample, "description": answer.strip()} for sample, answer in described]
        self.generated += generated
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.generated)
        write_atomically(self.folder / "samples.jsonl", lambda file: file.write(text.encode("utf-8")))
        return generated

    def _begin(self) -> list[dict]:
        """Writes the images; returns a resumed run's earlier descriptions."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, sample in zip(self.rows, self.questions, strict=True):
            pixels = row["pixel_values"][0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((160, 160)).save(self.folder / sample["picture"], quality=88)
        path = self.folder / "samples.jsonl"
        if not self.done_steps or not path.is_file():
            return []
        try:
            return [row for row in read_samples(path) if row["step"] <= self.done_steps]
        except (OSError, ValueError) as error:
            raise UsageError(f"{display_path(path)} cannot be read ({error}): move it away") from error


def read_samples(path: Path) -> list[dict]:
    """Reads a samples.jsonl; raises OSError or ValueError if it holds something else."""
    with open(path, "rb") as file:
        return [parse_json(line, SAMPLE) for line in file]
