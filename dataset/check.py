"""Check a data file before training on it: what is used, what is left out and why, what is cut.

    python -m dataset.check my_data.jsonl --images_path my_images
    python -m dataset.check my_data.parquet --max_seq_len 1536             as fine-tuning reads it
    python -m dataset.check my_data.jsonl --images_path my_images --pictures   decode every picture too

Nothing is trained and no weights are needed. The exit status is 0 if training would start with the file, and 1 if it
would refuse it. The tokenised rows are cached, so training with the same tokenizer and max_seq_len starts at once.
"""

import itertools
import re
import sys
import textwrap
import unicodedata
from collections import Counter, defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, file_path, number
from common.errors import run_script
from common.paths import BUILTIN_TOKENIZER_DIR, TOKENIZER_3V_DIR, TOKENIZER_DIR, display_path, place_of
from dataset.chat import has_image_pad, load_tokenizer
from dataset.file_kinds import hash_63, quiet_libraries
from dataset.lm_dataset import VLMDataset
from dataset.pictures import PictureError, load_picture
from dataset.row_forms import EXAMPLE_ROW
from model.model_vlm import CONFIG_3V, VLMConfig

WIDTH = 80  # characters of a line
SHOWN_PLACES, SHOWN_PICTURES = 8, 20
BATCH = 1000  # rows read at once
MANY_TOKENS, LEAST_SHARE = 1.5, 0.01  # a character; of all characters (the built-in tokenizer: English 0.37)
TOKENIZERS = (place_of(TOKENIZER_DIR), place_of(TOKENIZER_3V_DIR), BUILTIN_TOKENIZER_DIR)
IMAGE_TOKENS, IMAGE_TOKENS_3V = VLMConfig().image_tokens, CONFIG_3V["vision_patches"]


def parse_arguments(argv=None):
    parser = ArgumentParser(prog="python -m dataset.check", description=__doc__, imports=True)
    add, tokenizers = parser.add_argument, ", ".join(map(display_path, TOKENIZERS))
    add("data_path", metavar="FILE", type=file_path, help="jsonl or parquet")
    add("--images_path", type=file_path, help="folder of the jsonl's pictures")
    add("--tokenizer_path", type=file_path, help=f"training's (default: the first that exists of {tokenizers})")
    what = "tokens a sample is cut at; training's defaults are 640, fine-tuning 1536 (minimind-3v: 450, 768)"
    add("--max_seq_len", type=number(int, 8), default=640, help=what)
    what = f"tokens of a picture (default: {IMAGE_TOKENS}; minimind-3v: {IMAGE_TOKENS_3V})"
    add("--image_tokens", type=number(int, 1), help=what)
    add("--max_bad_rows", type=number(int, 0), help="rows that may be left out (default: 1 %% of the rows)")
    add("--pictures", action="store_true", help="decode every picture too, and name the broken ones")
    return parser.parse_args(argv)


def overview(data: VLMDataset) -> dict[str, str]:
    bad, blank = len(data.bad_rows), len(data.rows) - data.row_count
    facts = {"rows": f"{data.row_count:,}: {len(data):,} good, {bad:,} bad"}
    facts["rows"] += f" ({percent(bad, data.row_count)})" if bad else ""
    facts["rows"] += f", and {counted(blank, 'blank line')}" if blank else ""
    lengths, cut_tokens = data.lengths, data.column("cut_tokens")
    if len(data):
        total, learned = lengths.sum(), data.column("learned_tokens")[data.row_indices].sum()
        images = percent(data.image_count * data.image_tokens, total)
        by_row = [f"{number} in {rows:,}" for number, rows in sorted(Counter(data.image_counts.tolist()).items())]
        files = counted(len(np.unique(data.shown_pictures)), "file")
        half, most = np.percentile(lengths, (50, 95))
        facts["pictures"] = f"{files}, shown {counted(data.image_count, 'time')}; pictures by row: {', '.join(by_row)}"
        facts["tokens"] = f"{total:,}: {percent(learned, total)} learned ({learned:,}), {images} pictures"
        facts["per row"] = f"half have up to {half:,.0f} tokens, 95 % up to {most:,.0f}, the longest {lengths.max():,}"
    lost, refused = cut_tokens[data.row_indices], cut_tokens[data.left_out]
    refused = refused[refused > 0]  # rows that max_length leaves without an image or an answer
    longest = max((lengths + lost).max(initial=0), refused.max(initial=0))
    cuts = [f"{lost.sum():,} tokens of {counted((lost > 0).sum(), 'row')}"] if lost.any() else []
    cuts += [f"the whole of {counted(len(refused), 'row')}"] if len(refused) else []
    cut = f"{' and '.join(cuts)}; --max_seq_len {longest} fits all"
    facts |= data.rules
    facts[f"cut at {data.max_length}"] = cut if cuts else f"nothing (the longest row has {longest:,} tokens)"
    first, copies = {}, []
    for start in range(0, len(data), BATCH):
        for row in data.read_rows(data.row_indices[start : start + BATCH].tolist()):
            content = row["input_ids"], row["pictures"], row["picture_numbers"]
            original = first.setdefault(hash_63(repr(content).encode()), row["line"])
            copies += [f"{row['line']} (as {original})"] if original != row["line"] else []
    facts["duplicates"] = f"{counted(len(copies), 'row')} seen before: {places(copies, data)}" if copies else "none"
    return facts


