"""The built-in data set: scenes of coloured shapes, drawn by code, in the exact form of the published data.

A scene is one or two objects on a light background, each with a colour, a shape, a size and a place in a 3 x 3 grid.
Scene, picture and rows are functions of an index alone, so that the set need not be stored: `draw_builtin_dataset()`
draws it when it is first needed. About one in seven (colour, shape, place) combinations is held out: training never
shows one, and the held-out scenes show nothing else. The texts are in `language.py`, the
grading of descriptions in `grading.py`.
"""

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from common.paths import BUILTIN_DATASET_DIR
from dataset.scenes import language as scene_language
from dataset.scenes.language import COLOURS, PLACES, SHAPES, SIZES, Facts

PICTURE_SIZE = 128  # pixels a side, as the published pictures
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
STAMP = "complete.json"
STALE_AFTER_SECONDS = 600  # drawing takes about 15; an unfinished folder this old belongs to a run that died


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its attributes, and its geometry in pixels of the 128 x 128 picture."""

    facts: Facts
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One or two objects in reading order, and the two ends of the background's gradient."""

    objects: tuple[SceneObject, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]

    @property
    def facts(self) -> tuple[Facts, ...]:
        """Colour, shape, size and place of each object."""
        return tuple(thing.facts for thing in self.objects)


def is_held_out(colour: str, shape: str, place: str) -> bool:
    """Tells whether the combination is kept from training.

    The rule is a Latin square's (a linear form modulo 7): it takes 1 in 7 combinations, yet each pair colour-shape,
    colour-place and shape-place stays in training, so that a held-out scene is new only as a whole.
    """
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape) + 3 * PLACES.index(place)) % 7 == 0


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """Returns all (colour, shape, place) combinations that are held out, or all that are not."""
    return [
        (colour, shape, place)
        for colour in COLOURS
        for shape in SHAPES
        for place in PLACES
        if is_held_out(colour, shape, place) == held_out
    ]


TRAINING_COMBINATIONS = combinations(held_out=False)
HELDOUT_COMBINATIONS = combinations(held_out=True)


def training_scene(index: int) -> Scene:
    """Scene number `index` of an endless row of scenes without a held-out combination.

    The first TRAINING_SCENES of them are the data set's; the scripts that build the tower and the language model go on
    from there.
    """
    return _scene(Random(f"training scene {index}"), TRAINING_COMBINATIONS)


def heldout_scenes() -> list[Scene]:
    """The HELDOUT_SCENES scenes that consist of held-out combinations only."""
    return [_scene(Random(f"held-out scene {index}"), HELDOUT_COMBINATIONS) for index in range(HELDOUT_SCENES)]


def _scene(rng: Random, allowed: list[tuple[str, str, str]]) -> Scene:
    chosen = [rng.choice(allowed)]
    if rng.random() < 0.5:
        chosen.append(rng.choice([other for other in allowed if other[2] != chosen[0][2]]))
    chosen.sort(key=lambda combination: PLACES.index(combination[2]))
    light = tuple(rng.randint(205, 255) for _ in range(3))
    background = (light, tuple(min(255, max(200, value + rng.randint(-20, 20))) for value in light))
    return Scene(tuple(_scene_object(rng, *combination) for combination in chosen), background)


def _scene_object(rng: Random, colour: str, shape: str, place: str) -> SceneObject:
    size = rng.choice(SIZES)
    row, column = divmod(PLACES.index(place), 3)
    wander = 1.5 if size == "大" else 5.0  # a large object nearly fills its cell
    return SceneObject(
        facts=Facts(colour, shape, size, place),
        x=(column + 0.5) * CELL + rng.uniform(-wander, wander),
        y=(row + 0.5) * CELL + rng.uniform(-wander, wander),
        radius=rng.uniform(*RADII[size]),
        angle=math.radians(rng.uniform(-10, 10)),
        rgb=tuple(min(255, max(0, value + rng.randint(-14, 14))) for value in COLOUR_VALUES[colour]),
    )


def _outline(shape: str) -> list[tuple[float, float]]:
    # Corner points around (0, 0), y downwards, of about the unit circle's size.
    if shape == "正方形":
        return [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)]
    if shape == "三角形":
        return _corners([1.2] * 3)
    if shape == "五角星":
        return _corners([1.22, 0.5] * 5)
    if shape == "菱形":
        return [(0, -1.22), (0.82, 0), (0, 1.22), (-0.82, 0)]
    arm, half = 1.12, 0.36  # a cross
    return [
        (-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half),
        (half, arm), (-half, arm), (-half, half), (-arm, half), (-arm, -half), (-half, -half),
    ]  # fmt: skip


