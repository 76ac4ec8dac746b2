"""Reads what people have, row by row, and makes a row of any known form one of this project.

A reader yields (place, row): where the row stands, and its fields, or a RowError if it cannot be read.
"""

import base64
import binascii
import csv
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.errors import UsageError
from common.files import not_a_file
from common.paths import display_path, printable
from dataset import file_kinds, pictures, row_forms
from dataset.chat import IMAGE_TAG, RowError
from dataset.row_forms import TOOL_CALLS, check_images, parse_picture_names

IMAGE_FOLDERS = ("images", "Images", "image", "pictures", "photos")  # looked into beside a source
ENDINGS = {"JPEG": ".jpg", "PNG": ".png"}
QUALITY = 95
CHUNK = 1 << 20  # characters of a JSON list that are decoded at once
LONGEST_ROW = 1 << 26  # also of a table's field, which may be a picture in base64
BATCH = 32  # rows with their pictures' bytes
PROGRAMS = "img image photo picture pic dsc dscn dscf pxl dji gopr mvi wa screenshot whatsapp telegram signal from at"
BY_CAMERA = {*PROGRAMS.split(), "图片", "微信图片"}
BROKEN = "broken JSON, or the file is cut off"
DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)
DAMAGED += (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what `datasets` raises on bad JSON
BETWEEN_ROWS = re.compile(r"[\s,]*")
HASH = re.compile(r"(?=.*\d[a-f])[\da-f_-]{8,}")
NO_LABEL = "its name is not a label: give it one such as red_car_012.jpg, a folder for each class, or a .txt beside it"
KNOWN = """A source is one of these, recognised by its content:
  a folder of pictures with a .txt of the same name beside each, or with a folder
    for each class (photos/cat/1.jpg), or named by what they show (red_car_012.jpg)
  a table (CSV, TSV) whose first line is image,caption or image,label or
    image,question,answer; or Flickr8k's and Flickr30k's captions
  JSON: a list, an object a line or COCO's captions, with the picture's name as
    image, and conversations (LLaVA, ShareGPT, MiniCPM), messages (OpenAI), texts
    (FineVision), query and response (ms-swift), question and answer, caption, label
  a WebDataset tar, a parquet file, a folder of either, a folder that datasets saved
Text is UTF-8 or UTF-16. Pictures lie beside the source or in its images/."""
Rows = Iterator[tuple[str, dict | RowError]]


def read_source(path: Path) -> Rows:
    """Yields a source's rows; raises UsageError if it is of no known form, or cannot be read on."""
    name = display_path(path)
    try:
        form = file_kinds.kind_of_file(path)
        if form is None:
            is_empty = not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0
            found = "empty." if is_empty else "of no known form."
            if path.is_file() and not is_empty:
                with file_kinds.open_text(path, errors="replace") as file:
                    found += f" Its first line is\n  {printable(file.readline(80).strip())}"
            raise UsageError(f"{name} is {found}\n{KNOWN}")
        for place, row in READERS[form](path):
            yield place, row if isinstance(row, (dict, RowError)) else RowError("not a JSON object")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except DAMAGED as error:
        damaged = f"{str(error).rstrip('.')}. It is cut off or damaged: copy or download it again"
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or damaged}") from error


def not_read(path: Path) -> str:
    """Counts the files of a folder that are of another form than what is read of it: "2 .csv, 1 .tar"; else ""."""
    form, counts = file_kinds.kind_of_file(path), Counter()
    if form in (file_kinds.FOLDER, file_kinds.CLASSES, file_kinds.SHARDS):
        shards = set(file_kinds.data_files(path)) if form == file_kinds.SHARDS else ()
        for folder, images, texts, names in file_kinds.pictures_and_texts(path):
            others = sorted(set(names).difference(images, texts.values() if form == file_kinds.FOLDER else ()))
            others = [Path(printable(name)) for name in others if folder / name not in shards]
            counts.update(name.suffix.lower() or name.name for name in others)
    return ", ".join(f"{count:,} {ending}" for ending, count in counts.most_common())


