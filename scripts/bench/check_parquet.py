"""Measure what training data of the published form takes: disk, memory, and the time until training can start.

    python scripts/bench/check_parquet.py
    python scripts/bench/check_parquet.py --rows 3000 --folder my_folder

It writes a parquet file like the published one, then opens it for the first and the second time and reads samples in
random order, each in a process of its own. Memory is the peak without mapped files (Linux only).
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.lm_dataset import VLMDataset
from dataset.tokenizer import load_tokenizer
from scripts.bench.measuring import alone, print_table

ROWS_PER_PICTURE = 2_900_000 / 650_000
TEXT_ONLY = 230_000 / 2_900_000
PICTURE_BYTES = 6_600
GROUP_ROWS = 1_000_000
DRAWN = 64
MAX_LENGTH, IMAGE_TOKENS = 1536, 196
WORDS = "一只红色的猫坐在桌上看着窗外蓝天白云下有两个人走过街道"
READ = 4000  # samples, in random order
MEMORY_INTERVAL = 0.1  # seconds


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return file.getvalue()


def picture_files(count: int, rng: np.random.Generator) -> list[bytes]:
    """Returns different JPEGs of 256 x 256: a few drawings, each copy with bytes at the end that decoders pass over."""
    drawn = []
    for _ in range(min(DRAWN, count)):
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        drawn.append(jpeg(noise.resize((256, 256), Image.Resampling.BICUBIC)))
    picked = (drawn[number % len(drawn)] for number in range(count))
    return [start + rng.bytes(max(8, PICTURE_BYTES - len(start))) for start in picked]


def conversation(number: int, is_text: bool, long_text: str, rng: np.random.Generator) -> list[dict]:
    """Returns turns about an image; of text-only ones a tenth each have a system turn, reasoning or tool calls."""
    start = int(rng.integers(len(long_text) - 240))
    text = long_text[start : start + int(rng.integers(40, 240))]
    answer = {"role": "assistant", "content": f"{text}{number}。"}
    turns = [{"role": "user", "content": f"图中有什么{number}？" + ("" if is_text else "\n<image>")}, answer]
    kind = rng.integers(10) if is_text else None
    if kind == 0:
        turns.insert(0, {"role": "system", "content": f"回答要短{number % 7}"})
    elif kind == 1:
        answer["reasoning_content"] = text[:40]
    elif kind == 2:
        answer["content"] = f"<think>\n\n</think>\n\n{answer['content']}"
    elif kind == 3:
        answer["tool_calls"] = [{"name": "search", "arguments": {"query": text[:5]}}]
        turns += [{"role": "tool", "content": "{}"}, {"role": "assistant", "content": text}]
    return turns


def write_published_form(path: Path, rows: int, seed: int = 0) -> dict[str, int]:
    """Writes a parquet file like the published one.

    Each picture is in four to five rows but once in the file, row groups are huge, and a share of the rows is text only
    with a black picture of 8 x 8.

    Returns:
        How many rows, pictures and rows of text it has, and the bytes of a copy row by row.
    """
    rng, black = np.random.default_rng(seed), jpeg(Image.new("RGB", (8, 8)))
    schema = pa.schema({"conversations": pa.string(), "image_bytes": pa.dictionary(pa.int32(), pa.binary())})
    # A dictionary of any size stays one: by default the writer gives it up at 1 MB.
    options = {"dictionary_pagesize_limit": 2**31 - 1, "store_schema": False, "use_dictionary": ["image_bytes"]}
    long_text = "".join(rng.choice(list(WORDS), 100_000))
    counts = {"rows": rows, "pictures": 1, "rows of text": 0, "bytes of all rows": 0}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(rows, start + GROUP_ROWS))
            files = [black, *picture_files(max(1, int(len(numbers) / ROWS_PER_PICTURE)), rng)]
            shown = rng.integers(1, len(files), len(numbers))
            is_text = rng.random(len(numbers)) < TEXT_ONLY
            shown[is_text] = 0
            turns = (conversation(*row, long_text, rng) for row in zip(numbers, is_text, strict=True))
            column = pa.array([json.dumps(row, ensure_ascii=False) for row in turns], pa.string())
            counts["pictures"] += len(np.unique(shown[shown > 0]))
            counts["rows of text"] += int(is_text.sum())
            counts["bytes of all rows"] += column.nbytes + int(np.array([*map(len, files)])[shown].sum())
            pictures = pa.DictionaryArray.from_arrays(pa.array(shown, pa.int32()), pa.array(files, pa.binary()))
            writer.write_table(pa.table([column, pictures], schema=schema), GROUP_ROWS)
    return counts


def memory_in_use(process: int) -> int:
    """Returns the bytes of a process and its descendants without mapped files; 0 where this is not Linux."""
    folder = Path(f"/proc/{process}")
    with contextlib.suppress(OSError):  # it has ended, or this is not Linux
        anonymous = re.search(r"Pss_Anon: +(\d+) kB", (folder / "smaps_rollup").read_text())
        children = " ".join(file.read_text() for file in (folder / "task").glob("*/children")).split()
        return int(anonymous[1]) * 1024 + sum(memory_in_use(int(child)) for child in children)
    return 0


def with_memory(function: Callable, *arguments) -> dict:
    """Returns a function's figures with its seconds and the most memory that this process has during the call."""
    done = threading.Event()

    def sample() -> int:
        most = 0
        while True:
            most = max(most, memory_in_use(os.getpid()))
            if done.wait(MEMORY_INTERVAL):
                return most

    with ThreadPoolExecutor(1) as pool:
        memory, started = pool.submit(sample), time.perf_counter()
        try:
            found = function(*arguments)
            seconds = time.perf_counter() - started
        finally:
            done.set()
    return {"s": seconds, "memory GB": memory.result() / 1e9} | found


