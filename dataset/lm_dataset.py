"""The training data: rows of a jsonl or parquet file to tensors, and a list of samples to a batch.

A row is tokenised once; the result is kept as memory-mapped Arrow by the `datasets` library, so neither start-up time
nor memory grows with the file, and a loader's worker only decodes images.
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset import formats
from dataset.chat import ChatEncoder, RowError, check_images, parse_conversation, parse_picture_names
from dataset.formats import DataError
from dataset.pictures import CLIP_FORMAT, PictureError, PictureFormat, load_picture
from dataset.tokenizer import tokenizer_hash

# Part of the token cache's key: raise it when the same row must give other tokens than before.
ENCODING_VERSION = 4
ROWS_PER_PROCESS = 20_000
COLUMNS = datasets.Features(
    {
        "line": datasets.Value("int32"),
        "reason": datasets.Value("string"),  # what is wrong with the row; empty for a good one
        "input_ids": datasets.List(datasets.Value("uint16")),
        "learned": datasets.List(datasets.Value("int32")),  # start, end, start, end ... of the learned spans
        "image_starts": datasets.List(datasets.Value("int32")),
        "pictures": datasets.List(datasets.Value("string")),  # file names; a parquet has none
        "picture_hash": datasets.Value("int64"),  # of the first image's bytes or name: equal for the same image
        "tag_added": datasets.Value("bool"),  # the text had no <image>, so the picture was put first
        "learned_tokens": datasets.Value("int32"),
        "cut_tokens": datasets.Value("int32"),  # lost to max_length; of a row refused for it, all
    }
)


@dataclass(frozen=True)
class BadRow:
    """A row that is left out: its line in a jsonl or row in a parquet, from 1, and why."""

    line: int
    reason: str


class VLMDataset(Dataset):
    """Conversations about images, tokenised.

    `dataset[i]` is {"input_ids": (L,) int64, "labels": (L,) int64 with -100 where nothing is learned, "image_starts":
    (images,) int64 positions of each image's first placeholder, "pixel_values": uint8 (images, 3, size, size)}; after
    `use_features`, "image_features": float16 (images, patches, width) in place of the pixels. It raises `PictureError`
    where an image cannot be decoded. Rows that cannot be learned from are not counted; they are in `bad_rows`.

    Args:
        data_path: A jsonl file (one {"conversations": [...], "image": "a.jpg, b.jpg"} a line) or a parquet file
            (`conversations`, `image_bytes`).
        images_path: The folder of the jsonl's images; by default the jsonl's own. Not needed for parquet.
        tokenizer: The tokenizer that belongs to the language model.
        max_length: Tokens a sample is cut at.
        image_tokens: Placeholders an image takes in the text (`VLMConfig.image_tokens`).
        picture_format: How images are resized.
        cache_dir: Where the tokenised rows are kept; by default the `datasets` library's own cache.
        num_proc: Processes that tokenise; by default one per 20,000 rows, as far as there are cores.

    Raises:
        DataError: If a file or folder is missing, unreadable or empty.
    """

    def __init__(
        self,
        data_path: str | Path,
        images_path: str | Path | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        image_tokens: int,
        picture_format: PictureFormat = CLIP_FORMAT,
        cache_dir: str | Path | None = None,
        num_proc: int | None = None,
    ):
        self.data_path = Path(data_path)
        self.images_path = self.data_path.parent if images_path is None else Path(images_path)
        self.max_length, self.image_tokens, self.picture_format = max_length, image_tokens, picture_format
        self.is_parquet = self.data_path.suffix.lower() == ".parquet"
        raw = formats.load_rows(self.data_path, self.is_parquet, cache_dir)
        with formats.keeping_rows_of(self.data_path):
            self.rows = tokenise_rows(raw, tokenizer, max_length, image_tokens, self.is_parquet, num_proc)
        self.image_files = raw.select_columns([formats.image_column(raw)]) if self.is_parquet else None
        self.features = None  # a dataset.features.FeatureFile, see use_features
        reasons = self.rows.data.column("reason")
        lines, good = self.column("line"), pc.equal(reasons, "").to_numpy()
        refused = [(int(lines[i]), reasons[i].as_py()) for i in np.flatnonzero(~good)]
        self.bad_rows = [BadRow(line, reason) for line, reason in refused if reason != "blank"]
        self.row_count = len(self.rows) - len(refused) + len(self.bad_rows)  # without blank lines
        if not self.is_parquet:
            missing = self._missing_pictures(good)
            good[list(missing)] = False
            self.bad_rows += [BadRow(int(lines[i]), reason) for i, reason in missing.items()]
            self.bad_rows.sort(key=lambda row: row.line)
        self.positions = np.flatnonzero(good)  # of each sample among all rows

    def column(self, name: str) -> np.ndarray:
        """Returns (rows,) a column's values, of all rows."""
        return self.rows.data.column(name).to_numpy()

    def list_lengths(self, name: str) -> np.ndarray:
        """Returns (rows,) lengths of a list column, of all rows."""
        return pc.list_value_length(self.rows.data.column(name)).to_numpy()

    def _missing_pictures(self, good: np.ndarray) -> dict[int, str]:
        """Says of each row what its first image lacks. Not cached with the tokens: images come and go."""
        names, missing = self.rows.data.column("pictures"), {}
        named = np.flatnonzero(good & (self.list_lengths("pictures") > 0))
        if len(named) and not self.images_path.is_dir():
            raise DataError(f"{self.data_path} names pictures, but their folder is missing: {self.images_path}")
        for index in tqdm(named, desc="looking for pictures", unit=" rows", disable=len(named) < ROWS_PER_PROCESS):
            reasons = (formats.why_missing(self.images_path, name) for name in names[index].as_py())
            reason = next(filter(None, reasons), None)
            if reason:
                missing[int(index)] = reason
        return missing

    # Computed when asked for, not kept: each of a loader's workers may get a copy of everything that is kept here.

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each sample."""
        return self.list_lengths("input_ids")[self.positions]

    @property
    def image_counts(self) -> np.ndarray:
        """(samples,) images of each sample."""
        return self.list_lengths("image_starts")[self.positions]

    @property
    def learned_tokens(self) -> np.ndarray:
        """(samples,) learned tokens of each sample."""
        return self.column("learned_tokens")[self.positions]

    @property
    def picture_count(self) -> int:
        """Images of all samples."""
        return int(self.image_counts.sum())

    @property
    def cut_rows(self) -> int:
        """Samples that lose tokens to max_length."""
        return int((self.column("cut_tokens")[self.positions] > 0).sum())

    @property
    def tags_added(self) -> int:
        """Samples whose text had no `<image>`: the picture is put first."""
        return int(self.column("tag_added")[self.positions].sum())

    @property
    def left_out(self) -> np.ndarray:
        """Positions among all rows that are no samples: bad rows, blank lines, held-out rows."""
        return np.delete(np.arange(len(self.rows)), self.positions)

    @functools.cached_property
    def content_sha256(self) -> str:
        """SHA-256 (hex) of the rows' tokens and image names, wherever the file lies and whenever it was written."""
        digest = hashlib.sha256()
        for name in ("input_ids", "learned", "image_starts", "pictures"):
            column = self.rows.data.column(name)
            digest.update(pc.list_value_length(column).to_numpy().tobytes())
            for chunk in column.chunks:
                values = chunk.flatten()
                is_text = pa.types.is_string(values.type)
                names = "".join(f"{value}\0" for value in values.to_pylist()) if is_text else ""
                digest.update(names.encode() if is_text else values.to_numpy())
        return digest.hexdigest()

    def use_features(self, features):
        """Lets samples come with the tower's features (a `dataset.features.FeatureFile`) in place of pixels."""
        self.features = features

    def with_pixels(self) -> "VLMDataset":
        """Returns the same rows, coming with pixels."""
        data = copy.copy(self)
        data.features = None
        return data

    @functools.cached_property
    def first_slots(self) -> np.ndarray:
        """(rows,) the number of each row's first image among the images of all rows."""
        counts = self.list_lengths("image_starts")
        return np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.__getitems__([index])[0]
        if isinstance(sample, PictureError):
            raise sample
        return sample

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor] | PictureError]:
        """Returns samples for the collator: a PictureError in place of one with a broken image."""
        if len(indices) == 0:
            return []
        positions = self.positions[indices].tolist()
        samples = []
        for position, row in zip(positions, self.read_rows(positions), strict=True):
            try:
                samples.append(self._sample(position, row))
            except PictureError as error:
                samples.append(error)
        return samples

    def read_rows(self, positions: list[int]) -> list[dict]:
        """Returns the tokenised rows (COLUMNS) at these positions among all rows."""
        return self.rows.with_format("arrow")[positions].to_pylist()

    def _sample(self, position: int, row: dict) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.full_like(input_ids, -100)
        for start, end in zip(row["learned"][::2], row["learned"][1::2], strict=True):
            labels[start:end] = input_ids[start:end]
        starts = torch.tensor(row["image_starts"], dtype=torch.int64)
        sample = {"input_ids": input_ids, "labels": labels, "image_starts": starts}
        sources = self.picture_sources(position, row)
        if self.features is None:
            pixels = [load_picture(*source, self.picture_format) for source in sources]
            size = self.picture_format.size
            return sample | {
                "pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8)
            }
        first = int(self.first_slots[position])
        features = [self._features(slot, source) for slot, source in enumerate(sources, start=first)]
        empty = torch.zeros(0, *self.features.shape[1:], dtype=torch.float16)
        return sample | {"image_features": torch.stack(features) if features else empty}

    def _features(self, slot: int, source: tuple[Path | bytes, str]) -> torch.Tensor:
        features = self.features.get(slot)
        if features is None:
            load_picture(*source, self.picture_format)  # says what is wrong with it
            raise PictureError(source[1], "it could not be read when its features were computed; start the run anew")
        return torch.from_numpy(features)

    def picture_sources(self, position: int, row: dict) -> list[tuple[Path | bytes, str]]:
        """Returns each image's path or bytes, and what errors call it."""
        if not self.is_parquet:
            return [(self.images_path / name, name) for name in row["pictures"]]
        if not row["image_starts"]:
            return []
        files = formats.as_files(*self.image_files[position].values())
        return [(file, f"row {row['line']}, picture {n}") for n, file in enumerate(files, start=1)]


