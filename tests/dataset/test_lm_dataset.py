"""Rows of a jsonl or parquet file to samples, samples to batches, and the reports of bad rows."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import tiny_vlm
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from common.errors import UsageError
from common.paths import ROOT
from dataset.chat import ChatEncoder
from dataset.lm_dataset import BadRow, VLMCollator, VLMDataset
from dataset.pictures import PictureError, load_picture

SHIPPED = ROOT / "model" / "tokenizer"
NAMES = ["a.png", "b.png", "图/c.png"]
KEYS = ["input_ids", "labels", "image_starts", "pixel_values"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(SHIPPED))


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with three images, each of one shade, in images/."""
    for shade, name in zip((50, 100, 150), NAMES, strict=True):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (shade, 0, 0)).save(path)
    return tmp_path


def row(question="hi", answer="yes", image=None):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns} if image is None else {"conversations": turns, "image": image}


def line(value):
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


SAMPLES = [
    row("描述这张图片\n<image>", "一个红色的圆形。", "a.png"),
    row("no picture @", "right"),
    row("<image>@<image> and <image>", "three", "图/c.png, b.png,a.png"),
]


def build(folder, rows, tokenizer, name="data.jsonl", **options):
    """Writes the rows (bytes as they are) and reads them, with a cache of its own."""
    lines = [value if isinstance(value, bytes) else line(value) for value in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return opened(folder, tokenizer, name, **options)


def opened(folder, tokenizer, name="data.jsonl", max_length=640, image_tokens=196):
    return VLMDataset(folder / name, folder / "images", tokenizer, max_length, image_tokens, cache_dir=folder / "cache")


def build_parquet(folder, conversations, image_bytes, tokenizer, name="data.parquet"):
    pq.write_table(pa.table({"conversations": conversations, "image_bytes": image_bytes}), folder / name)
    return VLMDataset(folder / name, None, tokenizer, 640, 196, cache_dir=folder / "cache")


def answers(data, tokenizer):
    """Returns what each sample learns, as text."""
    labels = [data[index]["labels"] for index in range(len(data))]
    return [tokenizer.decode(sample[sample != -100]).removesuffix("<|im_end|>\n") for sample in labels]


def assert_same(samples, others):
    for sample, other in zip(samples, others, strict=True):
        assert list(sample) == list(other) == KEYS
        assert all(torch.equal(sample[key], other[key]) and sample[key].dtype == other[key].dtype for key in KEYS)


@pytest.fixture
def encodings(monkeypatch):
    """Returns a list that gets the number of conversations of each tokenisation."""
    counts, encode = [], ChatEncoder.encode

    def counted(self, conversations, **options):
        counts.append(len(conversations))
        return encode(self, conversations, **options)

    monkeypatch.setattr(ChatEncoder, "encode", counted)
    return counts


def test_a_sample(folder, tokenizer):
    data = build(folder, SAMPLES, tokenizer)
    chats = ChatEncoder(tokenizer, 196).encode([value["conversations"] for value in SAMPLES])
    assert (len(data), data.row_count, data.bad_rows, data.image_count) == (3, 3, [], 4)
    for sample, chat, shades in zip(data, chats, ([50], [], [150, 100, 50]), strict=True):
        length = len(chat.input_ids)
        labels = torch.full((length,), -100)
        for start, end in chat.learned:
            labels[start:end] = torch.tensor(chat.input_ids[start:end])
        assert list(sample) == KEYS
        assert torch.equal(sample["input_ids"], torch.tensor(chat.input_ids))
        assert torch.equal(sample["labels"], labels)
        assert sample["pixel_values"].shape == (len(shades), 3, 224, 224)
        assert sample["pixel_values"][:, 0, 100, 100].tolist() == shades
        assert sample["image_starts"].tolist() == chat.image_starts
        assert [sample[key].dtype for key in KEYS] == [torch.int64, torch.int64, torch.int64, torch.uint8]
    assert data.lengths.tolist() == [len(chat.input_ids) for chat in chats]
    assert data.column("learned_tokens").tolist() == [sum(end - start for start, end in chat.learned) for chat in chats]


def test_indices(folder, tokenizer):
    rows = [row(answer=str(number)) if number % 3 else b"bad" for number in range(20)]
    data = build(folder, rows, tokenizer)
    good = [str(number) for number in range(20) if number % 3]
    assert answers(data, tokenizer) == good
    assert_same(data.__getitems__([5, 0, 5, -1]), [data[5], data[0], data[5], data[len(good) - 1]])
    assert data.__getitems__([]) == []
    for index in (len(good), -len(good) - 1):
        with pytest.raises(IndexError):
            data[index]


def test_parquet_gives_the_same_samples_as_jsonl(folder, tokenizer):
    expected = list(build(folder, SAMPLES, tokenizer))
    turns = [value["conversations"] for value in SAMPLES]
    pictures = {name: (folder / "images" / name).read_bytes() for name in NAMES}
    lists = [[pictures["a.png"]], None, [pictures[name] for name in reversed(NAMES)]]
    as_text = [json.dumps(value, ensure_ascii=False) for value in turns]
    large = pa.large_list(pa.large_binary())
    for number, (conversations, image_bytes) in enumerate(
        [
            (as_text, pa.array(lists, pa.list_(pa.binary()))),
            (turns, pa.array([lists[0], [], lists[2]], pa.list_(pa.binary()))),
            (pa.array(as_text, pa.large_string()), pa.array([lists[0], [None], [*lists[2], None]], large)),
        ]
    ):
        data = build_parquet(folder, conversations, image_bytes, tokenizer, f"{number}.parquet")
        assert data.bad_rows == []
        assert_same(data, expected)
    bare = build_parquet(folder, as_text[:2], pa.array([pictures["a.png"], None], pa.binary()), tokenizer)
    assert_same(bare, expected[:2])
    text_only = build_parquet(folder, as_text[1:2], pa.array([None]), tokenizer, "text_only.parquet")
    assert_same(text_only, expected[1:2])


def test_bad_rows_and_broken_pictures_of_a_parquet_file(folder, tokenizer):
    picture = (folder / "images" / "a.png").read_bytes()
    turns = [row("<image>", "good"), row("<image>", "null"), row("<image><image>"), row("hi"), row("<image>"), None]
    conversations = [value and json.dumps(value["conversations"]) for value in turns]
    data = build_parquet(folder, conversations, [[picture], [None], [picture], [picture], [b"x"], []], tokenizer)
    assert data.bad_rows == [
        BadRow(2, "1 <image> in the text, but 0 picture(s)"),
        BadRow(3, "2 <image> in the text, but 1 picture(s)"),
        BadRow(6, "conversations is missing or not a list of turns"),
    ]
    assert data[0]["pixel_values"].shape == (1, 3, 224, 224)
    with pytest.raises(PictureError, match="row 5, picture 1: not a picture"):
        data[2]


@pytest.mark.parametrize("image_bytes", [["../a.png"], [["../a.png"]], [5]])
def test_a_parquet_column_of_another_type_is_refused(folder, tokenizer, image_bytes):
    # Above all text, which would be read as a path.
    with pytest.raises(UsageError, match="image_bytes must be a picture's bytes or a list of them"):
        build_parquet(folder, [json.dumps(row("<image>")["conversations"])], image_bytes, tokenizer)


def test_small_squares_of_one_size_in_a_batch_may_stay_as_they_are(tmp_path, tokenizer):
    """The model enlarges them to the same bytes; in a batch with others they come at the tower's size."""
    sizes, names = [(100, 100), (100, 100), (90, 90), (300, 200)], [f"{number}.png" for number in range(4)]
    (tmp_path / "images").mkdir()
    for number, (size, name) in enumerate(zip(sizes, names, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    rows = [row("<image>", "yes", name) for name in names] + [row("<image><image>", "two", "0.png,2.png"), row()]
    data, model = build(tmp_path, rows, tokenizer), tiny_vlm()
    for indices, size in (([0, 1, 5], 100), ([0, 2], 224), ([0, 1, 3], 224), ([1, 4], 224), ([5], 224)):
        small, whole = (VLMCollator()(of.__getitems__(indices)) for of in (data.changed(leaves_small=True), data))
        assert small["pixel_values"].shape[-1] == size and whole["pixel_values"].shape[-1] == 224
        assert torch.equal(model.encode_images(small["pixel_values"]), model.encode_images(whole["pixel_values"]))


def test_collate_takes_any_mix_of_pictures(folder, tokenizer):
    samples = list(build(folder, SAMPLES, tokenizer))
    for order in ([0, 1, 2], [1], [1, 1], [2, 0], [1, 2, 1, 0]):
        chosen = [samples[index] for index in order]
        batch = VLMCollator(pad_token_id=7)(chosen)
        longest = max(len(sample["input_ids"]) for sample in chosen)
        assert batch["input_ids"].shape == batch["labels"].shape == (len(order), longest)
        for number, sample in enumerate(chosen):
            length = len(sample["input_ids"])
            assert torch.equal(batch["input_ids"][number, :length], sample["input_ids"])
            assert torch.equal(batch["labels"][number, :length], sample["labels"])
            assert (batch["input_ids"][number, length:] == 7).all()
            assert (batch["labels"][number, length:] == -100).all()
        assert torch.equal(batch["pixel_values"], torch.cat([sample["pixel_values"] for sample in chosen]))
        starts = [[number, start] for number, sample in enumerate(chosen) for start in sample["image_starts"].tolist()]
        assert batch["image_starts"].tolist() == starts
        learned = torch.cat([sample["labels"][sample["labels"] != -100] for sample in chosen])
        assert torch.equal(batch["labels"].flatten()[batch["learned_positions"]], learned)
        assert batch["skipped"] == []


def test_collate_rounds_up_skips_broken_pictures_and_takes_empty_batches(folder, tokenizer):
    samples = list(build(folder, SAMPLES, tokenizer))
    error = PictureError("x.png", "cut off")
    assert VLMCollator(multiple=64)([samples[0], error, samples[2]])["input_ids"].shape == (2, 640)
    batch = VLMCollator()([error, samples[0], error])
    assert (batch["skipped"], len(batch["input_ids"])) == ([error, error], 1)
    assert batch["image_starts"].tolist() == [[0, samples[0]["image_starts"].item()]]
    for nothing, skipped in (([], []), ([error], [error])):
        batch = VLMCollator(multiple=64)(nothing)
        assert batch["skipped"] == skipped
        assert batch["input_ids"].shape == batch["labels"].shape == (0, 0)
        assert "pixel_values" not in batch
        assert batch["image_starts"].shape == (0, 2)
        assert batch["learned_positions"].shape == (0,)
        assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "image_starts", "learned_positions"))


def test_a_loader_with_workers_goes_on_past_broken_pictures(folder, tokenizer):
    (folder / "images" / "text.jpg").write_text("not a picture")
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "a.png").read_bytes()[:50])
    pictures = ["a.png", "text.jpg", "b.png", "cut.png", "a.png, text.jpg", "cut.png", "text.jpg"]
    rows = [row("<image>" * len(image.split()), f"answer {number}", image) for number, image in enumerate(pictures)]
    data = build(folder, [*rows, row("no picture", "answer 7")], tokenizer)
    with pytest.raises(PictureError, match=r"text\.jpg: not a picture"):
        data[1]
    order = [[0, 1, 2], [3, 4], [5, 6, 7], []]
    batches = list(DataLoader(data, batch_sampler=order, num_workers=2, collate_fn=VLMCollator()))
    skipped = [[error.name for error in batch["skipped"]] for batch in batches]
    assert skipped == [["text.jpg"], ["cut.png", "text.jpg"], ["cut.png", "text.jpg"], []]
    texts = ["".join(tokenizer.decode(batch["labels"][batch["labels"] != -100])) for batch in batches]
    assert texts == ["answer 0<|im_end|>\nanswer 2<|im_end|>\n", "", "answer 7<|im_end|>\n", ""]
    assert [len(batch.get("pixel_values", ())) for batch in batches] == [2, 0, 0, 0]


