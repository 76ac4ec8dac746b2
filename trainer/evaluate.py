"""Does the model look at the image? Held-out loss with the right images, with those of other rows, and without any."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dataset.lm_dataset import PictureError, VLMCollator, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM
from trainer.support.processes import Processes

# The features of up to this many images stay in memory (301 kB each with CLIP) between measurements.
KEPT_PICTURES = 2048


@dataclass(frozen=True)
class HeldOut:
    """Mean loss per learned token (nats) over held-out rows; None where there is nothing to measure.

    Attributes:
        loss: With the right images.
        loss_shuffled: With the images of another row.
        loss_blind: Without images, their placeholders left out of the text.
        samples, tokens: Rows and learned tokens measured.
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
        """The grounding gap: how much the loss (nats per token) rises with the images of other rows."""
        return self._gap(self.loss_shuffled)

    @property
    def gap_blind(self) -> float | None:
        """How much it rises without images."""
        return self._gap(self.loss_blind)

    def _gap(self, other: float | None) -> float | None:
        return None if other is None or self.loss is None else other - self.loss

    def as_dict(self) -> dict:
        """Returns the figures for metrics and wandb."""
        values = vars(self) | {"gap_shuffled": self.gap_shuffled, "gap_blind": self.gap_blind}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}

    def __str__(self):
        def shown(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        return (
            f"held out: loss {shown(self.loss)}  shuffled images {shown(self.loss_shuffled)}  no images "
            f"{shown(self.loss_blind)}  grounding gap {shown(self.gap_shuffled)}"
        )


class Evaluator:
    """Measures a model on held-out rows; leaves weights, random state and the model's mode as they are.

    Args:
        data: The rows.
        model: The model, on its device.
        processes: The ranks that share the rows.
        dtype: Of matrix products.
        batch_size: Rows per rank and forward pass.
    """

    def __init__(self, data: VLMDataset, model: MiniMindVLM, processes: Processes, dtype: torch.dtype, batch_size: int):
        self.data, self.model, self.processes, self.dtype = data, model, processes, dtype
        self.batch_size = batch_size
        self.collate = VLMCollator(model.config.pad_token_id)
        self.order = np.argsort(data.lengths, kind="stable")  # by length, for little padding
        # A row's partner, whose images it gets, is the row half the set away among those with images.
        pictured = np.flatnonzero(data.image_counts[self.order] > 0)
        self.partners = dict(zip(pictured.tolist(), np.roll(pictured, -(len(pictured) // 2)).tolist(), strict=True))
        self.seen: dict[int, tuple[dict, torch.Tensor] | None] = {}
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
        sums = self.processes.sum(*sums)
        losses = [sums[i] / sums[3] if sums[3] else None for i in range(3)]
        if len(self.partners) < 2:  # no other row has images
            losses[1] = None
        if not self.partners:
            losses[2] = None
        return HeldOut(*losses, samples=int(sums[4]), tokens=int(sums[3]), seconds=time.perf_counter() - started)

    def mine(self) -> list[int]:
        """Returns this rank's places in `order`."""
        return list(range(self.processes.rank, len(self.order), self.processes.world_size))

    def _sums(self, show_progress: bool) -> list[float]:
        """This rank's summed losses with own, shuffled and no images, its learned tokens, and its rows."""
        sums, mine = [0.0, 0.0, 0.0, 0, 0], self.mine()
        keeps = self.data.picture_count <= KEPT_PICTURES
        for start in tqdm(
            range(0, len(mine), self.batch_size), "held-out loss", unit="batch", disable=not show_progress
        ):
            part = mine[start : start + self.batch_size]
            seen = self.seen if keeps else {}
            self._encode_rows(
                {*part, *(self.partners[place] for place in part if place in self.partners)} - seen.keys(), seen
            )
            part = [place for place in part if seen[place] is not None]
            if not part:
                continue
            for kind, (samples, features) in enumerate(self._variants(part, seen)):
                loss, learned = self._loss(samples, features)
                sums[kind] += loss
            sums[3] += learned  # the same for all three
            sums[4] += len(part)
        return sums

    def _encode_rows(self, places: set[int], seen: dict):
        """Puts the rows at these places, with their images' features, into `seen`; None for one with a broken image."""
        for start in range(0, len(places), self.batch_size):
            part = sorted(places)[start : start + self.batch_size]
            samples = self.data.__getitems__([int(self.order[place]) for place in part])
            batch, first = self.collate(samples), 0
            features = self._encode(batch)
            for place, sample in zip(part, samples, strict=True):
                if isinstance(sample, PictureError):
                    self.skipped.append(sample)
                    seen[place] = None
                    continue
                count = len(sample["image_starts"])
                row = {name: sample[name] for name in ("input_ids", "labels", "image_starts")}
                seen[place] = row, features[first : first + count]
                first += count

    def _encode(self, batch: dict) -> torch.Tensor:
        if "pixel_values" not in batch:
            return torch.empty(0)
        return self.model.encode_images(batch["pixel_values"].to(self.processes.device)).to("cpu", torch.float16)

    def _variants(self, places: list[int], seen: dict) -> Iterator[tuple[list[dict], torch.Tensor]]:
        """Yields the rows with their own images, with their partners', and without."""
        samples = [seen[place][0] for place in places]
        yield samples, torch.cat([seen[place][1] for place in places])
        yield samples, torch.cat([self._others(place, seen) for place in places])
        blind = [without_images(sample, self.data.image_tokens) for sample in samples]
        yield blind, torch.empty(0, self.model.config.vision_patches, self.model.config.vision_hidden_size)

    def _others(self, place: int, seen: dict) -> torch.Tensor:
        """As many of its partner's features as the row has images; its own where it has no partner, or a broken one."""
        own = seen[place][1]
        partner = seen.get(self.partners.get(place))
        other = own if partner is None else partner[1]
        return other.repeat(-(-len(own) // max(1, len(other))), 1, 1)[: len(own)]

    def _loss(self, samples: list[dict], features: torch.Tensor) -> tuple[float, int]:
        device = self.processes.device
        batch = self.collate(samples)
        names = ("input_ids", "labels", "image_starts", "learned_positions")
        inputs = {name: batch[name].to(device) for name in names}
        if len(inputs["learned_positions"]) == 0:
            return 0.0, 0
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(**inputs, image_features=features.to(device), reduction="sum")
        return float(output.loss), len(inputs["learned_positions"])


def without_images(sample: dict[str, torch.Tensor], image_tokens: int) -> dict[str, torch.Tensor]:
    """Returns the sample without its images' placeholders."""
    kept = torch.ones(len(sample["input_ids"]), dtype=torch.bool)
    for start in sample["image_starts"].tolist():
        kept[start : start + image_tokens] = False
    return {
        "input_ids": sample["input_ids"][kept],
        "labels": sample["labels"][kept],
        "image_starts": sample["image_starts"][:0],
    }


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def exact_match(evaluator: Evaluator, tokenizer, longest: int, show_progress: bool = False) -> tuple[int, int]:
    """Counts the short answers that the model gives word for word, over all ranks.

    Args:
        evaluator: Says which rows, and which ranks share them.
        longest: Rows whose first answer has at most so many tokens are asked.

    Returns:
        Right, and asked.
    """
    data, size = evaluator.data, evaluator.batch_size
    mine = [int(evaluator.order[place]) for place in evaluator.mine()]
    right = asked = 0
    for start in tqdm(range(0, len(mine), size), "short answers", disable=not show_progress):
        rows = [row for row in data.__getitems__(mine[start : start + size]) if not isinstance(row, PictureError)]
        spans = [first_answer(row["labels"]) for row in rows]
        short = [(row, span) for row, span in zip(rows, spans, strict=True) if span[1] - span[0] <= longest]
        if not short:
            continue
        prompts = row_prompts([row for row, _ in short], evaluator.model.config.pad_token_id)
        answers = generate_answers(evaluator.model, tokenizer, prompts, longest)
        for (row, (begin, end)), text in zip(short, answers, strict=True):
            expected = tokenizer.decode(row["input_ids"][begin:end], skip_special_tokens=True)
            right += text.strip() == expected.strip()
            asked += 1
    right, asked = evaluator.processes.sum(right, asked)
    return int(right), int(asked)
