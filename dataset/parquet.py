"""A parquet file, brought once into the cache: each picture once, by its content, and the rows with their pictures'
numbers.

Several rows may be about one picture. Parquet stores it once (dictionary encoding), but an Arrow copy of the rows holds
it in each of them, several times the file's size. Here the rows name their pictures by number; both parts are
memory-mapped, so training holds neither.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from array import array
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from common.files import flush_folder, lock, scratch_folder
from common.paths import display_path
from dataset import foreign, forms
from dataset.conversation import RowError
from dataset.formats import DataError, changed_error, check_file, content_key, data_error, hash_63
from dataset.pictures import is_blank

VERSION = 1  # part of the cache's key: raise it when the same file must be brought in differently
BATCH, BATCHES = 100, 40  # rows that are read, and such batches that are written, at once
BLOCK_BYTES = 1 << 26  # of pictures that are written at once
BAR_ROWS = 20_000  # from here on a progress bar is shown
BYTES_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, *BYTES_TYPES)
LIST_TYPES = (pa.types.is_list, pa.types.is_large_list)
ROWS = pa.schema(
    {
        "conversations": pa.string(),  # JSON text
        "pictures": pa.list_(pa.int32()),  # their numbers; null where the file has only a picture's path
        "picture_hash": pa.int64(),  # of the first picture's content
        "is_blank": pa.bool_(),  # the only picture is the black one that stands for none
    }
)
PICTURES = pa.schema({"content": pa.binary(), "hash": pa.int64()})
SOURCE = "source.txt"  # the file that a folder of the cache was made from


def load_parquet(path: Path, image_tokens: int, cache_dir=None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns a file's rows (ROWS) and distinct pictures (PICTURES), memory-mapped; the first time it makes them.

    Args:
        path: A parquet file with the columns `conversations` and `image_bytes` (or `image`).
        image_tokens: Tokens an image takes; only to say how much disk is needed.
        cache_dir: Where the cache lies; by default that of `datasets`.

    Raises:
        DataError: If the file is missing, unreadable, empty or without these columns, if it changes meanwhile, or if
            the disk or the memory is too small.
    """
    check_file(path)
    try:
        key = f"{content_key(path)}-{VERSION}"
        folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "minimind-v" / key
        waits = False
        while not folder.is_dir():
            try:
                held = lock(folder)
            except BlockingIOError as other:
                if not waits:
                    print(f"{display_path(path)} is being read into {folder} by process {other}: waiting", flush=True)
                waits = True
                time.sleep(0.2)
                continue
            if not folder.is_dir():
                import_file(path, folder, image_tokens)
            del held
    except (pa.ArrowException, OSError, ValueError) as error:
        raise data_error(path, error) from error
    try:
        return kept_table(folder, "rows"), kept_table(folder, "pictures")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{folder} is damaged ({error}): delete it, and it is made again") from error


def kept_table(folder: Path, name: str) -> datasets.Dataset:
    table = datasets.table.MemoryMappedTable.from_file(str(folder / f"{name}.arrow"))
    return datasets.Dataset(table, fingerprint=f"{name}-{folder.name}")


def import_file(path: Path, folder: Path, image_tokens: int):
    """Makes a file's folder of the cache, whole or not at all, and removes that of the file's former content."""
    remove_former(path, folder)
    with pq.ParquetFile(path, memory_map=True) as file:
        name = image_column(file.schema_arrow.names)
        check_columns(path, file.schema_arrow, name)
        if file.metadata.num_rows == 0:
            raise DataError(f"{path} has no rows")
        announce(path, file.metadata, name, image_tokens, folder.parent)
        with scratch_folder(folder.parent) as part:
            (part / SOURCE).write_text(str(path.resolve()), encoding="utf-8", errors="surrogateescape")
            write_tables(file, name, part)
            if not folder.name.startswith(content_key(path)):
                raise changed_error(path)
            for written in part.iterdir():
                with open(written, "rb+") as opened:
                    os.fsync(opened.fileno())
            part.rename(folder)
            flush_folder(folder.parent)
    pa.default_memory_pool().release_unused()  # the row groups' dictionaries


