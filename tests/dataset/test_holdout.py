"""Held-out rows: one percent, the same in any order, and no image on both sides."""

import pytest
from tiny import pretrain_row, write_jsonl

from dataset.chat import load_tokenizer
from dataset.holdout import hold_out
from dataset.lm_dataset import VLMDataset

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world.tokenizer)


def held_out_of(world, tokenizer, tmp_path, rows, name="rows.jsonl"):
    path, images = write_jsonl(tmp_path / name, rows), tmp_path / "images"
    images.mkdir(exist_ok=True)
    for number, picture in enumerate({row["image"] for row in rows if "image" in row}):
        if not (images / picture).exists():
            (images / picture).symlink_to(world.images / f"{number % 12}.jpg")
    data = VLMDataset(path, images, tokenizer, 640, 196, cache_dir=world.root / "cache")
    return hold_out(data)


def answers(data: VLMDataset, tokenizer) -> set[str]:
    return {tokenizer.decode(row["input_ids"][row["labels"] != -100]) for row in (data[i] for i in range(len(data)))}


def many_rows(count: int, pictures: int | None = None) -> list[dict]:
    """Returns rows with different answers, each with its own image or sharing a few."""
    rows = []
    for number in range(count):
        row = pretrain_row(number)
        row["conversations"][1]["content"] = f"第{number}张。"
        row["image"] = f"copy_{number if pictures is None else number % pictures}.jpg"
        rows.append(row)
    return rows


def test_one_percent_is_held_out_in_any_order(world, tokenizer, tmp_path):
    rows = many_rows(400)
    data, held_out = held_out_of(world, tokenizer, tmp_path, rows)
    assert (len(data), len(held_out)) == (396, 4)
    assert not answers(data, tokenizer) & answers(held_out, tokenizer)
    assert len(answers(data, tokenizer) | answers(held_out, tokenizer)) == 400
    assert data.image_count == 396
    other, again = held_out_of(world, tokenizer, tmp_path, rows[::-1], "reversed.jsonl")
    assert answers(again, tokenizer) == answers(held_out, tokenizer)


def test_rows_about_one_picture_are_held_out_together(world, tokenizer, tmp_path):
    data, held_out = held_out_of(world, tokenizer, tmp_path, many_rows(400, pictures=100))
    assert len(held_out) == 4
    shown = [
        {name for row in of.read_rows(of.row_indices.tolist()) for name in row["pictures"]} for of in (data, held_out)
    ]
    assert len(shown[1]) == 1
    assert not shown[0] & shown[1]


@pytest.mark.parametrize(
    ("rows", "pictures", "expected"), [(99, None, 1), (3, None, 1), (12, 3, 4), (2, None, 0), (40, 2, 0), (1, None, 0)]
)
def test_with_few_pictures_one_is_held_out_with_its_rows(world, tokenizer, tmp_path, rows, pictures, expected):
    data, held_out = held_out_of(world, tokenizer, tmp_path, many_rows(rows, pictures))
    assert (0 if held_out is None else len(held_out)) == expected
    assert len(data) == rows - expected


def test_a_picture_in_every_row_is_not_held_out_with_all_of_them(world, tokenizer, tmp_path):
    data, held_out = held_out_of(world, tokenizer, tmp_path, many_rows(300, pictures=1))
    assert (len(data), len(held_out)) == (297, 3)


def test_a_row_that_shows_a_held_out_picture_beside_its_own_is_left_out(world, tokenizer, tmp_path):
    rows = many_rows(400)
    for number, row in enumerate(rows):
        row["image"] += f", copy_{(number + 1) % 400}.jpg"
        row["conversations"][0]["content"] += "<image>"
    images = tmp_path / "images"
    images.mkdir()
    for number in range(400):
        (images / f"copy_{number}.jpg").symlink_to(world.images / "0.jpg")
    data, held_out = held_out_of(world, tokenizer, tmp_path, rows)
    shown = [
        {name for row in of.read_rows(of.row_indices.tolist()) for name in row["pictures"]} for of in (data, held_out)
    ]
    assert not shown[0] & shown[1]
    assert len(held_out) == 4 and 400 - 4 - 2 * 4 <= len(data) < 396


def test_rows_without_pictures_are_held_out_by_their_text(world, tokenizer, tmp_path):
    rows = many_rows(300)
    for row in rows:
        del row["image"]
        row["conversations"][0]["content"] = "说。"
    data, held_out = held_out_of(world, tokenizer, tmp_path, rows)
    assert (len(data), len(held_out)) == (297, 3)
