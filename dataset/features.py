"""The frozen tower's features of every picture, computed once before the first step and kept in a memory-mapped file.

The file holds a header that says what it was made from, an index with one entry per picture, however many rows show it
(size and modification time of its file, a hash of its content, and whether it could be read), and the features in
float16: 301 kB a picture at CLIP's width of 768.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import UsageError
from common.files import remove_temporaries
from dataset.formats import hash_63
from dataset.lm_dataset import VLMDataset
from dataset.pictures import PictureError, decoding, load_picture
from dataset.workers import load_in_workers

HEADER_BYTES = 4096
INDEX_ENTRY = np.dtype([("size", "<i8"), ("modified", "<i8"), ("content", "<i8"), ("state", "u1")])
MISSING, PRESENT, UNREADABLE = 0, 1, 2
IMAGES_PER_FLUSH = 256


class FeatureCacheError(UsageError):
    """The file of features cannot be made, or belongs to something else."""


class FeatureFile:
    """Features by a picture's number (`VLMDataset.picture_numbers`).

    Args:
        folder: Where such files lie.
        data_sha256, tower_sha256: What the file is for; both are in its name and header.
        shape: (pictures, patches, width).

    Raises:
        FeatureCacheError: If the disk has no room for the whole file, or the file is for something else.
    """

    def __init__(self, folder: Path, data_sha256: str, tower_sha256: str, shape: tuple[int, int, int]):
        self.path = Path(folder) / f"{data_sha256[:12]}-{tower_sha256[:12]}.features"
        self.shape, self.size = shape, file_bytes(shape)
        header = json.dumps({"version": 3, "data": data_sha256, "tower": tower_sha256, "shape": shape}).encode()
        try:
            if not self.path.is_file() or self.path.stat().st_size != self.size:
                self._create(header)
            with open(self.path, "rb") as file:
                found = file.read(HEADER_BYTES).rstrip(b"\0")
            self._map()
        except OSError as error:
            raise FeatureCacheError(f"{self.path}: {error.strerror or error}") from error
        if found != header:
            raise FeatureCacheError(f"{self.path} was made from something else; delete it to have it made anew")

    def _create(self, header: bytes):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.size:
            raise FeatureCacheError(
                f"the features of {self.shape[0]:,} pictures take {self.size / 1e9:.1f} GB, and {self.path.parent} has "
                f"{free / 1e9:.1f} GB free: name another folder with --cache_vision, or say --cache_vision off"
            )
        remove_temporaries(self.path)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(header.ljust(HEADER_BYTES, b"\0"))
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.size)  # a disk that fills up later would crash the run
                else:
                    file.truncate(self.size)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _map(self):
        pictures = self.shape[0]
        self.index = np.memmap(self.path, INDEX_ENTRY, "r+", HEADER_BYTES, (pictures,))
        offset = HEADER_BYTES + pictures * INDEX_ENTRY.itemsize
        self.features = np.memmap(self.path, np.float16, "r+", offset, self.shape)

    def __getstate__(self):
        return {"path": self.path, "shape": self.shape, "size": self.size}  # each worker maps the file itself

    def __setstate__(self, state):
        vars(self).update(state)
        self._map()

    def is_current(self, numbers: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Tells which pictures' features are those that their files, by (size, modification time), would give again."""
        entries = self.index[numbers]
        same = (entries["size"] == stamps[:, 0]) & (entries["modified"] == stamps[:, 1])
        return same & (entries["state"] != MISSING)

    def by_content(self, but: np.ndarray) -> dict[int, int]:
        """Returns a number for each content whose features are there, by its hash, without those that are to change."""
        present = np.setdiff1d(np.flatnonzero(self.index["state"] == PRESENT), but)
        return dict(zip(self.index["content"][present].tolist(), present.tolist(), strict=True))

    def write(self, batch: Iterable[tuple[int, tuple[int, int], int, np.ndarray | None]]):
        """Writes (number, stamp, content's hash, features or None for an unreadable picture).

        The index comes last, so no entry is half true.
        """
        batch = list(batch)
        for number, _, _, features in batch:
            if features is not None:
                self.features[number] = features
        self.features.flush()
        for number, stamp, content, features in batch:
            self.index[number] = (*stamp, content, UNREADABLE if features is None else PRESENT)
        self.index.flush()

    def get(self, number: int) -> np.ndarray | None:
        """Returns a copy of (patches, width) float16, or None where the picture was unreadable."""
        return np.array(self.features[number]) if self.index[number]["state"] == PRESENT else None


def file_bytes(shape: tuple[int, int, int]) -> int:
    """Returns the size of a file of features."""
    pictures, patches, width = shape
    return HEADER_BYTES + pictures * (INDEX_ENTRY.itemsize + patches * width * 2)


