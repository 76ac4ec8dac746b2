"""What people have: each kind of source gives these rows, or is refused with what was found and what is expected."""

import base64
import io
import json
import shlex
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import as_file, read_jsonl, turn

from common.errors import UsageError
from scripts.make_dataset import commands, main, parse_arguments, write_dataset

PICTURE = as_file(Image.new("RGB", (8, 8), "red"), "PNG")
TEXT = base64.b64encode(as_file(Image.linear_gradient("L"), "PNG")).decode()
DESCRIBED, ASKED = "Describe this picture.\n<image>", "What is this?\n<image>"
FLICKR30K = 'image_name| comment_number| comment\na.jpg| 0| A "big" cat, asleep .\na.jpg| 1 A dog\nb.jpg| 0| A hen .\n'
TURNS = [turn("user", "<image_01> or\n<image_00>?"), turn("assistant", "Both.")]
NUMBERED = [turn("user", "<image_00>\nWho?"), TURNS[1]]
SPOKEN = [{"user": "Who?", "assistant": "A cat."}, {"user": "Where?", "assistant": "Here."}]


def jsonl(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in {"1.png": PICTURE, "1.txt": b"A cat."}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def classes(described: bytes | None = None) -> bytes:
    """Returns a parquet of images and numbers of classes, with their names, or this, in the metadata of `datasets`."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [{"bytes": PICTURE, "path": None}] * 2, "label": [1, 0]}
    file = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return (
        parquet(pq.read_table(file).replace_schema_metadata({"huggingface": described}))
        if described
        else file.getvalue()
    )


CLASS = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": []}}}}'  # no name for any number
SHARD = parquet(pa.table({"image": [PICTURE], "caption": ["A cat."]}))
SOURCES = {  # name: files, with PICTURE for ""; the source; the turns' contents of each row
    "class folders": (
        {"src/red_fox/1.jpg": "", "src/ice-bear/IMG_1.jpg": "", "src/deep/猫/1.png": ""},
        "src",
        [("这是什么？\n<image>", "猫"), (ASKED, "ice bear"), (ASKED, "red fox")],
    ),
    "names": (
        {"src/red_car_012.jpg": "", "src/images/big-dog (2).png": "", "src/notes.md": "x"},
        "src",
        [(ASKED, "red car"), (ASKED, "big dog")],
    ),
    "flickr8k": ({"t.txt": 'a.jpg#0\t"A cat, asleep .\nb.jpg#1\tA hen .\n'}, "t.txt",
                 [(DESCRIBED, '"A cat, asleep .'), (DESCRIBED, "A hen .")]),
    "no header": ({"t.csv": 'a.jpg,"A cat, asleep."\n'}, "t.csv", [(DESCRIBED, "A cat, asleep.")]),
    "file,label": ({"t.csv": "file,label\na.jpg,3\n"}, "t.csv", [(ASKED, "3")]),
    "filename;class": ({"t.csv": "filename;class\na.jpg;红色\n"}, "t.csv", [("这是什么？\n<image>", "红色")]),
    "path,title": ({"t.csv": "id,path,title\n1,a.jpg,Кот\n"}, "t.csv", [(DESCRIBED, "Кот")]),
    "japanese": ({"t.csv": "img,comment\na.jpg,猫です\n"}, "t.csv", [(DESCRIBED, "猫です")]),
    "chinese": ({"t.csv": "image,caption\na.jpg,一只cat\n"}, "t.csv", [("描述这张图片\n<image>", "一只cat")]),
    "answers": (
        {"t.jsonl": jsonl(*({"image": "a.jpg", "question": "?", "answer": answer} for answer in (1, True, 2.5)))},
        "t.jsonl",
        [("?\n<image>", "1"), ("?\n<image>", "true"), ("?\n<image>", "2.5")],
    ),
    "images/": ({"t.csv": "image,caption\nc.jpg,A cat.\n", "Images/c.jpg": ""}, "t.csv", [(DESCRIBED, "A cat.")]),
    "captions in a folder": (
        {"src/captions.txt": "image,caption\nc.jpg,A cat.\n", "src/Images/c.jpg": ""},
        "src",
        [(DESCRIBED, "A cat.")],
    ),
    "fine vision": (
        {"t.jsonl": jsonl({"images": ["a.jpg", "b.jpg"], "texts": SPOKEN})},
        "t.jsonl",
        [("<image>\n<image>\nWho?", "A cat.", "Where?", "Here.")],
    ),
    "ms-swift": (
        {"t.jsonl": jsonl(
            {"system": "S", "history": [["<image>Who?", "A cat."]], "query": "Where?", "response": "Here."}
            | {"images": ["a.jpg"]},
            {"query": "Who?", "response": "I."})},
        "t.jsonl",
        [("S", "<image>Who?", "A cat.", "Where?", "Here."), ("Who?", "I.")],
    ),
    "minicpm": (
        {"t.json": json.dumps([{"image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}, "conversations": TURNS},
                               {"image": "a.jpg", "conversations": NUMBERED}])},
        "t.json",
        [("<image> or\n<image>?", "Both."), ("<image>\nWho?", "Both.")],
    ),
    "base64": (
        {"t.tsv": f"index\timage\tquestion\tA\tB\tC\tanswer\n0\t{TEXT}{'A' * 160_000}\tWho?\tcat\tdog\t\tB\n"},
        "t.tsv",
        [("Who?\nA. cat\nB. dog\n<image>", "B")],
    ),
    "parquet shards": ({"src/0.parquet": SHARD, "src/1.parquet": SHARD}, "src", [(DESCRIBED, "A cat.")] * 2),
    "tar shards": ({"src/0.tar": tar(), "src/1.tar": tar()}, "src", [(DESCRIBED, "A cat.")] * 2),
    "jsonl shards": (
        {"src/0.jsonl": jsonl({"image": "c.jpg", "text": "A cat."}), "src/c.jpg": ""},
        "src",
        [(DESCRIBED, "A cat.")],
    ),
    "classes of datasets": ({"t.parquet": classes()}, "t.parquet", [(ASKED, "dog"), (ASKED, "cat")]),
}  # fmt: skip


def write(folder, files: dict):
    for name, content in ({"a.jpg": "", "b.jpg": ""} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(content or PICTURE)


def make(folder, *flags) -> tuple:
    args = parse_arguments([*map(str, flags), "--to", str(folder / "made")])
    return write_dataset(args), args.to


def contents(path) -> list[tuple]:
    return [tuple(turn["content"] for turn in row["conversations"]) for row in read_jsonl(path)]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_gives_these_rows(tmp_path, name):
    files, source, rows = SOURCES[name]
    write(tmp_path, files)
    made, folder = make(tmp_path, tmp_path / source)
    assert made.left_out == [] and contents(folder / "train.jsonl") == rows


def test_a_wrong_row_of_flickr30k_is_left_out_and_a_question_of_the_user_s_is_asked(tmp_path):
    write(tmp_path, {"results.csv": FLICKR30K})
    made, folder = make(tmp_path, tmp_path / "results.csv", "--question", "Seen?")
    assert [place for place, _ in made.left_out] == ["line 3"]
    assert contents(folder / "train.jsonl") == [
        ("Seen?\n<image>", 'A "big" cat, asleep .'),
        ("Seen?\n<image>", "A hen ."),
    ]


@pytest.mark.parametrize(
    "name", ["IMG_1234.jpg", "DSC001.png", "0815.jpg", "2.jpg", "img-2_3.jpg", "10268_693b08cb0e.png"]
)
def test_a_camera_s_names_are_no_labels(tmp_path, name):
    write(tmp_path, {f"src/{name}": ""})
    with pytest.raises(UsageError, match="its name is not a label: give it one such as red_car_012.jpg"):
        make(tmp_path, tmp_path / "src")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"src": "id;width;height\n1;2;3\n"}, "src is of no known form. Its first line is id;width;height A source"),
        ({"src/notes.md": "x"}, "src is of no known form. A source is one of these"),
        ({"src": jsonl({"snapshot": "a.jpg", "words": "x"})}, "no known form has these fields: snapshot, words"),
        ({"src": parquet(pa.table({"pixels": [1]}))}, "no known form has these fields: pixels"),
        ({"src/train-0.parquet": SHARD, "src/test-0.parquet": SHARD}, "src holds several splits. Name the files"),
        ({"src": jsonl({"images": ["a.jpg"], "texts": [{"user": "Who?"}]})}, "KeyError('assistant'). A good row is"),
        ({"src": jsonl({"query": "Who?", "response": None})}, "turn 2 has no text as content"),
        ({"src": jsonl({"image": {"<image_00>": "a.jpg"}, "conversations": TURNS})}, "KeyError('<image_01>')"),
        (
            {"src": jsonl({"image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}, "conversations": NUMBERED})},
            "the text does not say where the picture <image_01> belongs",
        ),
        (
            {"src": jsonl({"image": {"<image_00>": "a.jpg"}, "conversations": [turn("user", "Who?"), TURNS[1]]})},
            "the text does not say where the picture <image_00> belongs",
        ),
        ({"src": classes(b"{")}, "src cannot be read: Expecting property name"),
        ({"src": classes(b"5")}, "src cannot be read: argument of type 'int'"),
        ({"src": classes(CLASS)}, "turn 2 has no text as content"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_was_found(tmp_path, files, words):
    write(tmp_path, files)
    with pytest.raises(UsageError) as error:
        make(tmp_path, tmp_path / "src")
    assert words in " ".join(str(error.value).split())


def test_a_mix_takes_shares_of_its_sources(tmp_path):
    write(tmp_path, {f"{name}.csv": "image,caption\n" + f"a.jpg,{name}\n" * 10 for name in "xyz"})
    x, y, z = (tmp_path / f"{name}.csv" for name in "xyz")
    _, folder = make(tmp_path, z, "--mix", f"{x}=0.3", f"{y}=1.0")
    taken = contents(folder / "train.jsonl")
    assert [sum(answer == name for _, answer in taken) for name in "xyz"] == [3, 10, 10]
    text = "".join(f"a.jpg,{number}\n" for number in range(100))
    x.write_text(f"image,caption\n{text}")
    chosen = [contents(make(tmp_path, "--mix", f"{x}=0.5", "--overwrite")[1] / "train.jsonl") for _ in range(2)]
    assert chosen[0] == chosen[1] and 49 <= len(chosen[0]) <= 51
    for flags in (["--mix", f"{x}=2"], ["--mix", str(x)], []):
        with pytest.raises(SystemExit, match="2"):
            make(tmp_path, *flags)


def test_the_commands_lead_from_the_data_to_an_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(
        tmp_path,
        {f"cats/{number}/x.png": as_file(Image.new("RGB", (8, 8), (number, 0, 0)), "PNG") for number in range(40)},
    )
    main([str(tmp_path / "cats"), "--to", str(tmp_path / "my cats")])
    printed = capsys.readouterr().out
    data, heldout = f"--data_path '{tmp_path}/my cats/train.jsonl'", f"--eval_data '{tmp_path}/my cats/heldout.jsonl'"
    printed_commands = printed.replace(" \\\n     ", "").split("\n\n  ")[1].splitlines()
    assert [shlex.split(line) for line in printed_commands] == [
        shlex.split(f"python {line}")
        for line in (
            f"trainer/train_tower.py {data} {heldout} --save_tower out/my_cats_tower",
            f"trainer/train_pretrain_vlm.py {data} {heldout} --from_weight llm --vision_model_path out/my_cats_tower "
            "--save_weight my_cats_pretrain --epochs 60",
            f"trainer/train_sft_vlm.py {data} {heldout} --from_weight my_cats_pretrain --save_weight my_cats_sft "
            "--epochs 60",
            f"eval_vlm.py --weight my_cats_sft {heldout}",
        )
    ]
    assert all(len(line) <= 80 for line in printed.splitlines() if str(tmp_path) not in line)


def test_without_held_out_rows_the_pictures_are_described(tmp_path):
    write(tmp_path, {"t.csv": "image,caption\na.jpg,A cat.\n"})
    made, folder = make(tmp_path, tmp_path / "t.csv")
    assert "eval_data" not in commands(folder, made)
    assert shlex.split(commands(folder, made))[-2:] == ["--image_dir", str(folder / "images")]
