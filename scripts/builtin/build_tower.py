"""Build the small vision tower that stands in for CLIP's until that is downloaded, see README.md here.

    python scripts/builtin/build_tower.py                   # about 15 minutes on one core, into model/builtin/tower
    python scripts/builtin/build_tower.py --steps 50 --out_dir /tmp/tower

It is trained once on images of training scenes, then frozen. A linear layer must be able to turn its patch features
into words, so it is trained with one: from each patch's feature a linear head predicts whether an object covers the
patch, and that object's colour, shape, size and place. The head is dropped.
"""

import copy
import io
import json
import math
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.paths import BUILTIN_MODEL_DIR
from dataset.scenes.draw import JPEG_QUALITY, Scene, draw, heldout_scenes, patch_coverage, training_scene
from dataset.scenes.language import COLOURS, PLACES, SHAPES, SIZES, Facts

CONFIG = CLIPVisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, patch_size=16, image_size=224
)
# What the head predicts from a patch: whether an object covers it, and each word about the object.
TARGETS = ("object", *COLOURS, *SHAPES, *SIZES, *PLACES)
GROUPS = {
    attribute: slice(TARGETS.index(words[0]), TARGETS.index(words[-1]) + 1)
    for attribute, words in {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}.items()
}
COVERED, EMPTY = 0.2, 0.01  # patches covered by a share between the two are ignored
LOG_INTERVAL = 50  # steps
SEED = 0  # of the initial weights and the texts


def word_targets(facts: Facts) -> list[int]:
    """Returns the positions in TARGETS of an object's colour, shape, size and place."""
    return [TARGETS.index(word) for word in astuple(facts)]


def pixels(scenes: Sequence[Scene], processor: CLIPImageProcessorPil) -> Tensor:
    """Returns the scenes as the tower gets them: drawn, JPEG-compressed and preprocessed, (B, 3, 224, 224)."""
    images = []
    for scene in scenes:
        file = io.BytesIO()
        draw(scene).save(file, format="JPEG", quality=JPEG_QUALITY)
        images.append(Image.open(file))
    return processor(images=images, return_tensors="pt")["pixel_values"]


def patch_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Returns targets (B, 196, len(TARGETS)), ones and zeros, and which patches are learned (B, 196)."""
    targets = np.zeros((len(scenes), 196, len(TARGETS)), dtype=np.float32)
    learned = np.ones((len(scenes), 196), dtype=bool)
    for row, scene in enumerate(scenes):
        for facts, coverage in zip(scene.facts, patch_coverage(scene).reshape(-1, 196), strict=True):
            covered = np.flatnonzero(coverage >= COVERED)
            learned[row, (coverage > EMPTY) & (coverage < COVERED)] = False
            targets[row, covered[:, None], [0, *word_targets(facts)]] = 1
    return torch.from_numpy(targets), torch.from_numpy(learned)


def features(tower: CLIPVisionModel, pixel_values: Tensor) -> Tensor:
    """Returns the patch features as a VLM uses them: last_hidden_state without the class token, (B, 196, width)."""
    return tower(pixel_values=pixel_values).last_hidden_state[:, 1:]


def head_loss(predicted: Tensor, targets: Tensor, learned: Tensor) -> Tensor:
    """Returns the squared error of all targets, plus the cross-entropy of each group on patches of an object.

    The squared error makes the targets linear in the feature, which a projection into word embeddings needs; the
    cross-entropy separates the words.
    """
    predicted, targets = predicted[learned], targets[learned]
    covered = targets[:, 0] == 1
    # Most patches are empty: they get half the weight, the others the other half.
    squares = (predicted - targets).square().sum(dim=1)
    loss = squares[covered].mean() + squares[~covered].mean()
    for group in GROUPS.values():
        loss = loss + F.cross_entropy(6 * predicted[covered, group], targets[covered, group].argmax(dim=1))
    return loss


@torch.no_grad()
def measure(tower: CLIPVisionModel, head: nn.Linear, processor: CLIPImageProcessorPil) -> dict:
    """Returns the linear head's accuracy on held-out scenes, from 0 to 1.

    Each group's, over objects (by the mean over an object's patches); `whole`: of all four groups together; `patch`: of
    object or background, over patches.
    """
    scenes = heldout_scenes()
    parts = [scenes[start : start + 50] for start in range(0, len(scenes), 50)]
    predicted = torch.cat([head(features(tower, pixels(part, processor))) for part in parts])
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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns a linear warm-up over 5 % of the steps, then a cosine decay to 1 % of the peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


def parse_arguments(description: str, **defaults) -> Namespace:
    """Reads the flags of both build scripts, beside settings that are no flags; one thread and one seed."""
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--out_dir", type=file_path, help="folder to write")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="examples per step, each a new scene")
    parser.set_defaults(**defaults)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    return parser.parse_args()


def train(args: Namespace, groups: list[dict], batches: Iterable[tuple], loss_of: Callable, measure_and_save: Callable):
    """Trains with AdamW, printing losses and held-out results as it goes.

    Args:
        args: Of `parse_arguments`, with the peak `learning_rate`, and the steps of a `save_interval`.
        groups: AdamW's parameter groups; "factor" scales a group's learning rate.
        batches: One (name of the loss, batch) per step.
        loss_of: Returns the loss of a batch.
        measure_and_save: Writes the weights and returns the held-out results.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    parameters = [weight for group in groups for weight in group["params"]]
    started, recent = time.time(), defaultdict(list)
    for done, (name, batch) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(done - 1, args.steps, args.learning_rate)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent[name].append(loss.item())
        if done % LOG_INTERVAL == 0:
            losses = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in sorted(recent.items()))
            print(f"step {done} {losses} {time.time() - started:.0f} s", flush=True)
            recent.clear()
        if done % args.save_interval == 0 or done == args.steps:
            print(f"held-out scenes: {json.dumps(measure_and_save())}", flush=True)


def main():
    settings = {"out_dir": BUILTIN_MODEL_DIR / "tower", "steps": 1500, "learning_rate": 1e-3, "save_interval": 300}
    args = parse_arguments(__doc__, **settings)
    processor = CLIPImageProcessorPil()
    tower, head = CLIPVisionModel(CONFIG), nn.Linear(CONFIG.hidden_size, len(TARGETS))

    def loss_of(first_scene: int) -> Tensor:
        scenes = [training_scene(first_scene + index) for index in range(args.batch_size)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = head(features(tower, pixels(scenes, processor)))
        return head_loss(predicted.float(), *patch_targets(scenes))

    def measure_and_save() -> dict:
        copy.deepcopy(tower).half().save_pretrained(args.out_dir)
        processor.save_pretrained(args.out_dir)
        return measure(tower, head, processor)

    print(f"tower of {tower.num_parameters():,} parameters, {args.steps} steps of {args.batch_size}")
    groups = [{"params": [*tower.parameters(), *head.parameters()], "factor": 1.0, "weight_decay": 0.02}]
    batches = (("loss", step * args.batch_size) for step in range(args.steps))
    train(args, groups, batches, loss_of, measure_and_save)


if __name__ == "__main__":
    main()
