"""Kinds of data files, by their content; what is wrong with one that training does not take; the lines of a jsonl."""

import contextlib
import csv
import errno
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import datasets
import pyarrow as pa
import transformers
from PIL import Image
from xxhash import xxh3_128

from common.errors import UsageError
from common.files import fail, not_a_file
from common.paths import display_path, printable
from dataset.pictures import PICTURE_FORMATS
from dataset.row_forms import form_of_row

FOLDER, SAVED = "a folder of pictures with a .txt beside each", "a folder that datasets saved"
TABLE, LIST, TAR = "a table", "one JSON list", "a tar"
LINES, OBJECT, PARQUET = "one JSON object a line", "one JSON object", "a parquet file"
SHARDS, CLASSES = "a folder of data files", "a folder of pictures"
COCO = re.compile(r'\s*\{\s*("(info|licenses|annotations)"|"images"\s*:\s*\[\s*\{\s*"(id|license|file_name)")')
BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")  # of JPEG, PNG ...
READABLE = (*PICTURE_FORMATS, "MPO")  # MPO: a JPEG of several pictures is read as the first
PICTURE_SUFFIXES = {ending for ending, kind in Image.registered_extensions().items() if kind in READABLE}
DELIMITERS = ",\t;|"  # a spreadsheet writes semicolons where the comma is the decimal point; Flickr30k bars
NUMBER = re.compile(r"#\d+$")  # of a picture's caption, in Flickr8k
SHARD_ENDINGS = (".parquet", ".tar", ".tar.gz", ".tgz", ".jsonl", ".csv", ".tsv", ".txt")
CHANGED = "changed while it was read: start again when it is complete"


def kind_of_file(path: Path) -> str | None:
    """Names the kind of a file or folder by its content, not its name; None for an unknown one."""
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return SAVED
        found = [(Path(name).stem, texts) for _, names, texts, _ in pictures_and_texts(path) for name in names]
        if any(stem in texts for stem, texts in found):
            return FOLDER
        if data_files(path):
            return SHARDS
        return CLASSES if found else None
    with open_text(path, errors="replace") as file:
        text = file.read(1 << 16)
    if text.startswith("PAR1"):
        return PARQUET
    first, newline, rest = text.lstrip().partition("\n")
    if first.startswith("["):
        return LIST
    if first.startswith("{"):  # one object over several lines, or COCO's annotations; or an object a line
        try:
            is_object = {"images", "annotations"} <= json.loads(first).keys()
        except (ValueError, RecursionError):
            is_object = not (first.rstrip().endswith("}") or rest.lstrip().startswith("{"))
            if not newline:  # a first line longer than what is looked at
                is_object = COCO.match(text) is not None
        return OBJECT if is_object else LINES
    if table_header(text):
        return TABLE
    return TAR if tarfile.is_tarfile(path) else None


def open_text(path: Path, **how) -> TextIO:
    """Opens a text in UTF-8, or in UTF-16 where its first bytes show that, as in Excel's "Unicode text"."""
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    return open(path, encoding=encoding, **how)