def compute_features(
    data: VLMDataset,
    file: FeatureFile,
    encode_images: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    num_workers: int,
    rank: int = 0,
    ranks: int = 1,
):
    """Fills this rank's share of what `file` lacks for the samples of `data`; a run that was interrupted continues.

    A picture in several rows is encoded once, and so is one that several files hold. Off CUDA each is encoded by
    itself: pictures encoded together change each other's last bits, and the features shall not depend on how the work
    was divided. There, threads encode a picture each, which wastes less than all threads on one picture.

    Args:
        encode_images: (images, 3, size, size) uint8 on `device` to (images, patches, width).
    """
    slots = image_slots(data)
    numbers, first = np.unique(data.picture_numbers[slots], return_index=True)
    slots = slots[first]  # where each picture is shown first
    stamps = picture_stamps(data, slots)
    missing = ~file.is_current(numbers, stamps)
    known = file.by_content(numbers[missing])  # by a content's hash: its number, or features not written yet
    share = np.zeros_like(missing)
    share[rank::ranks] = True  # of all, not of what is missing: that changes while other ranks write
    numbers, slots, stamps = (values[share & missing] for values in (numbers, slots, stamps))
    if len(numbers) == 0:
        return
    loaded = load_in_workers(Images(data, slots), num_workers, batch_size=64, collate_fn=list, prefetch_factor=8)
    name = "encoding images, once" + (f" (1 of {ranks} processes)" if ranks > 1 else "")
    every = 0.2 if sys.stderr.isatty() else 30.0
    entries = zip(numbers.tolist(), map(tuple, stamps.tolist()), strict=True)
    done, is_cuda = [], device.type == "cuda"
    with (
        tqdm(desc=name, total=len(slots), unit="image", disable=rank > 0, mininterval=every) as bar,
        a_thread_each() as pool,
    ):
        for images in loaded:  # of (content's hash, pixels or None)
            new = list({content: pixels for content, pixels in images if content not in known}.values())
            new = [pixels for pixels in new if pixels is not None]
            groups = torch.stack(new).split(len(new) if is_cuda else 1) if new else ()
            encoded = (map if is_cuda else pool.map)(lambda group: encode_images(group.to(device)), groups)
            features = (of_image for group in encoded for of_image in group)
            for content, pixels in images:
                if pixels is not None and content not in known:
                    known[content] = next(features).to("cpu", torch.float16).numpy()
                kept = None if pixels is None else known[content]
                done.append((*next(entries), content, file.get(kept) if isinstance(kept, int) else kept))
                bar.update()
                if len(done) == IMAGES_PER_FLUSH:
                    write_known(file, done, known)
        write_known(file, done, known)


@contextlib.contextmanager
def a_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Yields as many threads as torch would use for one operation, each of which computes alone meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run does not wait for what has not begun
        torch.set_num_threads(threads)


def write_known(file: FeatureFile, done: list, known: dict):
    """Writes what is done, and lets go of its features."""
    file.write(done)
    known.update({content: number for number, _, content, features in done if features is not None})
    done.clear()


class Images(Dataset):
    """The images of these slots, decoded: (hash of the content, pixels), pixels None where one cannot be read."""

    def __init__(self, data: VLMDataset, slots: np.ndarray):
        self.data, self.slots = data, slots

    def __len__(self) -> int:
        return len(self.slots)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, torch.Tensor | None]]:
        data, slots = self.data, self.slots[indices]
        positions = (np.searchsorted(data.first_slots, slots, side="right") - 1).tolist()
        images = []
        for slot, position, row in zip(slots.tolist(), positions, data.read_rows(positions), strict=True):
            source, name = data.picture_sources(row)[slot - data.first_slots[position]]
            content = 0
            try:
                with decoding(name):
                    file = source if isinstance(source, bytes) else source.read_bytes()
                content = hash_63(file)
                images.append((content, load_picture(file, name, data.picture_format)))
            except PictureError:
                images.append((content, None))
        return images


def image_slots(data: VLMDataset) -> np.ndarray:
    """Returns the numbers of the samples' images among the images of all rows, ascending."""
    first, counts = data.first_slots[data.positions], data.image_counts
    return np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def picture_stamps(data: VLMDataset, slots: np.ndarray) -> np.ndarray:
    """Returns (slots, 2): size and modification time (ns) of each image's file; zeros in a parquet.

    A parquet's features are kept by what its pictures hold, so they need no stamp.
    """
    if data.is_parquet:
        return np.zeros((len(slots), 2), dtype=np.int64)
    names = pc.list_flatten(data.rows.data.column("pictures")).take(pa.array(slots)).to_pylist()
    return np.array([file_stamp(data.images_path / name) for name in names], dtype=np.int64).reshape(-1, 2)


def file_stamp(path: Path) -> tuple[int, int]:
    """Returns a file's size and modification time (ns); zeros for a missing one."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def tower_sha256(tower: torch.nn.Module) -> str:
    """Returns the SHA-256 (hex) of a tower's tensors and configuration."""
    digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted([*tower.state_dict().items(), *tower.named_buffers()]):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
