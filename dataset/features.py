"""The frozen tower's features on disk, so that a picture is encoded once and not once an epoch.

One memory-mapped file a data set and tower: a header that says what it was made with, each row's first slot, an index
(the picture's hash and a checksum of its features), and the features in float16: 301 kB a picture at CLIP's width 768.
"""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from common.errors import UsageError
from dataset.chat import TOKENS_PER_IMAGE

HEADER_BYTES = 4096
INDEX_ENTRY = np.dtype([("picture", "V16"), ("checksum", "<u4")])
PREPROCESSING = (
    "upright, rgb on white, shortest edge to 224 bicubic, centre crop 224; last hidden state, no class token"
)


class FeatureCacheError(UsageError):
    """The cache cannot be made or belongs to something else."""


def picture_digest(file: bytes) -> bytes:
    """16 bytes that stand for a picture's file."""
    return hashlib.blake2b(file, digest_size=16).digest()


def cache_bytes(rows: int, pictures: int, width: int) -> int:
    """Size of a cache file, in bytes."""
    return HEADER_BYTES + 8 * rows + pictures * (INDEX_ENTRY.itemsize + TOKENS_PER_IMAGE * width * 2)


class FeatureCache:
    """Features by slot (a picture's number in its data set), valid only for the picture they were made of.

    Several processes may read and write at the same time: a slot's features are written before its index entry, and an
    entry whose checksum does not fit its features counts as empty.

    Args:
        folder: Where cache files lie.
        data_fingerprint, tower_sha256: What the file is for; both are in its name and header.
        image_counts: (rows,) pictures of each row of the data file.
        width: Of the tower's features.

    Raises:
        FeatureCacheError: If the disk has no room for the whole file, or the file is another's.
    """

    def __init__(self, folder: Path, data_fingerprint: str, tower_sha256: str, image_counts: np.ndarray, width: int):
        self.path = Path(folder) / f"{data_fingerprint[:12]}-{tower_sha256[:12]}.features"
        self.rows, self.pictures, self.width = len(image_counts), int(image_counts.sum()), width
        self.size = cache_bytes(self.rows, self.pictures, width)
        header = {
            "preprocessing": PREPROCESSING,
            "tower_sha256": tower_sha256,
            "data_fingerprint": data_fingerprint,
            "pictures": self.pictures,
            "width": width,
        }
        try:
            if not self.path.is_file() or self.path.stat().st_size != self.size:
                self._create(header, image_counts)
            with open(self.path, "rb") as file:
                found = file.read(HEADER_BYTES).rstrip(b"\0")
            self._map()
        except OSError as error:
            raise FeatureCacheError(f"{self.path}: {error.strerror or error}") from error
        if found != json.dumps(header).encode():
            raise FeatureCacheError(f"{self.path} was made with something else; delete it, and it is made anew")

    def _create(self, header: dict, image_counts: np.ndarray):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.size:
            raise FeatureCacheError(
                f"the features of {self.pictures:,} pictures take {self.size / 1e9:.1f} GB, and {self.path.parent} has "
                f"{free / 1e9:.1f} GB free: name another folder with --cache_vision, or say --cache_vision off"
            )
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(json.dumps(header).encode().ljust(HEADER_BYTES, b"\0"))
                first_slots = np.cumsum(image_counts, dtype=np.int64) - image_counts
                file.write(first_slots.astype("<i8").tobytes())
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.size)  # so that the disk cannot fill up under the run
                else:
                    file.truncate(self.size)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _map(self):
        offset = HEADER_BYTES
        self.first_slots = np.memmap(self.path, "<i8", "r", offset, (self.rows,))
        offset += 8 * self.rows
        self.index = np.memmap(self.path, INDEX_ENTRY, "r+", offset, (self.pictures,))
        offset += self.pictures * INDEX_ENTRY.itemsize
        self.features = np.memmap(self.path, np.float16, "r+", offset, (self.pictures, TOKENS_PER_IMAGE, self.width))

    def __getstate__(self):
        # A loader's worker maps the file itself.
        return {name: value for name, value in vars(self).items() if name not in ("first_slots", "index", "features")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._map()

    def get(self, slot: int, digest: bytes) -> torch.Tensor | None:
        """(196, width) float16, or None where the slot is empty or of another picture."""
        entry = self.index[slot]
        if entry["picture"].tobytes() != digest:
            return None
        features = np.array(self.features[slot])
        return torch.from_numpy(features) if zlib.crc32(features) == entry["checksum"] else None

    def put(self, slot: int, digest: bytes, features: torch.Tensor):
        """Keeps (196, width) float16 on the CPU."""
        array = features.contiguous().numpy()
        self.features[slot] = array
        self.index[slot] = (np.void(digest), zlib.crc32(array))


def tower_sha256(tower: torch.nn.Module) -> str:
    """SHA-256 (hex) of a tower's tensors and configuration."""
    digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted([*tower.state_dict().items(), *tower.named_buffers()]):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
