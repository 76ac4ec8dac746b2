"""What the published parquet files look like, and that opening such a file costs little disk and memory."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
from published_parquet import memory_in_use, write_published_form

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.chat import load_tokenizer
from dataset.lm_dataset import VLMDataset
from scripts.benchmark import alone

pytest_plugins = ["tiny"]


def test_a_file_of_the_published_form_has_each_picture_once_in_one_row_group(tmp_path):
    counts = write_published_form(tmp_path / "rows.parquet", 500)
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


def memory_of_opening(path: Path, cache: Path) -> float:
    """Returns by how much opening the data makes this process grow, without mapped files, in GB."""
    before = memory_in_use(os.getpid())
    open_data(path, cache)
    return (memory_in_use(os.getpid()) - before) / 1e9


def open_data(path: Path, cache: Path) -> VLMDataset:
    data = VLMDataset(path, None, load_tokenizer(BUILTIN_TOKENIZER_DIR), 1536, 196, cache_dir=cache)
    assert data.content_sha256  # the checkpoint's key
    return data


def test_the_cache_is_small_and_opening_it_takes_hardly_any_memory(tmp_path):
    path, cache = tmp_path / "rows.parquet", tmp_path / "cache"
    counts = write_published_form(path, 12_000)
    alone(memory_of_opening, path, cache)  # imports it, in a process without the forms that other tests register
    assert counts["bytes of all rows"] > 75e6
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert size < counts["bytes of all rows"] / 2
    assert -0.01 < alone(memory_of_opening, path, cache) < size / 1e9 / 2
