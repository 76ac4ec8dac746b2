"""Measure what training data of the published form takes: disk, memory, and the time until training can start.

    python scripts/check_parquet.py
    python scripts/check_parquet.py --rows 3000 --folder my_folder

It writes a parquet file like the published one: each picture in four to five
rows but once in the file, huge row groups, and a share of rows that are text
only, with a black picture of 8 x 8. Then processes of their own open it for
the first and the second time, and read samples in random order.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.paths import BUILTIN_TOKENIZER_DIR  # noqa: E402
from dataset.lm_dataset import VLMDataset  # noqa: E402
from dataset.tokenizer import load_tokenizer, quiet_libraries  # noqa: E402
from scripts.measure.memory import peak_memory  # noqa: E402

ROWS_PER_PICTURE = 2_900_000 / 650_000
TEXT_ONLY = 230_000 / 2_900_000
PICTURE_BYTES = 6_600
GROUP_ROWS = 1_000_000
PIECE_ROWS = 10_000
DRAWN = 64
MAX_LENGTH, IMAGE_TOKENS = 1536, 196
WORDS = "一只红色的猫坐在桌上看着窗外蓝天白云下有两个人走过街道"


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return file.getvalue()


def picture_files(count: int, rng: np.random.Generator) -> list[bytes]:
    """Returns JPEGs of 256 x 256: a few are drawn, and each gets an end of its own, which decoders pass over."""
    drawn = []
    for _ in range(min(DRAWN, count)):
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        drawn.append(jpeg(noise.resize((256, 256), Image.Resampling.BICUBIC)))
    picked = (drawn[number % len(drawn)] for number in range(count))
    return [start + rng.bytes(max(8, PICTURE_BYTES - len(start))) for start in picked]


def conversation(number: int, pictures: int, long_text: str, rng: np.random.Generator) -> list[dict]:
    """Returns turns about so many pictures.

    Of those without, a tenth each have a system turn, reasoning, a think block or a tool call.
    """
    start = int(rng.integers(len(long_text) - 240))
    said = long_text[start : start + int(rng.integers(40, 240))]
    answer = {"role": "assistant", "content": f"{said}{number}。"}
    turns = [{"role": "user", "content": f"图中有什么{number}？" + "\n<image>" * pictures}, answer]
    kind = 9 if pictures else rng.integers(10)
    if kind == 0:
        turns.insert(0, {"role": "system", "content": f"回答要短{number % 7}"})
    elif kind == 1:
        answer["reasoning_content"] = said[:40]
    elif kind == 2:
        answer["content"] = f"<think>\n\n</think>\n\n{answer['content']}"
    elif kind == 3:
        answer["tool_calls"] = [{"name": "search", "arguments": {"query": said[:5]}}]
        turns += [{"role": "tool", "content": "{}"}, {"role": "assistant", "content": said}]
    return turns


def write_published_form(path: Path, rows: int, seed: int = 0, per_row: int = 1) -> dict[str, int]:
    """Writes a parquet file of the published form; returns how many rows, pictures and rows of text it has.

    Args:
        per_row: Pictures of a row that is not of text.
    """
    rng, black = np.random.default_rng(seed), jpeg(Image.new("RGB", (8, 8)))
    picture = pa.dictionary(pa.int32(), pa.binary())
    schema = pa.schema({"conversations": pa.string(), "image_bytes": picture if per_row == 1 else pa.list_(picture)})
    # A dictionary of any size stays one: by default the writer gives it up at 1 MB.
    options = {"dictionary_pagesize_limit": 2**31 - 1, "store_schema": False}
    options["use_dictionary"] = ["image_bytes", "image_bytes.list.element"]
    long_text = "".join(rng.choice(list(WORDS), 100_000))
    counts = {"rows": rows, "pictures": 1, "rows of text": 0, "bytes of all rows": 0}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(rows, start + GROUP_ROWS))
            files = [black, *picture_files(max(1, int(len(numbers) / ROWS_PER_PICTURE)), rng)]
            shown = rng.integers(1, len(files), (len(numbers), per_row))
            is_text = rng.random(len(numbers)) < TEXT_ONLY
            shown[is_text] = 0
            pictures_of = np.where(is_text, 1, per_row)
            shown = shown[np.arange(per_row) < pictures_of[:, None]]
            texts = (
                conversation(number, 0 if text else per_row, long_text, rng)
                for number, text in zip(numbers, is_text, strict=True)
            )
            column = pa.array([json.dumps(turns, ensure_ascii=False) for turns in texts], pa.string())
            counts["pictures"] += len(np.unique(shown[shown > 0]))
            counts["rows of text"] += int(is_text.sum())
            counts["bytes of all rows"] += column.nbytes + int(np.array([*map(len, files)])[shown].sum())
            pictures = pa.DictionaryArray.from_arrays(pa.array(shown, pa.int32()), pa.array(files, pa.binary()))
            if per_row > 1:
                ends = np.concatenate([[0], np.cumsum(pictures_of)])
                lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pictures)
                # The writer unfolds a list's dictionary, piece by piece, and a piece may have 2 GB at most.
                pieces = [lists[piece : piece + PIECE_ROWS] for piece in range(0, len(lists), PIECE_ROWS)]
                pictures = pa.chunked_array(pieces)
            writer.write_table(pa.table([column, pictures], schema=schema), GROUP_ROWS)
    return counts


def measured(function: Callable, *arguments) -> dict[str, float]:
    """Calls a function in a process of its own.

    Returns:
        What the function returns, with "seconds"; "peak GB", the memory of that process and those it starts, mapped
        files included; and "own GB", without mapped files. Both are zero where the system is not Linux.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed, function, *arguments).result()


