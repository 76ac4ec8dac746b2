"""The built-in data set: scenes of coloured shapes, drawn by code, in the format of the published data.

A scene is one or two objects on a light background, each with a colour, a shape, a size and a place in a 3 x 3 grid.
Scenes, images and rows depend on an index alone, so the set is not stored: it is drawn when it is first needed. The
texts are in `language.py`, the grading of descriptions in `grading.py`.
"""

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from common.errors import UsageError
from common.files import hash_of, read_record, remove_leftovers, whole_folder
from common.paths import BUILTIN_DATASET_DIR
from dataset.scenes import language
from dataset.scenes.language import COLOURS, PLACES, SHAPES, SIZES, Facts

PICTURE_SIZE = 128  # pixels a side, as in the published data
PATCHES_PER_SIDE = 14  # of the vision tower: 224 pixels in patches of 16
TRAINING_SCENES = 5000
HELDOUT_SCENES = 200

COLOUR_VALUES = {
    "红色": (214, 40, 40),
    "橙色": (244, 136, 22),
    "黄色": (238, 214, 36),
    "绿色": (46, 150, 66),
    "蓝色": (44, 84, 206),
    "紫色": (132, 54, 168),
    "黑色": (28, 28, 30),
    "灰色": (128, 128, 130),
}
RADII = {"大": (15.0, 17.5), "小": (8.0, 10.0)}  # of the circle, in pixels; the other shapes are about as large
CELL = PICTURE_SIZE / 3
SUPERSAMPLING = 4
JPEG_QUALITY = 92
# The code is the version: any change to it may change the set.
STAMP = {"drawn_by": " ".join(hash_of(Path(path)) for path in (__file__, language.__file__))}

# Corner points around (0, 0), y downwards, about as large as the unit circle.
OUTLINES = {
    "正方形": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
    "菱形": [(0, -1.22), (0.82, 0), (0, 1.22), (-0.82, 0)],
    "十字形": [
        (-0.36, -1.12), (0.36, -1.12), (0.36, -0.36), (1.12, -0.36), (1.12, 0.36), (0.36, 0.36),
        (0.36, 1.12), (-0.36, 1.12), (-0.36, 0.36), (-1.12, 0.36), (-1.12, -0.36), (-0.36, -0.36),
    ],
}  # fmt: skip
for _shape, _radii in (("三角形", [1.2] * 3), ("五角星", [1.22, 0.5] * 5)):
    _angles = [i * (2 * math.pi / len(_radii)) for i in range(len(_radii))]
    OUTLINES[_shape] = [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(_radii, _angles, strict=True)]


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes, and its geometry in pixels of the 128 x 128 image."""

    facts: Facts
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One or two objects in reading order, and the two end colours of the background's gradient."""

    objects: tuple[SceneObject, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]

    @property
    def facts(self) -> tuple[Facts, ...]:
        return tuple(thing.facts for thing in self.objects)


# Held-out scenes show nothing else, training scenes never one of them. The rule is a Latin square's (a linear form
# modulo 7): it takes 1 in 7 combinations, yet each pair colour-shape, colour-place and shape-place stays in training,
# so that a held-out scene is new only as a whole.
HELDOUT_COMBINATIONS = [
    (colour, shape, place)
    for colour, shape, place in product(COLOURS, SHAPES, PLACES)
    if (COLOURS.index(colour) + 2 * SHAPES.index(shape) + 3 * PLACES.index(place)) % 7 == 0
]
TRAINING_COMBINATIONS = [some for some in product(COLOURS, SHAPES, PLACES) if some not in HELDOUT_COMBINATIONS]


def training_scene(index: int) -> Scene:
    """Returns scene `index` of an endless sequence without held-out combinations.

    The data set has the first TRAINING_SCENES; the scripts that build the tower and the language model use more.
    """
    return _scene(Random(f"training scene {index}"), TRAINING_COMBINATIONS)


def heldout_scenes() -> list[Scene]:
    """Returns the HELDOUT_SCENES scenes, which consist of held-out combinations only."""
    return [_scene(Random(f"held-out scene {index}"), HELDOUT_COMBINATIONS) for index in range(HELDOUT_SCENES)]


