"""Writes a parquet file like the published ones: each picture once, in huge row groups, for several rows."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS_PER_PICTURE = 2_900_000 / 650_000
TEXT_ONLY = 230_000 / 2_900_000
PICTURE_BYTES = 6_600
GROUP_ROWS = 1_000_000
DRAWN = 64
WORDS = "一只红色的猫坐在桌上看着窗外蓝天白云下有两个人走过街道"


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
