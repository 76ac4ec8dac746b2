"""Sources read row by row: what is damaged is named with its place, and nothing is read ahead of its use."""

import gzip
import io
import json
import shutil
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import UsageError
from dataset.chat import RowError
from scripts.data import sources as dataset_sources
from scripts.data.sources import read_source

DOG = {"image": "a.jpg", "caption": "狗"}


@pytest.fixture
def source(tmp_path):
    """Returns a function that writes a source and reads it: [(place, value or reason)]."""

    def source(content: str | bytes, name="source"):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read(tmp_path / name)

    return source


def read(path):
    return [(place, f"bad: {row}" if isinstance(row, RowError) else row) for place, row in read_source(path)]


def tar(path, files: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_table_keeps_its_places_and_names_its_bad_rows(source):
    table = b'\xef\xbb\xbfimage,caption\r\na.jpg,"one\r\ntwo, ""three"""\r\n\r\nb.jpg\r\nc.jpg, "four"\r\ne.jpg,five'
    assert source(table) == [
        ("line 2", {"image": "a.jpg", "caption": 'one\r\ntwo, "three"'}),
        ("line 5", "bad: the first line has 2 fields, this one 1"),
        ("line 6", {"image": "c.jpg", "caption": "four"}),
        ("line 7", {"image": "e.jpg", "caption": "five"}),
    ]


@pytest.mark.parametrize("row", ['b.jpg,"two', '"b.jpg"x,two'])
def test_a_wrong_quote_would_swallow_the_rest_of_a_table_and_is_refused(source, row):
    with pytest.raises(UsageError, match="source, line 3: a quote is wrong or not closed"):
        source(f"image,caption\na.jpg,one\n{row}\nc.jpg,three\n")


@pytest.mark.parametrize("form", ["table", "list", "text beside a picture"])
def test_text_in_another_encoding_is_refused_or_a_bad_row(source, tmp_path, form):
    if form == "text beside a picture":
        for name in ("a", "b"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
            (tmp_path / f"{name}.txt").write_bytes("狗".encode("gbk" if name == "a" else "utf-8"))
        assert read(tmp_path) == [
            ("a.png", "bad: its .txt is not UTF-8"),
            ("b.png", {"image": ["b.png"], "caption": "狗"}),
        ]
    else:
        text = '[{"image": "a.jpg", "caption": "狗"}]' if form == "list" else "image,caption\na.jpg,ok\nb.jpg,狗"
        with pytest.raises(UsageError, match="source is not UTF-8 .*: save it as UTF-8"):
            source(text.encode("gbk"))


@pytest.mark.parametrize(
    "row",
    [
        "image\tcaption\r\na.jpg\t狗\r\n",
        json.dumps(DOG, ensure_ascii=False),
        json.dumps([DOG]),
        json.dumps(DOG, indent=1),
    ],
)
def test_utf_16_is_read_where_its_mark_says_so(source, tmp_path, row):
    """Excel's "Unicode text" and PowerShell's > write it."""
    assert [read for _, read in source(row.encode("utf-16"))] == [DOG]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("狗", encoding="utf-16")
    (tmp_path / "source").unlink()
    assert read(tmp_path) == [("a.png", {"image": ["a.png"], "caption": "狗"})]


def test_lines_that_are_no_rows(source):
    lines = b'\xef\xbb\xbf{"image": "a"}\n\n  \n[1]\n{"a": \n{"b": "\xff"}\n' + b'{"c":' * 100_000
    assert source(lines) == [
        ("line 1", {"image": "a"}),
        ("line 4", "bad: not a JSON object"),
        ("line 5", "bad: not JSON: Expecting value: line 1 column 6 (char 5)"),
        ("line 6", "bad: not UTF-8"),
        (
            "line 7",
            "bad: not JSON: maximum recursion depth exceeded while decoding a JSON object from a unicode string",
        ),
    ]


@pytest.mark.parametrize("chunk", [4, 7, 1 << 20])
def test_a_list_is_decoded_alike_in_chunks_of_any_size(source, monkeypatch, chunk):
    monkeypatch.setattr(dataset_sources, "CHUNK", chunk)
    rows = [{"image": "猫.jpg", "n": [1.5, {"a": '],"{'}, None, True]}, {}, {"text": "x" * 100}]
    for options in ({}, {"indent": 4}, {"ensure_ascii": False, "separators": (",", ":")}):
        read = source("\n " + json.dumps([*rows, 3], **options) + "\n")
        assert read == [
            *((f"row {n}", row) for n, row in enumerate(rows, start=1)),
            ("row 4", "bad: not a JSON object"),
        ]
    for broken in ('[{"a": 1}, {"b": ', '[{"a": 1}, {"b": tru}]', '[{"a": 1}', '[{"a": 1}, {"b": "\n"}]'):
        with pytest.raises(UsageError, match="source, row 2: broken JSON, or the file is cut off"):
            source(broken)


def test_a_long_broken_list_is_not_read_to_its_end(source, monkeypatch):
    monkeypatch.setattr(dataset_sources, "CHUNK", 10)
    monkeypatch.setattr(dataset_sources, "LONGEST_ROW", 100)
    with pytest.raises(UsageError, match="row 1: broken JSON"):
        source('[{"a" 1}, ' + '{"b": 2},' * 10_000)


def test_a_list_is_read_no_further_than_the_row_in_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_sources, "CHUNK", 1 << 10)
    path = tmp_path / "list.json"
    path.write_bytes(b'[{"image": "a.jpg", "caption": "x"}, ' + b" " * (1 << 15) + b"\xff")  # not UTF-8, if it is read
    rows = read_source(path)
    assert next(rows) == ("row 1", {"image": "a.jpg", "caption": "x"})
    with pytest.raises(UsageError, match="is not UTF-8"):
        next(rows)


def test_a_tar_s_rows_and_damage(tmp_path):
    files = [("d/1.jpg", b"one"), ("d/1.txt", "猫\n".encode()), ("d/2.png", b"two"), ("d/3.json", b"{}")]
    files += [("d/4.jpg", b"4"), ("d/4.json", b"{"), ("d/5.0.jpg", b"5"), ("d/5.1.jpg", b"6"), ("d/5.txt", b"both")]
    files += [("d/6.jpg", b"6"), ("d/6.a.txt", b"a"), ("d/6.b.txt", b"b"), ("d/7.jpg", b"7"), ("d/7.txt", b"\xff")]
    files += [("d/8.jpg", b"8"), ("d/8.txt", b"text"), ("d/8.json", b'{"caption": "json", "image": "8.jpg"}')]
    files += [("d/._8.jpg", b"of a Mac"), ("d/8.cls", b"3")]
    path = tar(tmp_path / "a.tar", files)
    assert read(path) == [
        ("d/1", {"image": [b"one"], "caption": "猫"}),
        ("d/2", "bad: a picture without a text"),
        ("d/3", "bad: a text without a picture"),
        ("d/4", "bad: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("d/5", {"image": [b"5", b"6"], "caption": "both"}),
        ("d/6", "bad: several texts whose names are the same up to the first dot"),
        ("d/7", "bad: its .txt is not UTF-8"),
        ("d/8", {"image": [b"8"], "caption": "text"}),
    ]


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize("end", [512 * 3 + 1, 512 * 4, 512 * 4 + 100])  # in a content, between two files, in a header
def test_a_tar_that_was_cut_off_is_refused(tmp_path, packed, end):
    path = tar(tmp_path / "a.tar", [("1.jpg", b"one"), ("1.txt", b"1"), ("2.jpg", b"two"), ("2.txt", b"2")])
    whole = path.read_bytes()
    path.write_bytes(packed(whole[: 512 * 9]))  # one block of zeros is enough
    assert len(read(path)) == 2
    path.write_bytes(packed(whole[:end]))
    with pytest.raises(UsageError, match="a.tar cannot be read: unexpected end of data. .*copy or download it again"):
        read(path)
    (tmp_path / "shards").mkdir()
    path.rename(tmp_path / "shards" / "a.tar")
    with pytest.raises(UsageError, match="a.tar cannot be read"):
        read(tmp_path / "shards")


def test_tarfile_does_not_keep_what_was_read(tmp_path, monkeypatch):
    kept, read_next = [], tarfile.TarFile.next

    def counted(archive):
        kept.append(len(archive.members))
        return read_next(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    assert len(read(tar(tmp_path / "a.tar", [(f"{number}.jpg", b"x") for number in range(50)]))) == 50
    assert len(kept) > 50 and max(kept) <= 1


def test_a_folder_names_what_has_no_counterpart(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/er/猫.webp", "lonely.png", "deep/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("a.txt", "b.txt", "deep/er/猫.TXT", "notes.txt"):
        (tmp_path / name).write_text(f"{name}\n", encoding="utf-8")
    assert read(tmp_path) == [
        ("a.jpg", {"image": ["a.jpg"], "caption": "a.txt"}),
        ("b.PNG", {"image": ["b.PNG"], "caption": "b.txt"}),
        ("lonely.png", "bad: a picture without a .txt of its name"),
        ("notes.txt", "bad: a text without a picture of its name"),
        ("deep/er/猫.webp", {"image": ["deep/er/猫.webp"], "caption": "deep/er/猫.TXT"}),
    ]


def test_splits_are_chosen_by_the_user(tmp_path):
    rows = datasets.Dataset.from_list([{"image_path": "a.jpg", "caption": "a"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError, match=r"holds 2 splits. Name the one to train on: .*two/train or .*two/test"):
        read(tmp_path / "two")
    wanted = [("row 1", {"image_path": "a.jpg", "caption": "a"})]
    assert read(tmp_path / "one") == read(tmp_path / "two" / "train") == wanted
    (tmp_path / "one" / "train" / "state.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "one")


SAVED = [
    *((name, text) for name in ("state.json", "dataset_info.json") for text in ("[]", "null", "5", "[" * 10_000, "")),
    *(("state.json", {"_split": value}) for value in (5, [1])),
    *(("state.json", {"_data_files": value}) for value in (5, [{}], [{"filename": "../outside.arrow"}])),
    *(("dataset_info.json", {"features": value}) for value in ("x", 5, {"caption": 5}, {"caption": {"_type": "x"}})),
    *(("dataset_dict.json", {"splits": value}) for value in (5, ["../other"])),
]


@pytest.mark.parametrize(("name", "content"), SAVED, ids=lambda value: str(value)[:40])
def test_a_saved_folder_that_is_damaged_or_leads_elsewhere_is_refused(tmp_path, name, content):
    datasets.Dataset.from_dict({"image": ["a.jpg"], "caption": ["a"]}).save_to_disk(tmp_path / "saved")
    shutil.copy(tmp_path / "saved/data-00000-of-00001.arrow", tmp_path / "outside.arrow")
    path = tmp_path / "saved" / name
    if name == "dataset_dict.json":  # of a folder with splits, which has none of the others
        (tmp_path / "saved/state.json").unlink()
        (tmp_path / "saved/dataset_info.json").unlink()
    if isinstance(content, dict):
        content = json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | content)
    path.write_text(content)
    with pytest.raises(UsageError, match="saved cannot be read: "):
        list(read_source(tmp_path / "saved"))


def test_a_parquet_is_read_in_small_batches(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [b"x"] * 1000, "caption": ["a"] * 1000}), tmp_path / "a.parquet")
    monkeypatch.setattr(dataset_sources, "BATCH", 10)
    sizes, iter_batches = [], pq.ParquetFile.iter_batches

    def counted(file, **options):
        for batch in iter_batches(file, **options):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    rows = read_source(tmp_path / "a.parquet")
    assert next(rows) == ("row 1", {"image": b"x", "caption": "a"}) and sizes == [10]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match="a.parquet cannot be read"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "source is empty"),
        (b"just a text\nof two lines", "source is of no known form"),
        (
            b"file,width\na.jpg,3\n",
            "Its first line is\n  file,width\n.* a table .* whose first line is image,caption or image,label",
        ),
        (b"\x89PNG\r\n\x1a\n", "source is of no known form"),
        ("Bild\n".encode("utf-16"), "Its first line is\n  Bild\n.*Text is UTF-8"),
        (b"PK\x03\x04" + b"\0" * 100, "of no known form"),
    ],
)
def test_unknown_forms_and_empty_sources_are_told_the_known_ones(source, content, words):
    with pytest.raises(UsageError, match=f"(?s){words}"):
        source(content)


def test_empty_folders(tmp_path):
    with pytest.raises(UsageError, match="is empty"):
        read(tmp_path)
