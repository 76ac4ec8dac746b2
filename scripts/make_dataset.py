"""Make training data from pictures with texts in any common form.

    python scripts/make_dataset.py my_photos --to my_data
    python scripts/make_dataset.py llava.json --images_path coco --to my_data
    python scripts/make_dataset.py --mix a.jsonl=0.3 b.csv=1 --to my_data

It writes my_data/train.jsonl, my_data/heldout.jsonl and my_data/images/, all
of it or nothing, and prints the commands that train on them. Every picture is
decoded; one that is larger than --size is made smaller. Rows that cannot be
used are listed in my_data/left_out.txt; more than 1 % of them is exit status 1.
"""

import argparse
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from networkx.utils import UnionFind  # torch requires networkx
from tqdm import tqdm

from common.cli import ArgumentParser, command, file_path, number
from common.errors import UsageError, run_script
from common.files import not_a_file, whole_folder
from common.paths import SAVE_DIR, display_path, printable
from dataset import check
from dataset.chat import RowError
from scripts.data.sources import KNOWN, make_row, not_read, read_source
from trainer.bundles import epochs_for
from trainer.support.processes import cores
from trainer.train_sft_vlm import STAGE as SFT

ROWS, LEFT_OUT, IMAGES = "rows.jsonl", "left_out.txt", "images"
AHEAD, MOST_THREADS = 8, 8  # rows per thread that are read, with their pictures, before the first of them is written
LEAST_ROWS, LEAST_PICTURES = 20, 3  # from so many rows on, some are held out; of so many pictures
LARGEST_SIZE = 4096  # pixels; no vision tower takes as many


@dataclass
class Made:
    keys: list[int] = field(default_factory=list)  # of each good row: its first picture's hash, 0: none
    linked: UnionFind = field(default_factory=UnionFind)  # the hashes of pictures that share a row
    left_out: list[tuple[str, str]] = field(default_factory=list)  # each bad row's place and reason
    held_out: int = 0  # rows


