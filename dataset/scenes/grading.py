"""Grades descriptions of the built-in scenes, and computes what guessing would score."""

import functools
import re
from collections.abc import Sequence
from itertools import chain, permutations
from typing import NamedTuple

from dataset.scenes.language import COLOURS, ENGLISH, PLACES, SHAPES, SIZES, Facts, caption

# Descriptions may use other words than the canonical ones, which are Chinese.
_SPELLINGS = {
    "colour": {**{spelling: word for word in COLOURS for spelling in (word, word[0])}, "grey": "灰色"},
    "shape": {
        **{shape: shape for shape in SHAPES},
        "正方": "正方形", "方形": "正方形", "方块": "正方形", "三角": "三角形", "星形": "五角星", "星": "五角星",
        "菱": "菱形", "十字": "十字形", "圆": "圆形", "plus": "十字形", "rhombus": "菱形", "disc": "圆形",
    },
    "size": {**{size: size for size in SIZES}, "big": "大"},
    "place": {
        **{place: place for place in PLACES},
        **{short + end: short + "角" for short in ("左上", "右上", "左下", "右下") for end in ("方", "边", "")},
        **{"上边": "上方", "上面": "上方", "下边": "下方", "下面": "下方", "左侧": "左边", "左方": "左边"},
        **{"右侧": "右边", "右方": "右边", "中央": "中间", "中心": "中间", "正中": "中间", "center": "中间"},
        **{"upper left": "左上角", "upper right": "右上角", "lower left": "左下角", "lower right": "右下角"},
    },
}  # fmt: skip
_PATTERNS = {}
for _attribute, _spellings in _SPELLINGS.items():
    # "at the top left": what counts is "top left".
    _spellings |= {ENGLISH.words[word].split("the ")[-1]: word for word in tuple(_spellings) if word in ENGLISH.words}
    # Longer ones first, so that neither 左上角 nor "top left" is read as its part.
    _words = sorted(_spellings, key=len, reverse=True)
    _alternatives = "|".join(rf"\b{word}\b" if word.isascii() else word for word in _words)
    _PATTERNS[_attribute] = re.compile(_alternatives, re.IGNORECASE)


class Grade(NamedTuple):
    """How much of a description is right."""

    right: int  # of `total`: colour, shape, size and place of each object, and the number of objects
    total: int
    whole: bool  # everything is right and nothing is invented


class Score(NamedTuple):
    """Grades over many scenes, as shares from 0 to 1."""

    attributes: float
    captions: float

    @classmethod
    def of(cls, grades: list[Grade]) -> "Score":
        attributes = sum(grade.right for grade in grades) / sum(grade.total for grade in grades)
        return cls(attributes, captions=sum(grade.whole for grade in grades) / len(grades))


@functools.cache
def parse_caption(text: str) -> list[dict[str, str]]:
    """Returns the colour, shape, size and place of each object in a description, as far as given, in canonical words.

    A clause that only names what the previous object lacks is added to that object.
    """
    objects: list[dict[str, str]] = []
    for clause in re.split(r"[，。；：、,.;:\n]+", text):
        found = {}
        for attribute, pattern in _PATTERNS.items():
            if match := pattern.search(clause):
                found[attribute] = _SPELLINGS[attribute][match.group().lower()]
        if objects and "shape" not in found and not found.keys() & objects[-1].keys():
            objects[-1].update(found)
        elif "shape" in found or "colour" in found:
            objects.append(found)
    return objects


def grade(text: str, objects: Sequence[Facts]) -> Grade:
    """Grades a description of an image that shows these objects (`Scene.facts`), in whichever order gets most right."""
    described, truth = parse_caption(text), [vars(thing).items() for thing in objects]
    candidates = [found.items() for found in described[:4]] + [{}.items()] * len(objects)  # {}: an object left out
    orders = permutations(candidates, len(objects))
    right = max(sum(len(found & facts) for found, facts in zip(order, truth, strict=True)) for order in orders)
    right += len(described) == len(objects)
    total = 1 + len(_SPELLINGS) * len(objects)
    return Grade(right, total, right == total)


def score(texts: Sequence[str], scenes: Sequence[Sequence[Facts]]) -> Score:
    """Grades one description per scene, and returns the overall shares."""
    return Score.of([grade(text, scene) for text, scene in zip(texts, scenes, strict=True)])


def chance(scenes: Sequence[Sequence[Facts]]) -> tuple[Score, Score]:
    """Returns the scores of true captions of other scenes (mean over all of them), and of the best single caption."""
    others = [[grade(caption(told), objects) for objects in scenes if objects is not told] for told in scenes]
    # The best by attributes, then by captions.
    return Score.of(list(chain(*others))), max(map(Score.of, others))