LONG = "a long text " * 200
BAD_ROWS = [
    (b"{", "not JSON"),
    (b'{"conversations": ' + b"[" * 100_000, "not JSON"),
    (b"[1]", "not a JSON object"),
    ({"image": "a.png"}, "conversations is missing"),
    (row("<image>", "x", "a.png")["conversations"], "not a JSON object"),
    ({"conversations": row()["conversations"][::-1]}, "turn 1 is of role 'assistant', expected 'user'"),
    (row(answer=None), "turn 2 has no text as content"),
    ({"conversations": row()["conversations"][:1]}, "no assistant turn"),
    (row(answer=" "), "turn 2: the answer is empty"),
    (row("<image>"), "1 <image> in the text, but 0 picture(s)"),
    (row("hi", image="a.png, b.png"), "0 <image> in the text, but 2 picture(s)"),
    (row("<image>", "x", "a.png, b.png"), "1 <image> in the text, but 2 picture(s)"),
    (row("hi", "<image>"), "turn 2: <image> is in a turn of role 'assistant'"),
    (row("<image>", "x", "nowhere.png"), "no such picture: nowhere.png"),
    (row("<image><image>", "x", "a.png, 图"), "no such picture: 图"),
    *(
        (row("<image>", "x", name), "the picture's path leaves images_path")
        for name in ("../data.jsonl", "/etc/passwd", "C:\\x", "a\\..\\..\\b")
    ),
    (row("<image>", "x", 5), "image must be a picture's name, a list of names or empty"),
    (row(LONG + "<image>", "x", "a.png"), "an image is cut off: it ends at token"),
    (row(LONG), "nothing left to learn"),
    (b'{"conversations": "\\ud800"}', "conversations is not JSON"),
    (json.dumps(row("\ud800")).encode(), "turn 1 holds half a surrogate pair"),
    (json.dumps(row("<image>", "x", "\ud800.png")).encode(), "a picture's name holds half a surrogate pair"),
    (line(row()).replace(b"hi", b"\xff"), "the line is not UTF-8"),
    (line(row()).decode().encode("utf-16"), "not UTF-8"),
]


