"""Builds the small vision tower that stands in for CLIP's where nothing was downloaded (scripts/builtin/README.md).

    python scripts/builtin/build_tower.py                   # about 15 minutes on one core, into model/builtin/tower
    python scripts/builtin/build_tower.py --steps 50 --out_dir /tmp/tower

The tower is trained once on pictures of training scenes, then frozen for good, like the real one. A single linear
layer must be able to turn its patch features into words, so that is what it is trained with: from each patch's
feature a linear head tells whether an object covers the patch, and that object's colour, shape, size and place. The
head is thrown away.
"""

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.paths import BUILTIN_MODEL_DIR  # noqa: E402
from dataset.scenes.draw import JPEG_QUALITY, Scene, draw, heldout_scenes, patch_coverage, training_scene  # noqa: E402
from dataset.scenes.language import COLOURS, PLACES, SHAPES, SIZES  # noqa: E402

CONFIG = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    patch_size=16,
    image_size=224,
)
GROUPS = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}
TARGETS = 1 + sum(len(words) for words in GROUPS.values())  # the first: is there an object at all
COVERED, EMPTY = 0.2, 0.01  # a patch covered less than COVERED and more than EMPTY is not learned from


def pixels(scenes: Sequence[Scene], processor: CLIPImageProcessorPil) -> Tensor:
    """Returns the scenes as the tower sees them later: drawn, through JPEG, preprocessed; (scenes, 3, 224, 224)."""
    pictures = []
    for scene in scenes:
        file = io.BytesIO()
        draw(scene).save(file, format="JPEG", quality=JPEG_QUALITY)
        pictures.append(Image.open(file))
    return processor(images=pictures, return_tensors="pt")["pixel_values"]


def patch_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Returns what each patch's feature must encode.

    Returns:
        Ones and zeros of shape (scenes, 196, TARGETS): an object is there, then its colour, shape, size and place by
        GROUPS, all zeros where no object is; and of shape (scenes, 196) which patches are to be learned from.
    """
    targets = np.zeros((len(scenes), 196, TARGETS), dtype=np.float32)
    learned = np.ones((len(scenes), 196), dtype=bool)
    for row, scene in enumerate(scenes):
        for thing, coverage in zip(scene.objects, patch_coverage(scene).reshape(-1, 196), strict=True):
            covered = np.flatnonzero(coverage >= COVERED)
            learned[row, (coverage > EMPTY) & (coverage < COVERED)] = False
            targets[row, covered, 0] = 1
            start = 1
            for attribute, words in GROUPS.items():
                targets[row, covered, start + words.index(getattr(thing.facts, attribute))] = 1
                start += len(words)
    return torch.from_numpy(targets), torch.from_numpy(learned)


def features(tower: CLIPVisionModel, pixel_values: Tensor) -> Tensor:
    """Returns the patch features as a VLM uses them: last_hidden_state without class token, (images, 196, width)."""
    return tower(pixel_values=pixel_values).last_hidden_state[:, 1:]


def reading_loss(told: Tensor, targets: Tensor, learned: Tensor) -> Tensor:
    """Squared error of all that is told, plus cross-entropy of each group where an object is.

    The squared error makes the values themselves linear in the feature (a projection into word embeddings needs
    that); the cross-entropy makes the words differ clearly.
    """
    told, targets = told[learned], targets[learned]
    covered = targets[:, 0] == 1
    # Most patches are empty: half the weight for these, half for the rest.
    squares = (told - targets).square().sum(dim=1)
    loss = squares[covered].mean() + squares[~covered].mean()
    start = 1
    for words in GROUPS.values():
        group = slice(start, start + len(words))
        loss = loss + F.cross_entropy(6 * told[covered, group], targets[covered, group].argmax(dim=1))
        start += len(words)
    return loss


@torch.no_grad()
def measure(tower: CLIPVisionModel, head: nn.Linear, processor: CLIPImageProcessorPil, scenes: list[Scene]) -> dict:
    """Measures how often the linear head is right, as shares from 0 to 1.

    For each group, over objects (the mean over the patches that an object covers); `whole` where all four groups are
    right; `patch` for objects told from background, over patches.
    """
    told = torch.cat(
        [head(features(tower, pixels(scenes[at : at + 50], processor))) for at in range(0, len(scenes), 50)]
    )
    targets, learned = patch_targets(scenes)
    right: dict[str, list[bool]] = {name: [] for name in (*GROUPS, "whole")}
    for row, scene in enumerate(scenes):
        for coverage in patch_coverage(scene).reshape(-1, 196):
            covered = torch.from_numpy(coverage >= COVERED)
            mean, target, start, all_right = told[row, covered].mean(dim=0), targets[row, covered][0], 1, True
            for name, words in GROUPS.items():
                group = slice(start, start + len(words))
                right[name].append(bool(mean[group].argmax() == target[group].argmax()))
                all_right &= right[name][-1]
                start += len(words)
            right["whole"].append(all_right)
    result = {name: round(sum(values) / len(values), 4) for name, values in right.items()}
    result["patch"] = round(float(((told[..., 0] > 0.5) == (targets[..., 0] == 1))[learned].float().mean()), 4)
    return result


def batches(batch_size: int, processor: CLIPImageProcessorPil) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of training scenes, none twice: pictures, targets, and which patches to learn from."""
    index = 0
    while True:
        scenes = [training_scene(index + offset) for offset in range(batch_size)]
        index += batch_size
        yield pixels(scenes, processor), *patch_targets(scenes)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to 1 % of the peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


def save(tower: CLIPVisionModel, processor: CLIPImageProcessorPil, folder: Path) -> None:
    """Writes config.json, model.safetensors (half precision) and preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    half = CLIPVisionModel(CONFIG).half()
    half.load_state_dict(tower.state_dict())
    half.save_pretrained(folder)
    processor.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out_dir", type=file_path, default=BUILTIN_MODEL_DIR / "tower", help="where it is written")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures a step, each drawn anew")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="the peak")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log_interval", type=int, default=100, help="steps between printed lines")
    parser.add_argument("--save_interval", type=int, default=300, help="steps between measured and saved states")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = CLIPImageProcessorPil()
    tower, head = CLIPVisionModel(CONFIG), nn.Linear(CONFIG.hidden_size, TARGETS)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    scenes, started, recent = heldout_scenes(), time.time(), []
    print(
        f"tower of {sum(p.numel() for p in tower.parameters()):,} parameters, {args.steps} steps of {args.batch_size}"
    )
    for step, (pixel_values, targets, learned) in zip(
        range(args.steps), batches(args.batch_size, processor), strict=False
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            told = head(features(tower, pixel_values))
        loss = reading_loss(told.float(), targets, learned)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % args.log_interval == 0:
            print(f"step {step + 1} loss {np.mean(recent):.4f} {time.time() - started:.0f} s", flush=True)
            recent.clear()
        if (step + 1) % args.save_interval == 0 or step + 1 == args.steps:
            save(tower, processor, args.out_dir)
            print(f"held-out scenes: {json.dumps(measure(tower, head, processor, scenes))}", flush=True)


if __name__ == "__main__":
    main()
