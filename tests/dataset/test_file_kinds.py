"""Data files that are read, and other forms, which are told the command that converts them."""

import io
import json
import os
import shlex
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import turn

from common.errors import UsageError
from dataset import file_kinds, parquet
from dataset.file_kinds import load_lines
from dataset.lm_dataset import VLMDataset
from dataset.parquet import load_parquet
from dataset.row_forms import EXAMPLE_ROW
from dataset.scenes.language import DESCRIBE

TURNS = [turn("user", "<image>\nWhat?"), turn("assistant", "A cat.")]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]


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


ASKED = {"image": "a.png", "question": "What?", "answer": "A cat."}


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"image": "a.png", "conversations": LLAVA}, TURNS),
        ({"image": ["a.png"], "messages": TURNS}, TURNS),
        ({"images": ["a.png"], "conversations": json.dumps(TURNS)}, TURNS),
        ({"messages": [{"role": "user", "content": PARTS}, TURNS[1]]}, TURNS),
        (ASKED, [turn("user", "What?\n<image>"), TURNS[1]]),
        (ASKED | {"question": "<image>\nWhat?"}, TURNS),
        ({"image": "a.png", "text": "一只猫。"}, [turn("user", f"{DESCRIBE}\n<image>"), turn("assistant", "一只猫。")]),
        ({"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat."}]}, TURNS),
        ({"images": ["a.png"], "query": "<image>\nWhat?", "response": "A cat."}, TURNS),
        ({"image": {"<image_00>": "a.png"}, "conversations": [turn("user", "<image_00>\nWhat?"), TURNS[1]]}, TURNS),
        ({"image": "a.png", "text": "A cat."}, [turn("user", "Describe this picture.\n<image>"), TURNS[1]]),
    ],
)
def test_a_row_of_another_form_is_read_as_the_same_row_of_the_project_s(folder, tokenizer, row, same):
    data = of_rows(folder, tokenizer, row, {"image": "a.png", "conversations": same})
    assert data.bad_rows == []
    if "conversations" not in row:
        assert list(data.rules.values()) == ["in 1 row: read as conversations"]
    assert all(torch.equal(data[0][name], data[1][name]) for name in data[0])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"snapshot": "a.png", "words": "A cat."}, "no known form has these fields: snapshot, words"),
        ({"image": "", "caption": "A cat."}, "no picture is named"),
        ({"image": "a.png", "question": 5, "answer": "A cat."}, "the question is not text"),
        ({"image": "a.png", "caption": None}, "turn 2 has no text as content"),
        (ASKED | {"question": "<image><image>"}, "not read as a picture with question and answer: ValueError"),
        (
            ASKED | {"image": "data:image/png;base64," + "iVBORw0KGgo" + "A" * 80},
            "base64 text; convert it with",
        ),
        ({"messages": [turn("user", [{"type": "audio"}]), TURNS[1]]}, "a part that is neither text nor picture"),
    ],
)
def test_a_row_of_no_form_or_a_broken_one_is_told_so(folder, tokenizer, row, reason):
    [bad] = of_rows(folder, tokenizer, row).bad_rows
    assert reason in bad.reason


def test_the_right_form_that_errors_show_is_right(folder, tokenizer):
    shutil.copy(folder / "photos" / "a.png", folder / "photos" / "a.jpg")
    data = of_rows(folder, tokenizer, json.loads(EXAMPLE_ROW))
    assert (len(data), data.bad_rows, data.rules) == (1, [], {})


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
    assert data.rules == {"no <image>": "in 1 row: the picture is put first"}
    [bad] = data.bad_rows
    assert bad.reason.startswith("0 <image> in the text, but 2 picture(s) (commas divide names; a name with a comma")


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


def test_a_file_of_a_known_form_is_told_the_command_that_converts_it(folder, tokenizer):
    (folder / "a list.json").write_text(json.dumps([{"image": "a.png", "conversations": TURNS}]), encoding="utf-8")
    (folder / "rows.csv").write_text("image,caption\n", encoding="utf-8")
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(folder / "saved")
    with tarfile.open(folder / "shard.tar", "w") as shard:
        shard.add(folder / "photos" / "a.png", "a.png")
    shutil.copytree(folder / "photos", folder / "captions")
    (folder / "captions" / "a.txt").write_text("A cat.", encoding="utf-8")
    pq.write_table(pa.table({"image": [b""], "caption": ["A cat."]}), folder / "captions.parquet")
    forms = {"a list.json": "is one JSON list", "rows.csv": "is a table", "saved": "is a folder that datasets saved"}
    forms |= {"shard.tar": "is a tar", "captions": "is a folder of pictures with a .txt beside each"}
    forms |= {"photos": "is a folder of pictures"}
    (folder / "empty").mkdir()
    for name, form in (forms | {"captions.parquet": "needs the columns conversations and image_bytes"}).items():
        with pytest.raises(UsageError) as error:
            opened(folder, tokenizer, name)
        command = f"python scripts/make_dataset.py {shlex.quote(str(folder / name))} --to my_data"
        assert form in str(error.value) and command in str(error.value)
    with pytest.raises(UsageError, match="is a folder, not a data file$"):
        opened(folder, tokenizer, "empty")


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


@pytest.mark.parametrize("form", ["jsonl", "none.parquet", "snappy.parquet", "zstd.parquet"])
def test_a_correction_in_place_is_seen_wherever_it_is_though_size_and_time_stay(folder, form):
    random, path, cache = np.random.default_rng(0), folder / f"rows.{form}", folder / "cache"
    answers = ["".join(map(chr, random.integers(ord("一"), ord("龥"), 100))) for _ in range(2000)]
    time = None

    def written_and_read() -> datasets.Dataset:
        if form == "jsonl":
            path.write_text("\n".join(answers), encoding="utf-8")
        else:
            table = pa.table({"conversations": answers, "image_bytes": pa.array([None] * 2000, pa.binary())})
            pq.write_table(table, path, compression=form.split(".")[0], use_dictionary=False)
        if time is not None:
            os.utime(path, ns=(time, time))
        return load_lines(path, cache) if form == "jsonl" else load_parquet(path, cache)[0]

    fingerprints = [written_and_read()._fingerprint]
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    for row in random.integers(0, 2000, 10).tolist():
        answers[row] = f"{answers[row][:50]}{chr(ord(answers[row][50]) ^ 1)}{answers[row][51:]}"
        read = written_and_read()
        assert read.data.column(0).to_pylist() == answers
        assert path.stat().st_size == size or form in ("snappy.parquet", "zstd.parquet")
        fingerprints.append(read._fingerprint)  # the tokens' cache is keyed by it
    assert len(set(fingerprints)) == 11


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_what_is_read_of_a_file_that_changes_meanwhile_is_not_kept(folder, tokenizer, monkeypatch, form):
    rows = pa.table({"conversations": [json.dumps(TURNS)], "image_bytes": [(folder / "photos/a.png").read_bytes()]})
    path, key = folder / f"rows.{form}", file_kinds.content_key
    path.write_text(json.dumps({"image": "a.png", "conversations": TURNS}), encoding="utf-8")
    if form == "parquet":
        pq.write_table(rows, path)
    times = iter(["before", "after"])
    for module in (file_kinds, parquet):
        monkeypatch.setattr(module, "content_key", lambda path: f"{next(times)}{key(path)}")
    with pytest.raises(UsageError, match="changed while it was read: start again when it is complete"):
        opened(folder, tokenizer, path.name)
    monkeypatch.undo()
    assert not list(folder.glob("cache/**/*.arrow"))
    assert len(opened(folder, tokenizer, path.name)) == 1