def about_answers(data: VLMDataset, tokenizer) -> dict[str, str]:
    """Says of the first rows' answers if all are numbers, and which scripts' characters the tokenizer takes apart."""

    def script_of(character: str) -> str:  # "" for spaces, digits and the like
        category = unicodedata.category(character)
        is_emoji = category == "So" and character != "\ufffd"  # half a character, where a row is cut
        return unicodedata.name(character, "").split(" ")[0].lower() if category[0] == "L" else "emoji" * is_emoji

    answers, runs, found = [], defaultdict(list), []
    for row in data.read_rows(data.row_indices[:BATCH].tolist()):
        spans = zip(row["learned"][::2], row["learned"][1::2], strict=True)
        answers += [row["input_ids"][start:end] for start, end in spans]
    answers = tokenizer.batch_decode(answers, skip_special_tokens=True)
    are_numbers = answers and all(re.fullmatch(r"[\d.-]*\d[\d.-]*", answer.strip()) for answer in answers)
    facts = {"answers": "only numbers: if they stand for classes, name the classes instead"} if are_numbers else {}
    text = " ".join(answers)
    for script, run in itertools.groupby(text, script_of):
        runs[script].append("".join(run))
    for script, texts in runs.items():
        size, tokens = sum(map(len, texts)), tokenizer(texts, add_special_tokens=False)["input_ids"]
        share = sum(map(len, tokens)) / size
        if script and share > MANY_TOKENS and size > LEAST_SHARE * len(text):
            found.append(f"{script} takes {share:.1f} tokens a character")
    what = "(English 0.4, Chinese 0.8): longer answers, slower learning"
    return facts | ({"words": f"{', '.join(found)} {what}"} if found else {})


def places(shown: list | tuple, data: VLMDataset | None) -> str:
    """Lists the first places, which are texts, or the numbers of lines or rows of a data set."""
    first = ", ".join(map(str, shown[:SHOWN_PLACES])) + (", ..." if len(shown) > SHOWN_PLACES else "")
    return first if data is None else f"{'row' if data.is_parquet else 'line'}{'' if len(shown) == 1 else 's'} {first}"


def by_reason(rows: list[tuple[int | str, str]], data: VLMDataset | None = None) -> list[str]:
    """Formats the places and reasons of bad rows: each kind with its first reason, the most frequent kind first."""
    kinds, lines = defaultdict(list), []
    for row in rows:
        # A reason without what differs by row: numbers, quoted words, and details after `:`.
        general = re.sub(r"""(?<!\w)('[^']*'|"[^"]*")|\d+""", "*", row[1])
        kinds[re.match(r"(turn \*: )?[^:]*", general)[0]].append(row)
    for kind in sorted(kinds.values(), key=len, reverse=True):
        shown, reasons = zip(*kind, strict=True)
        lines += fact(counted(len(kind), "row"), reasons[0] + " (the first; others differ)" * (len(set(reasons)) > 1))
        lines += fact("", places(shown, data))
    return lines


def broken_pictures(data: VLMDataset) -> list[str]:
    """Decodes every picture, each once, and names the broken ones; training only skips their rows."""

    def decode(picture: int) -> str | None:
        try:
            load_picture(*data.picture_source(picture), data.picture_format)
        except PictureError as error:
            return str(error)

    shown, lines = data.shown_pictures, np.repeat(data.column("line")[data.row_indices], data.image_counts)
    pictures = np.unique(shown).tolist()
    with ThreadPool() as pool:  # Pillow releases the GIL while it decodes
        decoded = pool.imap(decode, pictures, 16)
        bar = tqdm(decoded, "decoding", len(pictures), unit=" pictures", leave=False, disable=None)
        errors = {picture: error for picture, error in zip(pictures, bar, strict=True) if error}
    skipped = counted(len(np.unique(lines[np.isin(shown, list(errors))])), "row")
    report = [f"broken pictures: {len(errors):,} of {len(pictures):,}; training skips {skipped}"]
    for picture, error in itertools.islice(errors.items(), SHOWN_PICTURES):
        report += fact("", f"{error} ({places(np.unique(lines[shown == picture]).tolist(), data)})")
    return report + fact("", "...") * (len(errors) > SHOWN_PICTURES)


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
    path = args.tokenizer_path or next(folder for folder in TOKENIZERS if (folder / "tokenizer.json").is_file())
    tokenizer = load_tokenizer(path.resolve())
    image_tokens = args.image_tokens or (IMAGE_TOKENS_3V if has_image_pad(tokenizer) else IMAGE_TOKENS)
    images_path = args.images_path and args.images_path.resolve()
    data = VLMDataset(args.data_path.resolve(), images_path, tokenizer, args.max_seq_len, image_tokens)
    facts = {"tokenizer": display_path(path.resolve())} | overview(data) | about_answers(data, tokenizer)
    report = [display_path(data.data_path), *(line for name in facts for line in fact(name, facts[name]))]
    report += ["", "bad rows", *by_reason(data.bad_rows, data)] if data.bad_rows else []
    print("\n".join(report), flush=True)
    if args.pictures:
        print("\n" + "\n".join(broken_pictures(data)), flush=True)
    bad, limit = len(data.bad_rows), data.bad_rows_limit(args.max_bad_rows)
    if bad <= limit and len(data):
        left_out = f", {bad:,} left out" if bad else ""
        print(f"\nTraining would start with this file: {counted(len(data), 'usable row')}{left_out}.")
        return
    allowed = f"{limit:,} (1 % of the rows)" if args.max_bad_rows is None else f"--max_bad_rows {limit}"
    why = f"{counted(bad, 'bad row')}, more than {allowed}" if bad > limit else "there are no usable rows"
    if bad and not data.is_parquet:
        print(f"\nA good line looks like this:\n  {EXAMPLE_ROW}")
    print(f"\nTraining would refuse this file: {why}.")
    sys.exit(1)


if __name__ == "__main__":
    run_script(main)
