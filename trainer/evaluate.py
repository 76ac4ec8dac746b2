"""Does the model look at the image? Held-out loss with the right images, with those of other rows, and without any."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM
from trainer.support.prefetch import tensors_of
from trainer.support.processes import Processes

# The features of up to this many images stay in memory (301 kB each with CLIP) between measurements.
CACHED_PICTURES = 2048


@dataclass(frozen=True)
class HeldOut:
    """Mean loss per unit (nats per learned token) over held-out rows; None where there is nothing to measure.

    Attributes:
        loss: With the right images.
        loss_shuffled: With the images of another row.
        loss_blind: Without images, their placeholders left out of the text.
        samples, tokens: Rows and units measured.
        seconds: Duration of the measurement.
    """

    loss: float | None
    loss_shuffled: float | None
    loss_blind: float | None
    samples: int
    tokens: int
    seconds: float

    @property
    def gap_shuffled(self) -> float | None:
        """The grounding gap: how much the loss rises with the images of other rows."""
        return None if self.loss_shuffled is None else self.loss_shuffled - self.loss

    @property
    def gap_blind(self) -> float | None:
        """How much the loss rises without images."""
        return None if self.loss_blind is None else self.loss_blind - self.loss

    def as_dict(self) -> dict:
        """Returns the figures for metrics and wandb."""
        values = vars(self) | {"gap_shuffled": self.gap_shuffled, "gap_blind": self.gap_blind}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}

    def __str__(self):
        figures = (self.loss, self.loss_shuffled, self.loss_blind, self.gap_shuffled)
        loss, shuffled, blind, gap = ("-" if value is None else f"{value:.4f}" for value in figures)
        return f"held out: loss {loss}  shuffled images {shuffled}  no images {blind}  grounding gap {gap}"


class Evaluator:
    """Measures a stage's loss on held-out rows; leaves weights, random state and the model's mode as they are.

    Args:
        data: The rows.
        model: The model, on its device.
        loss: (model, batch) -> (loss sum, ...), as a stage's.
        collate: Samples to a batch, as a stage's collator.
        processes: The ranks that share the rows.
        dtype: Compute dtype.
        batch_size: Rows per rank and forward pass.
    """

    def __init__(
        self,
        data: VLMDataset,
        model: MiniMindVLM,
        loss: Callable,
        collate: Callable,
        processes: Processes,
        dtype: torch.dtype,
        batch_size: int,
    ):
        self.data, self.model, self.loss, self.collate = data, model, loss, collate
        self.processes, self.dtype, self.batch_size = processes, dtype, batch_size
        self.order = np.argsort(data.lengths, kind="stable")  # by length, for little padding
        # A row's partner, whose images it gets, is the row half the set away among those with images.
        pictured = np.flatnonzero(data.image_counts[self.order] > 0)
        self.partners = dict(zip(pictured.tolist(), np.roll(pictured, -(len(pictured) // 2)).tolist(), strict=True))
        self.samples: dict[int, dict | None] = {}  # by place in `order`; None for one with a broken image
        self.skipped: list[PictureError] = []

    def measure(self, show_progress: bool = False) -> HeldOut:
        """Measures once; all ranks take part, and each gets the result."""
        started, was_training = time.perf_counter(), self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                sums = self._sums(show_progress)
        finally:
            self.model.train(was_training)
        *sums, units, samples = self.processes.sum(*sums)
        losses = [total / units if units else None for total in sums]
        if len(self.partners) < 2:  # no other row has images
            losses[1] = None
        if not self.partners:
            losses[2] = None
        return HeldOut(*losses, samples=int(samples), tokens=int(units), seconds=time.perf_counter() - started)

    def places(self) -> list[int]:
        """Returns this rank's places in `order`."""
        return list(range(self.processes.rank, len(self.order), self.processes.world_size))

    def _sums(self, show_progress: bool) -> list[float]:
        """Returns this rank's summed losses with own, shuffled and no images, its units, and its rows."""
        sums, places = [0.0, 0.0, 0.0, 0, 0], self.places()
        starts = range(0, len(places), self.batch_size)
        for start in tqdm(starts, "held-out loss", unit="batch", disable=not show_progress):
            part = places[start : start + self.batch_size]
            partners = {self.partners[place] for place in part if place in self.partners}
            self._load(sorted({*part, *partners} - self.samples.keys()))
            part = [place for place in part if self.samples[place] is not None]
            own = [self.samples[place] for place in part]
            shuffled = [self.samples[place] | {"image_features": self._other_features(place)} for place in part]
            blind = [self.data.without_images(row) | {"image_features": row["image_features"][:0]} for row in own]
            for way, rows in enumerate((own, shuffled, blind) if part else ()):
                loss, units = self._loss(rows)
                sums[way] += loss
            if part:
                sums[3:] = sums[3] + units, sums[4] + len(part)  # the units are the same in all three ways
            if self.data.picture_count > CACHED_PICTURES:
                self.samples.clear()
        return sums

    def _load(self, places: list[int]):
        """Reads the rows at these places, with their images' features in place of the pixels."""
        for start in range(0, len(places), self.batch_size):
            part = places[start : start + self.batch_size]
            rows = dict(zip(part, self.data.__getitems__(self.order[part].tolist()), strict=True))
            self.skipped += [row for row in rows.values() if isinstance(row, PictureError)]
            pixels = {place: row["pixel_values"] for place, row in rows.items() if not isinstance(row, PictureError)}
            self.samples |= dict.fromkeys(part)
            if pixels:
                encoded = self.model.encode_images(torch.cat([*pixels.values()]).to(self.processes.device))
                features = encoded.to("cpu", torch.float16).split([len(of_row) for of_row in pixels.values()])
                for place, of_row in zip(pixels, features, strict=True):
                    del rows[place]["pixel_values"]
                    self.samples[place] = rows[place] | {"image_features": of_row}

    def _other_features(self, place: int) -> torch.Tensor:
        """Partner's features, repeated to this row's image count; its own without a partner, or with a broken one."""
        own = self.samples[place]["image_features"]
        partner = self.samples.get(self.partners.get(place))
        other = own if partner is None else partner["image_features"]
        return other.repeat(-(-len(own) // max(1, len(other))), 1, 1)[: len(own)]

    def _loss(self, samples: list[dict]) -> tuple[float, int]:
        batch, device = self.collate(samples), self.processes.device
        if batch["units"] == 0:
            return 0.0, 0
        tensors = {name: part.to(device) for name, part in tensors_of(batch).items()}
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, *_ = self.loss(self.model, tensors)
        return float(loss), batch["units"]


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def exact_match(evaluator: Evaluator, tokenizer, longest: int, show_progress: bool = False) -> tuple[int, int]:
    """Counts the short answers that the model gives exactly, over all ranks.

    Args:
        evaluator: Its rows are asked, shared by its ranks.
        longest: Only rows with a first answer of at most this many tokens are asked.

    Returns:
        Number of exact answers, and of rows asked.
    """
    data, size, places = evaluator.data, evaluator.batch_size, evaluator.places()
    right = asked = 0
    for start in tqdm(range(0, len(places), size), "short answers", disable=not show_progress):
        rows = data.__getitems__(evaluator.order[places[start : start + size]].tolist())
        spans = [(row, *first_answer(row["labels"])) for row in rows if not isinstance(row, PictureError)]
        short = [(row, begin, end) for row, begin, end in spans if end - begin <= longest]
        if not short:
            continue
        prompts = row_prompts([row for row, *_ in short], evaluator.model.config.pad_token_id)
        answers = generate_answers(evaluator.model, tokenizer, prompts, longest)
        for (row, begin, end), text in zip(short, answers, strict=True):
            expected = tokenizer.decode(row["input_ids"][begin:end], skip_special_tokens=True)
            right += text.strip() == expected.strip()
        asked += len(short)
    right, asked = evaluator.processes.sum(right, asked)
    return int(right), int(asked)
