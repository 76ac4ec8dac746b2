"""Look through a data file before training on it: what is learned from, what is left out and why, what is cut.

    python -m dataset.check my_data.jsonl --images_path my_images
    python -m dataset.check my_data.parquet --max_seq_len 1536             as fine-tuning reads it
    python -m dataset.check my_data.jsonl --images_path my_images --pictures   decode every picture too

Nothing is trained and no weights are needed. The exit status is 0 where training would start with the file, and 1 where
it would refuse it. The tokenised rows are kept: a training with the same tokenizer and max_seq_len begins at once.
"""

import argparse
import hashlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from common.errors import (
    UsageError,  # noqa: E402
    run_script,  # noqa: E402
)
from common.paths import BUILTIN_TOKENIZER_DIR, TOKENIZER_DIR, display_path
from dataset.chat import TOKENS_PER_IMAGE, ChatEncoder  # noqa: E402
from dataset.lm_dataset import BadRow, RowTokeniser, VLMDataset, count_parquet_pictures, load_rows  # noqa: E402
from dataset.pictures import PictureError, load_picture  # noqa: E402
from trainer.flags import LEAST  # noqa: E402
from trainer.setup import bad_rows_limit, load_tokenizer, quiet_libraries  # noqa: E402
from trainer.support.processes import cores  # noqa: E402

WIDTH = 80
BAR = 40
BINS = 10
SHOWN_LINES = 8
SHOWN_PICTURES = 20
BATCH = 1000  # rows read at once
UNCUT = 2**31 - 1


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Raises:
        UsageError: If a number is too small.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dataset.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data_path", metavar="FILE", type=Path, help="jsonl or parquet")
    add("--images_path", type=Path, help="folder of the jsonl's pictures")
    what = f"default: {display_path(TOKENIZER_DIR)}, or where it was not downloaded {display_path(BUILTIN_TOKENIZER_DIR)}"
    add("--tokenizer_path", type=Path, help=f"the tokenizer that training will use ({what})")
    what = "tokens a sample is cut at; pretraining takes 640, fine-tuning 1536, if they are not told otherwise"
    add("--max_seq_len", type=int, default=640, help=f"{what} (default: %(default)s)")
    what = "rows that cannot be learned from and may be left out"
    add("--max_bad_rows", type=int, help=f"{what} (default: 1 %% of the rows)")
    add("--pictures", action="store_true", help="decode every picture too, and name the broken ones")
    args = parser.parse_args(argv)
    for name in ("data_path", "images_path", "tokenizer_path"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).expanduser().resolve())
    for name in ("max_seq_len", "max_bad_rows"):
        value = getattr(args, name)
        if value is not None and value < LEAST[name]:
            raise UsageError(f"--{name} {value}: must be at least {LEAST[name]}")
    return args


