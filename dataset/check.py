"""Look through a data file before training on it: what is learned from, what is left out and why, what is cut.

    python -m dataset.check my_data.jsonl --images_path my_images
    python -m dataset.check my_data.parquet --max_seq_len 1536             as fine-tuning reads it
    python -m dataset.check my_data.jsonl --images_path my_images --pictures   decode every picture too

Nothing is trained and no weights are needed. The exit status is 0 where training would start with the file, and 1 where
it would refuse it. The tokenised rows are kept: training with the same tokenizer and max_seq_len starts at once.
"""

import argparse
import hashlib
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.paths import BUILTIN_TOKENIZER_DIR, TOKENIZER_DIR, display_path  # noqa: E402
from dataset.lm_dataset import VLMDataset, bad_rows_limit  # noqa: E402
from dataset.pictures import PictureError, load_picture  # noqa: E402
from dataset.tokenizer import load_tokenizer, quiet_libraries  # noqa: E402
from model.model_vlm import VLMConfig  # noqa: E402

WIDTH = 80
BAR = 40
BINS = 10
SHOWN_LINES = 8
SHOWN_PICTURES = 20
BATCH = 1000  # rows read at once


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Raises:
        UsageError: If a number is too small.
    """
    parser = ArgumentParser(prog="python -m dataset.check", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("data_path", metavar="FILE", type=file_path, help="jsonl or parquet")
    add("--images_path", type=file_path, help="folder of the jsonl's pictures")
    what = (
        f"default: {display_path(TOKENIZER_DIR)}, or where it was not downloaded {display_path(BUILTIN_TOKENIZER_DIR)}"
    )
    add("--tokenizer_path", type=file_path, help=f"the tokenizer that training will use ({what})")
    what = "tokens a sample is cut at; the defaults of training are 640 (pretraining) and 1536 (fine-tuning)"
    add("--max_seq_len", type=int, default=640, help=what)
    what = "tokens a picture takes: 196 with the published tower and projection"
    add("--image_tokens", type=int, default=VLMConfig().image_tokens, help=what)
    add("--max_bad_rows", type=int, help="rows that may be left out (default: 1 %% of the rows)")
    add("--pictures", action="store_true", help="decode every picture too, and name the broken ones")
    args = parser.parse_args(argv)
    for name in ("data_path", "images_path", "tokenizer_path"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).expanduser().resolve())
    for name, least in (("max_seq_len", 8), ("image_tokens", 1), ("max_bad_rows", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: must be at least {least}")
    return args


def overview(data: VLMDataset) -> list[str]:
    """Returns the counts: rows, pictures, tokens, what is cut, duplicates."""
    bad, blank = len(data.bad_rows), len(data.rows) - data.row_count
    rows = f"{data.row_count:,}: {len(data):,} good, {bad:,} bad"
    rows += f" ({percent(bad, data.row_count)})" if bad else ""
    report = fact("rows", rows + (f", and {counted(blank, 'blank line')}" if blank else ""))
    if len(data):
        total, learned = int(data.lengths.sum()), int(data.learned_tokens.sum())
        images = percent(data.picture_count * data.image_tokens, total)
        report += fact("pictures", pictures(data))
        report += fact("tokens", f"{total:,}: {percent(learned, total)} learned ({learned:,}), {images} pictures")
    if data.tags_added:
        report += fact("no <image>", f"in {counted(data.tags_added, 'row')}: the picture is put first")
    report += fact(f"cut at {data.max_length}", cut(data))
    return report + (fact("duplicates", duplicates(data)) if len(data) else [])


def pictures(data: VLMDataset) -> str:
    rows_of = rows_by_picture(data)
    if not rows_of:  # a parquet's pictures have no names
        return f"{data.picture_count:,}"
    several = sum(len(rows) > 1 for rows in rows_of.values())
    shared = f"{several:,} of them in several rows" if several else "none in several rows"
    return f"{data.picture_count:,} of {counted(len(rows_of), 'file')}, {shared}"


def rows_by_picture(data: VLMDataset) -> dict[str, set[int]]:
    """Returns the lines that show each picture, by its name."""
    rows_of = defaultdict(set)
    for position, row in good_rows(data, ["pictures"]):
        for name in row["pictures"]:
            rows_of[name].add(position + 1)
    return rows_of


def good_rows(data: VLMDataset, columns: list[str]) -> Iterable[tuple[int, dict]]:
    rows = data.rows.select_columns(columns).with_format("arrow")
    for start in range(0, len(data), BATCH):
        positions = data.positions[start : start + BATCH].tolist()
        yield from zip(positions, rows[positions].to_pylist(), strict=True)


def cut(data: VLMDataset) -> str:
    lost = data.column("cut_tokens")
    refused = lost[data.left_out]
    refused = refused[refused > 0]  # rows that max_length leaves without an image or an answer
    longest = max((data.lengths + lost[data.positions]).max(initial=0), refused.max(initial=0))
    if longest <= data.max_length:
        return f"nothing (the longest row has {longest:,} tokens)"
    parts = [f"{lost[data.positions].sum():,} tokens of {counted(data.cut_rows, 'row')}"] if data.cut_rows else []
    parts += [f"the whole of {counted(len(refused), 'row')}"] if len(refused) else []
    return f"{' and '.join(parts)}; --max_seq_len {longest} would cut none"


def duplicates(data: VLMDataset) -> str:
    first, copies = {}, []
    for position, row in good_rows(data, ["input_ids", "pictures", "picture_hash"]):
        content = repr(
            (row["input_ids"], row["pictures"], row["picture_hash"] if row["pictures"] or data.is_parquet else 0)
        )
        digest = hashlib.blake2b(content.encode(), digest_size=12).digest()
        if digest in first:
            copies.append(f"{position + 1} (as {first[digest] + 1})")
        else:
            first[digest] = position
    return f"{counted(len(copies), 'row')} seen before: {places(data, copies)}" if copies else "none"


def places(data: VLMDataset, lines: list) -> str:
    """Returns the first few of the lines that rows stand in."""
    place = ("row" if data.is_parquet else "line") + ("" if len(lines) == 1 else "s")
    return f"{place} {', '.join(map(str, lines[:SHOWN_LINES]))}{', ...' if len(lines) > SHOWN_LINES else ''}"


def bad_rows(data: VLMDataset) -> list[str]:
    """Returns the bad rows by what is wrong with them: how many, the first one's reason, and their lines."""
    kinds = defaultdict(list)
    for row in data.bad_rows:
        kinds[kind_of(row.reason)].append(row)
    report = ["bad rows"] if kinds else []
    for rows in sorted(kinds.values(), key=len, reverse=True):
        report += fact(counted(len(rows), "row"), rows[0].reason)
        report += fact("", places(data, [row.line for row in rows]))
    return report