def write_tables(file: pq.ParquetFile, name: str, part: Path):
    """Writes the rows and, each once, the pictures; in memory are a block of rows and a hash for each picture."""
    rows, every = file.metadata.num_rows, 0.2 if sys.stderr.isatty() else 30.0
    with (
        open(part / "rows.arrow", "wb") as rows_file,
        open(part / "pictures.arrow", "wb") as pictures_file,
        pa.ipc.new_stream(rows_file, ROWS) as row_writer,
        pa.ipc.new_stream(pictures_file, PICTURES) as picture_writer,
        tqdm(desc="keeping each picture", total=rows, unit=" rows", disable=rows < BAR_ROWS, mininterval=every) as bar,
    ):
        pictures, waiting, read = Pictures(), [], 0
        for batch in file.iter_batches(BATCH, columns=["conversations", name]):
            columns = [as_json(batch.column("conversations")), *pictures.number(batch.column(name))]
            waiting.append(pa.record_batch(columns, schema=ROWS))
            read += len(batch)
            bar.update(len(batch))
            # Opening the files looks at each block that was written, so there must not be many.
            if len(waiting) == BATCHES or pictures.new_bytes > BLOCK_BYTES or read == rows:
                row_writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                picture_writer.write_batch(pictures.take_new())
                waiting.clear()


class Pictures:
    """The distinct pictures so far: `number` says which ones rows have, `take_new` returns those not taken yet."""

    def __init__(self):
        self.numbers: dict[bytes, int] = {}
        self.hashes, self.blank = array("q"), set()
        self.new, self.new_bytes = [], 0

    def take_new(self) -> pa.RecordBatch:
        """Returns (PICTURES) those that were not returned before."""
        taken = pa.record_batch([self.new, self.hashes[len(self.hashes) - len(self.new) :].tolist()], schema=PICTURES)
        self.new, self.new_bytes = [], 0
        return taken

    def number(self, column: pa.Array) -> tuple[list, list, list]:
        """Returns the columns `pictures`, `picture_hash` and `is_blank` of rows with these pictures."""
        numbers = []
        for images in column.to_pylist():
            try:
                numbers.append([self._number(content) for content in as_files(images)])
            except RowError:
                numbers.append(None)
        hashes = [self.hashes[of_row[0]] if of_row else 0 for of_row in numbers]
        return numbers, hashes, [bool(of_row) and len(of_row) == 1 and of_row[0] in self.blank for of_row in numbers]

    def _number(self, content: bytes) -> int:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        number = self.numbers.setdefault(digest, len(self.numbers))
        if number == len(self.hashes):
            self.hashes.append(hash_63(content))
            self.new.append(content)
            self.new_bytes += len(content)
            if is_blank(content):
                self.blank.add(number)
        return number


