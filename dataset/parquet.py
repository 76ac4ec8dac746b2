"""Imports a parquet file into the cache once: its rows, and its distinct pictures.

Several rows may show one picture. Parquet stores it once (dictionary encoding), but an Arrow copy of the rows holds it
in each of them, several times the file's size. Here the rows name their pictures by number; both parts are
memory-mapped.
"""

import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from common.files import flush, lock_of, scratch_folder
from common.paths import display_path
from dataset import foreign, forms
from dataset.formats import DataError, changed_error, check_file, content_key, hash_63
from dataset.pictures import is_blank

VERSION = 1  # part of the cache's key: raise it when the same file must be imported differently
BATCH, BATCHES = 100, 40  # rows that are read, and such batches that are written, at once
BLOCK_BYTES = 1 << 26  # of pictures that are written at once
BAR_ROWS = 20_000  # from here on a progress bar is shown
ROWS = pa.schema(
    {
        "conversations": pa.string(),  # JSON text
        "pictures": pa.list_(pa.int32()),  # their numbers; null where the file has only a picture's path
        "picture_hash": pa.int64(),  # of the first picture's content
        "is_blank": pa.bool_(),  # the only picture is the black placeholder
    }
)
PICTURES = pa.schema({"content": pa.binary(), "hash": pa.int64()})


def load_parquet(path: Path, cache_dir=None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns a file's rows (ROWS) and distinct pictures (PICTURES), memory-mapped; the first call imports the file.

    Args:
        path: A parquet file with the columns `conversations` and `image_bytes` (or `image`).
        cache_dir: The cache's folder; by default that of `datasets`.

    Raises:
        DataError: If the file is missing, empty or without these columns, or if it changes meanwhile.
        pa.ArrowException, OSError: If it is unreadable, or the cache cannot be written.
    """
    check_file(path)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "minimind-v" / f"{content_key(path)}-{VERSION}"
    if not folder.is_dir():
        with lock_of(folder):
            if not folder.is_dir():  # no other process was faster
                import_file(path, folder)
    try:
        return open_table(folder, "rows"), open_table(folder, "pictures")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{folder} is damaged ({error}): delete it, and it is made again") from error


def open_table(folder: Path, name: str) -> datasets.Dataset:
    table = datasets.table.MemoryMappedTable.from_file(str(folder / f"{name}.arrow"))
    return datasets.Dataset(table, fingerprint=f"{name}-{folder.name}")


def import_file(path: Path, folder: Path):
    """Writes a file's cache folder, whole or not at all."""
    with pq.ParquetFile(path, memory_map=True) as file:
        column = image_column(path, file.schema_arrow)
        if file.metadata.num_rows == 0:
            raise DataError(f"{path} has no rows")
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        size = tqdm.format_sizeof(sum(group.total_byte_size for group in groups), suffix="B")
        print(f"{display_path(path)} is read once into the cache: it takes up to {size} in {folder.parent}", flush=True)
        with scratch_folder(folder.parent) as part:
            try:
                write_tables(file, column, part)
            except TypeError as error:
                cure = f"Convert base64 text or file names with:\n  {foreign.command(path)}"
                raise DataError(f"{path}: {column} must be a picture's bytes or a list of them. {cure}") from error
            if not folder.name.startswith(content_key(path)):
                raise changed_error(path)
            for written in part.iterdir():
                flush(written)
            part.rename(folder)
            flush(folder.parent)
    pa.default_memory_pool().release_unused()  # the row groups' dictionaries


def image_column(path: Path, schema: pa.Schema) -> str:
    """Returns the name of the image column; raises DataError unless the columns exist once."""
    foreign.check_names(path, schema.names)
    name = "image" if "image" in schema.names and "image_bytes" not in schema.names else "image_bytes"
    if not {"conversations", name} <= set(schema.names):
        is_known = forms.form_of_row(dict.fromkeys(schema.names)) is not None
        hint = f". Convert it with:\n  {foreign.command(path)}" if is_known else ""
        needed = "the columns conversations and image_bytes (or image)"
        raise DataError(f"{path} needs {needed}, it has {schema.names}{hint}")
    return name


def write_tables(file: pq.ParquetFile, image_column: str, part: Path):
    """Writes the rows and the distinct pictures; holds in memory a block of rows and a hash per picture."""
    rows, every = file.metadata.num_rows, 0.2 if sys.stderr.isatty() else 30.0
    with (
        open(part / "rows.arrow", "wb") as rows_file,
        open(part / "pictures.arrow", "wb") as pictures_file,
        pa.ipc.new_stream(rows_file, ROWS) as row_writer,
        pa.ipc.new_stream(pictures_file, PICTURES) as picture_writer,
        tqdm(desc="importing rows", total=rows, unit=" rows", disable=rows < BAR_ROWS, mininterval=every) as bar,
    ):
        pictures, waiting, read = Pictures(), [], 0
        for batch in file.iter_batches(BATCH, columns=["conversations", image_column]):
            columns = [as_json(batch.column("conversations")), *pictures.add(batch.column(image_column))]
            waiting.append(pa.record_batch(columns, schema=ROWS))
            read += len(batch)
            bar.update(len(batch))
            # Opening the files visits every block, so keep them few.
            is_block = len(waiting) == BATCHES or sum(map(len, pictures.new.values())) > BLOCK_BYTES
            if is_block or read == rows:
                row_writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                picture_writer.write_batch(pa.record_batch([[*pictures.new.values()], [*pictures.new]], PICTURES))
                waiting.clear()
                pictures.new.clear()


class Pictures:
    """Numbers pictures by their content, in the order they come; `new` holds those not written yet."""

    def __init__(self):
        self.numbers: dict[int, int] = {}  # by the content's hash
        self.new: dict[int, bytes] = {}
        self.blank: set[int] = set()

    def add(self, column: pa.Array) -> tuple[list, list, list]:
        """Returns the columns `pictures`, `picture_hash` and `is_blank` of rows with these pictures."""
        keys = [files and [self._key(content) for content in files] for files in map(as_files, column.to_pylist())]
        numbers = [of_row and [self.numbers[key] for key in of_row] for of_row in keys]
        first = [of_row[0] if of_row else 0 for of_row in keys]
        return numbers, first, [key in self.blank and len(of_row) == 1 for key, of_row in zip(first, keys, strict=True)]

    def _key(self, content: bytes) -> int:
        key = hash_63(content)
        if key not in self.numbers:
            self.numbers[key], self.new[key] = len(self.numbers), content
            if is_blank(content):
                self.blank.add(key)
        return key


def as_files(images) -> list[bytes] | None:
    """Returns the image files of a row: bytes, {"bytes", "path"}, or a list of them.

    None if one is only a path, which is not followed: it may lead anywhere.
    """
    images = [image for image in (images if isinstance(images, list) else [images]) if image is not None]
    images = [image if isinstance(image, dict) else {"bytes": image} for image in images]
    if any(image.get("bytes") is None and image.get("path") for image in images):
        return None
    return [image["bytes"] for image in images if image.get("bytes") is not None]


def as_json(column: pa.Array) -> pa.Array:
    """Returns conversations as JSON text; raises pa.ArrowInvalid for text that is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not pa.types.is_nested(column.type):
        column.validate(full=True)
        return column.cast(pa.string())
    values = column.to_pylist()
    texts = [value if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.array(texts, pa.string())