class Check:
    """What is to be said about a data file. Its methods return lines of text.

    Args:
        data: The file, as training reads it.
        tokenizer: The tokenizer it was read with.
    """

    def __init__(self, data: VLMDataset, tokenizer: PreTrainedTokenizerBase):
        self.data, self.tokenizer = data, tokenizer
        self.good = np.delete(np.arange(len(data.rows)), data.left_out)  # (samples,) positions among all rows
        self.place = "row" if data.is_parquet else "line"
        self.lengths = data.lengths
        self.image_counts = self._of_good_rows(pc.list_value_length(self._column("image_starts")))
        # Names of the good rows' pictures, and at which position the row of each stands. A parquet has no names.
        self.names = pc.list_flatten(self._column("pictures").take(pa.array(self.good)))
        self.name_positions = np.repeat(self.good, 0 if data.is_parquet else self.image_counts)

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.data.rows.data.column(name)

    def _of_good_rows(self, column: pa.ChunkedArray) -> np.ndarray:
        return np.delete(column.to_numpy(), self.data.left_out)

    def overview(self) -> list[str]:
        data, bad = self.data, len(self.data.bad_rows)
        rows = f"{data.row_count:,}: {len(data):,} good, {bad:,} bad"
        if bad:
            rows += f" ({percent(bad, data.row_count)})"
        blank = len(data.rows) - data.row_count
        report = fact("rows", rows + (f", and {counted(blank, 'blank line')}" if blank else ""))
        if len(data):
            report += fact("pictures", self._pictures()) + fact("tokens", self._tokens())
        report += fact(f"cut at {data.max_length}", self._cut())
        return report + (fact("duplicates", self._duplicates()) if len(data) else [])

    def _pictures(self) -> str:
        text = f"{self.data.picture_count:,}"
        if len(self.names) == 0:
            return text
        # A name that a row holds twice is still of one row.
        pairs = pa.table({"row": self.name_positions, "name": self.names}).group_by(["row", "name"]).aggregate([])
        rows = pairs.group_by("name").aggregate([("row", "count")]).column("row_count").to_numpy()
        several = int((rows > 1).sum())
        shared = f"{several:,} of them in several rows" if several else "none in several rows"
        return f"{text} of {counted(len(rows), 'file')}, {shared}"

    def _tokens(self) -> str:
        total, learned = int(self.lengths.sum()), int(self.data.learned_tokens.sum())
        of_pictures = self.data.picture_count * TOKENS_PER_IMAGE
        return f"{total:,}: {percent(learned, total)} learned ({learned:,}), {percent(of_pictures, total)} pictures"

    def _cut(self) -> str:
        lost = self._of_good_rows(self._column("cut_tokens"))
        too_long = self._lengths_of_refused()
        longest = max((self.lengths + lost).max(initial=0), too_long.max(initial=0))
        if longest <= self.data.max_length:
            return f"nothing (the longest row has {longest:,} tokens)"
        parts = [f"{lost.sum():,} tokens of {counted((lost > 0).sum(), 'row')}"] if lost.any() else []
        parts += [f"the whole of {counted(len(too_long), 'row')}"] if len(too_long) else []
        return f"{' and '.join(parts)}; --max_seq_len {longest} would cut none"

    def _lengths_of_refused(self) -> np.ndarray:
        """Whole lengths of the rows that are bad because of max_seq_len. The data set keeps no tokens of bad rows."""
        positions = [row.line - 1 for row in self.data.bad_rows if "max_seq_len" in row.reason]
        if not positions:
            return np.zeros(0, dtype=np.int64)
        raw = load_rows(self.data.data_path, self.data.is_parquet)
        counts = count_parquet_pictures(raw) if self.data.is_parquet else None
        column = "conversations" if self.data.is_parquet else "text"
        texts = raw.select_columns([column])
        tokenise = RowTokeniser(ChatEncoder(self.tokenizer), UNCUT, counts)
        lengths = []
        for start in range(0, len(positions), BATCH):
            batch = positions[start : start + BATCH]
            lengths += map(len, tokenise(texts[batch][column], batch)["input_ids"])
        return np.array(lengths)

    def _duplicates(self) -> str:
        digests = self._digests()[self.good]
        _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
        if self.data.is_parquet:  # of the rows whose tokens are those of another: whether the pictures are too
            for index in np.flatnonzero((sizes[group] > 1) & (self.image_counts > 0)):
                pictures = picture_bytes(self.data, self.good[index])
                digests[index] = digest(digests[index].tobytes(), *(digest(file).tobytes() for file in pictures))
            _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        copies = np.flatnonzero(first[group] != np.arange(len(digests)))
        if len(copies) == 0:
            return "none"
        lines = [f"{self.good[i] + 1} (as {self.good[first[group[i]]] + 1})" for i in copies[:SHOWN_LINES]]
        return f"{counted(len(copies), 'row')} seen before: " + self._places(lines, len(copies))

    def _digests(self) -> np.ndarray:
        """(rows,) a number for each row that is the same for the same tokens and names of pictures."""
        digests = []
        columns = self.data.rows.select_columns(["input_ids", "pictures"]).with_format("arrow")
        for table in columns.iter(BATCH):
            tokens = table.column("input_ids").combine_chunks()
            values, edges = tokens.values.to_numpy(), tokens.offsets.to_numpy()
            names = ("\0".join(row).encode() for row in table.column("pictures").to_pylist())
            digests += [digest(values[edges[i] : edges[i + 1]], row) for i, row in enumerate(names)]
        return np.array(digests)

    def _places(self, lines: Iterable, count: int) -> str:
        """Where rows stand: the first few lines of `count`."""
        more = ", ..." if count > SHOWN_LINES else ""
        return f"{self.place if count == 1 else self.place + 's'} {', '.join(map(str, lines))}{more}"

    def bad_rows(self) -> list[str]:
        """The bad rows by what is wrong with them: how many, the first one's reason, and where they stand."""
        kinds: dict[str, list[BadRow]] = {}
        for row in self.data.bad_rows:
            kinds.setdefault(kind_of(row.reason), []).append(row)
        report = ["bad rows"] if kinds else []
        for rows in sorted(kinds.values(), key=len, reverse=True):
            report += fact(counted(len(rows), "row"), rows[0].reason)
            report += fact("", self._places((row.line for row in rows[:SHOWN_LINES]), len(rows)))
        return report

    def histograms(self) -> list[str]:
        if len(self.data) == 0:
            return []
        mean = f"mean {self.lengths.mean():.0f}, longest {self.lengths.max():,}"
        report = [f"tokens per row ({mean})", *histogram(self.lengths)]
        return [*report, "", "pictures per row", *histogram(self.image_counts)]

    def broken_pictures(self) -> list[str]:
        """Decodes every picture of the good rows; which cannot be, and why. Training only skips them."""
        if self.data.is_parquet:
            tasks = self.good[self.image_counts > 0].tolist()
            errors = find_broken(self._try_row, tasks, "row")
            count, skipped = self.data.picture_count, len({error.name.partition(",")[0] for error in errors})
        else:
            tasks = pc.unique(self.names).to_pylist()
            errors = find_broken(self._try_name, tasks, "picture")
            is_broken = pc.is_in(self.names, pa.array([error.name for error in errors], pa.string())).to_numpy()
            count, skipped = len(tasks), len(np.unique(self.name_positions[is_broken]))
        if not errors:
            return [f"broken pictures: none of {count:,}"]
        report = [f"broken pictures: {len(errors):,} of {count:,}; training skips {counted(skipped, 'row')}"]
        for error in errors[:SHOWN_PICTURES]:
            text = str(error) if self.data.is_parquet else f"{error} ({self._rows_that_name(error.name)})"
            report += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
        if len(errors) > SHOWN_PICTURES:
            report.append(f"  ... and {len(errors) - SHOWN_PICTURES:,} more")
        return report

    def _rows_that_name(self, name: str) -> str:
        lines = np.unique(self.name_positions[pc.equal(self.names, name).to_numpy()]) + 1
        return self._places(lines[:SHOWN_LINES], len(lines))

    def _try_name(self, name: str) -> list[PictureError]:
        return broken([(self.data.images_path / name, name)])

    def _try_row(self, position: int) -> list[PictureError]:
        files = picture_bytes(self.data, position)
        return broken([(file, f"row {position + 1}, picture {n}") for n, file in enumerate(files, start=1)])

    def refusal(self, max_bad_rows: int | None) -> str | None:
        """Why training would not start with this file, or None: the rule of `Run.load_data`."""
        data, bad = self.data, len(self.data.bad_rows)
        limit = bad_rows_limit(data, max_bad_rows)
        given = f"{limit:,} (1 % of the rows)" if max_bad_rows is None else f"--max_bad_rows {max_bad_rows}"
        if bad > limit:
            return f"{counted(bad, 'bad row')}, more than {given}"
        return None if len(data) else "there is no row to learn from"