def held_out(made: Made, share: float) -> np.ndarray:
    """Returns which rows to hold out, bool (rows,): if possible 2 of 20 and 3 of 30, unless `share` is 0; at most half.

    They are those whose pictures have the smallest hashes, in whatever order. Rows that share a picture, directly or
    through other rows, go together, so none is trained on. Several small groups are taken, for pictures to shuffle.
    """
    smallest = {picture: min(group) for group in made.linked.to_sets() for picture in group}
    roots = np.array([smallest.get(key, key) for key in made.keys], dtype=np.uint64)
    least = min(LEAST_PICTURES, len(roots) // 10) if share > 0 and len(roots) >= LEAST_ROWS else 0
    wanted = max(int(share * len(roots)), least)
    groups, sizes = np.unique(roots[roots > 0], return_counts=True)
    smallest_sets = min(np.sort(sizes)[:least].sum(), len(roots) // 5)
    most = min(max(2 * wanted, sizes.min(initial=len(roots)), smallest_sets), len(roots) // 2)
    taken, rows = [], 0
    for group, size in zip(groups, sizes, strict=True):
        if (rows < wanted or len(taken) < least) and rows + size <= most:
            taken.append(group)
            rows += size
    return np.isin(roots, np.array(taken, dtype=np.uint64))


def taken_rows(args: argparse.Namespace) -> Iterator[tuple[str, dict | RowError, Path]]:
    """Yields a share of each source's rows, chosen by a fixed seed: place, row, pictures' folder."""
    for source, share in args.sources:
        images_path = args.images_path or (source if source.is_dir() else source.parent)
        random, taken = Random(0), 0
        for read, (place, row) in enumerate(read_source(source), start=1):
            if random.random() < share * read - taken:  # what was taken stays within one row of the share
                taken += 1
                yield place if len(args.sources) == 1 else f"{source.name} {place}", row, images_path


def write_rows(args: argparse.Namespace, part: Path) -> Made:
    """Writes every good row and picture, and the list of the others; raises UsageError if there is no good row."""
    (part / IMAGES).mkdir()
    made, threads = Made(), min(cores(), MOST_THREADS)
    convert = partial(make_row, question=args.question, size=args.size, folder=part / IMAGES)
    bar = tqdm(desc="converting", unit=" rows", disable=None, leave=False)
    with open(part / ROWS, "w", encoding="utf-8") as rows, bar, ThreadPoolExecutor(threads) as pool:
        items = taken_rows(args)
        while batch := list(itertools.islice(items, AHEAD * threads)):
            places, originals, folders = zip(*batch, strict=True)
            for place, row in zip(places, pool.map(convert, originals, folders), strict=True):
                if isinstance(row, RowError):
                    made.left_out.append((printable(place), printable(row)))
                else:
                    names = row.pop("image")
                    hashes = [int(name[:16], 16) for name in names]
                    if len(hashes) > 1:
                        made.linked.union(*hashes)
                    made.keys.append(hashes[0] if hashes else 0)
                    image = {"image": ", ".join(f"{IMAGES}/{name}" for name in names)} if names else {}
                    rows.write(json.dumps(image | row, ensure_ascii=False) + "\n")
                bar.update()
    if not made.keys:
        sources, rows = ", ".join(display_path(source) for source, _ in args.sources), len(made.left_out)
        none = f"{sources}: none of {check.counted(rows, 'row')} can be used"
        raise UsageError("\n".join([none, *reasons(made)]))
    if made.left_out:
        lines = [f"{place}: {reason}\n" for place, reason in made.left_out]
        (part / LEFT_OUT).write_text("".join(lines), encoding="utf-8")
    return made


def write_dataset(args: argparse.Namespace) -> Made:
    """Writes the folder --to as the flags say, whole or not at all; raises UsageError if something forbids it."""
    for source, _ in args.sources:
        if (reason := not_a_file(source)) and not source.is_dir():
            raise UsageError(f"{display_path(source)} cannot be read: {reason}")
        if args.to.is_relative_to(source) or source.is_relative_to(args.to):
            raise UsageError(f"--to {display_path(args.to)} and {display_path(source)} must not contain each other")
    if args.images_path and not args.images_path.is_dir():
        raise UsageError(f"--images_path: no such folder: {display_path(args.images_path)}")
    if args.images_path and args.images_path.is_relative_to(args.to):
        raise UsageError(f"--to {display_path(args.to)} would replace the pictures in {display_path(args.images_path)}")
    with whole_folder(args.to, {"dataset_by": "scripts/make_dataset.py"}, args.overwrite, "--to") as part:
        made = write_rows(args, part)
        is_held_out = held_out(made, args.heldout)
        made.held_out = int(is_held_out.sum())
        for split, is_taken in (("train", ~is_held_out), ("heldout", is_held_out)):
            if is_taken.any():
                with open(part / ROWS, "rb") as rows, open(part / f"{split}.jsonl", "wb") as out:
                    out.writelines(itertools.compress(rows, is_taken))
        (part / ROWS).unlink()
    return made


def reasons(made: Made) -> list[str]:
    is_misplaced = any(why.startswith(("no such picture", "the picture's path leaves")) for _, why in made.left_out)
    hint = "(--images_path names the folder of the pictures; by default it is the source's)"
    return check.by_reason(made.left_out) + (check.fact("", hint) if is_misplaced else [])


def commands(folder: Path, made: Made) -> str:
    name = re.sub(r"\W+", "_", folder.name)[:40]
    heldout, tower = folder / "heldout.jsonl" if made.held_out else None, SAVE_DIR / f"{name}_tower"
    files = {"data_path": folder / "train.jsonl", "eval_data": heldout}
    pretrained, finetuned, rows = f"{name}_pretrain", f"{name}_sft", len(made.keys) - made.held_out
    first = {"from_weight": "llm", "vision_model_path": tower, "save_weight": pretrained}
    second = {"from_weight": pretrained, "save_weight": finetuned}
    steps = {
        "trainer/train_tower.py": files | {"save_tower": tower},
        "trainer/train_pretrain_vlm.py": files | first | {"epochs": epochs_for("pretrain", rows)},
        "trainer/train_sft_vlm.py": files | second | {"epochs": epochs_for("sft", rows)},
        "eval_vlm.py": {"weight": finetuned, "eval_data": heldout, "image_dir": None if heldout else folder / IMAGES},
    }
    return "\n".join(textwrap.indent(command(script, flags), "  ") for script, flags in steps.items())


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=f"{__doc__}\n{KNOWN}", imports=True)
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="*", type=file_path, help="files or folders to convert into one data set")
    add("--mix", metavar="SOURCE=SHARE", nargs="+", type=source_and_share, help="take a share of a source, from 0 to 1")
    add("--to", metavar="FOLDER", type=file_path, required=True, help="the folder to write")
    add("--images_path", type=file_path, help="folder of the pictures that rows name (default: beside the source)")
    add("--question", help="about pictures with only a caption or a label (default: one in the language of that)")
    add("--size", type=number(int, 1, LARGEST_SIZE), default=256, help="pixels of a larger picture's shorter side")
    add("--heldout", metavar="SHARE", type=number(float, 0, 0.5), default=0.02, help="of the rows to hold out; 0: none")
    add("--overwrite", action="store_true", help="replace the folder, if this script wrote all in it")
    args = parser.parse_args(argv)
    if not args.sources and not args.mix:
        parser.error("the following arguments are required: SOURCE")
    sources = [*((path, 1.0) for path in args.sources), *(args.mix or [])]
    args.sources, args.to = [(path.resolve(), share) for path, share in sources], args.to.resolve()
    args.images_path = args.images_path and args.images_path.resolve()
    return args


def source_and_share(text: str) -> tuple[Path, float]:
    source, _, share = text.rpartition("=")
    if not source or not share:
        raise argparse.ArgumentTypeError(f"{text!r} lacks its share or its source: write a.jsonl=0.3, for example")
    return file_path(source), number(float, 0, 1)(share)


def main(argv=None):
    args = parse_arguments(argv)
    made = write_dataset(args)
    sizes = [picture.stat().st_size for picture in (args.to / IMAGES).iterdir()]
    bad, rows = len(made.left_out), len(made.keys) + len(made.left_out)
    left_out = f"{bad:,} of {rows:,} rows"
    facts = {"rows": f"{len(made.keys):,}: {len(made.keys) - made.held_out:,} to train on, {made.held_out:,} held out"}
    listed = f"{left_out} ({check.percent(bad, rows)}), all listed in {LEFT_OUT} there"
    facts |= {"pictures": f"{len(sizes):,}, {sum(sizes) / 1e6:,.2f} MB", "left out": listed if bad else "nothing"}
    others = [f"{counts} in {display_path(source)}" for source, _ in args.sources if (counts := not_read(source))]
    if others:
        facts["not read"] = f"other files: {'; '.join(others)}. To read one, name it as a source of its own"
    lines = [line for name, value in facts.items() for line in check.fact(name, value)]
    print(display_path(args.to), *lines, *reasons(made), sep="\n", end="\n\n", flush=True)
    check.main([str(args.to / "train.jsonl"), "--max_seq_len", str(SFT.defaults["max_seq_len"])])
    print("\nTo train on it, and to measure what was learned:\n", commands(args.to, made), sep="\n")
    if bad > rows // 100:
        others = f"The others are written; reasons: {display_path(args.to / LEFT_OUT)}"
        raise UsageError(f"more than 1 % of the rows were left out: {left_out}. {others}")


if __name__ == "__main__":
    run_script(main)
