"""Parquet files of the published form: each picture kept once, by its content; rows of text; what is made only once."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from published_parquet import write_published_form
from tiny import SFT, as_file, turn

from common.errors import UsageError
from dataset import parquet
from dataset.chat import ChatEncoder
from dataset.features import FeatureFolder, compute_features
from dataset.holdout import hold_out, rows_in_both
from dataset.lm_dataset import VLMDataset
from dataset.pictures import is_blank
from scripts.data.sources import read_source
from trainer.setup import split

pytest_plugins = ["tiny"]

BLACK = as_file(Image.new("RGB", (8, 8)), "JPEG")
ASKED, TEXT = "<image>\n图中有什么？", "你好"


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return as_file(Image.fromarray(noise).resize((32, 32)), "JPEG")


def said(asked: str, answer: str = "一只猫。", *before: dict, **more) -> list[dict]:
    return [*before, turn("user", asked), turn("assistant", answer) | more]


@pytest.fixture
def written(tmp_path, tokenizer):
    """Writes rows of (turns, image) as a parquet, and opens it."""

    def write(rows, name="rows.parquet", images=None, **options) -> VLMDataset:
        texts = [json.dumps(turns, ensure_ascii=False) for turns, _ in rows]
        images = pa.array([image for _, image in rows], pa.binary()) if images is None else images
        pq.write_table(pa.table({"conversations": texts, "image_bytes": images}), tmp_path / name, **options)
        return opened(tmp_path / name, tokenizer)

    return write


def opened(path: Path, tokenizer) -> VLMDataset:
    return VLMDataset(path, None, tokenizer, 640, 16, cache_dir=path.parent / "cache")


def kept_in(folder: Path) -> Path:
    [kept] = (folder / "cache" / "minimind-v").iterdir()
    return kept


def means(data: VLMDataset) -> list[list[float]]:
    return [sample["pixel_values"].float().mean(dim=(1, 2, 3)).tolist() for sample in data]


# ---- rows


@pytest.mark.parametrize("twice", ["conversations", "image_bytes", "source"])
def test_a_column_that_stands_there_twice_is_refused(tmp_path, tokenizer, twice):
    names = ["conversations", "image_bytes", "source", twice]
    columns = {"conversations": json.dumps(said(ASKED)), "image_bytes": picture(0), "source": "a"}
    table = pa.Table.from_arrays([pa.array([columns[name]]) for name in names], names=names)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match=f"rows.parquet has the column {twice} twice"):
        opened(tmp_path / "rows.parquet", tokenizer)
    with pytest.raises(UsageError, match=f"rows.parquet has the column {twice} twice"):
        list(read_source(tmp_path / "rows.parquet"))
    (tmp_path / "rows.csv").write_text("image,caption,Caption\na.jpg,one,two\n")
    with pytest.raises(UsageError, match="rows.csv has the column caption twice"):
        list(read_source(tmp_path / "rows.csv"))


def test_rows_of_text_with_a_black_picture_are_learned_as_text(written):
    red, two = as_file(Image.new("RGB", (8, 8), "red"), "JPEG"), said("<image><image>你好")
    data = written([(said(TEXT), BLACK), (said(TEXT), None), (said(f"<image>\n{TEXT}"), BLACK), (said(TEXT), red)])
    assert [len(sample["image_starts"]) for sample in data] == [0, 0, 1, 1]
    assert torch.equal(data[0]["input_ids"], data[1]["input_ids"])
    assert data.bad_rows == []
    assert data.rules == {
        "no <image>": "in 1 row: the picture is put first",
        "text only": "in 1 row: no <image>, and the black 8 x 8 placeholder picture; learned as text",
    }
    lists = pa.array([[BLACK], [BLACK, BLACK], [BLACK, BLACK]])
    data = written([(said(TEXT), None), (two, None), (said(TEXT), None)], "lists.parquet", lists)
    assert [len(sample["image_starts"]) for sample in data] == [0, 2]
    assert [bad.reason for bad in data.bad_rows] == ["0 <image> in the text, but 2 picture(s)"]


def test_only_the_black_picture_of_8_x_8_stands_for_none():
    for kind in ("JPEG", "PNG", "BMP", "WEBP"):
        assert is_blank(as_file(Image.new("RGB", (8, 8)), kind))
    assert is_blank(as_file(Image.new("L", (8, 8)), "PNG"))
    spot = Image.new("RGB", (8, 8))
    spot.putpixel((3, 3), (200, 0, 0))
    others = [spot, Image.new("RGB", (8, 9)), Image.new("RGB", (256, 256)), Image.new("RGBA", (8, 8), (0, 0, 0, 0))]
    assert not any(is_blank(as_file(image, "PNG")) for image in others)
    assert not any(map(is_blank, [b"", b"no picture", BLACK[:40], as_file(others[0], "PNG")[:60]]))


@pytest.mark.parametrize("wording", ["", "Reply briefly.", "你是一个智能助手，名叫小明。" * 20, "<|im_end|>\n@"])
def test_a_system_turn_may_say_anything(written, tokenizer, wording):
    turns = said(TEXT, "好", turn("system", wording))
    data = written([(turns, BLACK)])
    [chat] = ChatEncoder(tokenizer, 16).encode([turns])
    assert data[0]["input_ids"].tolist() == chat.input_ids
    assert (data.bad_rows, len(data)) == ([], 1)


def test_a_system_turn_without_text_is_an_empty_one(written):
    null, missing, empty = turn("system", None), {"role": "system"}, turn("system", "")
    calls = [null, *said(TEXT, None, tool_calls=[{"name": "search"}])]
    answers = [said(TEXT, None), [null, *said(TEXT, None)]]
    data = written([(turns, BLACK) for turns in (*(said(TEXT, "好", system) for system in (empty, null, missing)),
                                                 calls, [null, *said(TEXT), turn("tool", "x")], *answers)])  # fmt: skip
    assert len({tuple(sample["input_ids"].tolist()) for sample in data}) == 1 and len(data) == 3
    assert data.tool_rows == 2
    assert [bad.reason for bad in data.bad_rows] == [f"turn {number} has no text as content" for number in (2, 3)]


def test_tool_calls_are_left_out_but_are_not_bad(written):
    calls = [{"name": "search", "arguments": {"query": "猫"}}]
    called = [*said(TEXT, "", tool_calls=calls), turn("tool", "{}"), turn("assistant", "一只猫。")]
    rows = [said(TEXT), called, said(TEXT, "", tool_calls=json.dumps(calls)), [*said(TEXT), turn("tool", "x")]]
    rows += [said(TEXT, tool_calls=none) for none in (None, "", [], "[]")]
    data = written([(turns, BLACK) for turns in rows])
    assert (len(data), data.row_count, data.bad_rows) == (5, 8, [])
    assert (
        data.rules["tool calls"] == "in 3 rows: left out: only minimind-3v's prompt form has tools; not counted as bad"
    )


def test_reasoning_and_empty_think_blocks_are_dropped_and_the_answer_learned(written):
    empty = ["<think>\n\n</think>\n\n", "<think></think>", "\n<think> </think>"]
    rows = [said(TEXT), said(TEXT, reasoning_content="猫？"), *(said(TEXT, f"{block}一只猫。") for block in empty)]
    rows += [said(TEXT, reasoning_content=none) for none in (None, "", " ")]
    kept, nothing = said(TEXT, "<think>\n猫\n</think>\n\n一只猫。"), said(TEXT, empty[0])
    data = written([(turns, BLACK) for turns in [*rows, kept, nothing]])
    assert all(torch.equal(data[i]["input_ids"], data[0]["input_ids"]) for i in range(len(rows)))
    assert len(data) == len(rows) + 1 and data.lengths[-1] > data.lengths[0]  # thoughts that are written stay
    assert [bad.reason for bad in data.bad_rows] == ["turn 2: the answer is empty"]
    assert data.rules["reasoning"].startswith("in 1 row: ")
    assert data.rules["empty think"] == (
        "in 3 rows: minimind-3v begins every answer so; for others the empty think block is dropped"
    )


# ---- pictures


def published(tmp_path, tokenizer, rows=200) -> tuple[dict, VLMDataset]:
    counts = write_published_form(tmp_path / "published.parquet", rows)
    return counts, opened(tmp_path / "published.parquet", tokenizer)


def test_each_picture_is_kept_once_and_read_from_every_row(written, tmp_path):
    shown = [0, 1, 2, 0, 1, 0, 0]
    data = written([(said(ASKED, f"第{row}张。"), picture(number)) for row, number in enumerate(shown)])
    assert data.shown_pictures.tolist() == shown
    assert (data.image_count, len(set(data.picture_keys.tolist()))) == (7, 3)
    assert data.image_files["content"] == [picture(number) for number in range(3)]
    expected = means(data)
    assert all(expected[row] == expected[shown.index(number)] for row, number in enumerate(shown))
    assert len({values[0] for values in expected}) == 3
    assert means(pickle.loads(pickle.dumps(data))) == expected
    size = (kept_in(tmp_path) / "pictures.arrow").stat().st_size
    assert sum(len(picture(number)) for number in range(3)) < size < sum(len(picture(number)) for number in shown)


def test_a_file_of_the_published_form_takes_less_disk_than_a_copy_of_its_rows(tmp_path, tokenizer):
    counts, data = published(tmp_path, tokenizer, 400)
    assert len(data.image_files) == counts["pictures"] < 100
    assert data.rules["text only"].startswith(f"in {counts['rows of text'] - data.tool_rows} row")
    size = sum(path.stat().st_size for path in kept_in(tmp_path).iterdir())
    assert size < counts["bytes of all rows"] / 2
    assert len(data) + data.tool_rows == 400


@pytest.mark.parametrize("form", ["dictionaries", "lists of dictionaries", "structs", "several row groups", "plain"])
def test_every_way_to_write_the_pictures_gives_the_same(written, tmp_path, form):
    shown, files = [0, 1, 1, 0, 2], [picture(number) for number in range(3)]
    rows = [(said(ASKED, f"第{row}张。"), files[number]) for row, number in enumerate(shown)]
    dictionaries = pa.DictionaryArray.from_arrays(pa.array(shown, pa.int32()), pa.array(files))
    images = {
        "dictionaries": dictionaries,
        "lists of dictionaries": pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), dictionaries),
        "structs": pa.array([{"bytes": files[number], "path": f"{row}.jpg"} for row, number in enumerate(shown)]),
    }
    options = {"several row groups": {"row_group_size": 2}, "plain": {"use_dictionary": False}}
    data = written(rows, "other.parquet", images.get(form), **options.get(form, {}))
    assert data.bad_rows == []
    assert data.shown_pictures.tolist() == shown
    shutil.rmtree(tmp_path / "cache")
    assert means(data) == means(written(rows))


def test_a_picture_in_several_rows_is_encoded_once(tmp_path, tokenizer):
    counts, data = published(tmp_path, tokenizer)
    encoded = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels.float().mean(dim=(1, 2, 3))[:, None, None].expand(-1, 4, 2)

    for _ in range(2):
        features = FeatureFolder(tmp_path, "tower", (4, 2))
        features.make_room(data.picture_keys)
        compute_features(data, features, encode, torch.device("cpu"))
    assert sum(encoded) == counts["pictures"] - 1 < data.image_count / 3  # not the black one
    expected = means(data)
    data.features = features
    for sample, of_pixels in zip(data, expected, strict=True):
        assert sample["image_features"][:, 0, 0].tolist() == pytest.approx(of_pixels, rel=1e-3)


def test_rows_that_share_a_picture_are_held_out_together(tmp_path, tokenizer):
    _, data = published(tmp_path, tokenizer, 400)
    kept, held_out = hold_out(data, share=0.05)
    shown = [
        set(np.concatenate([row["picture_numbers"] for row in of.read_rows(of.row_indices.tolist())]))
        for of in (kept, held_out)
    ]
    assert 0 < len(held_out) <= 40 and len(kept) + len(held_out) == len(data)
    assert not shown[0] & shown[1]
    assert rows_in_both(kept, held_out) == 0
    assert (held_out.image_counts > 0).all()
    texts = data.column("picture_hash")[data.row_indices[data.image_counts == 0]]
    assert len(np.unique(texts)) == len(texts)  # the black picture does not make them one group


def pairs(written, numbers) -> VLMDataset:
    """Opens a file of rows with these pictures each, in another form for each number of rows."""
    rows = [(said("<image>" * len(shown), f"第{row}个。"), None) for row, shown in enumerate(numbers)]
    lists = pa.array([[picture(number) for number in shown] for shown in numbers], pa.list_(pa.binary()))
    return written(rows, f"{len(rows)}.parquet", lists)


def shown_by(data: VLMDataset) -> set[int]:
    return {number for row in data.read_rows(data.row_indices.tolist()) for number in row["picture_numbers"]}


def test_a_held_out_picture_is_not_trained_on_as_the_second_of_a_row(written):
    data = pairs(written, [[number, (number + 1) % 60] for number in range(60)] + [[number] for number in range(60)])
    said = []
    kept, held_out = split(SimpleNamespace(log=said.append, args=SimpleNamespace(eval_data=None)), data)
    assert not shown_by(kept) & shown_by(held_out)
    left_out = len(data) - len(kept) - len(held_out)
    assert 0 < left_out <= 3 * len(held_out)
    assert len(kept.row_indices) == len(set(kept.row_indices.tolist()) - set(held_out.row_indices.tolist()))
    assert said == [f"{left_out} rows show a held-out image beside others: used for neither training nor evaluation"]


def test_a_picture_in_most_rows_is_not_left_out_with_them_but_said(written):
    data = pairs(written, [[number, 200] for number in range(100)])
    said = []
    kept, held_out = split(SimpleNamespace(log=said.append, args=SimpleNamespace(eval_data=None)), data)
    assert (len(kept), len(held_out)) == (99, 1)
    assert len(said) == 1 and said[0].startswith("warning: 99 held-out rows or images are trained on too")


def test_the_same_texts_with_other_pictures_are_other_data(written):
    rows = [(said(ASKED, f"第{number}张。"), picture(number)) for number in range(4)]
    others = [[(turns, picture(number)) for (turns, _), number in zip(rows, numbers, strict=True)]
              for numbers in ([0, 1, 2, 4], [1, 0, 2, 3], [0, 0, 1, 2])]  # fmt: skip
    found = [written(those, f"{n}.parquet").content_sha256 for n, those in enumerate([rows, rows, *others])]
    assert found[0] == found[1] and len(set(found)) == 4


def test_many_rows_are_few_blocks_and_large_pictures_more(tmp_path, tokenizer, monkeypatch):
    """Opening a file looks at each of its blocks; writing it holds one in memory."""
    rows = [(said(TEXT), None)] * 1000
    texts = [json.dumps(turns, ensure_ascii=False) for turns, _ in rows]
    for name, limit, blocks in (("a", 1 << 26, [1, 1]), ("b", 5000, [10, 10])):
        monkeypatch.setattr(parquet, "BLOCK_BYTES", limit)
        images = [np.random.default_rng(number).bytes(100) for number in range(1000)]
        pq.write_table(pa.table({"conversations": texts, "image_bytes": images}), tmp_path / f"{name}.parquet")
        kept = parquet.load_parquet(tmp_path / f"{name}.parquet", tmp_path / name)
        assert [of.data.column(0).num_chunks for of in kept] == blocks
        assert kept[1]["content"] == images
        assert kept[0]["pictures"] == [[number] for number in range(1000)]


def test_several_processes_give_the_same_rows(tmp_path, tokenizer, monkeypatch):
    _, data = published(tmp_path, tokenizer)
    path = tmp_path / "published.parquet"
    monkeypatch.setattr("dataset.rows.ROWS_PER_PROCESS", 150)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    two = VLMDataset(path, None, tokenizer, 640, 16, cache_dir=tmp_path / "other cache")
    assert len(two.rows.cache_files) == 2
    assert two.rows.data.to_pylist() == data.rows.data.to_pylist()


# ---- the cache


def test_what_was_made_is_opened_without_reading_the_file(tmp_path, tokenizer, monkeypatch):
    _, data = published(tmp_path, tokenizer)
    monkeypatch.setattr(parquet.pq, "ParquetFile", lambda *args, **named: pytest.fail("read again"))
    monkeypatch.setattr(ChatEncoder, "encode", lambda *args, **named: pytest.fail("tokenised again"))
    shutil.copytree(tmp_path, tmp_path / "copied", ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "copied" / "cache").symlink_to(tmp_path / "cache")
    for path in (tmp_path / "published.parquet", tmp_path / "copied" / "published.parquet"):
        again = opened(path, tokenizer)
        assert again.content_sha256 == data.content_sha256
        assert torch.equal(again[5]["pixel_values"], data[5]["pixel_values"])


def test_the_disk_that_is_needed_is_said_before(written, capsys):
    rows = [(said(ASKED, f"第{row}张。"), picture(row % 5)) for row in range(50)]
    data = written(rows)
    shown = re.search(r"rows\.parquet is read once .*: it takes up to ([\d.]+)kB in ", capsys.readouterr().out)
    real = sum(map(len, data.image_files["content"]))
    assert real <= float(shown[1]) * 1000 <= 2 * real + 10_000


def test_a_changed_file_is_read_again(written):
    written([(said(ASKED), picture(0))])
    changed = written([(said(ASKED), picture(2)), (said(ASKED), picture(3))])
    assert changed.image_files["content"] == [picture(2), picture(3)]


def test_a_full_disk_leaves_nothing_and_is_not_blamed_on_the_file(written, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parquet, "as_files", full)
    with pytest.raises(UsageError, match="the rows of .* cannot be kept in .*: No space left .* HF_HOME"):
        written([(said(ASKED), picture(0))])
    assert list((tmp_path / "cache" / "minimind-v").iterdir()) == []


def test_a_process_that_was_killed_while_reading_leaves_nothing_behind(written, tmp_path):
    rows = [(said(ASKED), picture(0))]
    written(rows)
    shutil.rmtree(tmp_path / "cache")
    process = os.fork()
    if process == 0:
        parquet.as_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            parquet.load_parquet(tmp_path / "rows.parquet", tmp_path / "cache")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert kept_in(tmp_path).suffix == ".tmp"
    assert len(written(rows)) == 1
    assert kept_in(tmp_path).suffix == ""


def test_another_process_that_reads_the_same_file_is_waited_for(written, tmp_path, tokenizer, monkeypatch):
    rows = [(said(ASKED), picture(0))]
    written(rows)
    folder = kept_in(tmp_path)
    folder.rename(tmp_path / "made by another")
    monkeypatch.setattr(parquet, "import_file", lambda *args: pytest.fail("made twice"))
    with ThreadPool(1) as pool:
        with parquet.lock_of(folder):
            opening = pool.apply_async(opened, (tmp_path / "rows.parquet", tokenizer))
            opening.wait(0.5)
            assert not opening.ready()
            (tmp_path / "made by another").rename(folder)
        assert len(opening.get(30)) == 1


def test_a_damaged_cache_is_named(written, tmp_path):
    rows = [(said(ASKED), picture(number)) for number in range(9)]
    written(rows)
    (kept_in(tmp_path) / "pictures.arrow").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(UsageError, match=f"{kept_in(tmp_path)} is damaged .*: delete it, and it is made again"):
        written(rows)
    shutil.rmtree(kept_in(tmp_path))
    assert len(written(rows)) == 9


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "binary_view"])
def test_text_of_every_type_is_read_as_text(tmp_path, tokenizer, kind):
    texts = pa.array([json.dumps(said(ASKED), ensure_ascii=False).encode(), None]).cast(getattr(pa, kind)())
    for name, column in (("a", texts), ("b", texts.cast(pa.string()).dictionary_encode())):
        pq.write_table(pa.table({"conversations": column, "image_bytes": [picture(0)] * 2}), tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.parquet")
        data = opened(tmp_path / f"{name}.parquet", tokenizer)
        assert (len(data), [bad.line for bad in data.bad_rows]) == (1, [2])
        rows, _ = parquet.load_parquet(tmp_path / f"{name}.parquet", tmp_path / "cache")
        assert rows["conversations"] == [json.dumps(said(ASKED), ensure_ascii=False), None]


def test_text_that_is_not_utf_8_is_an_error_of_the_file(tmp_path, tokenizer):
    broken = pa.array([b'[{"role": "user\xff"}]']).view(pa.string())
    pq.write_table(pa.table({"conversations": broken, "image_bytes": [picture(0)]}), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match=r"rows\.parquet cannot be read: .*UTF8"):
        opened(tmp_path / "rows.parquet", tokenizer)


# ---- runs


def test_a_run_on_the_published_form_says_its_rules_and_resumes_bit_identically(world, tmp_path):
    write_published_form(tmp_path / "published.parquet", 100)
    table = pq.read_table(tmp_path / "published.parquet")
    calls = [row for row, text in enumerate(table["conversations"].to_pylist()) if "tool_calls" in text]
    table = table.take([*range(32), *calls])
    pq.write_table(table, tmp_path / "published.parquet")
    flags = ["--data_path", tmp_path / "published.parquet", "--max_seq_len", 640, "--epochs", 2, "--batch_size", 6]
    flags += ["--from_weight", "llm", "--learning_rate", 1e-3, "--num_workers", 1, "--ignore_high_loss"]
    ends = []
    for name, hook in (("whole", ""), ("killed", KILLED_IN_STEP_9)):
        out = world.copy_of_out(tmp_path / name)
        run = world.run(SFT, *world.files("sft", out), *flags, "--save_interval", 3, hook=hook)
        if hook:
            assert run.code == -signal.SIGKILL
            run = world.run(SFT, *world.files("sft", out), *flags, "--save_interval", 3, "--from_resume", 1)
        ends.append(torch.load(run.passed() and out / "sft_vlm_32.pth", weights_only=True))
        assert "text only: in " in run.out and "tool calls: in " in run.out
        assert ("is read once into the cache" in run.out, "encoding images, once" in run.err) == (not hook, not hook)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    files = pa.array([file + b"other" for file in table["image_bytes"].to_pylist()])
    pq.write_table(table.set_column(1, "image_bytes", files), tmp_path / "other.parquet")
    flags += ["--data_path", tmp_path / "other.parquet", "--from_resume", 1]
    world.run(SFT, *world.files("sft", out), *flags).refused("sft_vlm_32_resume.pth differs from this run in its data")


KILLED_IN_STEP_9 = """
import os, signal, model.model_vlm
forward, calls = model.model_vlm.MiniMindVLM.forward, []
def counted(*inputs, **named):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*inputs, **named)
model.model_vlm.MiniMindVLM.forward = counted
"""
