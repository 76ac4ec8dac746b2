"""A stage's record: everything that makes a stage. Nothing about a stage is written anywhere else."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dataset.lm_dataset import VLMCollator, VLMDataset

MODEL_INPUTS = ("input_ids", "labels", "image_starts", "learned_positions")


def answer_loss(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the cross-entropy summed over the learned tokens, and the experts' balancing loss (None without)."""
    inputs = {name: batch[name] for name in MODEL_INPUTS} | {"image_features": image_features(model, batch)}
    output = model(**inputs, reduction="sum")
    return output.loss, output.aux_loss


def image_features(model, batch: dict) -> torch.Tensor:
    """Returns a batch's (images, patches, width): from the cache, or encoded now."""
    if "image_features" not in batch:
        return model.encode_images(batch["pixel_values"])
    features = batch["image_features"]
    if "pixel_values" in batch:  # one by one, as compute_features does, for the same bits
        encoded = [model.encode_images(pixels) for pixels in batch["pixel_values"].split(1)]
        features[batch["unencoded"]] = torch.cat(encoded).to(features.dtype)
    return features


def cosine_learning_rate(args, done: float) -> float:
    """Returns the peak at 0 of the run done; cosine decay to 10 % at 1."""
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True, eq=False)
class Stage:
    """What makes a stage.

    Attributes:
        name: In the sidecar of its weights.
        title, story: What it is called, and what it does, in a line.
        defaults: The published settings, by flag; trainer/bundles.py has where a model needs others.
        data: Its data's name: dataset/{data}_data.jsonl, and dataset/builtin/{data}.jsonl of the built-in set.
        following: The command that comes next; {save_weight} and {sft_weight} are filled in.
        loss: (model, batch) -> (loss sum, balancing loss of experts or None).
        dataset, collator: A data file to samples, samples to a batch, whose `units` the loss is divided by.
        schedule: (flags, share of the run done) -> learning rate.
        add_flags: Adds the stage's own flags to a parser's `add_argument`.
    """

    name: str
    title: str
    story: str
    defaults: dict
    data: str
    following: str
    loss: Callable = answer_loss
    dataset: Callable = VLMDataset
    collator: Callable = VLMCollator
    schedule: Callable = cosine_learning_rate
    add_flags: Callable = lambda add: None