def fact(name: str, text: str) -> list[str]:
    """`name` and, beside it, `text`, as wide as the terminal."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15, break_on_hyphens=False
    )


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def kind_of(reason: str) -> str:
    """What is wrong with a row, without what is different in every row: numbers, quoted words, and details after `:`."""
    general = re.sub(r"""(?<!\w)(?:'[^']*'|"[^"]*")|\d+""", "*", reason)
    turn, rest = re.match(r"(turn \*:? |)(.*)", general, re.DOTALL).groups()
    return turn + rest.partition(":")[0]


def digest(*parts: bytes | np.ndarray) -> np.uint64:
    """64 bits: among a million different rows two are alike by chance once in tens of millions of files."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return np.frombuffer(state.digest(), dtype=np.uint64)[0]


def histogram(values: np.ndarray) -> list[str]:
    """A bar for each of about ten equally wide ranges of whole numbers.

    Args:
        values: (N,) integers, at least one.
    """
    low, high = int(values.min()), int(values.max())
    steps = (base * 10**power for power in range(10) for base in (1, 2, 5))
    step = next(step for step in steps if step * BINS > high - low)
    first = low // step * step
    counts = np.bincount((values - first) // step)
    starts = [first + step * i for i in range(len(counts))]
    ends = [min(start + step - 1, high) for start in starts]
    labels = [f"{start:,}" + (f" to {end:,}" if end > start else "") for start, end in zip(starts, ends, strict=True)]
    wide, largest = max(map(len, labels)), int(counts.max())
    bars = ["#" * -(-BAR * int(count) // largest) for count in counts]  # rounded up: one row is seen too
    return [
        f"  {label:>{wide}} |{bar:<{BAR}} {count:>{len(f'{largest:,}')},}"
        for label, bar, count in zip(labels, bars, counts, strict=True)
    ]


def picture_bytes(data: VLMDataset, position: int) -> list[bytes]:
    """The files of a parquet row's pictures."""
    files = data.image_bytes[int(position)]["image_bytes"]
    return [file for file in (files if isinstance(files, list) else [files]) if file is not None]