def read_folder(path: Path) -> Rows:
    for folder, images, texts, _ in file_kinds.pictures_and_texts(path):
        inside = folder.relative_to(path)
        for name in images:
            picture, text = str(inside / name), texts.get(Path(name).stem)
            if text is None:
                yield picture, RowError("a picture without a .txt of its name")
            elif reason := not_a_file(folder / text):
                yield picture, RowError(f"its .txt cannot be read: {reason}")
            else:
                yield picture, captioned([picture], (folder / text).read_bytes())
        stems = {Path(name).stem for name in images}
        for name in (name for stem, name in texts.items() if stem not in stems):
            yield str(inside / name), RowError("a text without a picture of its name")


def captioned(images: list[str | bytes], text: bytes) -> dict | RowError:
    try:
        return {"image": images, "caption": text.decode(json.detect_encoding(text)).strip()}
    except UnicodeDecodeError:
        return RowError("its .txt is not UTF-8")


def read_classes(path: Path) -> Rows:
    """Reads pictures whose folder, or own name if that is the source or images/, says what they show."""
    for folder, images, *_ in file_kinds.pictures_and_texts(path):
        for name in images:
            place, label = str((folder / name).relative_to(path)), folder.name
            if folder == path or label in IMAGE_FOLDERS:
                label = Path(name).stem
                is_no_label = BY_CAMERA.issuperset(re.findall(r"[^\W\d_]+", label.lower())) or HASH.fullmatch(label)
                label = "" if is_no_label else re.sub(r"[\W\d_]+$", "", label)
            label = re.sub(r"[\s_-]+", " ", label).strip()
            yield place, {"image": [place], "label": label} if label else RowError(NO_LABEL)


def read_shards(path: Path) -> Rows:
    files = file_kinds.data_files(path)
    if len({split[0] for file in files if (split := re.match("train|val|test", file.name))}) > 1:
        raise UsageError(f"{display_path(path)} holds several splits. Name the files of the one to train on")
    for file in files:
        yield from ((f"{file.name} {place}", row) for place, row in read_source(file))


def read_table(path: Path) -> Rows:
    with file_kinds.open_text(path, newline="") as file:
        delimiter, names = file_kinds.table_header(file.readline())
        is_flickr = delimiter == "|" or (names is None and delimiter == "\t")  # its quotes are part of the text
        first, names = (2, names) if names else (1 + file.seek(0), ["image", "caption"])
        file_kinds.check_names(path, names)
        csv.field_size_limit(LONGEST_ROW)
        quoting = csv.QUOTE_NONE if is_flickr else csv.QUOTE_MINIMAL
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True, quoting=quoting)
        line = first
        try:
            for fields in reader:
                if len(fields) == len(names):
                    fields[0] = file_kinds.NUMBER.sub("", fields[0]) if is_flickr else fields[0]
                    yield f"line {line}", dict(zip(names, fields, strict=True))
                elif fields:  # not a blank line
                    yield f"line {line}", RowError(f"the first line has {len(names)} fields, this one {len(fields)}")
                line = first + reader.line_num
        except csv.Error as error:  # where the row ends, nothing tells
            raise UsageError(f"{display_path(path)}, line {line}: a quote is wrong or not closed ({error})") from error


