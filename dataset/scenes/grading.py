"""Grading a description of a built-in scene, and what guessing would get."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from dataset.scenes.language import COLOURS, PLACES, SHAPES, SIZES, Facts, caption

# Longer spellings first, so that 左上角 is not read as 上. A description need not use the canonical words.
_SPELLINGS = {
    "colour": {spelling: word for word in COLOURS for spelling in (word, word[0])},
    "shape": {
        **{shape: shape for shape in SHAPES},
        "正方": "正方形", "方形": "正方形", "方块": "正方形", "三角": "三角形", "星形": "五角星", "星": "五角星",
        "菱": "菱形", "十字": "十字形", "圆": "圆形",
    },
    "size": {size: size for size in SIZES},
    "place": {
        **{place: place for place in PLACES},
        **{short + end: short + "角" for short in ("左上", "右上", "左下", "右下") for end in ("方", "边", "")},
        **{"上边": "上方", "上面": "上方", "下边": "下方", "下面": "下方", "左侧": "左边", "左方": "左边"},
        **{"右侧": "右边", "右方": "右边", "中央": "中间", "中心": "中间", "正中": "中间"},
    },
}  # fmt: skip
_PATTERNS = {
    attribute: re.compile("|".join(sorted(spellings, key=len, reverse=True)))
    for attribute, spellings in _SPELLINGS.items()
}
_CLAUSE_ENDS = re.compile(r"[，。；：、,.;:\n]+")
ATTRIBUTES = tuple(_SPELLINGS)


@dataclass(frozen=True)
class Grade:
    """How much of a description is right.

    Attributes:
        right: attributes that are right, of `total`: colour, shape, size and place of each object, and their number.
        total: attributes that the scene has.
        whole: whether everything is right, and nothing is described that is not there.
    """

    right: int
    total: int
    whole: bool


@dataclass(frozen=True)
class Score:
    """Grades over many scenes, as shares from 0 to 1."""

    attributes: float
    captions: float


def parse_caption(text: str) -> list[dict[str, str]]:
    """Parses the objects of a description, tolerating other spellings, missing words and other punctuation.

    Returns:
        One dictionary an object, in the text's order, with those of the keys colour, shape, size and place that were
        found, in the canonical words. A clause that names only what the object before it lacks belongs to that object.
    """
    objects: list[dict[str, str]] = []
    for clause in _CLAUSE_ENDS.split(text):
        found = {}
        for attribute, pattern in _PATTERNS.items():
            match = pattern.search(clause)
            if match:
                found[attribute] = _SPELLINGS[attribute][match.group()]
        completes = bool(objects) and "shape" not in found and not found.keys() & objects[-1].keys()
        if completes:
            objects[-1].update(found)
        elif "shape" in found or "colour" in found:
            objects.append(found)
    return objects


def grade(text: str, objects: Sequence[Facts]) -> Grade:
    """Grades a description of one picture.

    The described objects are matched with those of the scene in whichever way gets the most right, so the order of
    description does not matter.

    Args:
        text: the description.
        objects: what the scene holds, as `Scene.facts`.
    """
    return _grade(parse_caption(text), objects)


def _grade(described: list[dict[str, str]], objects: Sequence[Facts]) -> Grade:
    candidates = described[:4] + [{}] * len(objects)  # {}: an object that is not described
    right = max(
        sum(
            found.get(key) == getattr(thing, key)
            for found, thing in zip(order, objects, strict=True)
            for key in ATTRIBUTES
        )
        for order in permutations(candidates, len(objects))
    )
    right += len(described) == len(objects)
    total = 1 + len(ATTRIBUTES) * len(objects)
    return Grade(right, total, whole=right == total)


def score(texts: Sequence[str], scenes: Sequence[Sequence[Facts]]) -> Score:
    """Grades one description for each scene, and sums up."""
    return _sum_up([grade(text, objects) for text, objects in zip(texts, scenes, strict=True)])


def _sum_up(grades: list[Grade]) -> Score:
    return Score(
        attributes=sum(grade.right for grade in grades) / sum(grade.total for grade in grades),
        captions=sum(grade.whole for grade in grades) / len(grades),
    )


def chance(scenes: Sequence[Sequence[Facts]]) -> tuple[Score, Score]:
    """What describing without looking gets.

    Returns:
        The score of describing each scene by the true caption of some other scene (the mean over all others, which is
        what shuffled pictures must fall to), and the score of the one caption among them that, given to every scene,
        gets the most attributes right.
    """
    described = [parse_caption(caption(objects)) for objects in scenes]
    others = [
        [_grade(objects_of, objects) for at, objects in enumerate(scenes) if at != source]
        for source, objects_of in enumerate(described)
    ]
    by_constant = [_sum_up(grades) for grades in others]
    return (
        _sum_up([grade for grades in others for grade in grades]),
        max(by_constant, key=lambda score: (score.attributes, score.captions)),
    )
