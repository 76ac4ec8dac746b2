"""scripts/bench/check_parquet.py: what it writes is the published form, and what it prints is there."""

import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.errors import UsageError
from scripts.bench import check_parquet
from scripts.bench.measuring import alone

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


def test_it_prints_disk_memory_and_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_parquet, "alone", lambda function, *arguments: function(*arguments))  # in this process
    monkeypatch.setattr("sys.argv", ["check_parquet.py", "--rows", "300", "--folder", str(tmp_path / "made")])
    check_parquet.main()
    shown = capsys.readouterr().out
    for line in ("the file", "a copy row by row", "the cache", "opened first", "opened again", "read in random order"):
        assert re.search(rf"^  {line} +.*\d", shown, re.MULTILINE), line
    title = next(line for line in shown.splitlines() if line.startswith("300 rows"))
    assert title.split() == "300 rows disk GB s memory GB samples samples/s".split()
    assert re.search(r"opened again +(\d+\.\d\d +){2}29\d", shown)  # less rows that call tools


def memory_of_opening(path: Path, cache: Path) -> float:
    """Returns by how much opening the data makes this process grow, without mapped files, in GB."""
    before = check_parquet.memory_in_use(os.getpid()) / 1e9
    return check_parquet.with_memory(check_parquet.open_and_read, path, cache, 0)["memory GB"] - before


def test_the_cache_is_small_and_opening_it_takes_hardly_any_memory(tmp_path):
    path, cache = tmp_path / "rows.parquet", tmp_path / "cache"
    counts = check_parquet.write_published_form(path, 12_000)
    check_parquet.open_data(path, cache)
    assert counts["bytes of all rows"] > 75e6
    size = check_parquet.folder_bytes(cache)
    assert size < counts["bytes of all rows"] / 2
    assert -0.01 < alone(memory_of_opening, path, cache) < size / 1e9 / 2


def test_too_few_rows_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_parquet.py", "--rows", "99"])
    with pytest.raises(UsageError, match="--rows 99: must be at least 100"):
        check_parquet.main()
