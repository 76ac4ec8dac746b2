"""Files written whole or not at all, and read without running code from them."""

import errno
import glob
import hashlib
import os
import pickle
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from common.errors import UsageError
from common.paths import display_path

TEMPORARY = ".tmp"
# What torch.load raises on files that are cut off, garbled, or no weight files at all (the fuzz tests show it).
LOADING_ERRORS = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError),
    *(AttributeError, struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]):
    """Calls `write(file)` on a temporary file beside `path`, flushes it to disk, then renames it to `path`.

    Raises:
        UsageError: If that fails (the disk is full); the file is then as it was before.
    """
    write_together({path: write})


def write_together(files: dict[Path, Callable[[BinaryIO], None]]):
    """Does what `write_atomically` does for several files: all are on disk before the first is renamed, in order.

    Raises:
        UsageError: If that fails; all files are then as they were before.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporaries[path], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
            flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save's own error names no cause
        if not isinstance(reason, OSError):
            raise
        raise UsageError(f"{display_path(path)} cannot be written: {reason.strerror or reason}") from error
    finally:
        for temporary in filter(Path.exists, temporaries.values()):
            temporary.unlink()


def flush_folder(folder: Path):
    """Syncs a folder, so that a renamed file is there after a power cut."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_temporaries(path: Path):
    """Removes what killed processes left of a file or folder half written: its temporaries whose process is gone."""
    for hidden in (f".{path.name}", path.name):
        for temporary in path.parent.glob(f"{glob.escape(hidden)}.*{TEMPORARY}"):
            number = temporary.name.removeprefix(f"{hidden}.").removesuffix(TEMPORARY)
            if number.isdecimal() and not is_alive(int(number)):
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Tells whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return process != os.getpid()


def lock(name: Path):
    """Locks a name on this machine for as long as this process lives; the system releases it, however that ends.

    The lock is a file in the system's temporary folder: not every folder knows locks, and none is left among the files.

    Returns:
        What holds the lock; None where the system knows no locks.

    Raises:
        BlockingIOError: If another process holds it; its number is the message.
    """
    if fcntl is None:
        return None
    digest = hashlib.sha256(str(name.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    try:
        file = open(Path(tempfile.gettempdir()) / f"minimind-v-{digest}.lock", "a+")  # noqa: SIM115 (it stays open)
    except OSError:  # another user's
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(holder or "unknown") from error
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def not_a_file(path: Path) -> str | None:
    """Says why a path cannot be read as a file: opening a pipe or a device waits for ever. None for a regular file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return "no such file" if is_missing else getattr(error, "strerror", None) or str(error)
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    kind = next((kind for kind, is_kind in kinds.items() if is_kind(mode)), "a device")
    return None if stat.S_ISREG(mode) else f"it is {kind}, not a file"


def check_checksums(path: Path):
    """Raises BadZipFile unless a file's checksums are right, which torch.load does not check."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # of a torch before 1.6, whose files hold no checksums
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("it is damaged, most likely cut off")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"it is damaged: {damaged} in it does not fit its checksum")


def load_file(path: Path) -> dict:
    """Loads a file of torch.save without running code from it.

    Raises:
        UsageError: If the file is cut off, garbled, or holds more than tensors and plain values.
    """
    try:
        if reason := not_a_file(path):
            raise ValueError(reason)
        check_checksums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = "it holds something else than tensors, which could run code when loaded"
        raise UsageError(
            f"{display_path(path)} cannot be read: {reason}. Delete it, and copy or train it again."
        ) from error


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256 (hex) of named tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