def test_bad_rows_are_skipped_with_line_and_reason(folder, tokenizer):
    lines, expected = [], {}
    for number, (bad, reason) in enumerate(BAD_ROWS):
        lines += [row(answer=f"good {number}"), b" \t"[: number % 3], bad]
        expected[len(lines)] = reason
        expected |= {len(lines) + 1: reason} if b"\n" in (bad if isinstance(bad, bytes) else b"") else {}
    data = build(folder, [*lines, row(answer="last")], tokenizer, max_length=500)
    assert [bad.line for bad in data.bad_rows] == list(expected)
    for bad, reason in zip(data.bad_rows, expected.values(), strict=True):
        assert reason in bad.reason
        bad.reason.encode("utf-8")
    assert answers(data, tokenizer) == [f"good {number}" for number in range(len(BAD_ROWS))] + ["last"]
    assert data.row_count == 2 * len(BAD_ROWS) + 1  # blank lines do not count


def test_line_numbers_are_those_of_the_file(folder, tokenizer):
    """With Windows line ends, a byte order mark, no last newline, and Unicode separators inside a text."""
    tricky = row("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "one")
    content = b"\xef\xbb\xbf" + b"\r\n".join([line(tricky), b"", b"bad", line(row(answer="two"))])
    (folder / "data.jsonl").write_bytes(content)
    data = opened(folder, tokenizer)
    assert answers(data, tokenizer) == ["one", "two"]
    assert [bad.line for bad in data.bad_rows] == [3]
    expected = ChatEncoder(tokenizer, 196).encode([tricky["conversations"]])[0].input_ids
    assert data[0]["input_ids"].tolist() == expected


def test_cut_rows_are_counted(folder, tokenizer):
    data = build(folder, [row(answer=LONG), row(), row(answer=LONG)], tokenizer, max_length=50)
    assert len(data) == 3 and "2 rows are cut at max_seq_len" in data.summary
    assert data.lengths.tolist() == [50, data.lengths[1], 50]
    assert data[0]["labels"][-1] == data[0]["input_ids"][-1]


def test_an_unchanged_file_is_tokenised_once_but_its_pictures_are_checked_anew(folder, tokenizer, encodings):
    rows = [row("<image>", "here", "a.png"), row("<image>", "later", "later.png")]
    data = build(folder, rows, tokenizer)
    assert data.bad_rows == [BadRow(2, "no such picture: later.png")]
    assert sum(encodings) == 2
    shutil.copy(folder / "images" / "a.png", folder / "images" / "later.png")
    (folder / "images" / "a.png").unlink()
    data = opened(folder, tokenizer)
    assert data.bad_rows == [BadRow(1, "no such picture: a.png")]
    assert answers(data, tokenizer) == ["later"]
    assert sum(encodings) == 2


def test_a_changed_file_length_or_tokenizer_gives_changed_rows(folder, tokenizer, encodings):
    first = build(folder, [row(answer=LONG)], tokenizer, max_length=60)
    assert len(opened(folder, tokenizer, max_length=70)[0]["input_ids"]) == 70
    tokenizer_json = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer_json["model"]["merges"] = tokenizer_json["model"]["merges"][:100]
    shutil.copytree(SHIPPED, folder / "other")
    (folder / "other" / "tokenizer.json").write_text(json.dumps(tokenizer_json), encoding="utf-8")
    other = AutoTokenizer.from_pretrained(str(folder / "other"))
    of_other = opened(folder, other, max_length=60)
    assert of_other[0]["input_ids"].tolist() != first[0]["input_ids"].tolist()
    changed = build(folder, [row(answer="changed"), row(answer="and longer")], tokenizer, max_length=60)
    assert answers(changed, tokenizer) == ["changed", "and longer"]
    assert sum(encodings) == 5
    fingerprints = [data.rows._fingerprint for data in (first, of_other, changed)]
    assert len(set(fingerprints)) == 3


def test_several_processes_give_the_same_rows(folder, tokenizer, monkeypatch):
    rows = [row(f"{number} <|im_end|>\n<|im_start|>assistant\n", "<|im_end|>") for number in range(10)] + [b"bad"]
    one = build(folder, rows, tokenizer, "one.jsonl")
    monkeypatch.setattr("dataset.rows.ROWS_PER_PROCESS", 6)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    two = build(folder, rows, tokenizer, "two.jsonl")
    assert len(two.rows.cache_files) == 2
    assert_same(two, one)
    assert one.bad_rows == two.bad_rows
    assert [bad.line for bad in two.bad_rows] == [11]


def test_memory_does_not_grow_with_rows(folder, tokenizer):
    picture = (folder / "images" / "a.png").read_bytes()
    sizes, allocated = {}, {}
    for count in (20, 2000):
        conversations = [json.dumps(row("<image>", str(number))["conversations"]) for number in range(count)]
        before = pa.total_allocated_bytes()
        data = build_parquet(folder, conversations, [picture] * count, tokenizer, f"{count:04}.parquet")
        allocated[count] = pa.total_allocated_bytes() - before
        assert data.rows.cache_files
        assert data.image_files.cache_files
        assert all(Path(file["filename"]).is_relative_to(folder / "cache") for file in data.rows.cache_files)
        sizes[count] = len(pickle.dumps(data))  # what a spawned worker gets
        copied = pickle.loads(pickle.dumps(data))
        assert_same([copied[count - 1]], [data[count - 1]])
    assert data.rows.data.nbytes > 500_000
    assert allocated[2000] - allocated[20] < 50_000
    assert sizes[2000] - sizes[20] < 8 * 1980 + 200  # eight bytes per row


def test_a_pickled_copy_reads_the_same_after_bad_rows(folder, tokenizer):
    data = build(folder, [b"bad", row(answer="1"), b"bad", row("<image>", "2", "a.png")], tokenizer)
    assert_same(pickle.loads(pickle.dumps(data)), data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such data file"),
        ("data.csv", b"image,caption", "is a table"),
        ("data.txt", b"a,b", "neither .jsonl nor .parquet"),
        ("list.json", b"\xef\xbb\xbf\n [{}]", "is one JSON list"),
        ("data.jsonl", b"", "is empty"),
        ("data.parquet", b"PAR1 not really", "cannot be read: .*Parquet"),
    ],
)
def test_an_unusable_data_file_is_named(folder, tokenizer, name, content, message):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}.*{message}|{message}.*{name}"):
        opened(folder, tokenizer, name)


