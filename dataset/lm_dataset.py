"""The training data: rows of a jsonl or parquet file to tensors, and a list of rows to a batch.

A row is tokenised once; the result is kept as memory-mapped Arrow by the `datasets` library, so neither start-up nor
memory grows with the file, and a loader's worker has only pictures to decode.
"""

import copy
import functools
import glob
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

from common.errors import UsageError
from dataset.chat import (
    TOKENS_PER_IMAGE,
    ChatEncoder,
    RowError,
    check_images,
    parse_conversation,
    parse_picture_names,
)
from dataset.features import FeatureCache, picture_digest
from dataset.pictures import PictureError, load_picture, read_picture_file

# Part of the cache's name: raise it when the same row must give other tokens than before.
ENCODING_VERSION = 1
ROWS_PER_PROCESS = 20_000
BYTES_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
FEATURES = datasets.Features(
    {
        "line": datasets.Value("int32"),
        "reason": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("uint16")),
        "learned": datasets.List(datasets.Value("int32")),
        "image_starts": datasets.List(datasets.Value("int32")),
        "pictures": datasets.List(datasets.Value("string")),
        "learned_tokens": datasets.Value("int32"),
        "cut_tokens": datasets.Value("int32"),
    }
)


class DataError(UsageError):
    """A data file that is missing, unreadable, or has too many bad rows."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out: its line (of a jsonl, from 1) or row (of a parquet, from 1), and why."""

    line: int
    reason: str