def open_data(path: Path, cache: Path) -> VLMDataset:
    """Does with a data file what a run does before its first step."""
    data = VLMDataset(path, None, load_tokenizer(BUILTIN_TOKENIZER_DIR), MAX_LENGTH, IMAGE_TOKENS, cache_dir=cache)
    data.content_sha256  # noqa: B018 (the checkpoint's key)
    return data


def open_and_read(path: Path, cache: Path, count: int) -> dict:
    """Opens a data file and reads samples in random order, pictures decoded."""
    data = open_data(path, cache)
    order = np.random.default_rng(1).integers(0, len(data), count).tolist()
    started = time.perf_counter()
    for start in range(0, count, 16):
        data.__getitems__(order[start : start + 16])
    speed = {"samples/s": count / (time.perf_counter() - started)} if count else {}
    return {"samples": len(data)} | speed


def measure_file(rows: int, folder: Path) -> dict[str, dict]:
    """Writes a data file and opens it, each time in a process of its own.

    Returns:
        Rows of a table: gigabytes on disk; seconds, peak memory and samples of each process.
    """
    path, cache = folder / "published_form.parquet", folder / "cache"
    counts = write_published_form(path, rows)
    table = {"imports alone": alone(with_memory, dict)}
    for line, read in (("opened first", 0), ("opened again", 0), ("read in random order", min(rows, READ))):
        table[line] = alone(with_memory, open_and_read, path, cache, read)
    disk = path.stat().st_size, counts["bytes of all rows"], folder_bytes(cache)
    lines = "the file", "a copy row by row", "the cache"
    return {line: {"disk GB": size / 1e9} for line, size in zip(lines, disk, strict=True)} | table


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the file")
    parser.add_argument("--folder", type=file_path, help="where file and cache are written (default: removed after)")
    args = parser.parse_args(argv)
    if args.rows < 100:
        raise UsageError(f"--rows {args.rows}: must be at least 100")
    return args


def main():
    args = parse_arguments()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            print_table(f"{args.rows:,} rows", measure_file(args.rows, folder.resolve()))
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    run_script(main)
