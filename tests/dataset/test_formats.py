"""Data in other common formats is read, or the message says how to convert it."""

import io
import json
import shutil
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.formats import RIGHT_FORM, SPLIT_LIST, DataError
from dataset.lm_dataset import VLMDataset
from dataset.tokenizer import load_tokenizer

TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
PARTS = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUILTIN_TOKENIZER_DIR)


@pytest.fixture
def folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(photos / name)
    return tmp_path


def opened(folder, tokenizer, name, images_path="photos") -> VLMDataset:
    images_path = images_path and folder / images_path
    return VLMDataset(folder / name, images_path, tokenizer, 300, 4, cache_dir=folder / "cache")


def of_rows(folder, tokenizer, *rows, images_path="photos") -> VLMDataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return opened(folder, tokenizer, "rows.jsonl", images_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "a.png", "conversations": LLAVA}, ["LLaVA format", '"role" and "content"', "user for human"]),
        ({"image": "a.png", "messages": TURNS}, ['"messages" format', 'call it "conversations"']),
        ({"messages": PARTS}, ["OpenAI format (content in parts)", '"conversations"']),
        ({"image": "a.png", "caption": "A cat."}, ["image and caption", "the caption as answer"]),
        ({"image": "a.png", "text": "A cat."}, ["image and text"]),
        ({"images": ["a.png"], "conversations": TURNS}, ['"images": call it "image"']),
    ],
)
def test_a_row_of_a_known_format_is_told_its_name_and_the_cure(folder, tokenizer, row, words):
    [bad] = of_rows(folder, tokenizer, row).bad_rows
    for word in words:
        assert word in bad.reason


def test_the_right_form_that_errors_show_is_right(folder, tokenizer):
    shutil.copy(folder / "photos" / "a.png", folder / "photos" / "a.jpg")
    data = of_rows(folder, tokenizer, json.loads(RIGHT_FORM))
    assert (len(data), data.bad_rows, data.tags_added) == (1, [], 0)


def test_one_picture_without_a_tag_is_put_first_and_counted(folder, tokenizer):
    bare = [{"role": "user", "content": "What?"}, TURNS[1]]
    data = of_rows(
        folder,
        tokenizer,
        {"image": "a.png", "conversations": TURNS},
        {"image": "a.png", "conversations": bare},
        {"image": "a.png, b.png", "conversations": bare},
    )
    assert data[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()
    assert data.tags_added == 1
    assert [bad.reason for bad in data.bad_rows] == ["0 <image> in the text, but 2 picture(s)"]


def test_names_may_be_a_list_or_absolute_inside_the_folder(folder, tokenizer):
    two = [{"role": "user", "content": "<image><image>What?"}, TURNS[1]]
    inside, outside = str(folder / "photos" / "a.png"), str(folder / "c.png")
    shutil.copy(inside, outside)
    data = of_rows(
        folder,
        tokenizer,
        {"image": ["a.png", "b.png"], "conversations": two},
        {"image": inside, "conversations": TURNS},
        {"image": outside, "conversations": TURNS},
        {"image": "photos/a.png", "conversations": TURNS},
    )
    assert [data[i]["pixel_values"].shape[0] for i in range(len(data))] == [2, 1]
    assert [bad.reason for bad in data.bad_rows] == [
        f"the picture's path leaves images_path: {outside!r}",
        f"no such picture: photos/a.png (it is in {folder}: give that as --images_path)",
    ]


def test_pictures_are_looked_for_beside_the_jsonl_where_no_folder_is_given(folder, tokenizer):
    data = of_rows(folder, tokenizer, {"image": "photos/a.png", "conversations": TURNS}, images_path=None)
    assert data[0]["pixel_values"].shape[0] == 1


def test_a_json_list_is_told_the_command_that_splits_it_and_the_command_works(folder, tokenizer):
    rows = [{"image": "a.png", "conversations": TURNS}] * 2
    for indent in (None, 2):
        (folder / "list.json").write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        with pytest.raises(DataError, match="is one JSON list") as error:
            opened(folder, tokenizer, "list.json")
        assert SPLIT_LIST.format(name="list.json", stem="list") in str(error.value)
    command = SPLIT_LIST.format(name="list.json", stem="list").replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=folder, check=True)
    assert len(opened(folder, tokenizer, "list.jsonl")) == 2


def test_a_table_and_a_saved_folder_are_told_what_to_do(folder, tokenizer):
    (folder / "rows.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match='is a table; a jsonl is needed.*\n  {"image"'):
        opened(folder, tokenizer, "rows.csv")
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(folder / "saved")
    with pytest.raises(DataError, match=r"folder that datasets saved.*to_parquet"):
        opened(folder, tokenizer, "saved")
    with pytest.raises(DataError, match="is a folder, not a data file"):
        opened(folder, tokenizer, "photos")


@pytest.mark.parametrize("several", [False, True])
def test_a_parquet_that_datasets_wrote_is_read(folder, tokenizer, several):
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    picture = Image.new("RGB", (8, 8))
    rows = {"conversations": [json.dumps(TURNS)] * 2, "image": [[picture] if several else picture] * 2}
    features = datasets.Features({"conversations": datasets.Value("string"), "image": feature})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    data = opened(folder, tokenizer, "rows.parquet")
    assert not data.bad_rows
    assert [tuple(data[i]["pixel_values"].shape) for i in range(len(data))] == [(1, 3, 224, 224)] * 2


def test_a_parquet_of_plain_structs_is_read_and_a_missing_picture_told(folder, tokenizer):
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    images = [{"bytes": content.getvalue(), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    pq.write_table(pa.table({"conversations": [json.dumps(TURNS)] * 2, "image": images}), folder / "rows.parquet")
    data = opened(folder, tokenizer, "rows.parquet")
    assert len(data) == 1 and data[0]["pixel_values"].shape[0] == 1
    assert [bad.reason for bad in data.bad_rows] == [
        "the parquet holds a picture's path only, not its bytes (write it from opened pictures)"
    ]


def test_the_library_s_own_bars_stay_off_the_screen(folder, tokenizer, capfd):
    of_rows(folder, tokenizer, {"image": "a.png", "conversations": TURNS})
    assert capfd.readouterr().err == ""
