"""Imports a parquet file into the cache once: its distinct pictures, and its rows, which name them by number.

Parquet stores a picture that several rows show once (dictionary encoding), but an Arrow copy of the rows holds it in
each of them, several times the file's size.
"""

import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import MemoryMappedTable
from tqdm import tqdm

from common.errors import UsageError
from common.files import flush, lock_of, scratch_folder
from common.paths import display_path
from dataset import file_kinds, row_forms
from dataset.file_kinds import CHANGED, check_file, content_key, hash_63
from dataset.pictures import is_blank

VERSION = 1  # part of the cache's key: raise it when the same file must be imported differently
BATCH, BATCHES = 100, 40  # rows that are read, and such batches that are written, at once
BLOCK_BYTES = 1 << 26  # of pictures that are written at once
BAR_DELAY = 2.0  # seconds of work after which a progress bar is shown
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

    The cache lies in `cache_dir`, by default that of `datasets`. Raises UsageError for a file that is missing, empty,
    without its columns or changed meanwhile, and what `file_kinds.reading` explains.
    """
    check_file(path)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "minimind-v" / f"{content_key(path)}-{VERSION}"
    with lock_of(folder):  # another process may import the same file
        if not folder.is_dir():
            import_file(path, folder)
    try:
        tables = {name: MemoryMappedTable.from_file(str(folder / f"{name}.arrow")) for name in ("rows", "pictures")}
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{folder} is damaged ({error}): delete it, and it is made again") from error
    return tuple(datasets.Dataset(table, fingerprint=f"{name}-{folder.name}") for name, table in tables.items())


def import_file(path: Path, folder: Path):
    """Writes a file's cache folder, whole or not at all."""
    with pq.ParquetFile(path, memory_map=True) as file:
        names = file.schema_arrow.names
        file_kinds.check_names(path, names)
        column = "image" if "image" in names and "image_bytes" not in names else "image_bytes"
        if not {"conversations", column} <= set(names):
            is_known = row_forms.form_of_row(dict.fromkeys(names)) is not None
            hint = f". Convert it with:\n  {file_kinds.command(path)}" if is_known else ""
            raise UsageError(f"{path} needs the columns conversations and image_bytes (or image), it has {names}{hint}")
        if file.metadata.num_rows == 0:
            raise UsageError(f"{path} has no rows")
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        size = tqdm.format_sizeof(sum(group.total_byte_size for group in groups), suffix="B")
        print(f"{display_path(path)} is read once into the cache: it takes up to {size} in {folder.parent}", flush=True)
        with scratch_folder(folder.parent) as part:
            try:
                write_tables(file, column, part)
            except TypeError as error:
                cure = f"Convert base64 text or file names with:\n  {file_kinds.command(path)}"
                raise UsageError(f"{path}: {column} must be a picture's bytes or a list of them. {cure}") from error
            if not folder.name.startswith(content_key(path)):
                raise UsageError(f"{path} {CHANGED}")
            for written in part.iterdir():
                flush(written)
            part.rename(folder)
            flush(folder.parent)
    pa.default_memory_pool().release_unused()  # the row groups' dictionaries


def write_tables(file: pq.ParquetFile, image_column: str, part: Path):
    """Writes the rows and the distinct pictures; holds in memory a block of rows and a hash per picture."""
    rows, every = file.metadata.num_rows, 0.2 if sys.stderr.isatty() else 30.0
    numbers, blank = {}, set()  # of all pictures, by their content's hash: in the order they come; which are blank
    new, waiting, read = {}, [], 0  # contents and rows that are not written yet
    with (
        open(part / "rows.arrow", "wb") as rows_file,
        open(part / "pictures.arrow", "wb") as pictures_file,
        pa.ipc.new_stream(rows_file, ROWS) as row_writer,
        pa.ipc.new_stream(pictures_file, PICTURES) as picture_writer,
        tqdm(desc="importing rows", total=rows, unit=" rows", delay=BAR_DELAY, mininterval=every) as bar,
    ):
        for batch in file.iter_batches(BATCH, columns=["conversations", image_column]):
            shown = []  # pictures, picture_hash and is_blank of each row
            for files in map(as_files, batch.column(image_column).to_pylist()):
                keys = [hash_63(content) for content in files or ()]
                for key, content in zip(keys, files or (), strict=True):
                    if key not in numbers:
                        numbers[key], new[key] = len(numbers), content
                        if is_blank(content):
                            blank.add(key)
                first = keys[0] if keys else 0
                is_placeholder = len(keys) == 1 and first in blank
                shown.append((None if files is None else [numbers[key] for key in keys], first, is_placeholder))
            texts = batch.column("conversations")
            if pa.types.is_nested(texts.type):
                talks = texts.to_pylist()
                texts = [talk if talk is None else json.dumps(talk, ensure_ascii=False, default=str) for talk in talks]
            else:
                texts.validate(full=True)  # raises pa.ArrowInvalid for text that is not UTF-8
                texts = texts.cast(pa.string())
            waiting.append(pa.record_batch([texts, *zip(*shown, strict=True)], ROWS))
            read += len(batch)
            bar.update(len(batch))
            # Opening the files visits every block, so keep them few.
            if len(waiting) == BATCHES or sum(map(len, new.values())) > BLOCK_BYTES or read == rows:
                row_writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                picture_writer.write_batch(pa.record_batch([[*new.values()], [*new]], PICTURES))
                waiting.clear()
                new.clear()


def as_files(images) -> list[bytes] | None:
    """Returns a row's image files; None if one is only a path, which is not followed: it may lead anywhere."""
    images = images if isinstance(images, list) else [images]
    images = [image if isinstance(image, dict) else {"bytes": image} for image in images]
    if any(image.get("bytes") is None and image.get("path") for image in images):
        return None
    return [image["bytes"] for image in images if image.get("bytes") is not None]
