"""The training data: rows of a jsonl or parquet file to tensors, and samples to a batch."""

import copy
import functools
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.errors import UsageError
from dataset import file_kinds
from dataset.parquet import BAR_DELAY, load_parquet
from dataset.pictures import CLIP_FORMAT, PictureError, PictureFormat, load_picture, preprocess_image
from dataset.row_forms import TOOL_CALLS
from dataset.rows import BLANK_LINE, KINDS, BadRow, Variation, tokenise_rows


class VLMDataset(Dataset):
    """Conversations about images, tokenised: the rows of a file, of which those at `row_indices` are its samples.

    `dataset[i]` is {"input_ids": (L,) int64, "labels": (L,) int64 with -100 where nothing is learned, "image_starts":
    (images,) int64 positions of each image's first placeholder, "pixel_values": uint8 (images, 3, size, size)}; with
    `features`, "image_features": float16 (images, patches, width) in place of the pixels, and "unencoded": bool
    (images,), True where features are missing: zeros, with pixels supplied. It raises `PictureError` if an image cannot
    be decoded. Unusable rows are not samples; see `bad_rows`.

    The file is a jsonl of rows in a form of `dataset.row_forms`, with pictures in `images_path` (by default its own
    folder), or a parquet (`conversations`, `image_bytes`). An image takes `image_tokens` placeholders in the text.
    Tokenised rows are cached in `cache_dir`, by default that of the `datasets` library. Raises UsageError if a file or
    folder is missing, unreadable or empty.
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
        variation: Variation | None = None,
    ):
        self.data_path = Path(data_path)
        self.images_path = self.data_path.parent if images_path is None else Path(images_path)
        self.max_length, self.image_tokens, self.picture_format = max_length, image_tokens, picture_format
        self.is_parquet = self.data_path.suffix.lower() == ".parquet"
        self.features = None  # a dataset.features.FeatureFolder
        self.leaves_small = False  # on a GPU: `encode_images` enlarges a batch of small squares of one size
        with file_kinds.reading(self.data_path):
            if self.is_parquet:
                raw, self.image_files = load_parquet(self.data_path, cache_dir)
            else:
                raw = file_kinds.load_lines(self.data_path, cache_dir)
            self.rows = tokenise_rows(raw, tokenizer, max_length, image_tokens, variation)
        reasons = self.rows.data.column("reason")
        refused = {row: reasons[row].as_py() for row in pc.indices_nonzero(pc.not_equal(reasons, "")).to_pylist()}
        if not self.is_parquet:  # its pictures are numbered by name; a parquet's have numbers
            by_row = self.rows.data.column("pictures").combine_chunks()
            shown = by_row.values.dictionary_encode()
            self.picture_names, numbers = shown.dictionary, shown.indices.to_numpy()
            self._picture_lists = pa.ListArray.from_arrays(by_row.offsets, shown.indices)
            if len(numbers) and not self.images_path.is_dir():
                raise UsageError(f"{self.data_path} names pictures, but their folder is missing: {self.images_path}")
            # Missing pictures are not cached with the tokens: they come and go.
            names = tqdm(self.picture_names.to_pylist(), "looking for pictures", unit=" pictures", delay=BAR_DELAY)
            why = [file_kinds.why_missing(self.images_path, name) for name in names]
            missing = np.array(why, dtype=object)[numbers]
            rows = np.repeat(np.arange(len(self.rows)), pc.list_value_length(by_row).to_numpy())
            for place in np.flatnonzero(missing):
                refused.setdefault(int(rows[place]), missing[place])
        self.row_indices = np.delete(np.arange(len(self.rows)), list(refused))  # of each sample among all rows
        counts = Counter(refused.values())
        self.tool_rows, self.row_count = counts[TOOL_CALLS], len(self.rows) - counts[BLANK_LINE]
        bad = sorted(item for item in refused.items() if item[1] not in (BLANK_LINE, TOOL_CALLS))
        self.bad_rows = [BadRow(index + 1, reason) for index, reason in bad]

    def __len__(self) -> int:
        return len(self.row_indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        [sample] = self.__getitems__([index])
        if isinstance(sample, PictureError):
            raise sample
        return sample

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor] | PictureError]:
        """Returns samples for the collator: a PictureError in place of one with a broken image."""
        row_indices = self.row_indices[indices].tolist()
        samples = []
        for row_index, row in zip(row_indices, self.read_rows(row_indices), strict=True):
            sample, numbers = text_of(row), self.picture_lists[row_index].as_py()
            pictures = list(enumerate(numbers, start=1))
            if self.features is not None:
                encoded = [self.features.get(key) for key in self.picture_keys[numbers].tolist()]
                unencoded = torch.tensor([of_image is None for of_image in encoded], dtype=torch.bool)
                features = np.zeros((len(encoded), *self.features.shape), np.float16)
                for image, of_image in enumerate(encoded):
                    features[image] = 0 if of_image is None else of_image
                sample |= {"image_features": torch.from_numpy(features), "unencoded": unencoded}
                pictures = list(itertools.compress(pictures, unencoded))  # broken, or feature file lost since the start
            try:
                if pictures or self.features is None:
                    sample["pixel_values"] = []
                for place, number in pictures:
                    source, name = self.picture_source(number)
                    name = f"row {row['line']}, picture {place}" if self.is_parquet else name
                    sample["pixel_values"].append(load_picture(source, name, self.picture_format, self.leaves_small))
                samples.append(sample)
            except PictureError as error:
                samples.append(error)
        # Each sample's images become one tensor, at the tower's size unless all have the same size.
        with_pixels = [sample for sample in samples if isinstance(sample, dict) and "pixel_values" in sample]
        shapes = {image.shape for sample in with_pixels for image in sample["pixel_values"]}
        shape = shapes.pop() if len(shapes) == 1 else (3, self.picture_format.size, self.picture_format.size)
        for sample in with_pixels:
            images = sample["pixel_values"]
            if shapes:
                images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
                images = [torch.from_numpy(preprocess_image(image, self.picture_format)) for image in images]
            sample["pixel_values"] = torch.stack(images) if images else torch.zeros(0, *shape, dtype=torch.uint8)
        return samples

    def without_images(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns a sample's text without its images' placeholders."""
        is_text = torch.ones(len(sample["input_ids"]), dtype=torch.bool)
        for start in sample["image_starts"].tolist():
            is_text[start : start + self.image_tokens] = False
        texts = {name: sample[name][is_text] for name in ("input_ids", "labels")}
        return sample | texts | {"image_starts": sample["image_starts"][:0]}

    def bad_rows_limit(self, max_bad_rows: int | None) -> int:
        """Returns how many bad rows are tolerated: --max_bad_rows, else 1 % of all rows."""
        return self.row_count // 100 if max_bad_rows is None else max_bad_rows

    def column(self, name: str) -> np.ndarray:
        """Returns (rows,) a column's values, of all rows."""
        return self.rows.data.column(name).to_numpy()

    def read_rows(self, row_indices: list[int]) -> list[dict]:
        """Returns the tokenised rows (COLUMNS) at these indices among all rows."""
        return self.rows.with_format("arrow")[row_indices].to_pylist()

    def changed(self, **attributes) -> "VLMDataset":
        """Returns a copy with other attributes, such as the `row_indices` of some of the rows."""
        data = copy.copy(self)
        vars(data).update(attributes)
        return data

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each sample."""
        return pc.list_value_length(self.rows.data.column("input_ids")).to_numpy()[self.row_indices]

    @property
    def image_counts(self) -> np.ndarray:
        """(samples,) images of each sample."""
        return pc.list_value_length(self.rows.data.column("image_starts")).to_numpy()[self.row_indices]

    @property
    def image_count(self) -> int:
        return int(self.image_counts.sum())

    @property
    def summary(self) -> str:
        """The samples' line in a run's header."""
        learned, cut = (self.column(name)[self.row_indices] for name in ("learned_tokens", "cut_tokens"))
        cut = f"; {(cut > 0).sum():,} rows are cut at max_seq_len" if cut.any() else ""
        learned = f"{learned.sum():,} learned tokens, longest row {self.lengths.max()} tokens{cut}"
        return f"{len(self):,} rows, {len(np.unique(self.shown_pictures)):,} pictures, {learned}"

    @property
    def rules(self) -> dict[str, str]:
        """Number and treatment of rows, by special kind."""
        counts = Counter(pc.list_flatten(self.rows.data.column("kinds").take(pa.array(self.row_indices))).to_pylist())
        counts["tool calls"] = self.tool_rows
        rules = dict.fromkeys(counts, "read as conversations") | KINDS
        in_rows = {kind: f"in {count:,} row{'' if count == 1 else 's'}" for kind, count in counts.items() if count}
        return {kind: f"{in_rows[kind]}: {rule}" for kind, rule in rules.items() if kind in in_rows}

    @property
    def left_out(self) -> np.ndarray:
        """Indices of the rows that are not samples: bad rows, blank lines, held-out rows."""
        return np.delete(np.arange(len(self.rows)), self.row_indices)

    @functools.cached_property
    def content_sha256(self) -> str:
        """SHA-256 (hex) of the rows' tokens and their images' names or bytes; part of a resume file's fingerprint."""
        digest = hashlib.sha256()
        if self.is_parquet:
            digest.update(hashlib.sha256(self.image_files.data.column("hash").to_numpy()).hexdigest().encode())
        for name in ("input_ids", "learned", "image_starts", "picture_numbers" if self.is_parquet else "pictures"):
            column = self.rows.data.column(name)
            digest.update(pc.list_value_length(column).to_numpy().tobytes())
            for chunk in pc.list_flatten(column).chunks:
                is_text = pa.types.is_string(chunk.type)
                values = "".join(f"{name}\0" for name in chunk.to_pylist()).encode() if is_text else chunk.to_numpy()
                digest.update(values)
        return digest.hexdigest()

    @property
    def picture_lists(self) -> pa.ListArray | pa.ChunkedArray:
        """(rows,) the picture numbers of each row; duplicates (by name; in a parquet by bytes) share a number."""
        return self.rows.data.column("picture_numbers") if self.is_parquet else self._picture_lists

    @property
    def shown_pictures(self) -> np.ndarray:
        """(images of the samples,) the picture number of each."""
        return pc.list_flatten(self.picture_lists.take(pa.array(self.row_indices))).to_numpy()

    @property
    def first_pictures(self) -> np.ndarray:
        """(samples,) the picture number of each sample's first image; -1 for a sample without."""
        lists = self.picture_lists.take(pa.array(self.row_indices)).to_pylist()
        return np.array([numbers[0] if numbers else -1 for numbers in lists], dtype=np.int64)

    @functools.cached_property
    def picture_keys(self) -> np.ndarray:
        """(pictures,) int64 content hash of each picture that samples show; 0 for others and unreadable ones.

        Reads the files, once in a process: 100,000 of 20 kB take 5 to 10 seconds on two cores. Size and time stamp
        would be faster, but tools that copy and edit may preserve both.
        """
        shown = np.unique(self.shown_pictures)
        if self.is_parquet:
            return np.where(np.isin(np.arange(len(self.image_files)), shown), self.image_files.data["hash"], 0)

        def hash_of(number: int) -> int:
            try:
                return file_kinds.hash_63(self.picture_source(number)[0].read_bytes())
            except (OSError, MemoryError):
                return 0

        keys = np.zeros(len(self.picture_names), dtype=np.int64)
        with ThreadPool() as pool:
            hashes = pool.imap(hash_of, shown.tolist(), 64)
            keys[shown] = list(tqdm(hashes, "reading pictures", len(shown), unit=" pictures", delay=BAR_DELAY))
        return keys

    def picture_source(self, number: int) -> tuple[Path | bytes, str]:
        """Returns a picture's path or bytes, and its name in errors."""
        if self.is_parquet:
            return self.image_files[number]["content"], f"picture {number + 1}"
        name = self.picture_names[number].as_py()
        return self.images_path / name, name