def table_header(text: str) -> tuple[str, list[str] | None] | None:
    """Returns a table's delimiter and columns (None: the first line is already a picture and its caption), or None."""
    line = text.partition("\n")[0].rstrip("\r")
    for delimiter in DELIMITERS:
        try:
            names = [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            continue
        if form_of_row(dict.fromkeys(names)):
            return delimiter, names
        if len(names) == 2 and is_picture(NUMBER.sub("", names[0])):
            return delimiter, None
    return None


def pictures_and_texts(folder: Path) -> Iterator[tuple[Path, list[str], dict[str, str], list[str]]]:
    """Yields each folder inside, its pictures' names, its texts' names by stem, and all names; skips hidden ones."""
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        texts = {Path(name).stem: name for name in names if name.lower().endswith(".txt")}
        yield Path(where), [name for name in names if is_picture(name)], texts, names


def data_files(folder: Path) -> list[Path]:
    """Returns a folder's files of the first of SHARD_ENDINGS that it has; a .txt counts if it is a table."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for ending in SHARD_ENDINGS:
        found = [path for path in files if path.name.endswith(ending)]
        if found := [path for path in found if ending != ".txt" or kind_of_file(path) == TABLE]:
            return found
    return []


def is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURE_SUFFIXES


def command(source: str | Path) -> str:
    """Returns the command that converts a file or a folder to training data."""
    return f"python scripts/make_dataset.py {shlex.quote(str(source))} --to my_data"


def check_names(path: Path, names: list[str]):
    """Raises UsageError if two columns have one name."""
    if twice := [printable(name) for name in names if names.count(name) > 1]:
        raise UsageError(f"{display_path(path)} has the column {twice[0]} twice: rename or remove one of them")


def check_file(path: Path):
    """Raises UsageError unless this is a jsonl or parquet file that is not empty."""
    reason, form = not_a_file(path), None
    if reason == "no such file":
        raise UsageError(f"no such data file: {path}")
    if reason is None or path.is_dir():
        try:
            form = kind_of_file(path)
        except OSError as error:
            reason = error.strerror
    refused = {
        f" is {form}. Convert it with:\n  {command(path)}": form not in (None, LINES, PARQUET),
        " is a folder, not a data file": path.is_dir(),
        f" cannot be read: {reason}": reason is not None,
        ": a name with :: means something else to the library that reads it; rename the file": "::" in path.name,
        " is neither .jsonl nor .parquet": path.suffix.lower() not in (".jsonl", ".json", ".parquet"),
        " is empty": reason is None and path.stat().st_size == 0,
    }
    for why, is_so in refused.items():
        if is_so:
            raise UsageError(f"{path}{why}")


def load_lines(data_path: Path, cache_dir=None) -> datasets.Dataset:
    """Returns the lines of a jsonl, memory-mapped, as `text`; raises UsageError, or what `reading` explains."""
    check_file(data_path)
    # utf-8-sig: some editors on Windows begin a file with a byte order mark.
    how = {"encoding": "utf-8-sig", "encoding_errors": "replace", "split": "train", "cache_dir": cache_dir}
    files = glob.escape(str(data_path.resolve()))  # the library would take a folder named [a] for a pattern
    key = content_key(data_path)
    with without_bars():  # "Generating train split" means nothing to the user
        lines = datasets.load_dataset("text", data_files=files, name=key, **how)
    if content_key(data_path) != key:
        shutil.rmtree(Path(lines.cache_files[0]["filename"]).parent, ignore_errors=True)
        raise UsageError(f"{data_path} {CHANGED}")
    if len(lines) == 0:
        raise UsageError(f"{data_path} has no rows")
    return lines


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
            raise UsageError(f"{data_path} cannot be read: {cause}") from error
        cache, where = datasets.config.HF_DATASETS_CACHE, f" ({named})" if named else ""
        cure = f"{cause.strerror}{where}. Make room, or set HF_HOME to another folder"
        raise UsageError(f"the rows of {data_path} cannot be kept in {cache}: {cure}") from error
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        why = "was killed, most likely because memory ran out: end other programs, then run the same command again"
        raise UsageError(f"a process that tokenises {data_path} {why}") from error


def quiet_libraries(is_main: bool):
    """Turns off the libraries' progress bars, except those of long waits on the main process."""
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        datasets.disable_progress_bars()


@contextlib.contextmanager
def without_bars():
    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def content_key(path: Path) -> str:
    """Hashes a whole file: size, time stamp or a sample would miss a few letters corrected in place (3 to 10 GB/s)."""
    digest = xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_63(content: bytes) -> int:
    """Returns a hash that fits an int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


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
        hint = f" (its path has backslashes; convert it with: {command('FILE')})"
    return f"no such picture: {printable(name)}{hint}"
