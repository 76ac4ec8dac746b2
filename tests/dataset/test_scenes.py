"""The built-in scenes: the same on every run, nothing held out in training, graded rightly, drawn whole or not."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations as pairs_of
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UsageError
from common.files import RECORD, SCRATCH, TEMPORARY, remove_leftovers
from common.paths import ROOT
from dataset.scenes import draw as scenes
from dataset.scenes.grading import chance, grade, parse_caption, score
from dataset.scenes.language import COLOURS, LANGUAGES, PLACES, SHAPES, SIZES, Facts, caption, questions, scene_rows

TRAINING = 40  # scenes in the drawn test set


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return scenes.draw_builtin_dataset(tmp_path_factory.mktemp("data") / "builtin", training=TRAINING)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_drawing_again_gives_the_same_bytes(drawn, tmp_path):
    again = scenes.draw_builtin_dataset(tmp_path / "builtin", training=TRAINING)
    files = sorted(path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file())
    assert len(files) == TRAINING + scenes.HELDOUT_SCENES + 4
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((drawn / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_training_shows_no_held_out_combination_and_held_out_scenes_nothing_else():
    def combinations_in(some):
        return {(thing.colour, thing.shape, thing.place) for scene in some for thing in scene.facts}

    in_training = combinations_in(scenes.training_scene(index) for index in range(scenes.TRAINING_SCENES))
    held_out = combinations_in(scenes.heldout_scenes())
    assert len(scenes.TRAINING_COMBINATIONS) + len(scenes.HELDOUT_COMBINATIONS) == 8 * 6 * 9
    assert in_training == set(scenes.TRAINING_COMBINATIONS)
    assert held_out <= set(scenes.HELDOUT_COMBINATIONS)
    assert len(scenes.heldout_scenes()) == 200


def test_training_shows_every_pair_of_colour_shape_and_place():
    for (first, some), (second, others) in pairs_of(enumerate((COLOURS, SHAPES, PLACES)), 2):
        seen = {(combination[first], combination[second]) for combination in scenes.TRAINING_COMBINATIONS}
        assert len(seen) == len(some) * len(others)


def test_objects_are_where_they_are_said_to_be():
    """The drawn pixels and the patch coverage agree with the facts, in colour, place and size."""
    for index in range(30):
        scene = scenes.training_scene(index)
        pixels = np.asarray(scenes.draw(scene)).astype(int)
        for thing, coverage in zip(scene.objects, scenes.patch_coverage(scene), strict=True):
            assert np.abs(pixels[round(thing.y), round(thing.x)] - thing.rgb).max() <= 1
            nearest = min(COLOURS, key=lambda name: np.abs(np.subtract(scenes.COLOUR_VALUES[name], thing.rgb)).sum())
            assert nearest == thing.facts.colour
            rows, columns = np.indices(coverage.shape) + 0.5
            row, column = (int((at * coverage).sum() / coverage.sum() / 14 * 3) for at in (rows, columns))
            assert PLACES[3 * row + column] == thing.facts.place
            assert (coverage.sum() > 4.7) == (thing.facts.size == "大")


@pytest.mark.parametrize("name", ["pretrain", "sft", "heldout"])
def test_rows_are_well_formed(drawn, name):
    rows = read(drawn / f"{name}.jsonl")
    assert len(rows) == {"pretrain": TRAINING, "sft": TRAINING, "heldout": scenes.HELDOUT_SCENES}[name]
    folder = drawn / ("heldout_images" if name == "heldout" else "images")
    for row in rows:
        assert [turn["role"] for turn in row["conversations"]] == ["user", "assistant"] * (
            len(row["conversations"]) // 2
        )
        assert all(turn["content"] for turn in row["conversations"])
        pictures = row["image"].split(", ") if "image" in row else []
        placeholders = [turn["content"].count("<image>") for turn in row["conversations"]]
        assert placeholders == [len(pictures)] + [0] * (len(placeholders) - 1)
        for picture in pictures:
            with Image.open(folder / picture) as image:
                assert (image.size, image.mode, image.format) == ((128, 128), "RGB", "JPEG")


def test_sft_holds_every_kind_of_row():
    facts = [scenes.training_scene(index).facts for index in range(600)]
    rows = list(scene_rows("sft", facts, [f"{index}.jpg" for index in range(600)]))
    pictures = [row.get("image", "").count(".jpg") for row in rows]
    assert {0, 1, 2} == set(pictures)
    assert any(len(row["conversations"]) > 4 for row in rows)
    for row, scene, count in zip(rows, facts, pictures, strict=True):
        if count == 1 and len(row["conversations"]) == 2 and row["conversations"][1]["content"].startswith("图中有"):
            assert grade(row["conversations"][1]["content"], scene).whole


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


@pytest.mark.parametrize("name", ["pretrain", "sft", "heldout"])
def test_rows_take_turns_in_chinese_and_english_and_never_mix_them(drawn, name):
    orders = set()
    for number, row in enumerate(read(drawn / f"{name}.jsonl")):
        texts = [turn["content"].replace("<image>", "") for turn in row["conversations"]]
        assert {is_chinese(text) for text in texts} == {number % 2 == 0}
        orders.add((number % 2, row["conversations"][0]["content"].startswith("<image>")))
    assert len(orders) == (2 if name == "heldout" else 4)  # both orders of picture and question, in either language


def test_questions_have_one_right_answer_and_as_many_yes_as_no():
    answers = []
    for index in range(200):
        facts = scenes.training_scene(index).facts
        asked = questions(facts, Random(index))
        assert len(dict(asked)) == len(asked)
        for question, answer in asked:
            if question.endswith("吗？"):
                answers.append(answer)
                present = any(thing.colour in question and thing.shape in question for thing in facts)
                assert answer == ("有。" if present else "没有。")
            for thing in facts:
                if question == f"{thing.shape}在哪里？":
                    assert [other.place for other in facts if other.shape == thing.shape] == [answer[1:-1]]
    assert answers.count("有。") == answers.count("没有。")


objects = st.lists(
    st.builds(Facts, *map(st.sampled_from, (COLOURS, SHAPES, SIZES, PLACES))),
    min_size=1,
    max_size=2,
    unique_by=lambda thing: thing.place,
).map(tuple)


@given(objects, st.sampled_from(LANGUAGES))
@settings(deadline=None)
def test_a_true_caption_is_all_right(scene, language):
    result = grade(caption(scene, language), scene)
    assert result.whole and result.right == result.total == 4 * len(scene) + 1
    assert grade(caption(scene[::-1], language), scene).whole


@given(objects, st.sampled_from(["colour", "shape", "size", "place"]), st.sampled_from(LANGUAGES), st.data())
@settings(deadline=None)
def test_one_wrong_word_costs_one_attribute(scene, attribute, language, data):
    words = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}[attribute]
    word = data.draw(st.sampled_from([word for word in words if word != getattr(scene[0], attribute)]))
    wrong = (replace(scene[0], **{attribute: word}), *scene[1:])
    result = grade(caption(wrong, language), scene)
    same_anyway = sorted(map(repr, wrong)) == sorted(map(repr, scene))
    assert result.whole == same_anyway
    if len(scene) == 1:
        assert result.right == result.total - 1


def test_a_missing_or_an_invented_object_is_wrong():
    first, second = Facts("红色", "圆形", "大", "左上角"), Facts("蓝色", "菱形", "小", "中间")
    missing, invented = grade(caption([first]), (first, second)), grade(caption([first, second]), (first,))
    assert (missing.right, missing.total, missing.whole) == (4, 9, False)
    assert (invented.right, invented.total, invented.whole) == (4, 5, False)
    assert grade("", (first,)).right == 0


@pytest.mark.parametrize(
    "text",
    [
        "图中有一个大的红色圆形，在左上角。",
        "左上有一个大红圆",
        "一个物体:左上方 有 大的 红色 圆形,",
        "圆形，红色，大，左上角",
        "A big red disc in the upper left corner.",
        "There is one object: at the Top Left a large red circle",
    ],
)
def test_slips_of_form_are_forgiven(text):
    assert parse_caption(text) == [{"colour": "红色", "shape": "圆形", "size": "大", "place": "左上角"}]


def test_chance_is_far_below_the_truth_and_random_below_the_best_constant():
    facts = [scene.facts for scene in scenes.heldout_scenes()]
    assert score([caption(scene) for scene in facts], facts).captions == 1
    other, constant = chance(facts)
    assert 0.15 < other.attributes < constant.attributes < 0.5
    assert other.captions < 0.02 and constant.captions < 0.02


def test_an_interrupted_drawing_is_redone(tmp_path, monkeypatch):
    root = tmp_path / "builtin"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes.language, "scene_rows", stop)
        scenes.draw_builtin_dataset(root, training=5)
    assert not root.exists() and not scenes.is_drawn(root)
    scenes.draw_builtin_dataset(root, training=5)
    assert scenes.is_drawn(root)
    assert [path.name for path in tmp_path.iterdir()] == ["builtin"]


def test_a_complete_set_is_kept_and_that_of_other_code_redrawn(tmp_path):
    root = scenes.draw_builtin_dataset(tmp_path / "builtin", training=5)
    stamp, row = root / RECORD, root / "sft.jsonl"
    recorded = json.loads(stamp.read_text(encoding="utf-8"))
    stamp.write_text(json.dumps(recorded | {"drawn_by": "other code"}), encoding="utf-8")
    scenes.draw_builtin_dataset(root, training=5)
    assert scenes.is_drawn(root) and "sft.jsonl" in json.loads(stamp.read_text(encoding="utf-8"))["files"]
    (root / "mine.txt").touch()
    scenes.draw_builtin_dataset(root, training=5)  # the set is complete
    (root / "mine.txt").unlink()
    stamp.write_text(json.dumps(recorded | {"drawn_by": "other code"}), encoding="utf-8")
    for name in ("images/mine.jpg", "mine.txt"):  # what is the user's stays
        (root / name).write_text("mine", encoding="utf-8")
        with pytest.raises(UsageError, match=f"builtin is not replaced: it holds {name}, which"):
            scenes.draw_builtin_dataset(root, training=5)
        assert (root / name).read_text(encoding="utf-8") == "mine" and row.is_file()
        (root / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["builtin"]


# Drawing pauses once its temporary folder is there.
DRAWS = """
import sys, time
from pathlib import Path
from dataset.scenes import draw as scenes
scenes.draw = lambda *_: (print("begun", flush=True), time.sleep(60))
scenes.draw_builtin_dataset(Path(sys.argv[1]))
"""


def test_what_a_killed_drawing_left_goes_with_the_next_but_not_a_living_ones_nor_the_users(tmp_path):
    root = tmp_path / "builtin"
    mine = tmp_path / f"{SCRATCH}mine{TEMPORARY}" / "photo.jpg"
    mine.parent.mkdir()
    mine.touch()
    start = [sys.executable, "-c", DRAWS, root]
    killed, living = (subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2))
    try:
        assert killed.stdout.readline() == living.stdout.readline() == b"begun\n"
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 3
        scenes.draw_builtin_dataset(root, training=5)
        assert len(list(tmp_path.iterdir())) == 3 and mine.exists() and scenes.is_drawn(root)
    finally:
        living.kill()
        living.wait()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"builtin", mine.parent.name}