class VLMDataset(Dataset):
    """Conversations about pictures, tokenised.

    `dataset[i]` is {"input_ids": (L,) int64, "labels": (L,) int64 with -100 where nothing is learned, "pixel_values":
    uint8 (images, 3, 224, 224), "image_starts": (images,) int64 positions of each image's first placeholder}; it raises
    `PictureError` where a picture cannot be decoded. Rows that cannot be learned from are not counted; they stand in
    `bad_rows`.

    Args:
        data_path: A jsonl file (one {"conversations": [...], "image": "a.jpg, b.jpg"} a line) or a parquet file
            (`conversations`, `image_bytes`).
        images_path: The folder the jsonl's pictures lie in; not needed for parquet.
        tokenizer: The tokenizer that belongs to the language model.
        max_length: Tokens a sample is cut at.
        cache_dir: Where the tokenised rows are kept; by default the `datasets` library's own cache.
        num_proc: Processes that tokenise; by default one for every 20,000 rows, as far as there are cores.

    Raises:
        DataError: If a file or folder is missing, unreadable or empty.
    """

    def __init__(
        self,
        data_path: str | Path,
        images_path: str | Path | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 640,
        cache_dir: str | Path | None = None,
        num_proc: int | None = None,
    ):
        self.data_path = Path(data_path)
        self.images_path = None if images_path is None else Path(images_path)
        self.max_length = max_length
        self.is_parquet = self.data_path.suffix.lower() == ".parquet"
        raw = load_rows(self.data_path, self.is_parquet, cache_dir)
        self.row_count = len(raw)
        self.rows = tokenise_rows(raw, tokenizer, max_length, self.is_parquet, num_proc)
        self.image_bytes = raw.select_columns(["image_bytes"]) if "image_bytes" in raw.column_names else None
        self.fingerprint = self.rows._fingerprint
        reasons = self.rows.data.column("reason")
        good = pc.equal(reasons, "").to_numpy()
        lines = self.rows.data.column("line").to_numpy()
        self.bad_rows = [
            BadRow(int(lines[i]), reasons[i].as_py()) for i in np.flatnonzero(~good) if reasons[i].as_py() != "blank"
        ]
        self.row_count -= int(pc.sum(pc.equal(reasons, "blank")).as_py() or 0)
        if not self.is_parquet:
            self._check_pictures_exist(good, lines)
        self.left_out = np.flatnonzero(~good)
        self.cut_rows = int((self._of_good_rows(self.rows.data.column("cut_tokens")) > 0).sum())
        self.picture_count = int(self.image_counts.sum())
        self.feature_cache: FeatureCache | None = None

    def _image_counts(self) -> pa.ChunkedArray:
        return pc.list_value_length(self.rows.data.column("image_starts"))

    def use_feature_cache(self, folder: Path, tower_sha256: str, width: int) -> FeatureCache:
        """Lets samples come with the tower's features where a cache holds them.

        `dataset[i]` then has "image_features" (found, 196, width) float16, "pixel_values" of the other pictures only, and
        "slots", each picture's (slot, digest, whether it was found) in reading order.

        Raises:
            FeatureCacheError: If there is no room for the cache.
        """
        counts = self._image_counts().to_numpy()
        self.feature_cache = FeatureCache(folder, self.content_sha256, tower_sha256, counts, width)
        return self.feature_cache

    # Computed when asked for, not kept: each of a loader's workers may get a copy of all that is kept here.
    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each sample."""
        return self._of_good_rows(pc.list_value_length(self.rows.data.column("input_ids")))

    @property
    def image_counts(self) -> np.ndarray:
        """(samples,) pictures of each sample."""
        return self._of_good_rows(self._image_counts())

    @property
    def learned_tokens(self) -> np.ndarray:
        """(samples,) learned tokens of each sample."""
        return self._of_good_rows(self.rows.data.column("learned_tokens"))

    @functools.cached_property
    def content_sha256(self) -> str:
        """SHA-256 (hex) of the rows' tokens and pictures' names: wherever the file lies and whenever it was written."""
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

    def hold_out(self, share: float = 0.01, most: int = 512) -> "VLMDataset | None":
        """Takes some rows out, to measure on: those whose hash is smallest, whatever the file's order.

        Rows that show the same picture are taken together; where there are pictures, rows without one are not taken.

        Returns:
            The rows taken out, at most `share` of all and about `most`; None where that is none.
        """
        wanted = min(most, int(share * len(self)))
        good = np.delete(np.arange(len(self.rows)), self.left_out)
        if self.picture_count:
            good = good[self.image_counts > 0]
        if wanted == 0 or wanted >= len(good):
            return None
        hashes = row_hashes(self.rows.data)[good]
        taken = good[hashes <= np.partition(hashes, wanted - 1)[wanted - 1]]
        if len(taken) > 2 * wanted:  # a picture in so many rows that they cannot all be spared
            taken = good[np.argsort(hashes, kind="stable")[:wanted]]
        held_out = copy.copy(self)
        held_out.left_out = np.delete(np.arange(len(self.rows)), taken)
        self.left_out = np.union1d(self.left_out, taken)
        for dataset in (self, held_out):
            dataset.picture_count = int(dataset.image_counts.sum())
            dataset.cut_rows = int((dataset._of_good_rows(dataset.rows.data.column("cut_tokens")) > 0).sum())
        return held_out

    def _of_good_rows(self, column: pa.ChunkedArray) -> np.ndarray:
        return np.delete(column.to_numpy(), self.left_out)

    def _positions(self, indices: list[int]) -> np.ndarray:
        """Where these samples stand among all rows."""
        indices = np.asarray(indices)
        if not ((-len(self) <= indices) & (indices < len(self))).all():
            raise IndexError(f"there are {len(self)} samples, asked for {indices.tolist()}")
        indices = indices % len(self)
        good_before = self.left_out - np.arange(len(self.left_out))
        return indices + np.searchsorted(good_before, indices, side="right")

    def _check_pictures_exist(self, good: np.ndarray, lines: np.ndarray):
        """Marks rows with a missing picture as bad. Not cached with the tokens: pictures come and go."""
        pictures = self.rows.data.column("pictures")
        named = np.flatnonzero(good & (pc.list_value_length(pictures).to_numpy() > 0))
        if len(named) and (self.images_path is None or not self.images_path.is_dir()):
            raise DataError(f"{self.data_path} names pictures, but their folder is missing: {self.images_path}")
        for index in tqdm(named, desc="looking for pictures", unit=" rows", disable=len(named) < ROWS_PER_PROCESS):
            missing = [name for name in pictures[index].as_py() if not os.path.isfile(self.images_path / name)]
            if missing:
                good[index] = False
                self.bad_rows.append(BadRow(int(lines[index]), f"no such picture: {missing[0]}"))
        self.bad_rows.sort(key=lambda row: row.line)

    def __len__(self) -> int:
        return len(self.rows) - len(self.left_out)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.__getitems__([index])[0]
        if isinstance(sample, PictureError):
            raise sample
        return sample

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor] | PictureError]:
        """Samples for the collate function: in place of one with a broken picture stands its PictureError."""
        if len(indices) == 0:
            return []
        positions = self._positions(indices).tolist()
        rows = self.rows.with_format("arrow")[positions].to_pylist()
        samples = []
        for position, row in zip(positions, rows, strict=True):
            try:
                samples.append(self._sample(position, row))
            except PictureError as error:
                samples.append(error)
        return samples

    def _sample(self, position: int, row: dict) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.full_like(input_ids, -100)
        for start, end in zip(row["learned"][::2], row["learned"][1::2], strict=True):
            labels[start:end] = input_ids[start:end]
        sources = self._picture_sources(position, row)
        if self.feature_cache is None:
            pictures = {"pixel_values": stack_pictures([load_picture(*source) for source in sources])}
        else:
            pictures = self._cached_pictures(position, sources)
        return {
            "input_ids": input_ids,
            "labels": labels,
            **pictures,
            "image_starts": torch.tensor(row["image_starts"], dtype=torch.int64),
        }

    def _picture_sources(self, position: int, row: dict) -> list[tuple[Path | bytes, str]]:
        """Each picture's path or bytes, and what errors call it."""
        if not self.is_parquet:
            return [(self.images_path / name, name) for name in row["pictures"]]
        if not row["image_starts"]:
            return []
        files = self.image_bytes[position]["image_bytes"]
        files = files if isinstance(files, list) else [files]
        files = [file for file in files if file is not None]
        return [(file, f"row {row['line']}, picture {n}") for n, file in enumerate(files, start=1)]

    def _cached_pictures(self, position: int, sources: list[tuple[Path | bytes, str]]) -> dict:
        """What the cache holds as features, the rest as pixels with the slots where their features belong."""
        features, pixels, slots = [], [], []
        first_slot = int(self.feature_cache.first_slots[position])
        for slot, (source, name) in enumerate(sources, start=first_slot):
            file = read_picture_file(source, name)
            digest = picture_digest(file)
            found = self.feature_cache.get(slot, digest)
            if found is None:
                pixels.append(load_picture(file, name))
            else:
                features.append(found)
            slots.append((slot, digest, found is not None))
        width = self.feature_cache.width
        empty = torch.zeros(0, TOKENS_PER_IMAGE, width, dtype=torch.float16)
        return {
            "pixel_values": stack_pictures(pixels),
            "image_features": torch.stack(features) if features else empty,
            "slots": slots,
        }


