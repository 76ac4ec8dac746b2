"""Check a data file before training on it: what is learned from, what is left out and why, what is cut.

    python -m dataset.check my_data.jsonl --images_path my_images
    python -m dataset.check my_data.parquet --max_seq_len 1536             as fine-tuning reads it
    python -m dataset.check my_data.jsonl --images_path my_images --pictures   decode every picture too

Nothing is trained and no weights are needed. The exit status is 0 if training would start with the file, and 1 if it
would refuse it. The tokenised rows are cached, so training with the same tokenizer and max_seq_len starts at once.
"""

import argparse
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from common.paths import BUILTIN_TOKENIZER_DIR, TOKENIZER_3V_DIR, TOKENIZER_DIR, display_path, place_of
from dataset.chat import has_image_pad
from dataset.formats import RIGHT_FORM, hash_63
from dataset.lm_dataset import VLMDataset, bad_rows_limit
from dataset.pictures import PictureError, load_picture
from dataset.tokenizer import load_tokenizer, quiet_libraries
from model.model_vlm import VLMConfig

WIDTH, BAR = 80, 40  # characters of a line, and of a histogram's longest bar
BINS = 10
SHOWN_LINES, SHOWN_PICTURES = 8, 20
BATCH = 1000  # rows read at once
TOKENIZERS = {
    place_of(TOKENIZER_DIR): "the published one",
    place_of(TOKENIZER_3V_DIR): "minimind-3v's",
    BUILTIN_TOKENIZER_DIR: "the built-in one",
}
IMAGE_TOKENS_3V = 64  # of minimind-3v's tower: 8 x 8 patches of 32 pixels


