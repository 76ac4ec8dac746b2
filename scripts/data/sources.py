"""What people have, read row by row: folders, tables, JSON, tar archives, parquet and `datasets` folders."""

import csv
import io
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UsageError
from common.files import not_a_file
from common.paths import display_path
from common.schema import SchemaError, read_json
from dataset import foreign, forms
from dataset.conversation import RowError
from dataset.formats import with_plain_images

CHUNK = 1 << 20  # characters of a JSON list that are decoded at once
LONGEST_ROW = 1 << 26
TEXTS = (".txt", ".json")  # of a tar
BATCH = 32  # rows with their pictures' bytes
BETWEEN_ROWS = re.compile(r"[\s,]*")
SAVED = {  # what datasets takes from the files of a folder that it saved
    "state.json": {"_data_files": [{"filename": str}], "_split?": (str, None), "_format_columns?": ([str], None)},
    "dataset_info.json": {"features?": (dict, None), "splits?": (dict, None)},
    "dataset_dict.json": {"splits": [str]},
}
KNOWN = """A source is one of these, recognised by its content:
  a folder of pictures with a .txt of the same name beside each
  a table (CSV, TSV) whose first line is image,caption or image,question,answer
  JSON: a list, an object a line or COCO's captions, with conversations (LLaVA, ShareGPT), messages (OpenAI),
    caption, or question and answer, and the picture's name as image
  a WebDataset tar, a parquet file, a folder that datasets saved
Text is UTF-8."""


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        place: Where it stands, as the report says it.
        value: Its fields; a RowError if it cannot be read.
        share: How much of the source has been read, 0 to 1.
    """

    place: str
    value: dict | RowError
    share: float


def read_source(path: Path) -> Iterator[Row]:
    """Yields a source's rows, none of them kept.

    Raises:
        UsageError: If it is of no known form, or cannot be read on.
    """
    name = display_path(path)
    try:
        form = foreign.form_of_file(path)
        if form == foreign.SHARDS:
            raise UsageError(f"{name} is {form}. Name them:\n  {foreign.command(path)}")
        if form is None:
            raise UsageError(f"{name} is {'empty' if is_empty(path) else 'of no known form'}. {KNOWN}")
        yield from READERS[form](path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def is_empty(path: Path) -> bool:
    return next(path.iterdir(), None) is None if path.is_dir() else path.stat().st_size == 0


def read_folder(path: Path) -> Iterator[Row]:
    """Reads pictures with their texts; a text without a picture is a bad row as well."""
    done, files = 0, sum(len(pictures) + len(texts) for _, pictures, texts in foreign.pictures_and_texts(path))
    for folder, pictures, texts in foreign.pictures_and_texts(path):
        inside = folder.relative_to(path)
        for name in pictures:
            text = texts.get(foreign.stem(name))
            yield Row(str(inside / name), captioned(folder, inside / name, text), done / files)
            done += 1
        stems = set(map(foreign.stem, pictures))
        for name in (name for stem, name in texts.items() if stem not in stems):
            yield Row(str(inside / name), RowError("a text without a picture of its name"), done / files)
        done += len(texts)


def captioned(folder: Path, picture: Path, text: str | None) -> dict | RowError:
    if text is None:
        return RowError("a picture without a .txt of its name")
    if reason := not_a_file(folder / text):
        return RowError(f"its .txt cannot be read: {reason}")
    try:
        caption = (folder / text).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return RowError("its .txt is not UTF-8")
    return {"image": [str(picture)], "caption": caption}


def read_table(path: Path) -> Iterator[Row]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        lines = utf8_lines(file, path)
        delimiter, names = foreign.table_header(next(lines))
        foreign.check_names(path, names)
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        while True:
            line = reader.line_num + 2  # the header was line 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num + 1 > line:  # it went on through more lines, which would be lost
                    raise UsageError(f"{display_path(path)}, line {line}: a quote is not closed ({error})") from error
                fields = RowError(f"not a table's row: {error}")
            if isinstance(fields, list) and len(fields) != len(names):
                fields = RowError(f"{len(fields)} fields, but the first line names {len(names)}") if fields else None
            if fields is not None:  # not a blank line
                value = dict(zip(names, fields, strict=True)) if isinstance(fields, list) else fields
                yield Row(f"line {line}", value, file.tell() / size)


def utf8_lines(file: io.BufferedReader, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{display_path(path)}, line {number}: not UTF-8. Save the file as UTF-8") from error


def read_lines(path: Path) -> Iterator[Row]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"line {number}", parsed(line.removeprefix(b"\xef\xbb\xbf").strip()), file.tell() / size)


def parsed(text: bytes) -> dict | RowError:
    """Returns the fields of a JSON object."""
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")
    return value if isinstance(value, dict) else RowError("not a JSON object")


def read_list(path: Path) -> Iterator[Row]:
    """Decodes a JSON list object by object, as much of the file at a time as that takes."""
    decoder, size, number = json.JSONDecoder(), path.stat().st_size, 0
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(CHUNK)
        at = text.index("[") + 1
        while True:
            at = BETWEEN_ROWS.match(text, at).end()
            if text.startswith("]", at):
                return
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                rest = text[at:]
                more = file.read(max(CHUNK, len(rest))) if len(rest) < LONGEST_ROW else ""
                if not more:
                    where = f"{display_path(path)}, row {number + 1}"
                    raise UsageError(f"{where}: broken JSON, or the file is cut off ({error})") from error
                text, at = rest + more, 0
                continue
            number += 1
            row = value if isinstance(value, dict) else RowError("not a JSON object")
            yield Row(f"row {number}", row, (file.buffer.tell() - (len(text) - at)) / size)


def read_object(path: Path) -> Iterator[Row]:
    """Reads COCO's captions, or the list that a JSON object holds, or the object as the one row."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{display_path(path)}: broken JSON, or the file is cut off ({error})") from error
    lists = [value for value in whole.values() if isinstance(value, list)]
    rows = [whole] if forms.form_of_row(whole) or len(lists) != 1 else lists[0]
    if isinstance(whole.get("annotations"), list) and isinstance(whole.get("images"), list):
        images = (image for image in whole["images"] if isinstance(image, dict))
        names = {str(image.get("id")): image.get("file_name") for image in images}
        rows = [
            {"image": names.get(str(one.get("image_id"))), "caption": one.get("caption")}
            if isinstance(one, dict)
            else one
            for one in whole["annotations"]
        ]
    values = (row if isinstance(row, dict) else RowError("not a JSON object") for row in rows)
    yield from numbered(values, len(rows))