def stack_pictures(pictures: list[torch.Tensor]) -> torch.Tensor:
    """uint8 (pictures, 3, 224, 224)."""
    return torch.stack(pictures) if pictures else torch.zeros(0, 3, 224, 224, dtype=torch.uint8)


def load_rows(data_path: Path, is_parquet: bool, cache_dir=None) -> datasets.Dataset:
    """The file's rows, memory-mapped: `text` lines of a jsonl, the columns of a parquet.

    Raises:
        DataError: If the file is missing, of another kind, unreadable or empty.
    """
    if not data_path.is_file():
        raise DataError(f"no such data file: {data_path}")
    if data_path.suffix.lower() not in (".jsonl", ".json", ".parquet"):
        raise DataError(f"{data_path} is neither .jsonl nor .parquet")
    if data_path.stat().st_size == 0:
        raise DataError(f"{data_path} is empty")
    # utf-8-sig: some editors on Windows begin a file with a byte order mark.
    text = {"path": "text", "encoding": "utf-8-sig", "encoding_errors": "replace"}
    kind = {"path": "parquet"} if is_parquet else text
    files = glob.escape(str(data_path.resolve()))  # the library would take a folder named [a] for a pattern
    try:
        rows = datasets.load_dataset(**kind, data_files=files, split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{data_path} cannot be read: {reason}") from error
    if len(rows) == 0:
        raise DataError(f"{data_path} has no rows")
    if is_parquet and not {"conversations", "image_bytes"} <= set(rows.column_names):
        raise DataError(f"{data_path} needs the columns conversations and image_bytes, it has {rows.column_names}")
    return rows


def tokenise_rows(raw, tokenizer, max_length: int, is_parquet: bool, num_proc: int | None) -> datasets.Dataset:
    """The tokenised rows in the file's order (FEATURES), from the cache where they are there."""
    key = f"{raw._fingerprint} {tokenizer_hash(tokenizer)} {max_length} {ENCODING_VERSION}"
    processes = num_proc or min(os.cpu_count() or 1, 1 + len(raw) // ROWS_PER_PROCESS)
    picture_counts = count_parquet_pictures(raw) if is_parquet else None
    return raw.map(
        RowTokeniser(ChatEncoder(tokenizer), max_length, picture_counts),
        input_columns="conversations" if is_parquet else "text",
        with_indices=True,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=raw.column_names,
        features=FEATURES,
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        desc="tokenising",
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides which ids a text gets."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()


def count_parquet_pictures(raw) -> np.ndarray:
    """Pictures per row, from the column's offsets alone: the bytes stay on disk."""
    column = raw.data.column("image_bytes")
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    element = column.type.value_type if is_list else column.type
    if not any(is_bytes(element) for is_bytes in BYTES_TYPES):
        raise DataError(f"image_bytes must be a picture's bytes or a list of them, it is {column.type}")
    if not is_list:
        return pc.is_valid(column).to_numpy().astype(np.int64)
    return np.concatenate([count_valid(lists) for lists in column.chunks])


def count_valid(lists: pa.ListArray) -> np.ndarray:
    """How many elements of each list are not null."""
    before = np.concatenate(([0], np.cumsum(lists.values.is_valid())))
    offsets = lists.offsets.to_numpy()
    return np.where(lists.is_valid(), before[offsets[1:]] - before[offsets[:-1]], 0)


def row_hashes(table: pa.Table) -> np.ndarray:
    """(rows,) uint64: of the first picture's name, or of the tokens where no picture has a name."""
    batches = table.select(["input_ids", "pictures"]).to_batches()
    return np.concatenate([batch_hashes(batch) for batch in batches])


def batch_hashes(batch: pa.RecordBatch) -> np.ndarray:
    lists, names = batch.column("input_ids"), batch.column("pictures").to_pylist()
    lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
    values, ends = lists.flatten().to_numpy().astype(np.uint64), np.cumsum(lengths)
    within = (np.arange(len(values)) - np.repeat(ends - lengths, lengths)).astype(np.uint64)
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed(values * np.uint64(1 << 32) + within))))
    hashes = mixed(sums[ends] - sums[ends - lengths])
    for index, of_row in enumerate(names):
        if of_row:
            hashes[index] = int.from_bytes(hashlib.blake2b(of_row[0].encode(), digest_size=8).digest(), "little")
    return hashes


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 whose every bit depends on all bits of the given ones (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class RowTokeniser:
    """Maps a batch of raw rows to FEATURES; what is wrong with a row goes into its `reason`, else empty."""

    def __init__(self, encoder: ChatEncoder, max_length: int, picture_counts: np.ndarray | None):
        self.encoder, self.max_length, self.picture_counts = encoder, max_length, picture_counts

    def __call__(self, values: list, indices: list[int]) -> dict[str, list]:
        parsed = []
        for value, index in zip(values, indices, strict=True):
            try:
                parsed.append(self._parse(value, index))
            except RowError as error:
                parsed.append(str(error))
        encoded = iter(self.encoder.encode([turns for turns, _ in (row for row in parsed if not isinstance(row, str))]))
        columns = {name: [] for name in FEATURES}
        for row, index in zip(parsed, indices, strict=True):
            for name, value in self._columns(row, None if isinstance(row, str) else next(encoded), index).items():
                columns[name].append(value)
        return columns

    def _parse(self, value, index: int) -> tuple[list[dict], list[str]]:
        """The row's turns and the names of its pictures."""
        if self.picture_counts is not None:
            turns = parse_conversation(value)
            check_images(turns, int(self.picture_counts[index]))
            return turns, []
        if not value.strip():
            raise RowError("blank")
        if "\ufffd" in value:
            raise RowError("the line is not UTF-8 (or holds U+FFFD, the sign of a text once broken)")
        try:
            row = json.loads(value)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise RowError(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RowError("not a JSON object")
        turns, names = parse_conversation(row.get("conversations")), parse_picture_names(row.get("image"))
        check_images(turns, len(names))
        return turns, names

    def _columns(self, row, chat, index: int) -> dict:
        empty = {
            "input_ids": [],
            "learned": [],
            "image_starts": [],
            "pictures": [],
            "learned_tokens": 0,
            "cut_tokens": 0,
        }
        if isinstance(row, str):
            return {"line": index + 1, "reason": row, **empty}
        whole_length = len(chat.input_ids)
        try:
            chat = chat.truncated(self.max_length)
        except RowError as error:
            return {"line": index + 1, "reason": str(error), **empty}
        return {
            "line": index + 1,
            "reason": "",
            "input_ids": chat.input_ids,
            "learned": [edge for stretch in chat.learned for edge in stretch],
            "image_starts": chat.image_starts,
            "pictures": row[1],
            "learned_tokens": sum(end - start for start, end in chat.learned),
            "cut_tokens": whole_length - len(chat.input_ids),
        }


class VLMCollator:
    """Joins samples of any lengths and numbers of pictures to one batch.

    Args:
        pad_token_id: Fills input_ids at the right; labels are filled with -100.
        multiple: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, pad_token_id: int = 0, multiple: int = 1):
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, samples: list[dict[str, torch.Tensor] | PictureError]) -> dict:
        """Returns the batch.

        input_ids, labels (B, L); pixel_values uint8 (all images, 3, 224, 224) in reading order; image_starts (all
        images, 2) sample and column; learned_positions (N,) where labels.flatten() is learned; tokens: how many there are
        without padding; skipped: the PictureErrors of samples left out. With a feature cache, image_features and slots
        are joined likewise.
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
        pictures = [sample["pixel_values"] for sample in samples]
        cached = {}
        if samples and "slots" in samples[0]:
            cached["image_features"] = torch.cat([sample["image_features"] for sample in samples])
            cached["slots"] = [slot for sample in samples for slot in sample["slots"]]
        return cached | {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": torch.cat(pictures) if pictures else torch.zeros(0, 3, 224, 224, dtype=torch.uint8),
            "image_starts": torch.cat(starts),
            "learned_positions": (labels.flatten() != -100).nonzero()[:, 0],
            "tokens": sum(len(sample["input_ids"]) for sample in samples),
            "skipped": skipped,
        }