def parse_arguments(argv=None) -> argparse.Namespace:
    """Reads the flags; raises UsageError if a number is too small."""
    parser = ArgumentParser(prog="python -m dataset.check", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("data_path", metavar="FILE", type=file_path, help="jsonl or parquet")
    add("--images_path", type=file_path, help="folder of the jsonl's pictures")
    default = f"the first that is there of {', '.join(map(display_path, TOKENIZERS))}"
    add("--tokenizer_path", type=file_path, help=f"the tokenizer that training will use (default: {default})")
    what = "tokens a sample is cut at; training's defaults are 640, fine-tuning 1536 (minimind-3v: 450, 768)"
    add("--max_seq_len", type=int, default=640, help=what)
    what = f"tokens a picture takes (default: {VLMConfig().image_tokens}; minimind-3v: {IMAGE_TOKENS_3V})"
    add("--image_tokens", type=int, help=what)
    add("--max_bad_rows", type=int, help="rows that may be left out (default: 1 %% of the rows)")
    add("--pictures", action="store_true", help="decode every picture too, and name the broken ones")
    args = parser.parse_args(argv)
    for name, least in {"max_seq_len": 8, "image_tokens": 1, "max_bad_rows": 0}.items():
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
    for name, rule in data.rules.items():
        report += fact(name, rule)
    report += fact(f"cut at {data.max_length}", cut(data))
    return report + (fact("duplicates", duplicates(data)) if len(data) else [])


def good_rows(data: VLMDataset) -> Iterable[tuple[int, dict]]:
    for start in range(0, len(data), BATCH):
        positions = data.positions[start : start + BATCH].tolist()
        yield from zip(positions, data.read_rows(positions), strict=True)


def pictures(data: VLMDataset) -> str:
    shown = data.shown_pictures
    if len(shown) == 0:
        return "none"
    # A row may show a picture twice.
    rows, several = np.repeat(np.arange(len(data)), data.image_counts), shown.max() + 1
    rows_with = np.bincount(np.unique(rows * several + shown) % several)
    shared = f"{(rows_with > 1).sum():,} of them in several rows" if (rows_with > 1).any() else "none in several rows"
    return f"{data.picture_count:,} of {counted(int((rows_with > 0).sum()), 'file')}, {shared}"


def cut(data: VLMDataset) -> str:
    cut_tokens = data.column("cut_tokens")
    lost, refused = cut_tokens[data.positions], cut_tokens[data.left_out]
    refused = refused[refused > 0]  # rows that max_length leaves without an image or an answer
    longest = max((data.lengths + lost).max(initial=0), refused.max(initial=0))
    if longest <= data.max_length:
        return f"nothing (the longest row has {longest:,} tokens)"
    parts = [f"{lost.sum():,} tokens of {counted(data.cut_rows, 'row')}"] if data.cut_rows else []
    parts += [f"the whole of {counted(len(refused), 'row')}"] if len(refused) else []
    return f"{' and '.join(parts)}; --max_seq_len {longest} would cut none"


def duplicates(data: VLMDataset) -> str:
    first, copies = {}, []
    for position, row in good_rows(data):
        content = row["input_ids"], row["pictures"], row["picture_numbers"]
        original = first.setdefault(hash_63(repr(content).encode()), position)
        if original != position:
            copies.append(f"{position + 1} (as {original + 1})")
    return f"{counted(len(copies), 'row')} seen before: {places(data, copies)}" if copies else "none"


def places(data: VLMDataset, lines: list) -> str:
    """Names the first few of these lines."""
    place = ("row" if data.is_parquet else "line") + ("" if len(lines) == 1 else "s")
    return f"{place} {', '.join(map(str, lines[:SHOWN_LINES]))}{', ...' if len(lines) > SHOWN_LINES else ''}"


def bad_rows(data: VLMDataset) -> list[str]:
    """Groups the bad rows by what is wrong: how many, the first one's reason, and their lines."""
    kinds = defaultdict(list)
    for row in data.bad_rows:
        kinds[kind_of(row.reason)].append(row)
    report = ["bad rows"] if kinds else []
    for rows in sorted(kinds.values(), key=len, reverse=True):
        report += fact(counted(len(rows), "row"), rows[0].reason)
        report += fact("", places(data, [row.line for row in rows]))
    return report


def kind_of(reason: str) -> str:
    """Strips from a reason what differs by row: numbers, quoted words, and details after `:`."""
    general = re.sub(r"""(?<!\w)('[^']*'|"[^"]*")|\d+""", "*", reason)
    return re.match(r"(turn \*: )?[^:]*", general)[0]


def histograms(data: VLMDataset) -> list[str]:
    """Shows how rows are distributed by length and by number of pictures."""
    lengths = data.lengths
    if len(lengths) == 0:
        return []
    report = [f"tokens per row (mean {lengths.mean():.0f}, longest {lengths.max():,})", *histogram(lengths)]
    return [*report, "", "pictures per row", *histogram(data.image_counts)]


def histogram(values: np.ndarray) -> list[str]:
    """Draws (N,) integers, N at least 1, as a bar for each of about ten equally wide bins."""
    low, high = int(values.min()), int(values.max())
    steps = (base * 10**power for power in range(10) for base in (1, 2, 5))
    step = next(step for step in steps if step * BINS > high - low)
    starts = range(low // step * step, high + 1, step)
    ends = [min(start + step - 1, high) for start in starts]
    labels = [f"{start:,}" + (f" to {end:,}" if end > start else "") for start, end in zip(starts, ends, strict=True)]
    counts = np.bincount((values - starts[0]) // step).tolist()
    wide, digits = max(map(len, labels)), len(f"{max(counts):,}")
    return [
        f"  {label:>{wide}} |{'#' * math.ceil(BAR * count / max(counts)):<{BAR}} {count:>{digits},}"
        for label, count in zip(labels, counts, strict=True)
    ]


def broken_pictures(data: VLMDataset) -> list[str]:
    """Decodes every picture, each once, and names the broken ones; training only skips their rows."""
    lines_of = defaultdict(list)  # by a picture's number

    def sources() -> Iterable[tuple[int, Path | bytes, str]]:
        for position, row in good_rows(data):
            first, of_row = data.first_slots[position], data.picture_sources(row)
            for number, source in zip(data.picture_numbers[first : first + len(of_row)].tolist(), of_row, strict=True):
                if number not in lines_of:
                    yield number, *source
                lines_of[number].append(row["line"])

    def decode(source: tuple[int, Path | bytes, str]) -> tuple[int, PictureError] | None:
        try:
            load_picture(*source[1:], data.picture_format)
        except PictureError as error:
            return source[0], error

    with ThreadPool() as pool:  # Pillow releases the GIL while it decodes
        decoded = pool.imap(decode, sources(), 16)
        bar = tqdm(decoded, "decoding", unit=" pictures", leave=False, disable=None)
        errors = dict(filter(None, bar))
    if not errors:
        return [f"broken pictures: none of {len(lines_of):,}"]
    skipped = {line for number in errors for line in lines_of[number]}
    report = [f"broken pictures: {len(errors):,} of {len(lines_of):,}; training skips {counted(len(skipped), 'row')}"]
    for number, error in list(errors.items())[:SHOWN_PICTURES]:
        text = f"{error} ({places(data, sorted(set(lines_of[number])))})"
        report += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if len(errors) > SHOWN_PICTURES:
        report.append(f"  ... and {len(errors) - SHOWN_PICTURES:,} more")
    return report


def fact(name: str, text: str) -> list[str]:
    """Formats `name` with `text` beside it, wrapped."""
    indent, later = f"  {name:<12} ", " " * 15
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=later, break_on_hyphens=False)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def main(argv=None):
    args = parse_arguments(argv)
    quiet_libraries(is_main=True)
    there = [folder for folder in TOKENIZERS if (folder / "tokenizer.json").is_file()]
    path = (args.tokenizer_path or there[0]).resolve()
    which = f" ({TOKENIZERS[path]})" if path in TOKENIZERS else ""
    data_path, images_path = args.data_path.resolve(), args.images_path and args.images_path.resolve()
    tokenizer = load_tokenizer(path)
    image_tokens = args.image_tokens or (IMAGE_TOKENS_3V if has_image_pad(tokenizer) else VLMConfig().image_tokens)
    data = VLMDataset(data_path, images_path, tokenizer, args.max_seq_len, image_tokens)
    summary = [display_path(data_path), *fact("tokenizer", display_path(path) + which), *overview(data)]
    print("\n\n".join("\n".join(lines) for lines in (summary, bad_rows(data), histograms(data)) if lines), flush=True)
    if args.pictures:
        print("\n" + "\n".join(broken_pictures(data)), flush=True)
    bad, limit = len(data.bad_rows), bad_rows_limit(data, args.max_bad_rows)
    if bad > limit or len(data) == 0:
        given = f"{limit:,} (1 % of the rows)" if args.max_bad_rows is None else f"--max_bad_rows {limit}"
        why = f"{counted(bad, 'bad row')}, more than {given}" if bad > limit else "there is no row to learn from"
        if bad and not data.is_parquet:
            print(f"\nA good line looks like this:\n  {RIGHT_FORM}")
        print(f"\nTraining would refuse this file: {why}.")
        sys.exit(1)
    left_out = f", {bad:,} left out" if bad else ""
    print(f"\nTraining would start with this file: {counted(len(data), 'row')} to learn from{left_out}.")


if __name__ == "__main__":
    run_script(main)