def read_lines(path: Path) -> Rows:
    # Only the line that is not UTF-8 is a bad row: its bytes stay as they are.
    with file_kinds.open_text(path, newline="\n", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", parsed(line.strip().encode("utf-8", "surrogateescape"))


def parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")


def read_list(path: Path) -> Rows:
    """Decodes a JSON list object by object, as much of the file at a time as that takes."""
    decoder, number = json.JSONDecoder(), 1
    with file_kinds.open_text(path) as file:
        at = (text := file.read(CHUNK)).index("[") + 1
        while not text.startswith("]", at := BETWEEN_ROWS.match(text, at).end()):
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                rest = text[at:]
                more = file.read(max(CHUNK, len(rest))) if len(rest) < LONGEST_ROW else ""
                if not more:
                    raise UsageError(f"{display_path(path)}, row {number}: {BROKEN} ({error})") from error
                text, at = rest + more, 0
            else:
                yield f"row {number}", value
                number += 1


def read_object(path: Path) -> Rows:
    """Reads COCO's captions, or the list that a JSON object holds, or the object as the one row."""
    with file_kinds.open_text(path) as file:
        text = file.read()
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{display_path(path)}: {BROKEN} ({error})") from error
    lists = [value for value in whole.values() if isinstance(value, list)]
    rows = [whole] if row_forms.form_of_row(whole) or len(lists) != 1 else lists[0]
    if isinstance(whole.get("annotations"), list) and isinstance(whole.get("images"), list):
        names = {str(image.get("id")): image.get("file_name") for image in whole["images"] if isinstance(image, dict)}
        captions = [row if isinstance(row, dict) else {} for row in whole["annotations"]]
        rows = [{"image": names.get(str(row.get("image_id"))), "caption": row.get("caption")} for row in captions]
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def read_tar(path: Path) -> Rows:
    """Reads a WebDataset: a row is neighbouring files of one name up to the first dot, pictures with JSON or text."""
    with tarfile.open(path) as archive:
        for key, files in itertools.groupby(tar_files(archive), key=lambda file: file[0]):
            files = [(name, content) for _, name, content in files]
            images = [content for name, content in files if file_kinds.is_picture(name)]
            texts = [content for name, content in files if name.endswith(".txt")]
            objects = [content for name, content in files if name.endswith(".json")]
            row = parsed(objects[0]) if objects else {}
            if not images or not (texts or objects):
                row = RowError("a picture without a text" if images else "a text without a picture")
            elif len(texts) > 1 or len(objects) > 1:
                row = RowError("several texts whose names are the same up to the first dot")
            elif texts and isinstance(row, dict) and row_forms.field(row, ("conversations", "messages")) is None:
                row = captioned(images, texts[0])
            elif isinstance(row, dict):
                row = {name: row[name] for name in row if name not in row_forms.PICTURE_FIELDS} | {"image": images}
            yield key, row


def tar_files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # it would keep all of them
        path = PurePosixPath(member.name)
        key, name = path.name.partition(".")[0], path.name.lower()
        if member.isfile() and key and (file_kinds.is_picture(name) or name.endswith((".txt", ".json"))):
            yield str(path.parent / key), name, archive.extractfile(member).read()
    # A block of zeros ends every complete tar; tarfile takes anything that is no header for the end.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")


def read_parquet(path: Path) -> Rows:
    with pq.ParquetFile(path, memory_map=True) as file:
        schema = file.schema_arrow
        file_kinds.check_names(path, schema.names)
        features = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
        yield from numbered(file.iter_batches(batch_size=BATCH), features)


def read_saved(path: Path) -> Rows:
    """Reads what `datasets` saved; raises UsageError if it has several splits, as one may be meant for testing."""
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) != 1:
            names = " or ".join(display_path(path / name) for name in saved)
            raise UsageError(f"{display_path(path)} holds {len(saved)} splits. Name the one to train on: {names}")
        [saved] = saved.values()
    for file in saved.cache_files:  # their names are from a file of the folder: none leads out of it
        if not os.path.abspath(file["filename"]).startswith(os.path.abspath(path) + os.sep):
            raise UsageError(f"{display_path(path)} cannot be read: it names {file['filename']}, outside of it")
    yield from numbered(saved.with_format("arrow").iter(BATCH), saved.features)  # pictures stay files