def _corners(radii: list[float]) -> list[tuple[float, float]]:
    turn = 2 * math.pi / len(radii)
    return [(radius * math.sin(i * turn), -radius * math.cos(i * turn)) for i, radius in enumerate(radii)]


def _mask(thing: SceneObject, side: int) -> Image.Image:
    # White where the object is, on a canvas of side x side pixels that stands for the whole picture.
    scale = side / PICTURE_SIZE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    x, y, radius = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.facts.shape == "圆形":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        cos, sin = math.cos(thing.angle) * radius, math.sin(thing.angle) * radius
        pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _outline(thing.facts.shape)], fill=255)
    return canvas


def draw(scene: Scene) -> Image.Image:
    """Draws the scene as an RGB picture of 128 x 128 pixels, antialiased."""
    size = (PICTURE_SIZE, PICTURE_SIZE)
    near, far = (Image.new("RGB", size, rgb) for rgb in scene.background)
    picture = Image.composite(far, near, Image.linear_gradient("L").resize(size))
    for thing in scene.objects:
        mask = _mask(thing, PICTURE_SIZE * SUPERSAMPLING).reduce(SUPERSAMPLING)
        picture.paste(thing.rgb, mask=mask)
    return picture


def patch_coverage(scene: Scene) -> np.ndarray:
    """Returns how much of each of the tower's patches each object covers.

    Returns:
        Shares from 0 to 1, of shape (objects, 14, 14); rows from top to bottom.
    """
    masks = [_mask(thing, PATCHES_PER_SIDE * 16).reduce(16) for thing in scene.objects]
    return np.stack([np.asarray(mask, dtype=np.float32) / 255 for mask in masks])


def is_drawn(root: Path = BUILTIN_DATASET_DIR) -> bool:
    """Tells whether the complete set, drawn by this very code, is in `root`."""
    stamp = root / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp()


def draw_builtin_dataset(root: Path = BUILTIN_DATASET_DIR, training: int = TRAINING_SCENES) -> Path:
    """Draws the whole set into `root`, unless it is there already.

    The set is drawn beside `root` and then renamed, so that an interrupted drawing never counts as a complete one; a
    set that other code drew is replaced. Several processes may call this at the same time.

    Args:
        root: the folder that will hold pretrain.jsonl, sft.jsonl, images/, heldout.jsonl and heldout_images/.
        training: the number of training scenes; fewer are of use to tests only.

    Returns:
        `root`.
    """
    if is_drawn(root):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    for leftover in root.parent.glob(f"{root.name}.drawing-*"):
        if time.time() - leftover.stat().st_mtime > STALE_AFTER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    unfinished = root.with_name(f"{root.name}.drawing-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _draw_into(unfinished, training)
        _put_in_place(unfinished, root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _draw_into(folder: Path, training: int) -> None:
    scenes = [training_scene(index) for index in range(training)]
    names = _save_pictures(scenes, folder / "images", "scene")
    facts = [scene.facts for scene in scenes]
    _write_rows(folder / "pretrain.jsonl", scene_language.pretrain_rows(facts, names))
    _write_rows(folder / "sft.jsonl", scene_language.sft_rows(facts, names))
    scenes = heldout_scenes()
    names = _save_pictures(scenes, folder / "heldout_images", "heldout")
    _write_rows(folder / "heldout.jsonl", scene_language.heldout_rows([scene.facts for scene in scenes], names))
    (folder / STAMP).write_text(_stamp(), encoding="utf-8")


def _save_pictures(scenes: list[Scene], folder: Path, prefix: str) -> list[str]:
    folder.mkdir()
    names = [f"{prefix}_{index:04d}.jpg" for index in range(len(scenes))]
    for scene, name in zip(scenes, names, strict=True):
        draw(scene).save(folder / name, quality=JPEG_QUALITY)
    return names


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _stamp() -> str:
    # The code is the version: whatever changes it may change the set.
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(scene_language.__file__)):
        digest.update(path.read_bytes())
    return json.dumps({"drawn_by": digest.hexdigest()})


def _put_in_place(finished: Path, root: Path) -> None:
    if root.exists() and not is_drawn(root):
        shutil.rmtree(root)
    try:
        os.rename(finished, root)
    except OSError:
        if not is_drawn(root):  # otherwise another process was faster, and drew the same
            raise