def tokenise_rows(
    raw, tokenizer, max_length: int, image_tokens: int, is_parquet: bool, num_proc: int | None
) -> datasets.Dataset:
    """Returns the tokenised rows (COLUMNS) in the file's order, from the cache where they are there."""
    key = f"{raw._fingerprint} {tokenizer_hash(tokenizer)} {max_length} {image_tokens} {ENCODING_VERSION}"
    processes = num_proc or min(os.cpu_count() or 1, 1 + len(raw) // ROWS_PER_PROCESS)
    with contextlib.nullcontext() if len(raw) >= ROWS_PER_PROCESS else formats.without_bars():
        return raw.map(
            RowTokeniser(ChatEncoder(tokenizer, image_tokens), max_length),
            input_columns=["conversations", formats.image_column(raw)] if is_parquet else ["text"],
            with_indices=True,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=raw.column_names,
            features=COLUMNS,
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            desc="tokenising",
        )


class RowTokeniser:
    """Maps a batch of raw rows to COLUMNS; what is wrong with a row goes into its `reason`."""

    def __init__(self, encoder: ChatEncoder, max_length: int):
        self.encoder, self.max_length = encoder, max_length

    def __call__(self, values: list, *more: list) -> dict[str, list]:
        *files, indices = more  # a parquet's second column, and the rows' numbers
        parsed = []
        for number, value in enumerate(values):
            try:
                parsed.append(parse_parquet_row(value, files[0][number]) if files else parse_line(value))
            except RowError as error:
                parsed.append(str(error))
        chats = iter(self.encoder.encode([row[0] for row in parsed if not isinstance(row, str)]))
        rows = [
            refused_row(index, row) if isinstance(row, str) else self._row(index, next(chats), *row[1:])
            for index, row in zip(indices, parsed, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in COLUMNS}

    def _row(self, index: int, chat, names: list[str], picture_hash: int, tag_added: bool) -> dict:
        whole_length = len(chat.input_ids)
        try:
            chat = self.encoder.truncate(chat, self.max_length)
        except RowError as error:
            return refused_row(index, str(error)) | {"cut_tokens": whole_length}
        return {
            "line": index + 1,
            "reason": "",
            "input_ids": chat.input_ids,
            "learned": [edge for span in chat.learned for edge in span],
            "image_starts": chat.image_starts,
            "pictures": names,
            "picture_hash": picture_hash,
            "tag_added": tag_added,
            "learned_tokens": sum(end - start for start, end in chat.learned),
            "cut_tokens": whole_length - len(chat.input_ids),
        }


def refused_row(index: int, reason: str) -> dict:
    lists = dict.fromkeys(("input_ids", "learned", "image_starts", "pictures"), [])
    numbers = dict.fromkeys(("picture_hash", "tag_added", "learned_tokens", "cut_tokens"), 0)
    return {"line": index + 1, "reason": reason, **lists, **numbers}


def parse_line(line: str) -> tuple[list[dict], list[str], int, bool]:
    """Returns turns, image names, image hash, and whether an `<image>` was added, of a jsonl line.

    Raises:
        RowError: If it cannot be learned from.
    """
    if not line.strip():
        raise RowError("blank")
    if "\ufffd" in line:
        raise RowError("the line is not UTF-8 (or holds U+FFFD, the sign of a text once broken)")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise RowError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    formats.check_row(row)
    turns, names = parse_conversation(row.get("conversations")), parse_picture_names(row.get("image"))
    tag_added = check_images(turns, len(names))
    return turns, names, hash_63(names[0].encode() if names else line.encode()), tag_added


def parse_parquet_row(conversations, image_bytes) -> tuple[list[dict], list[str], int, bool]:
    """Returns of a parquet row what `parse_line` does of a line (no names); raises RowError as it does."""
    turns, files = parse_conversation(conversations), formats.as_files(image_bytes)
    tag_added = check_images(turns, len(files))
    return turns, [], hash_63(files[0] if files else json.dumps(turns).encode()), tag_added


def hash_63(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1  # fits an int64


def bad_rows_limit(data: VLMDataset, max_bad_rows: int | None) -> int:
    """Returns how many bad rows are left out without refusing the file: as typed, else a hundredth of all rows."""
    return data.row_count // 100 if max_bad_rows is None else max_bad_rows


class VLMCollator:
    """Joins samples of any lengths and numbers of images to one batch.

    Args:
        pad_token_id: Fills input_ids at the right; labels are filled with -100.
        multiple: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, pad_token_id: int = 0, multiple: int = 1):
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, samples: list[dict[str, torch.Tensor] | PictureError]) -> dict:
        """Returns the batch.

        input_ids, labels (B, L); image_starts (all images, 2) sample and column; pixel_values or image_features (all
        images, ...) in reading order; learned_positions (N,) where labels.flatten() is learned; tokens: how many there
        are without padding; skipped: the PictureErrors of samples left out. Where nothing is left, the images are
        missing too.
        """
        skipped = [sample for sample in samples if isinstance(sample, PictureError)]
        samples = [sample for sample in samples if not isinstance(sample, PictureError)]
        longest = max((len(sample["input_ids"]) for sample in samples), default=0)
        longest = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(samples), longest), self.pad_token_id)
        labels = torch.full((len(samples), longest), -100)
        starts = [torch.zeros(0, 2, dtype=torch.int64)]
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            input_ids[row, :length] = sample["input_ids"]
            labels[row, :length] = sample["labels"]
            columns = sample["image_starts"]
            starts.append(torch.stack((torch.full_like(columns, row), columns), dim=1))
        images = {name for name in ("pixel_values", "image_features") if samples and name in samples[0]}
        return {name: torch.cat([sample[name] for sample in samples]) for name in images} | {
            "input_ids": input_ids,
            "labels": labels,
            "image_starts": torch.cat(starts),
            "learned_positions": (labels.flatten() != -100).nonzero()[:, 0],
            "tokens": sum(len(sample["input_ids"]) for sample in samples),
            "skipped": skipped,
        }
