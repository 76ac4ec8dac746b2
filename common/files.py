"""Files written whole or not at all, and read without running code from them."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock

from common.errors import UsageError, first_line
from common.paths import display_path, printable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types that weights may have
# A scratch folder's name, the file that says this program made it, and the lock held while its process lives.
SCRATCH, TEMPORARY, MARK, MARKED, ALIVE = ".minimind-v-", ".tmp", "mark", b"a temporary folder of MiniMind-V\n", "lock"
REPLACED = "replaced"
RECORD = "complete.json"  # in a folder that was written as a whole: by what, and every file with its hash
# What torch.load raises on files that are cut off, garbled, or no weight files at all (the fuzz tests show it).
LOADING_ERRORS = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError),
    *(AttributeError, struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]):
    """Replaces a file by what `write(file)` writes; raises UsageError if that fails, and leaves it as it was."""
    write_together({path: write})


def write_together(files: dict[Path, Callable[[BinaryIO], None]], then: Callable[[], object] = lambda: None):
    """Replaces files of one folder: writes all to disk, calls `then`, and renames them in order; raises UsageError."""
    path = next(iter(files))
    try:
        with scratch_folder(path.parent) as scratch:
            for path, write in files.items():
                with open(scratch / path.name, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            then()
            for path in files:
                os.replace(scratch / path.name, path)
                flush(path.parent)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save's own error names no cause
        if not isinstance(reason, OSError):
            raise
        raise UsageError(f"{display_path(path)} cannot be written: {reason.strerror or reason}") from error


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yields an empty folder in `parent`, on the same disk; removes it at the end, and those of killed processes."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    own = Path(tempfile.mkdtemp(TEMPORARY, SCRATCH, parent))
    alive = FileLock(own / ALIVE)
    try:
        with contextlib.suppress(OSError, NotImplementedError):  # some network disks know no locks
            alive.acquire()
        work = own / "work"
        work.mkdir()
        (own / MARK).write_bytes(MARKED)  # from now on others may remove it once the lock is free
        yield work
    finally:
        alive.release()
        discard(own)


def remove_leftovers(parent: Path):
    """Removes the scratch folders that killed processes left in `parent`."""
    for alive in parent.glob(f"{SCRATCH}*{TEMPORARY}/{ALIVE}"):
        mark = alive.with_name(MARK)
        with contextlib.suppress(OSError, NotImplementedError):  # Timeout, an OSError: its process lives
            if mark.is_file() and mark.read_bytes() == MARKED and not mark.parent.is_symlink():
                with FileLock(alive).acquire(timeout=0):
                    pass  # it is free: the process has ended
                discard(mark.parent)


def discard(scratch: Path):
    """Removes a scratch folder; a folder that was to be replaced gets its place back where nothing has taken it."""
    for former in (scratch / "work" / REPLACED).glob("*"):
        if not os.path.lexists(scratch.parent / former.name):
            former.rename(scratch.parent / former.name)
    shutil.rmtree(scratch / "work", ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)  # the mark last


@contextlib.contextmanager
def whole_folder(folder: Path, made_by: dict[str, str], overwrite: bool = True, flag: str = "") -> Iterator[Path]:
    """Yields a folder to write to, which becomes `folder` at the end; if anything fails, the old one stays.

    An old one is replaced if `overwrite`, and only if its record shows that the same program wrote everything in it:
    `made_by` says what writes it, by a key that no other program has. `flag` is for messages. Raises UsageError.
    """
    folder = Path(os.path.realpath(folder))
    try:
        refuse_to_lose(folder, made_by, overwrite, flag)
        with scratch_folder(folder.parent) as scratch:
            new, former = scratch / "new", scratch / REPLACED / folder.name
            new.mkdir()
            yield new
            hashes = {name: hash_of(path) for name, path in entries(new)}
            (new / RECORD).write_text(json.dumps(made_by | {"files": hashes}, indent=0) + "\n", encoding="utf-8")
            refuse_to_lose(folder, made_by, overwrite, flag)
            if hash_of(folder / RECORD) == hash_of(new / RECORD) and all((folder / name).exists() for name in hashes):
                return  # another process wrote the same meanwhile
            if os.path.lexists(folder):
                former.parent.mkdir()
                folder.rename(former)
            new.rename(folder)
    except OSError as error:
        raise UsageError(f"{display_path(folder)} cannot be written: {error.strerror or error}") from error


def refuse_to_lose(folder: Path, made_by: dict, overwrite: bool, flag: str):
    """Raises UsageError if a folder exists and may not be replaced."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UsageError(f"{display_path(folder)} is not a folder{f': name another with {flag}' if flag else ''}")
    if not overwrite:
        raise UsageError(f"{display_path(folder)} is there already: --overwrite replaces it, {flag} names another")
    record = read_record(folder)
    hashes = record.get("files") if made_by.keys() <= record.keys() else None
    for name, path in entries(folder):
        if not isinstance(hashes, dict) or name not in hashes or hashes[name] != hash_of(path):
            raise UsageError(
                f"{display_path(folder)} is not replaced: it holds {printable(name)}, which this program did not write "
                f"(or it was changed). Move that away{f', or name another folder with {flag}' if flag else ''}"
            )