def read_tar(path: Path) -> Iterator[Row]:
    """Reads a WebDataset: neighbouring files of one name up to the first dot are a row."""
    size = path.stat().st_size
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for key, files in itertools.groupby(tar_files(archive), key=lambda file: file[0]):
            yield Row(key, tar_row([(name, content) for _, name, content in files]), file.tell() / size)


def tar_files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Yields the key, name and content of each file that may belong to a row."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # it would keep all of them
        path = PurePosixPath(member.name)
        key, name = path.name.partition(".")[0], path.name.lower()
        if member.isfile() and key and (foreign.is_picture(name) or name.endswith(TEXTS)):
            yield str(path.parent / key), name, archive.extractfile(member).read()


def tar_row(files: list[tuple[str, bytes]]) -> dict | RowError:
    """Returns the fields of a sample: its JSON, or its text as the caption, and its pictures' bytes."""
    kinds = {kind: [content for name, content in files if name.endswith(kind)] for kind in TEXTS}
    pictures = [content for name, content in files if foreign.is_picture(name)]
    if not pictures or not any(kinds.values()):
        return RowError("a text without a picture" if any(kinds.values()) else "a picture without a text")
    if max(map(len, kinds.values())) > 1:
        return RowError("several texts of one name up to the first dot")
    row = parsed(kinds[".json"][0]) if kinds[".json"] else {}
    if isinstance(row, RowError):
        return row
    if kinds[".txt"] and forms.field(row, ("conversations", "messages")) is None:
        try:
            row = {"caption": kinds[".txt"][0].decode("utf-8-sig").strip()}
        except UnicodeDecodeError:
            return RowError("its .txt is not UTF-8")
    return {name: value for name, value in row.items() if name not in forms.PICTURE_FIELDS} | {"image": pictures}


def read_parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path, memory_map=True) as file:
        foreign.check_names(path, file.schema_arrow.names)
        rows, batches = file.metadata.num_rows, file.iter_batches(batch_size=BATCH)
        yield from numbered(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), rows)


def read_saved(path: Path) -> Iterator[Row]:
    """Reads what `datasets` saved; raises UsageError if it has several splits, as one may be meant for testing."""
    try:
        for name, schema in SAVED.items():
            for file in (*path.glob(name), *path.glob(f"*/{name}")):
                content = read_json(file, schema)
                names = [part["filename"] for part in content.get("_data_files", [])]
                names += content["splits"] if name == "dataset_dict.json" else []
                if any(named != PurePosixPath(named).name for named in names):
                    raise SchemaError(f"{file.name} leads to another folder")
        saved = datasets.load_from_disk(str(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of damaged features
        raise UsageError(f"{display_path(path)} cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) != 1:
            names = " or ".join(display_path(path / name) for name in saved)
            raise UsageError(f"{display_path(path)} holds {len(saved)} splits. Name the one to train on: {names}")
        [saved] = saved.values()
    batches = with_plain_images(saved.with_format("arrow")).iter(BATCH)
    yield from numbered(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), len(saved))


def numbered(values: Iterator[dict], rows: int) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        yield Row(f"row {number}", value, number / rows)


READERS = {
    foreign.FOLDER: read_folder,
    foreign.TABLE: read_table,
    foreign.LINES: read_lines,
    foreign.LIST: read_list,
    foreign.OBJECT: read_object,
    foreign.TAR: read_tar,
    foreign.PARQUET: read_parquet,
    foreign.SAVED: read_saved,
}