def numbered(batches: Iterable[pa.Table | pa.RecordBatch], features: dict) -> Rows:
    """Yields rows with the names of their classes, which `datasets` writes as numbers; None for unknown ones."""
    labels = {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    labels = {name: dict(enumerate(names)) for name, names in labels.items()}
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row | {name: names.get(row[name]) for name, names in labels.items()}


READERS = {
    file_kinds.FOLDER: read_folder,
    file_kinds.CLASSES: read_classes,
    file_kinds.SHARDS: read_shards,
    file_kinds.TABLE: read_table,
    file_kinds.LINES: read_lines,
    file_kinds.LIST: read_list,
    file_kinds.OBJECT: read_object,
    file_kinds.TAR: read_tar,
    file_kinds.PARQUET: read_parquet,
    file_kinds.SAVED: read_saved,
}


def make_row(row: dict | RowError, images_path: Path, question: str | None, size: int, folder: Path) -> dict | RowError:
    """Makes a row of this project, and writes each distinct picture once, under the hash of its content, to `folder`.

    Several threads may call it at once: they write the same content under the same name.
    Returns {"image": names in `folder`, "conversations"}; a RowError if the row cannot be learned from.
    """
    if isinstance(row, RowError):
        return row
    names, contents = [], {}
    try:
        named, form = row_forms.field(row, row_forms.PICTURE_FIELDS), row_forms.form_of_row(row)
        if named and form != row_forms.NUMBERED:
            row = row | {named: as_pictures(row[named], images_path)}
        if question and form in row_forms.QUESTIONS:
            row = row | {"question": question}
        turns, images = row_forms.read_row(row)
        if any("tool" in turn for turn in turns):
            raise RowError(TOOL_CALLS)
        images = as_pictures(images, images_path)
        has_tag = any(IMAGE_TAG in turn["content"] for turn in turns)
        if len(images) == 1 and not has_tag and isinstance(images[0], bytes) and pictures.is_blank(images[0]):
            return {"image": [], "conversations": turns}
        row_forms.images_first(turns, len(images))
        check_images(turns, len(images))
        for picture in images:
            name, content = "in the row", picture
            if isinstance(picture, str):
                [name] = parse_picture_names([picture])
                if reason := file_kinds.why_missing(images_path, name):
                    raise RowError(reason)
                with pictures.decoding(name):
                    content = (images_path / name).read_bytes()
            digest = hashlib.blake2b(content, digest_size=10).hexdigest()
            files = (f"{digest}{ending}" for ending in ENDINGS.values())
            file = next((file for file in files if (folder / file).is_file()), None)
            if file is None:
                kind, content = picture_file(content, name, size)
                file = f"{digest}{ENDINGS[kind]}"
                contents[file] = content
            names.append(file)
    except pictures.PictureError as error:
        return RowError(f"broken picture: {error}")
    except RowError as error:
        return error
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return {"image": names, "conversations": turns}


def picture_file(content: bytes, name: str, size: int) -> tuple[str, bytes]:
    """Returns the kind (JPEG or PNG) and content of a picture's file as training reads it, or raises PictureError.

    A picture whose shorter side is longer than `size` becomes a JPEG of that size. Others lose nothing: an upright RGB
    JPEG or PNG stays as it is, anything else becomes an RGB PNG.
    """
    with pictures.open_picture(content, name) as image:
        kind, is_small = image.format, min(image.size) <= size
        is_plain = image.mode == "RGB" and image.info.get("transparency") is None and kind in ENDINGS
        picture = pictures.to_rgb(pictures.upright(image, size))  # decodes all of it, so that a broken one is found now
        dimensions = pictures.resized_to(pictures.CLIP_FORMAT.size if is_small else size, *picture.size)
        if is_small and is_plain and pictures.turn_of(image) is None:
            return kind, content
        kind, file = "PNG" if is_small else "JPEG", io.BytesIO()
        picture = picture if is_small else picture.resize(dimensions, Image.Resampling.BICUBIC)
        picture.info.clear()
        picture.save(file, kind, quality=QUALITY)
        return kind, file.getvalue()


def as_pictures(value, images_path: Path) -> list[str | bytes]:
    """Returns the names or files' bytes of the pictures that a field holds: one, several with commas, or a list."""
    if isinstance(value, str) and not value.startswith("data:") and found(value, images_path) is None:
        value = parse_picture_names(value)
    images = []
    for picture in value if isinstance(value, list) else [value]:
        if picture in (None, ""):
            continue
        if isinstance(picture, dict):  # as `datasets` writes it
            picture = picture.get("bytes") or picture.get("path")
        if not isinstance(picture, (bytes, str)) or picture == "":
            raise RowError("the picture is neither a name nor a file's bytes")
        if isinstance(picture, str) and picture.startswith(("http:", "https:")):
            raise RowError("a picture on the web is not fetched: download it, and name its file")
        if isinstance(picture, str) and (picture.startswith("data:") or file_kinds.BASE64.fullmatch(picture)):
            try:
                picture = base64.b64decode("".join(picture.rpartition(",")[2].split()), validate=True)
            except binascii.Error as error:
                raise RowError(f"a data: URL that is not base64: {error}") from error
        elif isinstance(picture, str):
            path = unquote(picture.removeprefix("file://")) if picture.startswith("file:") else picture
            picture = found(path, images_path) or path
        images.append(picture)
    return images


def found(name: str, images_path: Path) -> str | None:
    """Returns where a picture lies in the folder: as named, also with backslashes, or in its images/; None: nowhere."""
    slashed = name.replace("\\", "/")
    places = (name, slashed, *(f"{folder}/{slashed}" for folder in IMAGE_FOLDERS))
    return next((place for place in places if os.path.isfile(images_path / place)), None)