def read_record(folder: Path) -> dict:
    """Returns the record of how a folder was written; {} where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if (folder / RECORD).is_file() and isinstance(record := json.loads((folder / RECORD).read_bytes()), dict):
            return record
    return {}


def entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields relative name and path of each file and link in a folder, but of its record; raises OSError."""
    for parent, folders, files in os.walk(folder, onerror=fail):
        for path in (Path(parent, name) for name in sorted(folders + files)):
            name = path.relative_to(folder).as_posix()
            if name != RECORD and (path.is_symlink() or not path.is_dir()):
                yield name, path


def fail(error: OSError):
    raise error


def hash_of(path: Path) -> str:
    """Returns a file's SHA-256 (hex); "" for anything else."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path):
    """Syncs a file, or a folder so that what was renamed in it is there after a power cut."""
    if os.name == "posix":
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def lock_of(name: Path) -> FileLock:
    """Returns this machine's lock of a path; the system releases it when the process that holds it ends."""
    # Its file lies in the system's temporary folder: not every disk knows locks, and the user's folders stay clean.
    user = getattr(os, "getuid", int)()  # a lock file of another user cannot be opened
    digest = hashlib.sha256(os.fsencode(name.resolve())).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"minimind-v-{user}-{digest}.lock")


def not_a_file(path: Path) -> str | None:
    """Says why a path cannot be read as a file: opening a pipe or a device waits for ever. None for a regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"


def load_file(path: Path) -> dict:
    """Loads a file of torch.save, running no code from it; raises UsageError if it is damaged, or more than tensors."""
    try:
        if reason := not_a_file(path):
            raise ValueError(reason)
        if zipfile.is_zipfile(path):  # torch.load does not check the checksums in it
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"it is damaged: {damaged} in it does not fit its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        reason, cure = first_line(error), ". Delete it, and copy or train it again."
        if isinstance(error, OSError):  # the file may be in order
            reason, cure = error.strerror or error, ""
        elif isinstance(error, EOFError) or "PytorchStreamReader" in reason:
            reason = "it is cut off"
        elif isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = "it holds something else than tensors, which could run code when loaded"
        raise UsageError(f"{display_path(path)} cannot be read: {reason}{cure}") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Loads a state dict; raises UsageError if the file is unreadable or holds something else."""
    tensors, why = load_file(path), "a plain dict of tensors is expected"
    if isinstance(tensors, dict):
        if all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()):
            return tensors
        if "learned" in tensors:
            why = "it is the state of a run, whose weights are in the .pth beside it"
    raise UsageError(f"{display_path(path)} is no weight file: {why}")


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256 (hex) of named tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
