"""scripts/check_parquet.py: what it writes is the published form, and what it prints is there."""

import json
import re

import pyarrow.parquet as pq
import pytest

from common.errors import UsageError
from scripts import check_parquet

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
    monkeypatch.setattr(check_parquet, "measured", check_parquet.timed)  # a process of its own imports for seconds
    monkeypatch.setattr("sys.argv", ["check_parquet.py", "--rows", "300", "--folder", str(tmp_path / "made")])
    check_parquet.main()
    shown = capsys.readouterr().out
    for name in ("the file", "a copy row by row", "opened first", "the cache", "opened again", "random samples"):
        assert re.search(rf"^  {name} +.*\d", shown, re.MULTILINE), name
    assert re.search(r"opened again +\d+\.\d s, peak memory \d\.\d\d GB \(\d\.\d\d GB without mapped files\)", shown)
    assert re.search(r"rows +\d+ to learn from, 0 bad; rows of text: \d+", shown)


def test_too_few_rows_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_parquet.py", "--rows", "99"])
    with pytest.raises(UsageError, match="--rows 99: must be at least 100"):
        check_parquet.main()
