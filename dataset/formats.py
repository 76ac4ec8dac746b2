"""Opens jsonl files; checks data files and explains what is wrong with them."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
from xxhash import xxh3_128

from common.errors import UsageError
from common.files import not_a_file
from common.paths import printable
from dataset import foreign


class DataError(UsageError):
    """A data file that is missing, unreadable, or has too many bad rows."""


def load_lines(data_path: Path, cache_dir=None) -> datasets.Dataset:
    """Returns the lines of a jsonl, memory-mapped, as `text`; raises DataError, or an error that `reading` explains."""
    check_file(data_path)
    # utf-8-sig: some editors on Windows begin a file with a byte order mark.
    how = {"encoding": "utf-8-sig", "encoding_errors": "replace", "split": "train", "cache_dir": cache_dir}
    files = glob.escape(str(data_path.resolve()))  # the library would take a folder named [a] for a pattern
    key = content_key(data_path)
    with without_bars():  # "Generating train split" means nothing to the user
        lines = datasets.load_dataset("text", data_files=files, name=key, **how)
    if content_key(data_path) != key:
        shutil.rmtree(Path(lines.cache_files[0]["filename"]).parent, ignore_errors=True)
        raise changed_error(data_path)
    if len(lines) == 0:
        raise DataError(f"{data_path} has no rows")
    return lines


def content_key(path: Path) -> str:
    """Hashes a whole file: size, time stamp or a sample would miss a few letters corrected in place (3 to 10 GB/s)."""
    digest = xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def changed_error(path: Path) -> DataError:
    return DataError(f"{path} changed while it was read: start again when it is complete")


def hash_63(content: bytes) -> int:
    """Returns a hash that fits an int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def without_bars():
    """Hides the progress bars of `datasets`."""
    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def reading(data_path: Path):
    """Explains what a damaged file, a full disk or a killed process raises while rows are read into the cache."""
    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
        cause = error.__cause__ or error
        named = str(getattr(cause, "filename", None) or "")
        is_full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not is_full and named in ("", str(data_path)):
            raise DataError(f"{data_path} cannot be read: {cause}") from error
        cache, where = datasets.config.HF_DATASETS_CACHE, f" ({named})" if named else ""
        raise DataError(
            f"the rows of {data_path} cannot be kept in {cache}: {cause.strerror}{where}. Make room, or set HF_HOME to "
            "another folder"
        ) from error
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        raise DataError(
            f"a process that tokenises {data_path} was killed, most likely because memory ran out: end other programs, "
            "then run the same command again"
        ) from error


def check_file(path: Path):
    """Raises DataError unless this is a jsonl or parquet file that is not empty."""
    reason = not_a_file(path)
    if reason == "no such file":
        raise DataError(f"no such data file: {path}")
    try:
        form = None if reason and not path.is_dir() else foreign.form_of_file(path)
    except OSError as error:
        reason, form = error.strerror, None
    refused = {
        f" is {form}. Convert it with:\n  {foreign.command(path)}": form in foreign.FOREIGN_FILES,
        " is a folder, not a data file": path.is_dir(),
        f" cannot be read: {reason}": reason is not None,
        ": a name with :: means something else to the library that reads it; rename the file": "::" in path.name,
        " is neither .jsonl nor .parquet": path.suffix.lower() not in (".jsonl", ".json", ".parquet"),
        " is empty": reason is None and path.stat().st_size == 0,
    }
    for why, is_so in refused.items():
        if is_so:
            raise DataError(f"{path}{why}")


def why_missing(folder: Path, name: str) -> str | None:
    """Returns why an image is not found in its folder, with a hint; None if it is found."""
    if os.path.isabs(name) and not Path(name).is_relative_to(folder):
        return f"the picture's path leaves images_path: {name!r}"
    if os.path.isfile(folder / name):
        return None
    hint = ""
    if os.path.isfile(folder.parent / name):
        hint = f" (it is in {folder.parent}: give that as --images_path)"
    elif os.path.isfile(folder / name.replace("\\", "/")):
        hint = f" (its path has backslashes; convert it with: {foreign.command('FILE')})"
    return f"no such picture: {printable(name)}{hint}"
