"""Make training data of what you have: pictures with texts in any usual form.

    python scripts/make_dataset.py my_photos --to my_data
        a folder with a .txt beside each picture
    python scripts/make_dataset.py captions.csv --to my_data
        a table of image,caption or image,question,answer
    python scripts/make_dataset.py llava.json --images_path coco --to my_data
    python scripts/make_dataset.py shards/*.tar --to my_data --parquet

It writes my_data/train.jsonl, my_data/heldout.jsonl and my_data/images/, all
of it or nothing. A source may also be JSON lines, ShareGPT, OpenAI messages,
parquet, or a folder that `datasets` saved; its content says which. Every
picture is decoded; one that is larger than --size is made smaller.

Rows that cannot be used are left out, counted by reason, and listed in
my_data/left_out.txt. More than 1 % of them is exit status 1, as training
would refuse such a file (--max_bad_rows); the data are written all the same.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from common.files import not_a_file, whole_folder
from common.paths import display_path, printable
from dataset import check
from dataset.conversation import RowError
from dataset.scenes.language import DESCRIBE
from scripts.data.rows import RowMaker
from scripts.data.sources import Row, read_source
from trainer.support.processes import cores
from trainer.train_sft_vlm import STAGE as SFT

ROWS, LEFT_OUT, IMAGES = "rows.jsonl", "left_out.txt", "images"
SPLITS = ("train", "heldout")
AHEAD, MOST_THREADS = 4, 8  # rows per thread that are read before the first of them is written
PARQUET_ROWS = 100  # with their pictures in memory
LEAST_ROWS = 20  # from here on at least one is held out
SHOWN_PLACES = 5
LARGEST_SIZE = 4096  # pixels; no vision tower takes as many


@dataclass
class Made:
    """What has been written, and what has been left out.

    Attributes:
        keys: For each row the hash of its first picture, 0 for none.
        linked: Leads from a picture's hash to that of another in the same row, see `root`.
        left_out: For each kind of reason how many rows, the first one's reason, and the first few places.
        most_pictures: Of a row.
        held_out: Rows held out.
        pictures: Distinct pictures.
        picture_bytes: Their files' size.
    """

    keys: array = field(default_factory=lambda: array("Q"))
    linked: dict[int, int] = field(default_factory=dict)
    left_out: dict[str, list] = field(default_factory=lambda: defaultdict(lambda: [0, "", []]))
    most_pictures: int = 0
    held_out: int = 0
    pictures: int = 0
    picture_bytes: int = 0

    @property
    def bad_rows(self) -> int:
        return sum(count for count, *_ in self.left_out.values())

    @property
    def rows(self) -> int:
        """Rows read, good or bad."""
        return len(self.keys) + self.bad_rows

    def add(self, names: list[str]):
        """Counts a row by its pictures' names, which are their hashes."""
        hashes = [int(name[:16], 16) for name in names]
        link(self.linked, hashes)
        self.keys.append(hashes[0] if hashes else 0)
        self.most_pictures = max(self.most_pictures, len(names))

    def leave_out(self, place: str, reason: str):
        kind = self.left_out[check.kind_of(reason)]
        kind[0] += 1
        kind[1] = kind[1] or reason
        kind[2] += [place] * (len(kind[2]) < SHOWN_PLACES)


def root(linked: dict[int, int], key: int) -> int:
    """Returns the picture that stands for all that are linked with this one (union-find)."""
    while key in linked:
        linked[key] = linked.get(linked[key], linked[key])  # halves the way for the next time
        key = linked[key]
    return key


def link(linked: dict[int, int], keys: list[int]):
    """Links the pictures of a row."""
    first, *others = sorted({root(linked, key) for key in keys}) or [0]
    linked.update(dict.fromkeys(others, first))


