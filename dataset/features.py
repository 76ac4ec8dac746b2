"""The frozen tower's features of every picture, computed once before the first step and kept, a file for each picture.

A file is named by the picture's content: pictures that change are encoded, the others are not, whatever files or data
sets they are in. No file is ever written to again: each is renamed when it is complete, so runs and ranks may share a
folder. Its checksum is compared whenever it is read; damaged or cut off, it counts as missing and is made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from xxhash import xxh3_128

from common.errors import UsageError
from common.files import TEMPORARY
from dataset.formats import hash_63
from dataset.lm_dataset import VLMDataset
from dataset.pictures import PictureError, decoding, load_picture
from dataset.workers import load_in_workers

VERSION = 1  # part of the checksum: raise it when the same picture must give other features
CHECKSUM_BYTES = 16
ABANDONED_SECONDS = 3600  # writing a file takes milliseconds, so one that is older was left by a killed process


class FeatureCacheError(UsageError):
    """The features cannot be kept."""


class FeatureFolder:
    """Features by a picture's content (`VLMDataset.picture_keys`).

    Each file holds a checksum of all that it is for and holds, and float16 (patches, width): 301 kB at CLIP's width of
    768. They are read, not mapped: a mapped file that another process cuts off would end this one without a word.

    Args:
        folder: Where such folders lie.
        made_by: A hash of what makes the features; its beginning is the folder's name.
        shape: (patches, width).
    """

    def __init__(self, folder: Path, made_by: str, shape: tuple[int, int]):
        self.path, self.made_by, self.shape = Path(folder) / made_by[:12], made_by, shape
        self.file_bytes = CHECKSUM_BYTES + 2 * shape[0] * shape[1]

    def make_room(self, keys: np.ndarray) -> int:
        """Makes the folder, and returns the bytes that the features of these pictures will still take in it.

        Raises:
            FeatureCacheError: If it cannot be written to, or its disk has no room for them.
        """
        needed = self.file_bytes * sum(not os.path.isfile(self._file(key)) for key in {*keys.tolist()} - {0})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                for path in self.path.glob(f"*{TEMPORARY}"):
                    if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                        path.unlink()
            self._write(self.path / "writable", b"")
            (self.path / "writable").unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise self._error(error) from error
        if free < needed:
            raise FeatureCacheError(
                f"the features of the pictures take {needed / 1e9:.1f} GB more, and {self.path} has {free / 1e9:.1f} "
                "GB free: name another folder with --cache_vision, or say --cache_vision off"
            )
        return needed

    def get(self, key: int) -> np.ndarray | None:
        """Returns (patches, width) float16 of a picture, or None where they are missing or damaged."""
        try:
            content = np.fromfile(self._file(key), np.uint8, self.file_bytes)
        except OSError:
            return None
        features = content[CHECKSUM_BYTES:]
        if content[:CHECKSUM_BYTES].tobytes() != self._checksum(key, features):
            return None
        return features.view(np.float16).reshape(self.shape)

    def write(self, key: int, features: np.ndarray):
        """Writes a picture's features: float16 (patches, width).

        Raises:
            FeatureCacheError: If that fails (the disk is full).
        """
        path = self._file(key)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._write(path, self._checksum(key, features) + features.tobytes())
        except OSError as error:
            raise self._error(error) from error

    def _file(self, key: int) -> str:
        digits = f"{key:016x}"
        return f"{self.path}/{digits[:2]}/{digits[2:]}.features"

    def _checksum(self, key: int, features: np.ndarray) -> bytes:
        digest = xxh3_128(f"{VERSION} {self.made_by} {self.shape} {key}".encode())
        digest.update(np.ascontiguousarray(features))
        return digest.digest()

    def _write(self, path: str | Path, content: bytes):
        temporary = self.path / f"{uuid.uuid4().hex}{TEMPORARY}"  # no process of any machine has this name
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> FeatureCacheError:
        return FeatureCacheError(
            f"the tower's features cannot be kept in {self.path}: {error.strerror or error}. Name another folder with "
            "--cache_vision, or say --cache_vision off"
        )


def compute_features(
    data: VLMDataset,
    folder: FeatureFolder,
    encode_images: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    num_workers: int,
    rank: int = 0,
    ranks: int = 1,
):
    """Fills this rank's share of what `folder` lacks for the samples of `data`; a run that was interrupted continues.

    What is there is read, to compare its checksums: 5,000 pictures, 0.25 GB, take 0.4 seconds.

    A picture in several rows is encoded once, and so is one that several files hold. Off CUDA each is encoded by
    itself: pictures encoded together change each other's last bits, and the features shall not depend on how the work
    was divided. There, threads encode a picture each, which wastes less than all threads on one picture.

    Args:
        encode_images: (images, 3, size, size) uint8 on `device` to (images, patches, width).

    Raises:
        FeatureCacheError: If they cannot be written.
    """
    keys, first = np.unique(data.picture_keys, return_index=True)
    numbers = np.sort(first[keys != 0])[rank::ranks]  # of all, not of what is missing: other ranks are changing that
    numbers = [number for number in numbers.tolist() if folder.get(data.picture_keys[number]) is None]
    if len(numbers) == 0:
        return
    loaded = load_in_workers(Images(data, numbers), num_workers, batch_size=64, collate_fn=list, prefetch_factor=8)
    name = "encoding images, once" + (f" (1 of {ranks} processes)" if ranks > 1 else "")
    every, is_cuda = 0.2 if sys.stderr.isatty() else 30.0, device.type == "cuda"
    with (
        tqdm(desc=name, total=len(numbers), unit="image", disable=rank > 0, mininterval=every) as bar,
        a_thread_each() as pool,
    ):
        for images in loaded:  # of (content's hash, pixels or None)
            pixels = [of_image for _, of_image in images if of_image is not None]
            groups = torch.stack(pixels).split(len(pixels) if is_cuda else 1) if pixels else ()
            encoded = (map if is_cuda else pool.map)(lambda group: encode_images(group.to(device)), groups)
            features = (of_image for group in encoded for of_image in group)
            for key, of_image in images:
                if of_image is not None:
                    folder.write(key, next(features).to("cpu", torch.float16).numpy())
                bar.update()


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


class Images(Dataset):
    """The images of these numbers, decoded: (hash of the content, pixels), pixels None where one cannot be read."""

    def __init__(self, data: VLMDataset, numbers: list[int]):
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None]:
        source, name = self.data.picture_source(self.numbers[index])
        try:
            with decoding(name):
                content = source if isinstance(source, bytes) else source.read_bytes()
            return hash_63(content), load_picture(content, name, self.data.picture_format)
        except PictureError:
            return 0, None


def tower_sha256(tower: torch.nn.Module) -> str:
    """Returns the SHA-256 (hex) of a tower's tensors and configuration."""
    digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted([*tower.state_dict().items(), *tower.named_buffers()]):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