def test_a_parquet_file_without_the_columns_is_named(folder, tokenizer):
    pq.write_table(pa.table({"conversations": ["[]"], "image": ["a.png"]}), folder / "data.parquet")
    with pytest.raises(UsageError, match="image must be a picture's bytes or a list of them"):
        opened(folder, tokenizer, "data.parquet")
    pq.write_table(pa.table({"conversations": ["[]"], "picture": ["a.png"]}), folder / "data.parquet")
    with pytest.raises(UsageError, match=r"needs the columns conversations and image_bytes .*, it has .*'picture'"):
        opened(folder, tokenizer, "data.parquet")


def test_a_missing_folder_of_pictures_is_named(folder, tokenizer):
    shutil.rmtree(folder / "images")
    with pytest.raises(UsageError, match="names pictures, but their folder is missing: .*images"):
        build(folder, SAMPLES, tokenizer)
    assert len(build(folder, [row()], tokenizer, "text_only.jsonl")) == 1


def test_nothing_but_blank_lines(folder, tokenizer):
    data = build(folder, [b"", b"  "], tokenizer)
    assert (len(data), data.row_count, data.bad_rows, data.image_count) == (0, 0, [], 0)


@pytest.mark.parametrize("inner", ["[1] data", "wh?t", "st*r", ".hidden", "100% {x}"])
def test_a_path_is_not_a_glob_pattern(folder, tokenizer, inner):
    for name in ("wh?t", "what", "st*r", "star", inner):
        (folder / name).mkdir(exist_ok=True)
        build(folder, [row(answer=name)], tokenizer, f"{name}/data.jsonl")
    assert answers(opened(folder, tokenizer, f"{inner}/data.jsonl"), tokenizer) == [inner]


def test_a_picture_is_that_of_load_picture(folder, tokenizer):
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "noise.jpg")
    data = build(folder, [row("<image>", "noise", "noise.jpg")], tokenizer)
    assert torch.equal(data[0]["pixel_values"][0], load_picture(folder / "images" / "noise.jpg"))


def test_an_edited_file_of_the_same_size_and_time_is_read_anew(folder, tokenizer):
    """As `rsync -t` and `cp -p` leave it."""
    path = folder / "data.jsonl"
    before = build(folder, [row(answer="cats")] * 3, tokenizer)
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"cats", b"dogs"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = opened(folder, tokenizer)
    assert path.stat().st_size == stat.st_size
    assert after.content_sha256 != before.content_sha256
    assert answers(after, tokenizer) == ["dogs"] * 3
