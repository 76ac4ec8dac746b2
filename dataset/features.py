"""Caches the frozen tower's features, computed once before the first step, in one file per picture.

A file is named by a hash of the picture's content, so only new or changed pictures are encoded, whatever data set they
are in. It is renamed when complete, so runs and ranks may share a folder; with a wrong checksum it counts as missing.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from xxhash import xxh3_128

from common.errors import UsageError
from common.files import scratch_folder
from dataset.file_kinds import hash_63
from dataset.lm_dataset import VLMDataset
from dataset.pictures import PictureError, load_picture

VERSION = 1  # part of the checksum: raise it when the same picture must give other features
CHECKSUM_BYTES = 16
BATCH = 64  # pictures that are decoded and written together, and on CUDA encoded


class FeatureFolder:
    """Features by a picture's content (`VLMDataset.picture_keys`): files of a checksum and float16 (patches, width).

    They are read, not mapped: a mapped file that another process truncates would crash this one. `made_by` is a hash of
    tower, dtype and picture format; its first 12 digits name the folder. `shape` is (patches, width).
    """

    def __init__(self, folder: Path, made_by: str, shape: tuple[int, int]):
        self.path, self.made_by, self.shape = Path(folder) / made_by[:12], made_by, shape
        self.file_bytes = CHECKSUM_BYTES + 2 * shape[0] * shape[1]  # 301 kB for CLIP

    def _file(self, key: int) -> Path:
        digits = f"{key:016x}"
        return self.path / digits[:2] / f"{digits[2:]}.features"

    def _checksum(self, key: int, features: np.ndarray) -> bytes:
        digest = xxh3_128(f"{VERSION} {self.made_by} {self.shape} {key}".encode())
        digest.update(features)
        return digest.digest()

    @contextlib.contextmanager
    def _scratch_folder(self) -> Iterator[Path]:
        try:
            with scratch_folder(self.path) as scratch:
                yield scratch
        except OSError as error:
            what = f"the tower's features cannot be kept in {self.path}: {error.strerror or error}"
            raise UsageError(f"{what}. Name another folder with --cache_vision, or say --cache_vision off") from error

    def make_room(self, keys: np.ndarray) -> int:
        """Makes the folder; returns the bytes that missing features need; UsageError if they cannot be kept."""
        needed = self.file_bytes * sum(not self._file(key).is_file() for key in {*keys.tolist()} - {0})
        with self._scratch_folder():
            if (free := shutil.disk_usage(self.path).free) < needed:
                raise OSError(f"they take {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free")
        return needed

    def get(self, key: int) -> np.ndarray | None:
        """Returns (patches, width) float16 of a picture, or None where they are missing or damaged."""
        try:
            content = np.fromfile(self._file(key), np.uint8, self.file_bytes)
        except OSError:
            return None
        checksum, features = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        is_whole = checksum.tobytes() == self._checksum(key, features)
        return features.view(np.float16).reshape(self.shape) if is_whole else None

    def write(self, features: dict[int, np.ndarray]):
        """Writes pictures' features, float16 (patches, width), by key; raises UsageError (the disk is full)."""
        with self._scratch_folder() as scratch:
            for key, of_image in features.items():
                path, new = self._file(key), scratch / f"{key}"
                new.write_bytes(self._checksum(key, of_image) + of_image.tobytes())
                path.parent.mkdir(exist_ok=True)
                os.replace(new, path)


def compute_features(
    data: VLMDataset, folder: FeatureFolder, encode_images: Callable, device: torch.device, rank=0, ranks=1
):
    """Computes this rank's share of the features that `folder` lacks; raises UsageError if it cannot be written.

    `encode_images` takes (images, 3, size, size) uint8 on `device` to (images, patches, width).
    """

    def read(number: int) -> tuple[int, torch.Tensor] | None:
        source, name = data.picture_source(number)
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
            return hash_63(content), load_picture(content, name, data.picture_format)
        except (OSError, MemoryError, PictureError):
            return None

    keys, first = np.unique(data.picture_keys, return_index=True)
    numbers = np.sort(first[keys != 0])[rank::ranks]  # a share of all: other ranks change which are missing
    numbers = [number for number in numbers.tolist() if folder.get(data.picture_keys[number]) is None]
    if not numbers:
        return
    name = "encoding images, once" + (f" (1 of {ranks} processes)" if ranks > 1 else "")
    every, is_cuda = 0.2 if sys.stderr.isatty() else 30.0, device.type == "cuda"
    # As many pictures at a time as torch has threads, each on one of them, which wastes less.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        with tqdm(desc=name, total=len(numbers), unit="image", disable=rank > 0, mininterval=every) as bar:
            for start in range(0, len(numbers), BATCH):
                part = numbers[start : start + BATCH]
                images = dict(image for image in pool.map(read, part) if image is not None)
                if images:
                    # Pictures encoded together change each other's last bits, so off CUDA each is encoded by itself.
                    groups = torch.stack([*images.values()]).split(len(images) if is_cuda else 1)
                    encoded = (map if is_cuda else pool.map)(lambda group: encode_images(group.to(device)), groups)
                    features = torch.cat([*encoded]).to("cpu", torch.float16).numpy()
                    folder.write(dict(zip(images, features, strict=True)))
                bar.update(len(part))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run does not wait for what has not begun
        torch.set_num_threads(threads)


def tower_key(tower: torch.nn.Module) -> str:
    """Returns the SHA-256 (hex) of a tower's tensors and configuration."""
    digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted([*tower.state_dict().items(), *tower.named_buffers()]):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
