"""Kinds of files and folders that hold pictures with texts, recognised by their content.

Training reads only jsonl and parquet; for the others its error names the command that converts them.
"""

import csv
import json
import os
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from common.errors import UsageError
from common.files import fail
from common.paths import display_path, printable
from dataset.forms import form_of_row
from dataset.pictures import PICTURE_FORMATS

FOLDER, SAVED = "a folder of pictures with a .txt beside each", "a folder that datasets saved"
TABLE, LIST, TAR = "a table", "one JSON list", "a tar"
LINES, OBJECT, PARQUET = "one JSON object a line", "one JSON object", "a parquet file"
SHARDS, CLASSES = "a folder of data files", "a folder of pictures"
FOREIGN_FILES = (FOLDER, CLASSES, SAVED, TABLE, LIST, OBJECT, TAR, SHARDS)
COCO = re.compile(r'\s*\{\s*("(info|licenses|annotations)"|"images"\s*:\s*\[\s*\{\s*"(id|license|file_name)")')
BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")  # of JPEG, PNG ...
READABLE = (*PICTURE_FORMATS, "MPO")  # MPO: a JPEG of several pictures is read as the first
PICTURE_SUFFIXES = {ending for ending, kind in Image.registered_extensions().items() if kind in READABLE}
DELIMITERS = ",\t;|"  # a spreadsheet writes semicolons where the comma is the decimal point; Flickr30k bars
NUMBER = re.compile(r"#\d+$")  # of a picture's caption, in Flickr8k
HEAD = 1 << 16  # bytes that are looked at
SHARD_ENDINGS = (".parquet", ".tar", ".tar.gz", ".tgz", ".jsonl", ".csv", ".tsv", ".txt")
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")


def command(source: str | Path) -> str:
    """Returns the command that converts a file or a folder to training data."""
    return f"python scripts/make_dataset.py {shlex.quote(str(source))} --to my_data"


def data_files(folder: Path) -> list[Path]:
    """Returns a folder's files of the first of SHARD_ENDINGS that it has; a .txt counts if it is a table."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for ending in SHARD_ENDINGS:
        found = [path for path in files if path.name.endswith(ending)]
        if found := [path for path in found if ending != ".txt" or form_of_file(path) == TABLE]:
            return found
    return []


def is_base64(value) -> bool:
    """Tells whether a text is a picture's file in base64."""
    return isinstance(value, str) and BASE64.fullmatch(value) is not None


def form_of_file(path: Path) -> str | None:
    """Names the kind of a file or folder by its content, not its name; None for an unknown one."""
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_BY_DATASETS):
            return SAVED
        found = [(stem(name), texts) for _, names, texts in pictures_and_texts(path) for name in names]
        if any(name in texts for name, texts in found):
            return FOLDER
        return SHARDS if data_files(path) else CLASSES if found else None
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return PARQUET
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
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


def check_names(path: Path, names: list[str]):
    """Raises UsageError if two columns have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{display_path(path)} has the column {printable(twice)} twice: rename or remove one of them")


def pictures_and_texts(folder: Path) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
    """Yields each folder inside, its pictures' names, and its texts' names by stem; skips hidden ones."""
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        texts = {stem(name): name for name in names if name.lower().endswith(".txt")}
        yield Path(where), [name for name in names if is_picture(name)], texts


def is_picture(name: str) -> bool:
    """Tells whether a file name has the ending of a readable picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def stem(name: str) -> str:
    return os.path.splitext(name)[0]