def broken(sources: list[tuple[Path | bytes, str]]) -> list[PictureError]:
    """What is wrong with those of these pictures that cannot be decoded."""
    errors = []
    for source, name in sources:
        try:
            load_picture(source, name)
        except PictureError as error:
            errors.append(error)
    return errors


def find_broken(look: Callable[..., list[PictureError]], tasks: list, unit: str) -> list[PictureError]:
    """What `look` finds in each of the tasks, in their order. Threads: Pillow decodes outside of Python's lock."""
    with ThreadPool(cores()) as pool:
        found = pool.imap(look, tasks, chunksize=16)
        bar = tqdm(found, desc="decoding", total=len(tasks), unit=f" {unit}s", leave=False, disable=None)
        return [error for errors in bar for error in errors]


def main():
    args = parse_arguments()
    quiet_libraries(is_main=True)
    is_published = (TOKENIZER_DIR / "tokenizer.json").is_file()
    path = args.tokenizer_path or (TOKENIZER_DIR if is_published else BUILTIN_TOKENIZER_DIR)
    which = {TOKENIZER_DIR: " (the published one)", BUILTIN_TOKENIZER_DIR: " (the built-in one)"}.get(path, "")
    tokenizer = load_tokenizer(path)
    check = Check(VLMDataset(args.data_path, args.images_path, tokenizer, args.max_seq_len), tokenizer)
    sections = [[display_path(args.data_path), *fact("tokenizer", display_path(path) + which), *check.overview()]]
    sections += [check.bad_rows(), check.histograms()]
    print("\n\n".join("\n".join(lines) for lines in sections if lines), flush=True)
    if args.pictures:
        print("\n" + "\n".join(check.broken_pictures()), flush=True)
    refusal = check.refusal(args.max_bad_rows)
    if refusal:
        print(f"\nTraining would refuse this file: {refusal}.")
        sys.exit(1)
    left_out = f", {len(check.data.bad_rows):,} left out" if check.data.bad_rows else ""
    print(f"\nTraining would start with this file: {counted(len(check.data), 'row')} to learn from{left_out}.")


if __name__ == "__main__":
    run_script(main)
