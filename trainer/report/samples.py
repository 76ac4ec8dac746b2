"""Descriptions of a few fixed images at every evaluation."""

import json
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
LOOKING_SECONDS = 20.0  # after which `look` begins no further image: a large model on a CPU takes many for each
LOOKS, LOOK_KEYS = "looking.jsonl", ("step", "picture", "prompt")
ABOUT = {"step": Range(int, 0, 1 << 53), "picture": str, "prompt": str}
SAMPLE = ABOUT | {"reference": str, "description": str}
LOOK = ABOUT | {"words": [{"word": str, "map": [[(float, int)]]}]}


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
        self.last: list[tuple[dict, torch.Tensor]] = []  # the newest descriptions, with their token ids

    def describe(self, model: MiniMindVLM, step: int) -> list[dict]:
        """Writes and returns greedy answers: {"step", "picture", "prompt", "reference", "description"} each."""
        if not self.rows:
            return []
        if self.generated is None:
            self.generated = self._begin()
        ids = generate(model, row_prompts(self.rows, model.config.pad_token_id), LONGEST)
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        described = zip(self.questions, answers, strict=True)
        generated = [{"step": step, **sample, "description": answer.strip()} for sample, answer in described]
        self.generated += generated
        self.last = list(zip(generated, ids, strict=True))
        write_lines(self.folder / "samples.jsonl", self.generated)
        return generated

    def look(self, model: MiniMindVLM):
        """Writes how much each word of the newest descriptions depends on each patch, to `folder`/looking.jsonl."""
        looks, started = [], time.perf_counter()
        for row, (sample, ids) in zip(self.rows, self.last, strict=False):
            if time.perf_counter() - started > LOOKING_SECONDS:
                break
            prompt = row_prompts([row], model.config.pad_token_id)
            if prompt["pixel_values"] is None:  # its images come after the first answer
                continue
            words = []
            for word, maps in word_maps(model, self.tokenizer, prompt, ids):
                of_first_image = maps[0].double().numpy().round(2) + 0.0  # no -0.0
                words.append({"word": word, "map": of_first_image.tolist()})
            looks.append({key: sample[key] for key in LOOK_KEYS} | {"words": words})
        if looks:
            write_lines(self.folder / LOOKS, looks)

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
            return [row for row in read_lines(path, SAMPLE) if row["step"] <= self.done_steps]
        except (OSError, ValueError) as error:
            raise UsageError(f"{display_path(path)} cannot be read ({error}): move it away") from error


def write_lines(path: Path, rows: list[dict]):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def read_lines(path: Path, schema) -> list[dict]:
    """Reads a samples.jsonl or looking.jsonl; raises OSError or ValueError if it holds something else."""
    with open(path, "rb") as file:
        return [parse_json(line, schema) for line in file]


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
