"""Sources read row by row: what is damaged is named with its place, and nothing is read ahead of its use."""

import io
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import UsageError
from dataset.conversation import RowError
from scripts.data import sources as dataset_sources
from scripts.data.sources import read_source


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
        ("line 5", "bad: 1 fields, but the first line has 2"),
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


def test_lines_that_are_no_rows(source):
    lines = b'\xef\xbb\xbf{"image": "a"}\n\n  \n[1]\n{"a": \n{"b": "\xff"}\n' + b'{"c":' * 100_000
    assert source(lines) == [
        ("line 1", {"image": "a"}),
        ("line 4", "bad: not a JSON object"),
        ("line 5", "bad: not JSON: Expecting value: line 1 column 6 (char 5)"),
        ("line 6", "bad: not JSON: 'utf-8' codec can't decode byte 0xff in position 7: invalid start byte"),
        (
            "line 7",
            "bad: not JSON: maximum recursion depth exceeded while decoding a JSON object from a unicode string",
        ),
    ]


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
        ("d/6", "bad: several texts of one name up to the first dot"),
        ("d/7", "bad: its .txt is not UTF-8"),
        ("d/8", {"image": [b"8"], "caption": "text"}),
    ]
    path.write_bytes(path.read_bytes()[: 512 * 3 + 100])  # within the second file
    with pytest.raises(UsageError, match="a.tar cannot be read: unexpected end of data"):
        read(path)


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
        ("image,caption\na.jpg,b\n".encode("utf-16"), "Text is UTF-8"),
        (b"PK\x03\x04" + b"\0" * 100, "of no known form"),
    ],
)
def test_unknown_forms_and_empty_sources_are_told_the_known_ones(source, content, words):
    with pytest.raises(UsageError, match=f"(?s){words}"):
        source(content)


def test_empty_folders(tmp_path):
    with pytest.raises(UsageError, match="is empty"):
        read(tmp_path)
