"""Does the model look at the image? Held-out loss with the right images, with those of other rows, and without any."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM
from trainer.support.processes import Processes, tensors_of

# The features of up to this many images stay in memory (301 kB each with CLIP) between measurements.
CACHED_PICTURES = 2048
SHORT_ANSWER = 16  # tokens
# Pictures are divided into this many groups: the spread of their gaps is the error of the gap, from FEWEST_GROUPS on.
GROUPS, FEWEST_GROUPS = 32, 8


@dataclass(frozen=True)
class HeldOut:
    """Mean loss, or a stage's other metric, per unit of held-out rows; None where there is nothing to measure."""

    loss: float | None  # with the right images
    loss_shuffled: float | None  # with the images of another row
    loss_blind: float | None  # without images, their placeholders left out of the text
    # The standard error of `gap_shuffled` over groups of pictures, each with all its rows; None for too few pictures.
    gap_error: float | None
    samples: int  # rows measured
    tokens: int  # units measured
    seconds: float
    gap_shuffled: float | None  # the grounding gap: how much the loss rises with the images of other rows
    gap_blind: float | None  # how much it rises without images
    metric: str = "loss"  # what is measured
    unit: str = "nats per token"  # of it

    def as_dict(self) -> dict:
        """Returns the figures for metrics and wandb."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in vars(self).items()}

    def __str__(self):
        figures = (self.loss, self.loss_shuffled, self.loss_blind, self.gap_shuffled)
        loss, shuffled, blind, gap = ("-" if value is None else f"{value:.4f}" for value in figures)
        gap += "" if self.gap_error is None else f" ± {self.gap_error:.4f}"
        return f"held out: {self.metric} {loss}  shuffled images {shuffled}  no images {blind}  grounding gap {gap}"


@dataclass
class Evaluator:
    """Measures a stage's loss on held-out rows; leaves weights, random state and the model's mode as they are."""

    data: VLMDataset
    model: MiniMindVLM  # on its device
    loss: Callable  # (model, batch) -> (loss sum, ...), as a stage's
    collate: Callable  # samples to a batch, as a stage's collator
    processes: Processes  # they share the rows
    dtype: torch.dtype  # of matrix products
    batch_size: int  # rows per rank and forward pass
    metric: str = HeldOut.metric  # the name of what `loss` measures, for reports
    unit: str = HeldOut.unit

    def __post_init__(self):
        first = self.data.first_pictures
        first = np.where(first < 0, -1 - np.arange(len(first)), first)  # each row without images counts as one
        pictures = np.unique(first, return_inverse=True)[1]
        groups = pictures * GROUPS // (pictures.max(initial=0) + 1)
        self.order = np.lexsort((self.data.lengths, groups))  # by length in each group, for little padding
        self.groups = groups[self.order]
        # Rows with images are sorted by picture; a row gets the images of its partner, half the set further on.
        pictured = np.lexsort((self.order, pictures[self.order]))
        pictured = pictured[self.data.image_counts[self.order[pictured]] > 0]
        self.partners = dict(zip(pictured.tolist(), np.roll(pictured, -(len(pictured) // 2)).tolist(), strict=True))
        self.shown = len(np.unique(first[first >= 0]))
        self.samples: dict[int, dict | None] = {}  # by place in `order`; None for one with a broken image
        self.skipped: list[PictureError] = []
        # Bars are shown by the main rank, in a terminal.
        self.bar = partial(tqdm, leave=False, disable=None if self.processes.is_main else True)

    def batches(self) -> list[list[int]]:
        """Returns this rank's places in `order`, in batches of one group each."""
        batches = []
        for group in np.unique(self.groups)[self.processes.rank :: self.processes.world_size]:
            places = np.flatnonzero(self.groups == group).tolist()
            batches += [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
        return batches

    @torch.no_grad()
    def measure(self) -> HeldOut:
        """Measures once; all ranks take part, and each gets the result."""
        started, was_training, device = time.perf_counter(), self.model.training, self.processes.device
        by_group = np.zeros((GROUPS, 5))  # summed losses with own, shuffled and no images, units, rows
        self.model.eval()
        for part in self.bar(self.batches(), "held-out loss"):
            of_group = by_group[self.groups[part[0]]]
            partners = {self.partners[place] for place in part if place in self.partners}
            self._load(sorted({*part, *partners} - self.samples.keys()))
            part = [place for place in part if self.samples[place] is not None]
            own = [self.samples[place] for place in part]
            shuffled, blind = [], []
            for place, row in zip(part, own, strict=True):
                features, partner = row["image_features"], self.samples.get(self.partners.get(place))
                others = features if partner is None else partner["image_features"]  # as many of them as it has
                shuffled.append(row | {"image_features": torch.from_numpy(np.resize(others, features.shape))})
                blind.append(self.data.without_images(row) | {"image_features": features[:0]})
            for way, rows in enumerate((own, shuffled, blind)):
                batch = self.collate(rows)
                if batch["units"] > 0:
                    tensors = {name: tensor.to(device) for name, tensor in tensors_of(batch).items()}
                    with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                        loss, *_ = self.loss(self.model, tensors)
                    of_group[way] += float(loss)
            of_group[3:] += batch["units"], len(part)  # the units are the same in all three ways
            if self.data.image_count > CACHED_PICTURES:
                self.samples.clear()
        self.model.train(was_training)
        by_group = np.reshape(self.processes.sum(*by_group.flatten()), by_group.shape)
        *sums, units, samples = by_group.sum(0).tolist()
        losses, error = [total / units if units else None for total in sums], None
        if self.shown < 2:  # no row has another image
            losses[1] = None
        if not self.partners:
            losses[2] = None
        measured = by_group[by_group[:, 3] > 0]
        if losses[1] is not None and len(measured) >= FEWEST_GROUPS:  # of a ratio of sums over groups
            deviations = measured[:, 1] - measured[:, 0] - (losses[1] - losses[0]) * measured[:, 3]
            error = float(np.sqrt((deviations**2).sum() * len(measured) / (len(measured) - 1)) / units)
        shuffled, blind = (None if loss is None else loss - losses[0] for loss in losses[1:])
        gaps = {"gap_shuffled": shuffled, "gap_blind": blind, "gap_error": error}
        sizes = {"samples": int(samples), "tokens": int(units), "seconds": time.perf_counter() - started}
        return HeldOut(*losses, **gaps, **sizes, metric=self.metric, unit=self.unit)

    def _load(self, places: list[int]):
        """Reads the rows at these places, with their images' features in place of the pixels."""
        for start in range(0, len(places), self.batch_size):
            part = places[start : start + self.batch_size]
            rows = self.data.__getitems__(self.order[part].tolist())
            readable = {place: row for place, row in zip(part, rows, strict=True) if not isinstance(row, PictureError)}
            self.samples |= dict.fromkeys(part) | readable
            self.skipped += [row for row in rows if isinstance(row, PictureError)]
            if readable:
                pixels = [row.pop("pixel_values") for row in readable.values()]
                encoded = self.model.encode_images(torch.cat(pixels).to(self.processes.device))
                features = encoded.to("cpu", torch.float16).split([len(of_row) for of_row in pixels])
                for row, of_row in zip(readable.values(), features, strict=True):
                    row["image_features"] = of_row


def exact_match(evaluator: Evaluator, tokenizer, longest: int, most: float = math.inf) -> dict:
    """Counts the short answers that the model gives to the letter, over all ranks.

    Asks only rows whose first answer has at most `longest` tokens, of about `most` rows on each rank. Returns the
    number asked, the shares right with their own images and with those of other rows, and what always giving a
    question's most frequent answer gets; {} if nothing is asked.
    """
    data, model, right, expected = evaluator.data, evaluator.model, Counter(), Counter()
    batches, seen, ways = evaluator.batches(), 0, ("exact_match", "exact_shuffled")
    # Not in their order: short rows come first in each group.
    for number in evaluator.bar(np.random.default_rng(0).permutation(len(batches)), "short answers"):
        if seen >= most:
            break
        part, asked = batches[number], []
        seen += len(part)
        places = [*part, *(evaluator.partners.get(place, place) for place in part)]
        rows = data.__getitems__(evaluator.order[places].tolist())
        for row, other in zip(rows, rows[len(part) :], strict=False):
            if isinstance(row, PictureError) or isinstance(other, PictureError):
                continue
            begin, end = first_answer(row["labels"])
            if end - begin <= longest:
                text = tokenizer.decode(row["input_ids"][begin:end], skip_special_tokens=True).strip()
                others = np.resize(other["pixel_values"], row["pixel_values"].shape)  # as many of them as it has
                asked.append((row, row | {"pixel_values": torch.from_numpy(others)}, text))
                expected[tuple(row["input_ids"][:begin].tolist()), text] += 1
        for place, way in enumerate(ways) if asked else ():
            prompts = row_prompts([of_row[place] for of_row in asked], model.config.pad_token_id)
            answers = generate_answers(model, tokenizer, prompts, longest)
            right[way] += sum(answer.strip() == text for answer, (*_, text) in zip(answers, asked, strict=True))
    of_ranks = evaluator.processes.gather((right, expected))
    right, expected = (sum(counters, Counter()) for counters in zip(*of_ranks, strict=True))
    if not (asked := expected.total()):
        return {}
    frequent = {question: count for (question, _), count in reversed(expected.most_common())}  # of each, the highest
    # An answer given once was not to be foreseen.
    right["exact_frequent"] = sum(count for count in frequent.values() if count > 1)
    return {"short_answers": asked} | {way: right[way] / asked for way in (*ways, "exact_frequent")}