def kind_of(reason: str) -> str:
    """Returns what is wrong with a row without what differs by row: numbers, quoted words, and details after `:`."""
    general = re.sub(r"""(?<!\w)(?:'[^']*'|"[^"]*")|\d+""", "*", reason)
    turn, rest = re.match(r"(turn \*:? |)(.*)", general, re.DOTALL).groups()
    return turn + rest.partition(":")[0]


def histograms(data: VLMDataset) -> list[str]:
    """Returns how many rows are how long, and have how many pictures."""
    if len(data) == 0:
        return []
    lengths = data.lengths
    report = [f"tokens per row (mean {lengths.mean():.0f}, longest {lengths.max():,})", *histogram(lengths)]
    return [*report, "", "pictures per row", *histogram(data.image_counts)]


def histogram(values: np.ndarray) -> list[str]:
    """Returns a bar for each of about ten equally wide ranges of (N,) whole numbers, N at least 1."""
    low, high = int(values.min()), int(values.max())
    steps = (base * 10**power for power in range(10) for base in (1, 2, 5))
    step = next(step for step in steps if step * BINS > high - low)
    first = low // step * step
    counts = np.bincount((values - first) // step)
    starts = [first + step * i for i in range(len(counts))]
    ends = [min(start + step - 1, high) for start in starts]
    labels = [f"{start:,}" + (f" to {end:,}" if end > start else "") for start, end in zip(starts, ends, strict=True)]
    wide, largest = max(map(len, labels)), int(counts.max())
    bars = ["#" * -(-BAR * int(count) // largest) for count in counts]  # rounded up: a single row is visible too
    return [
        f"  {label:>{wide}} |{bar:<{BAR}} {count:>{len(f'{largest:,}')},}"
        for label, bar, count in zip(labels, bars, counts, strict=True)
    ]


def broken_pictures(data: VLMDataset) -> list[str]:
    """Decodes every picture, each file once; returns which are broken, and where. Training only skips their rows."""
    rows_of = rows_by_picture(data)

    def decode(source: tuple[Path | bytes, str]) -> PictureError | None:
        try:
            load_picture(*source, data.picture_format)
        except PictureError as error:
            return error

    if data.is_parquet:
        rows = good_rows(data, ["line", "pictures", "image_starts"])
        sources, count = (source for row in rows for source in data.picture_sources(*row)), data.picture_count
    else:
        sources, count = ((data.images_path / name, name) for name in rows_of), len(rows_of)
    with ThreadPool() as pool:  # threads: Pillow decodes outside Python's lock
        decoded = tqdm(pool.imap(decode, sources, 16), "decoding", count, unit=" pictures", leave=False, disable=None)
        errors = [error for error in decoded if error is not None]
    if not errors:
        return [f"broken pictures: none of {count:,}"]
    skipped = {row for error in errors for row in rows_of.get(error.name, {error.name.partition(",")[0]})}
    report = [f"broken pictures: {len(errors):,} of {count:,}; training skips {counted(len(skipped), 'row')}"]
    for error in errors[:SHOWN_PICTURES]:
        text = str(error) if data.is_parquet else f"{error} ({places(data, sorted(rows_of[error.name]))})"
        report += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if len(errors) > SHOWN_PICTURES:
        report.append(f"  ... and {len(errors) - SHOWN_PICTURES:,} more")
    return report


def refusal(data: VLMDataset, max_bad_rows: int | None) -> str | None:
    """Returns why training would refuse this file; None where it would start."""
    bad, limit = len(data.bad_rows), bad_rows_limit(data, max_bad_rows)
    given = f"{limit:,} (1 % of the rows)" if max_bad_rows is None else f"--max_bad_rows {max_bad_rows}"
    if bad > limit:
        return f"{counted(bad, 'bad row')}, more than {given}"
    return None if len(data) else "there is no row to learn from"


def fact(name: str, text: str) -> list[str]:
    """Returns `name` with `text` beside it, as wide as a terminal."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15, break_on_hyphens=False
    )


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def main():
    args = parse_arguments()
    quiet_libraries(is_main=True)
    is_published = (TOKENIZER_DIR / "tokenizer.json").is_file()
    path = args.tokenizer_path or (TOKENIZER_DIR if is_published else BUILTIN_TOKENIZER_DIR)
    which = {TOKENIZER_DIR: " (the published one)", BUILTIN_TOKENIZER_DIR: " (the built-in one)"}.get(path, "")
    data = VLMDataset(args.data_path, args.images_path, load_tokenizer(path), args.max_seq_len, args.image_tokens)
    sections = [[display_path(args.data_path), *fact("tokenizer", display_path(path) + which), *overview(data)]]
    sections += [bad_rows(data), histograms(data)]
    print("\n\n".join("\n".join(lines) for lines in sections if lines), flush=True)
    if args.pictures:
        print("\n" + "\n".join(broken_pictures(data)), flush=True)
    why_not = refusal(data, args.max_bad_rows)
    if why_not:
        print(f"\nTraining would refuse this file: {why_not}.")
        sys.exit(1)
    left_out = f", {len(data.bad_rows):,} left out" if data.bad_rows else ""
    print(f"\nTraining would start with this file: {counted(len(data), 'row')} to learn from{left_out}.")


if __name__ == "__main__":
    run_script(main)