def held_out(made: Made, share: float) -> np.ndarray:
    """Chooses the rows to measure on: those whose pictures have the smallest hashes, whatever their order.

    Rows that share a picture, directly or through other rows, go together, so no held-out picture is trained on. Rows
    without a picture are not taken.

    Returns:
        bool (rows,): at least one row of 20 or more, unless `share` is 0; never more than half.
    """
    roots = np.array([root(made.linked, key) for key in made.keys], dtype=np.uint64)
    wanted = max(int(share * len(roots)), int(share > 0 and len(roots) >= LEAST_ROWS))
    groups, sizes = np.unique(roots[roots > 0], return_counts=True)
    most = min(max(2 * wanted, sizes.min(initial=len(roots))), len(roots) // 2)
    taken, rows = [], 0
    for group, size in zip(groups, sizes, strict=True):
        if rows >= wanted:
            break
        if rows + size <= most:
            taken.append(group)
            rows += size
    return np.isin(roots, np.array(taken, dtype=np.uint64))


def in_order(do: Callable, items: Iterable, threads: int) -> Iterator:
    """Yields do(item) for each item in order, from several threads; items are taken only a little ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(do, item))
                if len(waiting) == AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def rows_of(sources: list[Path]) -> Iterator[tuple[Path, Row]]:
    """Yields the rows of all sources, each with its source; places and shares are of them all."""
    for number, source in enumerate(sources):
        for row in read_source(source):
            place = row.place if len(sources) == 1 else f"{source.name} {row.place}"
            yield source, row._replace(place=place, share=(number + row.share) / len(sources))


def write_rows(args: argparse.Namespace, part: Path) -> Made:
    """Writes every good row and picture, and the list of the others.

    Raises:
        UsageError: If a source cannot be read, or no row can be used.
    """
    (part / IMAGES).mkdir()
    maker, made = RowMaker(args.question, args.size, part / IMAGES), Made()

    def make(item: tuple[Path, Row]) -> tuple[Row, dict | RowError]:
        source, row = item
        if isinstance(row.value, RowError):
            return row, row.value
        return row, maker.make(row.value, args.images_path or (source if source.is_dir() else source.parent))

    with (
        open(part / ROWS, "w", encoding="utf-8") as rows,
        open(part / LEFT_OUT, "w", encoding="utf-8") as left_out,
        tqdm(desc="converting", unit=" rows", disable=None, leave=False) as bar,
    ):
        for row, result in in_order(make, rows_of(args.sources), min(cores(), MOST_THREADS)):
            if isinstance(result, RowError):
                left_out.write(f"{printable(row.place)}: {printable(result)}\n")
                made.leave_out(printable(row.place), printable(result))
            else:
                made.add(result["image"])
                rows.write(json_line(result))
            bar.total = round(made.rows / row.share) if row.share else None
            bar.update()
    if not made.keys:
        given = ", ".join(map(display_path, args.sources))
        raise UsageError("\n".join([f"{given}: none of {made.rows:,} rows can be used", *reasons(made)]))
    if not made.left_out:
        (part / LEFT_OUT).unlink()
    return made


def json_line(row: dict) -> str:
    """Returns a row as a line of the jsonl: one picture as its name, several as a list, none left out."""
    names = [f"{IMAGES}/{name}" for name in row["image"]]
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    return json.dumps(image | {"conversations": row["conversations"]}, ensure_ascii=False) + "\n"


def split_rows(part: Path, is_held_out: np.ndarray):
    """Divides the rows between the two files; that of held-out rows is left away where there are none."""
    with (
        open(part / ROWS, encoding="utf-8") as rows,
        open(part / "train.jsonl", "w", encoding="utf-8") as train,
        open(part / "heldout.jsonl", "w", encoding="utf-8") as heldout,
    ):
        for row, held in zip(rows, is_held_out, strict=True):
            (heldout if held else train).write(row)
    (part / ROWS).unlink()
    if not is_held_out.any():
        (part / "heldout.jsonl").unlink()


def to_parquet(part: Path, most_pictures: int):
    """Replaces jsonl and images by parquet files with the pictures inside, a list of them where a row has several."""
    column = pa.binary() if most_pictures <= 1 else pa.list_(pa.binary())
    schema = pa.schema({"conversations": pa.string(), "image_bytes": column})
    for path in (part / f"{split}.jsonl" for split in SPLITS if (part / f"{split}.jsonl").exists()):
        with open(path, encoding="utf-8") as lines, pq.ParquetWriter(path.with_suffix(".parquet"), schema) as writer:
            while batch := [json.loads(line) for _, line in zip(range(PARQUET_ROWS), lines, strict=False)]:
                writer.write_table(pa.Table.from_pylist([parquet_row(row, part, column) for row in batch], schema))
        path.unlink()
    shutil.rmtree(part / IMAGES)


def parquet_row(row: dict, part: Path, column: pa.DataType) -> dict:
    names = row.get("image", [])
    files = [(part / name).read_bytes() for name in ([names] if isinstance(names, str) else names)]
    image = files if column != pa.binary() else files[0] if files else None
    return {"conversations": json.dumps(row["conversations"], ensure_ascii=False), "image_bytes": image}


def write_dataset(args: argparse.Namespace) -> Made:
    """Writes the folder --to as the flags say, whole or not at all.

    Raises:
        UsageError: If a flag or a source forbids it.
    """
    check_folders(args)
    with whole_folder(args.to, {"dataset_by": "scripts/make_dataset.py"}, args.overwrite, "--to") as part:
        made = write_rows(args, part)
        is_held_out = held_out(made, args.heldout)
        split_rows(part, is_held_out)
        made.held_out = int(is_held_out.sum())
        for picture in os.scandir(part / IMAGES):
            made.pictures += 1
            made.picture_bytes += picture.stat().st_size
        if args.parquet:
            to_parquet(part, made.most_pictures)
    return made


def report(made: Made, folder: Path) -> list[str]:
    """Returns what was written, and what was left out and why."""
    good, held = len(made.keys), made.held_out
    lines = [display_path(folder), *check.fact("rows", f"{good:,}: {good - held:,} to train on, {held:,} held out")]
    lines += check.fact("pictures", f"{made.pictures:,}, {made.picture_bytes / 1e6:,.2f} MB")
    if not made.left_out:
        return [*lines, *check.fact("left out", "nothing")]
    share = f"{made.bad_rows:,} of {made.rows:,} rows ({check.percent(made.bad_rows, made.rows)})"
    lines += check.fact("left out", f"{share}, all listed in {LEFT_OUT} there")
    return [*lines, *reasons(made)]


def reasons(made: Made) -> list[str]:
    lines = []
    for count, reason, places in sorted(made.left_out.values(), reverse=True):
        lines += check.fact(check.counted(count, "row"), reason)
        lines += check.fact("", ", ".join(places) + (", ..." if count > len(places) else ""))
        if reason.startswith(("no such picture", "the picture's path leaves")):
            lines += check.fact("", "(--images_path names the folder of the pictures; by default it is the source's)")
    return lines


def parse_arguments(argv=None) -> argparse.Namespace:
    """Reads the flags; raises UsageError for a number that makes no sense."""
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="*", type=file_path, help="what you have; several are put together")
    add("--to", metavar="FOLDER", type=file_path, help="the folder to write")
    add("--images_path", type=file_path, help="folder of the pictures that rows name (default: beside the source)")
    add("--question", default=DESCRIBE, help="what is asked about a picture that has a caption only")
    add("--size", type=int, default=256, help="larger pictures are resized to this shorter side, in pixels")
    add("--heldout", metavar="SHARE", type=float, default=0.02, help="share of the rows to measure on; 0: none")
    add("--parquet", action="store_true", help="write parquet files with the pictures inside")
    what = "rows that may be left out without exit status 1"
    add("--max_bad_rows", type=int, help=f"{what} (default: 1 %% of the rows)")
    add("--overwrite", action="store_true", help="replace the folder, if this script wrote all in it")
    args = parser.parse_args(argv)
    if not args.sources or args.to is None:
        raise UsageError("name what you have, and the folder to write: make_dataset.py SOURCE --to FOLDER")
    if not 1 <= args.size <= LARGEST_SIZE:
        raise UsageError(f"--size {args.size}: must be from 1 to {LARGEST_SIZE}")
    if not 0 <= args.heldout <= 0.5:
        raise UsageError(f"--heldout {args.heldout:g}: a share of the rows, from 0 to 0.5")
    if args.max_bad_rows is not None and args.max_bad_rows < 0:
        raise UsageError(f"--max_bad_rows {args.max_bad_rows}: must be at least 0")
    args.sources, args.to = [path.resolve() for path in args.sources], args.to.resolve()
    args.images_path = args.images_path and args.images_path.resolve()
    return args


def check_folders(args: argparse.Namespace):
    """Raises UsageError if a source is missing, or would be replaced."""
    for source in args.sources:
        reason = not_a_file(source)
        if reason and not source.is_dir():
            raise UsageError(f"{display_path(source)} cannot be read: {reason}")
        if args.to.is_relative_to(source) or source.is_relative_to(args.to):
            raise UsageError(f"--to {display_path(args.to)} and {display_path(source)} are one in the other")
    if args.images_path is not None and not args.images_path.is_dir():
        raise UsageError(f"--images_path: no such folder: {display_path(args.images_path)}")
    if args.images_path is not None and args.images_path.is_relative_to(args.to):
        raise UsageError(f"--to {display_path(args.to)} would replace the pictures in {display_path(args.images_path)}")


def main():
    args = parse_arguments()
    made = write_dataset(args)
    train, heldout = (args.to / f"{split}.{'parquet' if args.parquet else 'jsonl'}" for split in SPLITS)
    print("\n".join(report(made, args.to)))
    name = re.sub(r"\W+", "_", args.to.name)[:40] + "_sft"  # not the quick start's
    flags = {"data_path": train, "eval_data": heldout if made.held_out else None, "save_weight": name}
    given = [f"--{flag} {shlex.quote(display_path(value))}" for flag, value in flags.items() if value]
    print("\n  python trainer/train_sft_vlm.py", " \\\n    ".join(given), end="\n\n", flush=True)
    check.main([str(train), "--max_seq_len", str(SFT.defaults["max_seq_len"])])
    limit = made.rows // 100 if args.max_bad_rows is None else args.max_bad_rows
    if made.bad_rows > limit:
        given = "1 % of the rows" if args.max_bad_rows is None else f"--max_bad_rows {limit}"
        raise UsageError(
            f"{made.bad_rows:,} of {made.rows:,} rows were left out, more than {given}. The others are written; look "
            f"at the reasons in {display_path(args.to / LEFT_OUT)}, or accept them with --max_bad_rows {made.bad_rows}"
        )


if __name__ == "__main__":
    run_script(main)