def text_of(row: dict) -> dict[str, torch.Tensor]:
    """Returns the input_ids, labels and image_starts of a tokenised row."""
    input_ids = torch.tensor(row["input_ids"], dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for start, end in zip(row["learned"][::2], row["learned"][1::2], strict=True):
        labels[start:end] = input_ids[start:end]
    starts = torch.tensor(row["image_starts"], dtype=torch.int64)
    return {"input_ids": input_ids, "labels": labels, "image_starts": starts}


@dataclass
class VLMCollator:
    """Joins samples of any lengths and numbers of images into one batch."""

    pad_token_id: int = 0  # fills input_ids at the right; labels are filled with -100
    multiple: int = 1  # lengths are rounded up to a multiple of this

    def __call__(self, samples: list[dict[str, torch.Tensor] | PictureError]) -> dict:
        """Returns the batch.

        input_ids, labels (B, L); image_starts (all images, 2) sample and column; pixel_values or image_features (all
        images, ...) in reading order, or both, as `VLMDataset` says; learned_positions (N,) where labels.flatten() is
        learned; units: N, the divisor of the loss; samples: B; tokens: their number without padding;
        skipped: the PictureErrors of samples left out. If no sample is left, there are no image tensors.
        """
        skipped = [sample for sample in samples if isinstance(sample, PictureError)]
        samples = [sample for sample in samples if not isinstance(sample, PictureError)]
        starts = [(row, start) for row, sample in enumerate(samples) for start in sample["image_starts"].tolist()]
        batch = {"image_starts": torch.tensor(starts, dtype=torch.int64).view(-1, 2), "skipped": skipped}
        batch |= {"samples": len(samples), "tokens": sum(len(sample["input_ids"]) for sample in samples)}
        for name, filling in (("input_ids", self.pad_token_id), ("labels", -100)):
            sequences = [*(sample[name] for sample in samples), torch.zeros(0, dtype=torch.int64)]  # there may be none
            padded = pad_sequence(sequences, batch_first=True, padding_value=filling)[:-1]
            batch[name] = F.pad(padded, (0, -padded.shape[1] % self.multiple), value=filling)
        for name in ("pixel_values", "image_features", "unencoded"):
            if images := [sample[name] for sample in samples if name in sample]:
                batch[name] = torch.cat(images)
        learned_positions = (batch["labels"].flatten() != -100).nonzero()[:, 0]
        return batch | {"learned_positions": learned_positions, "units": len(learned_positions)}
