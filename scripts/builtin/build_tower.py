"""Build the small vision tower that stands in for CLIP's until that is downloaded, see README.md here.

    python scripts/builtin/build_tower.py     about 15 minutes on one core, into model/builtin/tower

It is trained once on images of training scenes, then frozen. A linear layer must be able to turn its patch features
into words, so it is trained with one: from each patch's feature a linear head predicts whether an object covers the
patch, and that object's colour, shape, size and place. The head is dropped.
"""

import copy
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser
from common.paths import BUILTIN_MODEL_DIR
from dataset.scenes.draw import JPEG_QUALITY, Scene, draw, heldout_scenes, patch_coverage, training_scene
from dataset.scenes.language import COLOURS, PLACES, SHAPES, SIZES

SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = CLIPVisionConfig(**SHAPE, patch_size=16, image_size=224)
PROCESSOR = CLIPImageProcessorPil()
TARGETS = ("object", *COLOURS, *SHAPES, *SIZES, *PLACES)
WORDS = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}
GROUPS = {name: slice(TARGETS.index(words[0]), TARGETS.index(words[-1]) + 1) for name, words in WORDS.items()}
COVERED, EMPTY = 0.2, 0.01  # patches covered by a share between the two are ignored
STEPS, BATCH_SIZE = 1500, 32  # each example a new scene
SEED = 0  # of the initial weights and the texts
OUT = BUILTIN_MODEL_DIR / "tower"


def predict(tower: CLIPVisionModel, head: nn.Linear, scenes: Sequence[Scene]) -> Tensor:
    """Returns what the head predicts of scenes, drawn and JPEG-compressed, (B, 196, len(TARGETS))."""
    images = []
    for scene in scenes:
        file = io.BytesIO()
        draw(scene).save(file, format="JPEG", quality=JPEG_QUALITY)
        images.append(Image.open(file))
    pixels = PROCESSOR(images=images, return_tensors="pt")["pixel_values"]
    return head(tower(pixel_values=pixels).last_hidden_state[:, 1:])  # without the class token, as a VLM uses them


def patch_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Returns targets (B, 196, len(TARGETS)), ones and zeros, and which patches are learned (B, 196)."""
    targets = torch.zeros(len(scenes), 196, len(TARGETS))
    learned = torch.ones(len(scenes), 196, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        for facts, coverage in zip(scene.facts, patch_coverage(scene).reshape(-1, 196), strict=True):
            learned[row, (coverage > EMPTY) & (coverage < COVERED)] = False
            for target in ("object", *astuple(facts)):
                targets[row, coverage >= COVERED, TARGETS.index(target)] = 1
    return targets, learned


def training_losses(tower: CLIPVisionModel, head: nn.Linear) -> Iterator[Tensor]:
    """Yields the loss of each step: the squared error of all targets, plus each group's cross-entropy on objects.

    The squared error makes the targets linear in the feature, which a projection into word embeddings needs; the
    cross-entropy separates the words.
    """
    for step in range(STEPS):
        scenes = [training_scene(step * BATCH_SIZE + index) for index in range(BATCH_SIZE)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = predict(tower, head, scenes).float()
        targets, learned = patch_targets(scenes)
        predicted, targets = predicted[learned], targets[learned]
        covered = targets[:, 0] == 1
        # Most patches are empty: they get half the weight, the others the other half.
        squares = (predicted - targets).square().sum(dim=1)
        loss = squares[covered].mean() + squares[~covered].mean()
        for group in GROUPS.values():
            loss = loss + F.cross_entropy(6 * predicted[covered, group], targets[covered, group].argmax(dim=1))
        yield loss


@torch.no_grad()
def save(tower: CLIPVisionModel, head: nn.Linear) -> dict:
    """Writes the tower, and returns the head's accuracy on held-out scenes: of objects, by their patches' mean.

    `whole` is of all four groups together, `patch` of object or background, over patches.
    """
    copy.deepcopy(tower).half().save_pretrained(OUT)
    PROCESSOR.save_pretrained(OUT)
    scenes = heldout_scenes()
    parts = [scenes[start : start + 50] for start in range(0, len(scenes), 50)]
    predicted = torch.cat([predict(tower, head, part) for part in parts])
    targets, learned = patch_targets(scenes)
    right = []
    for row, scene in enumerate(scenes):
        for coverage in patch_coverage(scene).reshape(-1, 196):
            covered = torch.from_numpy(coverage >= COVERED)
            mean, target = predicted[row, covered].mean(dim=0), targets[row, covered][0]
            right.append([bool(mean[group].argmax() == target[group].argmax()) for group in GROUPS.values()])
    shares = dict(zip(GROUPS, np.mean(right, axis=0), strict=True)) | {"whole": np.all(right, axis=1).mean()}
    shares["patch"] = ((predicted[..., 0] > 0.5) == (targets[..., 0] == 1))[learned].float().mean()
    return {name: round(float(share), 4) for name, share in shares.items()}


def train(groups: list[dict], losses: Iterable[Tensor], steps: int, peak: float, save: Callable[[], dict]):
    """Trains with AdamW and prints what `save` returns; a group's "factor" scales its rate, which rises to `peak`."""
    warm_up = max(1, steps // 20)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    parameters = [weight for group in groups for weight in group["params"]]
    for done, loss in enumerate(losses, start=1):
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - 1 - warm_up) / max(1, steps - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * peak * (done / warm_up if done <= warm_up else decay)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if done % max(1, steps // 10) == 0 or done == steps:
            print(f"step {done}, loss {loss.item():.4f}, held-out scenes: {json.dumps(save())}", flush=True)


def main():
    ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tower, head = CLIPVisionModel(CONFIG), nn.Linear(CONFIG.hidden_size, len(TARGETS))
    print(f"tower of {tower.num_parameters():,} parameters, {STEPS} steps of {BATCH_SIZE}")
    groups = [{"params": [*tower.parameters(), *head.parameters()], "factor": 1.0, "weight_decay": 0.02}]
    train(groups, training_losses(tower, head), STEPS, 1e-3, partial(save, tower, head))


if __name__ == "__main__":
    main()