def as_json(column: pa.Array) -> pa.Array:
    """Returns conversations as JSON text; raises pa.ArrowInvalid for text that is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if any(is_text(column.type) for is_text in TEXT_TYPES):
        column.validate(full=True)
        return column.cast(pa.string())
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str)
             for value in column.to_pylist()]  # fmt: skip
    return pa.array(texts, pa.string())


def as_files(images) -> list[bytes]:
    """Returns the image files of a row: bytes, {"bytes", "path"}, or a list of them.

    Raises:
        RowError: If there is only a path to one, which is not followed: it may lead anywhere.
    """
    images = [image for image in (images if isinstance(images, list) else [images]) if image is not None]
    images = [image if isinstance(image, dict) else {"bytes": image} for image in images]
    if any(image["bytes"] is None and image.get("path") for image in images):
        raise RowError("only a path")
    return [image["bytes"] for image in images if image["bytes"] is not None]


def image_column(names: list[str]) -> str:
    """Returns the name of the image column."""
    return "image" if "image" in names and "image_bytes" not in names else "image_bytes"


def check_columns(path: Path, schema: pa.Schema, name: str):
    """Raises DataError unless the file has the required columns, once and of the right types."""
    foreign.check_names(path, schema.names)
    if not {"conversations", name} <= set(schema.names):
        is_known = forms.form_of_row(dict.fromkeys(schema.names)) is not None
        cure = f". This makes training data of it:\n  {foreign.command(path)}" if is_known else ""
        needed = "the columns conversations and image_bytes (or image)"
        raise DataError(f"{path} needs {needed}, it has {schema.names}{cure}")
    column = element = schema.field(name).type
    if any(is_list(element) for is_list in LIST_TYPES):
        element = element.value_type
    if pa.types.is_dictionary(element):
        element = element.value_type
    if pa.types.is_struct(element) and element.get_field_index("bytes") >= 0:  # {"bytes", "path"}, as `datasets` writes
        element = element.field("bytes").type
    if not any(is_bytes(element) for is_bytes in BYTES_TYPES):
        raise DataError(
            f"{path}: {name} must be a picture's bytes or a list of them, it is {column}. Of base64 text and of files' "
            f"names, this makes training data:\n  {foreign.command(path)}"
        )


def announce(path: Path, metadata: pq.FileMetaData, name: str, image_tokens: int, folder: Path):
    """Says what disk and memory bringing a file in takes; raises DataError where there is less."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    pictures, text = (
        sum(chunk.total_uncompressed_size for group in groups for chunk in chunks(group, column))
        for column in (name, "conversations")
    )
    kept = text + text * 7 // 10 + metadata.num_rows * (100 + 2 * image_tokens)  # with token ids, two bytes each
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    needed = f"up to {size(pictures)} for its pictures, each once, and about {size(kept)} for its rows"
    if free < pictures + kept:
        raise DataError(
            f"{path} takes {needed} in {folder}, which has {size(free)} free: make room, or set HF_HOME to another "
            "folder"
        )
    memory = max(
        sum(memory_to_read(chunk) for column in (name, "conversations") for chunk in chunks(group, column))
        for group in groups
    )
    available = available_memory()
    if memory > available:
        raise DataError(
            f"the row groups of {path} take up to {size(memory)} of memory to read, and {size(available)} are free: "
            f"end other programs; or run this command on a machine with more memory, and copy {folder} from there"
        )
    print(
        f"{display_path(path)} is read once into {folder} ({size(free)} free), where it takes {needed}; meanwhile its "
        f"row groups take up to {size(memory)} of memory",
        flush=True,
    )


def size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


def chunks(group: pq.RowGroupMetaData, name: str) -> list[pq.ColumnChunkMetaData]:
    """Returns a row group's chunks of a column, one for each of its parts."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return [column for column in columns if column.path_in_schema.partition(".")[0] == name]


def memory_to_read(chunk: pq.ColumnChunkMetaData) -> int:
    """Returns the bytes of memory that reading a chunk takes: of its dictionary, as the rest is read in small pages."""
    if not any("DICTIONARY" in encoding for encoding in chunk.encodings):
        return 0
    share = 1.0
    if chunk.has_dictionary_page:  # not every writer says where it is
        share = (chunk.data_page_offset - chunk.dictionary_page_offset) / chunk.total_compressed_size
    copies = 1 if chunk.compression == "UNCOMPRESSED" else 2  # the decoder copies what it gets decompressed, or mapped
    return int(copies * share * chunk.total_uncompressed_size)


def available_memory() -> float:
    """Returns the bytes of memory and swap that a process can still get; infinity where the system is not Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", math.inf) + sizes.get("SwapFree", 0)


def remove_former(path: Path, folder: Path):
    """Removes what was kept of the same file with other content."""
    for source in folder.parent.glob(f"*/{SOURCE}"):
        if source.parent != folder and source.read_text("utf-8", "surrogateescape") == str(path.resolve()):
            shutil.rmtree(source.parent, ignore_errors=True)