def _scene(rng: Random, allowed: list[tuple[str, str, str]]) -> Scene:
    chosen, objects = [rng.choice(allowed)], []
    if rng.random() < 0.5:
        chosen.append(rng.choice([other for other in allowed if other[2] != chosen[0][2]]))
    chosen.sort(key=lambda combination: PLACES.index(combination[2]))
    light = tuple(rng.randint(205, 255) for _ in range(3))
    background = (light, tuple(min(255, max(200, value + rng.randint(-20, 20))) for value in light))
    for colour, shape, place in chosen:
        size = rng.choice(SIZES)
        row, column = divmod(PLACES.index(place), 3)
        wander = 1.5 if size == "大" else 5.0  # a large object nearly fills its cell
        x = (column + 0.5) * CELL + rng.uniform(-wander, wander)
        y = (row + 0.5) * CELL + rng.uniform(-wander, wander)
        radius, angle = rng.uniform(*RADII[size]), math.radians(rng.uniform(-10, 10))
        rgb = tuple(min(255, max(0, value + rng.randint(-14, 14))) for value in COLOUR_VALUES[colour])
        objects.append(SceneObject(Facts(colour, shape, size, place), x, y, radius, angle, rgb))
    return Scene(tuple(objects), background)


def _mask(thing: SceneObject, side: int) -> Image.Image:
    # White where the object is; side x side pixels that show the whole image.
    scale = side / PICTURE_SIZE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    x, y, radius = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.facts.shape == "圆形":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        cos, sin = math.cos(thing.angle) * radius, math.sin(thing.angle) * radius
        pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in OUTLINES[thing.facts.shape]], fill=255)
    return canvas


def draw(scene: Scene) -> Image.Image:
    """Draws the scene as an antialiased RGB image of 128 x 128 pixels."""
    size = (PICTURE_SIZE, PICTURE_SIZE)
    near, far = (Image.new("RGB", size, rgb) for rgb in scene.background)
    image = Image.composite(far, near, Image.linear_gradient("L").resize(size))
    for thing in scene.objects:
        image.paste(thing.rgb, mask=_mask(thing, PICTURE_SIZE * SUPERSAMPLING).reduce(SUPERSAMPLING))
    return image


def draw_heldout(folder: Path, count: int) -> list[Path]:
    """Draws scenes of the built-in set that were never trained on; returns their files."""
    folder.mkdir(parents=True)
    paths = [folder / f"scene_{number}.jpg" for number in range(count)]
    for path, scene in zip(paths, heldout_scenes(), strict=False):
        draw(scene).save(path, quality=JPEG_QUALITY)
    return paths


def patch_coverage(scene: Scene) -> np.ndarray:
    """Returns how much of each of the tower's patches each object covers, 0 to 1, (objects, 14, 14)."""
    masks = [_mask(thing, PATCHES_PER_SIDE * 16).reduce(16) for thing in scene.objects]
    return np.stack([np.asarray(mask, dtype=np.float32) / 255 for mask in masks])


def is_drawn(root: Path) -> bool:
    """Tells whether `root` holds the complete set, drawn by this very code."""
    return STAMP.items() <= read_record(root).items()


def draw_builtin_dataset(root: Path = BUILTIN_DATASET_DIR, training: int = TRAINING_SCENES) -> Path:
    """Draws pretrain.jsonl, sft.jsonl, images/, heldout.jsonl and heldout_images/ into `root`, if not there.

    An interrupted drawing never counts as complete; a set drawn by other code is replaced. Several processes may call
    this at the same time. Only tests pass `training`. Raises UsageError if the folder cannot be written, or holds what
    was not drawn.
    """
    remove_leftovers(root.parent)
    if is_drawn(root):
        return root
    parts = (
        ("images", "scene", [training_scene(index) for index in range(training)], ("pretrain", "sft")),
        ("heldout_images", "heldout", heldout_scenes(), ("heldout",)),
    )
    try:
        with whole_folder(root, STAMP) as new:
            for folder, prefix, scenes, stages in parts:
                (new / folder).mkdir()
                names = [f"{prefix}_{index:04d}.jpg" for index in range(len(scenes))]
                for scene, name in zip(scenes, names, strict=True):
                    draw(scene).save(new / folder / name, quality=JPEG_QUALITY)
                for stage in stages:
                    rows = language.scene_rows(stage, [scene.facts for scene in scenes], names)
                    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    (new / f"{stage}.jsonl").write_text(lines, encoding="utf-8")
    except UsageError:
        if not is_drawn(root):  # otherwise another process was faster and drew the same
            raise
    return root
