"""scripts/check_parquet.py: what it writes is the published form, and what it prints is there."""

import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.errors import UsageError
from scripts import check_parquet
from scripts.measure.memory import memory_in_use, peak_memory

pytest_plugins = ["tiny"]


def test_a_file_of_the_published_form_has_each_picture_once_in_one_row_group(tmp_path):
    counts = check_parquet.write_published_form(tmp_path / "rows.parquet", 500)
    with pq.ParquetFile(tmp_path / "rows.parquet") as file:
        assert file.metadata.num_row_groups == 1
        images = file.metadata.row_group(0).column(1)
        rows = file.read().to_pylist()
    files = [row["image_bytes"] for row in rows]
    assert len(files) == counts["rows"] == 500
    assert len(set(files)) == counts["pictures"] < 500 / 4
    assert sum(map(len, set(files))) <= images.total_uncompressed_size < sum(map(len, files)) / 3
    texts = [row["conversations"] for row in rows if "<image>" not in row["conversations"]]
    assert len(texts) == counts["rows of text"] > 20
    turns = [turn for text in texts for turn in json.loads(text)]
    assert {turn["role"] for turn in turns} == {"system", "user", "assistant", "tool"}
    assert any("reasoning_content" in turn for turn in turns)


def test_rows_of_several_pictures_keep_each_picture_once_too(tmp_path, monkeypatch):
    check_parquet.write_published_form(tmp_path / "whole.parquet", 300, per_row=4)
    monkeypatch.setattr(check_parquet, "PIECE_ROWS", 70)
    counts = check_parquet.write_published_form(tmp_path / "pieces.parquet", 300, per_row=4)

    assert pq.read_table(tmp_path / "pieces.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    group = pq.ParquetFile(tmp_path / "pieces.parquet").metadata.row_group(0)
    assert group.num_rows == 300 and group.column(1).has_dictionary_page
    assert group.column(1).total_uncompressed_size < (counts["pictures"] + 2) * 2 * check_parquet.PICTURE_BYTES
    assert counts["bytes of all rows"] > 300 * 3 * check_parquet.PICTURE_BYTES


def test_it_prints_disk_memory_and_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_parquet, "measured", check_parquet.timed)  # a process of its own imports for seconds
    monkeypatch.setattr("sys.argv", ["check_parquet.py", "--rows", "300", "--folder", str(tmp_path / "made")])
    check_parquet.main()
    shown = capsys.readouterr().out
    for name in ("the file", "a copy row by row", "opened first", "the cache", "opened again", "random samples"):
        assert re.search(rf"^  {name} +.*\d", shown, re.MULTILINE), name
    assert re.search(r"opened again +\d+\.\d s, peak memory \d\.\d\d GB \(\d\.\d\d GB without mapped files\)", shown)
    assert re.search(r"rows +\d+ to learn from, 0 bad; rows of text: \d+", shown)


def growth_of_opening(path: Path, cache: Path) -> dict[str, float]:
    """Returns by how much opening the data makes this process grow, without mapped files, in GB."""
    before = memory_in_use(os.getpid())[1] / 1e9
    with peak_memory(os.getpid()) as peak:
        data = check_parquet.opened(path, cache)
        data.content_sha256  # noqa: B018 (the checkpoint's key)
        held = memory_in_use(os.getpid())[1] / 1e9
    return {"growth": max(held, peak["own GB"]) - before}


def test_what_is_kept_is_small_and_opening_it_takes_hardly_any_memory(tmp_path):
    path, cache = tmp_path / "rows.parquet", tmp_path / "cache"
    counts = check_parquet.write_published_form(path, 12_000)
    check_parquet.open_it(path, cache)
    assert counts["bytes of all rows"] > 75e6
    kept = check_parquet.folder_bytes(cache, "*")
    assert kept < counts["bytes of all rows"] / 2
    assert check_parquet.measured(growth_of_opening, path, cache)["growth"] < kept / 1e9 / 2


def test_too_few_rows_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_parquet.py", "--rows", "99"])
    with pytest.raises(UsageError, match="--rows 99: must be at least 100"):
        check_parquet.main()
