"""A stage's record: everything that defines a stage. A model's bundle may override its defaults."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dataset.lm_dataset import VLMCollator, VLMDataset
from trainer.evaluate import Evaluator

MODEL_INPUTS = ("input_ids", "labels", "image_starts", "learned_positions")


def answer_loss(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the cross-entropy summed over the learned tokens, and the experts' balancing loss (None without)."""
    output = model(**model_inputs(model, batch), reduction="sum")
    return output.loss, output.aux_loss


def model_inputs(model, batch: dict) -> dict:
    """Returns what the model's `forward` takes of a batch of `VLMCollator`."""
    features = batch.get("image_features")  # (images, patches, width) from the cache, or encoded now
    if features is None:
        features = model.encode_images(batch["pixel_values"])
    elif "pixel_values" in batch:  # one by one, as compute_features does, for the same bits
        encoded = [model.encode_images(pixels) for pixels in batch["pixel_values"].split(1)]
        features[batch["unencoded"]] = torch.cat(encoded).to(features.dtype)
    return {name: batch[name] for name in MODEL_INPUTS} | {"image_features": features}


def pad_answers(batch: dict, batch_size: int) -> dict | None:
    """Pads a full batch of one image a row to one of a few shapes; `answer_loss` stays the same. None for others."""
    is_full = len(batch["input_ids"]) == len(batch["image_starts"]) == batch_size
    if not is_full or ("pixel_values" in batch) == ("image_features" in batch):
        return None
    length, learned = batch["input_ids"].shape[1], batch["learned_positions"]
    padded = round_up(length, 32)
    # Positions in the flattened batch move with its length. Padding names position 0, which is never learned.
    positions = learned // length * padded + learned % length
    return batch | {
        "input_ids": F.pad(batch["input_ids"], (0, padded - length)),
        "labels": F.pad(batch["labels"], (0, padded - length), value=-100),
        "learned_positions": F.pad(positions, (0, round_up(len(learned), 8) - len(learned))),
    }


def round_up(number: int, parts: int) -> int:
    """Rounds up to one of `parts` sizes between two powers of two, multiples of 8."""
    multiple = max(8, 2 ** (number.bit_length() - 1) // parts)
    return -(-number // multiple) * multiple


def frozen_copy(model):
    """Returns a copy of the model that does not learn; it shares the tower."""
    tower = model.vision_encoder
    return copy.deepcopy(model, {id(tower): tower}).requires_grad_(False).eval()


def cosine_learning_rate(args, done: float, step: int) -> float:
    """Returns the learning rate: its peak where `done` is 0, falling along a cosine to 10 % of it at 1."""
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True, eq=False)
class Stage:
    """What makes a stage."""

    name: str  # in the sidecar of its weights
    title: str  # what it is called
    story: str  # what it does, in a line
    # The published settings: all of from_weight, save_weight, freeze_llm, epochs, batch_size, learning_rate and
    # max_seq_len. trainer/bundles.py has where a model needs others.
    defaults: dict
    data: str  # its data's name: dataset/{data}_data.jsonl, and dataset/builtin/{data}.jsonl of the built-in set
    following: str  # the script that comes next
    # A data file to samples, called as `VLMDataset` is: a `VLMDataset` or a subclass.
    dataset: Callable = VLMDataset
    # (pad id, multiple of lengths) -> samples to a batch: tensors, and the numbers `units` (what the loss is divided
    # by: learned tokens, or pairs), `samples`, `tokens` and `skipped` (PictureErrors).
    collator: Callable = VLMCollator
    # (model, the batch's tensors, **companions) -> (loss summed over its units, balancing loss of experts or None).
    loss: Callable = answer_loss
    # (flags, model with its starting weights) -> what else the loss takes, by name: numbers, and frozen models such as
    # a reference model (`frozen_copy`), which go to the device. A checkpoint resumes only beside the same ones.
    companions: Callable = lambda args, model: {}
    # Measured on held-out rows in place of the loss, with the same arguments; None: the loss itself. The evaluator
    # gives its name and unit: `partial(Evaluator, metric="...", unit="...")`.
    metric: Callable | None = None
    # Measures held-out rows. Takes what `Evaluator` takes (`loss` has the companions), has its attributes `data` and
    # `skipped`, and a method `measure`; what that returns has `as_dict()` and is printed as a line.
    evaluator: Callable = Evaluator
    # (batch, batch_size) -> a batch of one of a few shapes with the same loss, whose step is then captured as a CUDA
    # graph, or None; a stage without it takes ordinary steps.
    pad: Callable | None = None
    schedule: Callable = cosine_learning_rate  # (flags, share of the run done, optimizer steps done) -> learning rate
    add_flags: Callable = lambda add: None  # adds the stage's own flags to a parser's `add_argument`