def timed(function: Callable, *arguments) -> dict[str, float]:
    quiet_libraries(is_main=False)
    with peak_memory(os.getpid()) as peak:
        started = time.perf_counter()
        found = function(*arguments)
        seconds = time.perf_counter() - started
    return found | {"seconds": seconds} | peak


def opened(path: Path, cache: Path) -> VLMDataset:
    tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    return VLMDataset(path, None, tokenizer, MAX_LENGTH, IMAGE_TOKENS, cache_dir=cache)


def open_it(path: Path, cache: Path) -> dict:
    """Does what a run does before its first step."""
    data = opened(path, cache)
    data.content_sha256  # noqa: B018 (the checkpoint's key)
    return {"samples": len(data), "bad": len(data.bad_rows), "rules": data.rules}


def read_samples(path: Path, cache: Path, count: int) -> dict:
    """Reads samples in random order, pictures decoded."""
    data = opened(path, cache)
    order = np.random.default_rng(1).integers(0, len(data), count).tolist()
    started = time.perf_counter()
    for start in range(0, count, 16):
        data.__getitems__(order[start : start + 16])
    return {"samples/s": count / (time.perf_counter() - started)}


def folder_bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def check(rows: int, folder: Path):
    """Writes the file, and prints what was measured."""
    path, cache = folder / "published_form.parquet", folder / "cache"
    counts = write_published_form(path, rows)
    fact("the file", f"{path.stat().st_size / 1e9:.3f} GB: {counts['rows']:,} rows, {counts['pictures']:,} pictures")
    fact("a copy row by row", f"would be {counts['bytes of all rows'] / 1e9:.3f} GB")
    imports = measured(dict)
    fact("imports alone", memory(imports))
    first = measured(open_it, path, cache)
    fact("opened first", f"{first['seconds']:.1f} s, {memory(first)}")
    kept = {"pictures": "pictures.arrow", "rows": "rows.arrow", "token ids": "cache-*.arrow"}
    sizes = {name: folder_bytes(cache, pattern) / 1e9 for name, pattern in kept.items()}
    parts = ", ".join(f"{name} {size:.3f}" for name, size in sizes.items())
    fact("the cache", f"{folder_bytes(cache, '*') / 1e9:.3f} GB: {parts}")
    again = measured(open_it, path, cache)
    fact("opened again", f"{again['seconds']:.1f} s, {memory(again)}")
    read = measured(read_samples, path, cache, min(rows, 4000))
    fact("random samples", f"{read['samples/s']:.0f} a second in one process, {memory(read)}")
    fact("rows", f"{again['samples']:,} to learn from, {again['bad']:,} bad; rows of text: {counts['rows of text']:,}")
    for kind, rule in again["rules"].items():
        fact(f"  {kind}", rule)


def memory(figures: dict) -> str:
    return f"peak memory {figures['peak GB']:.2f} GB ({figures['own GB']:.2f} GB without mapped files)"


def fact(name: str, text: str):
    print(f"  {name:<18} {text}", flush=True)


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
            check(args.rows, folder.resolve())
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    run_script(main)
