"""Each form of source becomes rows and pictures that training reads; what is held out, refused and reported."""

import base64
import io
import json
import os
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import read_jsonl, turn, write_jsonl

from common.errors import UsageError
from common.files import RECORD
from dataset import file_kinds
from dataset.lm_dataset import VLMDataset
from scripts.make_dataset import LARGEST_SIZE, Made, held_out, main, parse_arguments, write_dataset

NAMES = ["猫.png", "a b.jpg", "sub/c.png"]
TEXTS = ["A red cat, sitting.", '一只"狗"。\n它很大。', "Grüße"]
ASKED = "What is this?"
FIRST, LAST = f"<image>\n{ASKED}", f"{ASKED}\n<image>"


@pytest.fixture
def pictures(tmp_path):
    """A folder of three small pictures, one of them with a Chinese name; sources are written beside it."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        draw(folder / name, number)
    return folder


def draw(path, number: int):
    Image.frombytes("RGB", (4, 3), bytes(range(number, number + 36))).resize((40, 30)).save(path)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that runs the command in tmp_path; returns what it printed, and its error or ""."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments) -> tuple[str, str]:
        error = ""
        try:
            main(list(map(str, arguments)))
        except UsageError as refused:
            error = str(refused)
        return capsys.readouterr().out, error

    return run


def make(source, *flags):
    """Makes a data set in the folder `made` beside the source; returns what was made, and the folder."""
    to = ["--to", source.parent / "made"]
    args = parse_arguments(list(map(str, [source, *flags, *to])))
    return write_dataset(args), args.to


def read(path, tokenizer, images_path=None):
    return VLMDataset(path, images_path, tokenizer, 640, 4, cache_dir=path.parents[1] / "cache")


def dialogues(asked: str = FIRST) -> list[dict]:
    """The rows in this project's form."""
    rows = zip(NAMES, TEXTS, strict=True)
    return [{"image": name, "conversations": [turn("user", asked), turn("assistant", text)]} for name, text in rows]


def as_folder(pictures):
    for name, text in zip(NAMES, TEXTS, strict=True):
        (pictures / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8-sig")
    return pictures


def as_table(pictures, columns, delimiter=",", asked=()):
    rows = [columns, *([name, *asked, text] for name, text in zip(NAMES, TEXTS, strict=True))]
    lines = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path = pictures.with_name("rows.data")  # recognised by its content
    path.write_text("\r\n".join([*lines, ""]), encoding="utf-8-sig", newline="")
    return path


def llava(begin: str = "<image>\n", names=NAMES) -> list[dict]:
    rows = []
    for name, text in zip(names, TEXTS, strict=True):
        spoken = [{"from": "human", "value": f"{begin}{ASKED}"}, {"from": "gpt", "value": text}]
        rows.append({"id": 1, "image": name, "conversations": spoken})
    return rows


def messages(url) -> list[dict]:
    rows = []
    for name, text in zip(NAMES, TEXTS, strict=True):
        parts = [{"type": "image_url", "image_url": {"url": url(name)}}, {"type": "text", "text": ASKED}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        rows.append({"messages": [{"role": "user", "content": parts}, answer]})
    return rows


def as_list(pictures, rows, **options):
    path = pictures.with_name("rows.txt")
    path.write_text(json.dumps(rows, ensure_ascii=False, **options), encoding="utf-8-sig")
    return path


def as_lines(pictures, rows):
    return write_jsonl(pictures.with_name("rows.json"), rows)


def data_url(path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def as_tar(pictures, rows=None):
    path = pictures.with_name("shard.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        for number, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
            text = {"json": json.dumps(rows[number]).encode()} if rows else {"txt": text.encode()}
            for ending, content in {name.rpartition(".")[2]: (pictures / name).read_bytes(), **text}.items():
                member = tarfile.TarInfo(f"x/{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def as_saved(pictures, **columns):
    files = [{"bytes": (pictures / name).read_bytes(), "path": None} for name in NAMES]
    rows = datasets.Dataset.from_dict({"image": files, **columns}).cast_column("image", datasets.Image())
    rows.save_to_disk(pictures.with_name("saved"))
    return pictures.with_name("saved")


def in_base64(pictures) -> list[dict]:
    return [row | {"image": data_url(pictures / row["image"]).partition(",")[2]} for row in dialogues()]


def coco() -> dict:
    images = [{"id": number, "file_name": name, "height": 30} for number, name in enumerate(NAMES)]
    captions = [{"id": 7 * number, "image_id": number, "caption": text} for number, text in enumerate(TEXTS)]
    return {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": captions}


def as_object(pictures, content: dict, **options):
    path = pictures.with_name("captions.json")
    path.write_text(json.dumps(content, ensure_ascii=False, **options), encoding="utf-8")
    return path


def as_parquet(pictures, files=None):
    texts = [json.dumps(row["conversations"]) for row in dialogues()]
    files = files or [(pictures / name).read_bytes() for name in NAMES]
    pq.write_table(pa.table({"conversations": texts, "image_bytes": files}), pictures.with_name("rows.parquet"))
    return pictures.with_name("rows.parquet")


FORMS = {
    "folder": (as_folder, LAST),
    "csv": (lambda pictures: as_table(pictures, ["Image", "caption"]), LAST),
    "tsv": (lambda pictures: as_table(pictures, ["image", "caption"], "\t"), LAST),
    "semicolons": (lambda pictures: as_table(pictures, ["file_name", "text"], ";"), LAST),
    "questions": (lambda pictures: as_table(pictures, ["image", "question", "answer"], asked=[ASKED]), LAST),
    "llava": (lambda pictures: as_list(pictures, llava()), FIRST),
    "llava, indented": (lambda pictures: as_list(pictures, llava(), indent=2), FIRST),
    "llava without <image>": (lambda pictures: as_list(pictures, llava("")), FIRST),
    "llava, a list of names": (lambda pictures: as_list(pictures, llava(names=[[name] for name in NAMES])), FIRST),
    "llava lines": (lambda pictures: as_lines(pictures, llava()), FIRST),
    "messages": (
        lambda pictures: as_lines(
            pictures, [{"images": [row["image"]], "messages": row["conversations"]} for row in dialogues()]
        ),
        FIRST,
    ),
    "parts": (lambda pictures: as_lines(pictures, messages(lambda name: name)), FIRST),
    "parts of file: URLs": (
        lambda pictures: as_list(pictures, messages(lambda name: (pictures / name).as_uri())),
        FIRST,
    ),
    "parts of data: URLs": (
        lambda pictures: as_lines(pictures, messages(lambda name: data_url(pictures / name))),
        FIRST,
    ),
    "tar": (as_tar, LAST),
    "tar of captions": (lambda pictures: as_tar(pictures, [{"caption": text, "width": 40} for text in TEXTS]), LAST),
    "tar of dialogues": (lambda pictures: as_tar(pictures, llava()), FIRST),
    "saved captions": (lambda pictures: as_saved(pictures, text=TEXTS), LAST),
    "saved dialogues": (
        lambda pictures: as_saved(pictures, conversations=[row["conversations"] for row in llava()]),
        FIRST,
    ),
    "parquet": (as_parquet, FIRST),
    "own": (lambda pictures: as_lines(pictures, dialogues()), FIRST),
    "base64 text": (lambda pictures: as_lines(pictures, in_base64(pictures)), FIRST),
    "parquet of base64 text": (
        lambda pictures: as_parquet(pictures, [row["image"] for row in in_base64(pictures)]),
        FIRST,
    ),
    "names with backslashes": (
        lambda pictures: as_lines(pictures, [row | {"image": row["image"].replace("/", "\\")} for row in dialogues()]),
        FIRST,
    ),
    "coco": (lambda pictures: as_object(pictures, coco()), LAST),
    "coco, indented": (lambda pictures: as_object(pictures, coco(), indent=1), LAST),
    "an object with a list": (lambda pictures: as_object(pictures, {"version": 1, "data": llava()}, indent=2), FIRST),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_this_projects_own(pictures, tokenizer, form):
    build, asked = FORMS[form]
    expected = list(read(write_jsonl(pictures.with_name("own.jsonl"), dialogues(asked)), tokenizer, pictures))
    if form == "folder":  # its files are taken in the order of their names
        expected = [expected[1], expected[0], expected[2]]
    source = build(pictures)
    made, folder = make(source, "--images_path", pictures, "--question", ASKED)
    assert {path.name for path in folder.iterdir()} == {RECORD, "train.jsonl", "images"}
    assert (len(made.keys), made.left_out, len(list((folder / "images").iterdir()))) == (3, [], 3)
    data = read(folder / "train.jsonl", tokenizer)
    assert not data.bad_rows
    for sample, other in zip(data, expected, strict=True):
        assert sample.keys() == other.keys()
        assert all(torch.equal(sample[name], other[name]) for name in sample)


def test_several_pictures_of_a_row_and_rows_without_one(pictures, tokenizer):
    two = [turn("user", "<image> or <image>?"), turn("assistant", "Both.")]
    rows = [{"image": f"{NAMES[0]}, {NAMES[1]}", "conversations": two}, *dialogues()]
    rows += [{"image": NAMES[:2], "conversations": [turn("user", "Which?"), turn("assistant", "Both.")]}]
    rows += [{"conversations": [turn("user", "Hi."), turn("assistant", "Hello.")]}]
    source = as_lines(pictures, rows)
    rows[4]["conversations"][0]["content"] = "<image>\n<image>\nWhich?"
    expected = list(read(write_jsonl(pictures.with_name("own.jsonl"), rows), tokenizer, pictures))
    _, folder = make(source, "--images_path", pictures)
    data = read(folder / "train.jsonl", tokenizer)
    assert (len(data), len(list((folder / "images").iterdir()))) == (6, 3)
    for sample, other in zip(data, expected, strict=True):
        assert all(torch.equal(sample[name], other[name]) for name in sample)


def test_several_sources_are_put_together_and_a_picture_of_both_stands_once(pictures):
    table, lines = as_table(pictures, ["image", "caption"]), as_lines(pictures, [*dialogues(), {"a": 1}])
    made, folder = make(table, lines, "--images_path", pictures)
    rows = read_jsonl(folder / "train.jsonl")
    assert rows[0]["conversations"][0]["content"] == "Describe this picture.\n<image>"
    assert [row["image"] for row in rows[:3]] == [row["image"] for row in rows[3:]]
    assert {f"images/{path.name}" for path in (folder / "images").iterdir()} == {row["image"] for row in rows}
    assert (folder / "left_out.txt").read_text() == (
        "rows.json line 4: conversations is missing, and no known form has these fields: a\n"
    )


@pytest.fixture
def many(tmp_path):
    """Twelve pictures in forty rows, several of which are about two pictures."""
    (tmp_path / "many").mkdir()
    for number in range(12):
        draw(tmp_path / "many" / f"{number}.png", number)
    rows = []
    for number in range(40):
        names = [f"{number % 12}.png"] + [f"{number % 12 + 1}.png"] * (number % 12 in (3, 4, 8))
        asked = turn("user", "<image>" * len(names))
        rows.append({"image": names, "conversations": [asked, turn("assistant", str(number))]})
    return write_jsonl(tmp_path / "many" / "rows.jsonl", rows)


def names_of(path) -> set[str]:
    return {name for row in read_jsonl(path) for name in row["image"].split(", ")}


def answers_of(path) -> set[str]:
    return {row["conversations"][1]["content"] for row in read_jsonl(path)}


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_no_held_out_picture_is_trained_on_and_no_row_is_lost(many, share):
    made, folder = make(many, "--heldout", share)
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    assert names_of(train).isdisjoint(names_of(heldout)) and len(names_of(train) | names_of(heldout)) == 12
    assert answers_of(train) | answers_of(heldout) == {str(number) for number in range(40)}
    assert made.held_out == len(read_jsonl(heldout)) and max(1, share * 40 * 0.6) <= made.held_out <= 20


def test_the_same_pictures_are_held_out_in_any_order_and_under_any_name(many):
    _, folder = make(many, "--heldout", 0.2)
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    make(many, "--heldout", 0.2, "--overwrite")
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    held = answers_of(folder / "heldout.jsonl")
    for path in list(many.parent.glob("*.png")):
        path.rename(path.with_name(f"new_{path.name}"))
    rows = [row | {"image": [f"new_{name}" for name in row["image"]]} for row in read_jsonl(many)]
    write_jsonl(many, rows[::-1])
    make(many, "--heldout", 0.2, "--overwrite")
    assert answers_of(folder / "heldout.jsonl") == held


def test_how_many_rows_are_held_out():
    def count(keys, share):
        return int(held_out(Made(keys=keys), share).sum())

    assert [count(range(1, 1 + rows), 0.02) for rows in (1, 19, 20, 30, 100, 1000)] == [0, 0, 2, 3, 3, 20]
    assert count(range(1, 1001), 0) == 0
    assert count([5] * 100, 0.02) == 0  # all of them are about one picture
    assert count([1] * 5 + [2] * 5 + [3] * 5 + [4] * 5, 0.02) == 5  # one of four, with all of its rows
    assert count([number // 5 + 1 for number in range(100)], 0.02) == 15  # of three pictures
    assert count([0] * 90 + list(range(1, 11)), 0.02) == 3 and count([0] * 100, 0.02) == 0


def test_bad_rows_are_counted_by_reason_listed_and_left_out(pictures, run):
    rows = [dialogues()[number % 3] for number in range(195)]
    gone = [row | {"image": f"gone{number}.png"} for number, row in enumerate(dialogues())]
    source = as_lines(pictures, [*rows, *gone])
    with open(source, "ab") as file:
        file.write(b'{"half\n\n' + b'{"image": "\xff"}\n')
    flags = [source, "--to", "new data", "--images_path", pictures, "--heldout", 0]
    printed, error = run(*flags)
    folder = pictures.parent / "new data"
    report = " ".join(printed.split())
    assert f"{folder} rows 195: 195 to train on, 0 held out pictures 3, 0.00 MB" in report
    assert "left out 5 of 200 rows (2.5 %), all listed in left_out.txt there 3 rows no such" in report
    assert "no such picture: gone0.png (the first; others differ) line 196, line 197, line 198 1 row" in report
    assert "(--images_path names the folder of the pictures" in report
    assert "1 row not JSON: Unterminated string" in report and "1 row not UTF-8 line 201" in report
    assert "Training would start with this file: 195 usable rows." in printed
    assert "more than 1 % of the rows were left out: 5 of 200 rows. The others are written" in error
    assert len((folder / "left_out.txt").read_text().splitlines()) == 5
    assert all(len(line) <= 80 for line in printed.splitlines() if str(folder) not in line)


def test_what_is_there_is_not_overwritten(pictures):
    source = as_table(pictures, ["image", "caption"])
    _, folder = make(source, "--images_path", pictures)
    with pytest.raises(UsageError, match="is there already: --overwrite replaces it"):
        make(source, "--images_path", pictures)
    for name in ("mine.txt", "images/mine.jpg", "images/sub/mine.jpg", "train.jsonl"):  # the last as the user edited it
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
        with pytest.raises(UsageError, match=f"not replaced: it holds {name}, which this program did not write"):
            make(source, "--images_path", pictures, "--overwrite")
        assert (folder / name).read_text(encoding="utf-8") == "mine"
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    make(source, "--images_path", pictures, "--overwrite")
    before = (folder / "train.jsonl").read_bytes()
    for images_path in (pictures / "sub", folder / "images"):  # nothing is found there, or it would be deleted
        with pytest.raises(UsageError, match="none of 3 rows can be used|would replace the pictures"):
            make(source, "--images_path", images_path, "--overwrite")
    for inside in (folder / "train.jsonl", pictures.parent):
        with pytest.raises(UsageError, match="must not contain each other"):
            write_dataset(parse_arguments([str(inside), "--to", str(folder), "--overwrite"]))
    assert (folder / "train.jsonl").read_bytes() == before
    assert {path.name for path in pictures.parent.iterdir()} == {"pictures", "rows.data", "made"}


def test_files_of_another_form_in_a_folder_are_named(pictures, run):
    folder = as_folder(pictures)
    for name in ("a.csv", "b.csv", "sub/c.tar", ".hidden.csv", "LICENSE"):
        (folder / name).write_text("image,caption\n", encoding="utf-8")
    printed, error = run(folder, "--to", "made")
    expected = f"not read other files: 2 .csv, 1 LICENSE, 1 .tar in {folder}. To read one, name it"
    assert error == "" and expected.replace(" ", "") in "".join(printed.split())  # a long path is broken over lines
    for path in folder.rglob("*.txt"):
        path.unlink()
    as_table(pictures, ["image", "caption"]).rename(folder / "a.csv")
    (folder / "b.csv").unlink()
    printed, error = run(folder, "--to", "made", "--overwrite")  # the table is read
    assert error == "" and "other files: 1 LICENSE, 1 .tar in" in " ".join(printed.split())


def test_a_source_that_breaks_off_leaves_nothing(pictures):
    source = as_list(pictures, llava())
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(UsageError, match="row 3: broken JSON, or the file is cut off"):
        make(source, "--images_path", pictures)
    assert {path.name for path in pictures.parent.iterdir()} == {"pictures", "rows.txt"}


def test_no_source_or_caption_is_a_pipe_and_shards_are_read(pictures, tokenizer):
    """Training names the command."""
    os.mkfifo(pictures.with_name("pipe.csv"))
    with pytest.raises(UsageError, match="it is a pipe, not a file"):
        make(pictures.with_name("pipe.csv"))
    folder = as_folder(pictures)
    draw(folder / "last.png", 9)
    os.mkfifo(folder / "last.txt")
    made, _ = make(folder)
    assert (len(made.keys), [reason for _, reason in made.left_out]) == (
        3,
        ["its .txt cannot be read: it is a pipe, not a file"],
    )
    shards = pictures.with_name("my shards")
    shards.mkdir()
    as_parquet(pictures).rename(shards / "0.parquet")
    with pytest.raises(UsageError, match=rf"a folder of data files(.|\n)*make_dataset.py '{shards}' --to my_data"):
        read(shards, tokenizer)
    assert len(make(shards, "--overwrite")[0].keys) == 3


def test_training_names_the_command_for_what_it_does_not_read(pictures, tokenizer):
    lines = in_base64(pictures)[:1] + [dialogues()[2] | {"image": "sub\\c.png"}, dialogues()[0] | {"image": "a, 1.jpg"}]
    data = read(as_lines(pictures, lines), tokenizer, pictures)
    reasons = [row.reason for row in data.bad_rows]
    assert [words in reason for words, reason in zip(("base64", "backslashes", "comma"), reasons, strict=True)] == [
        True
    ] * 3
    assert all("python scripts/make_dataset.py FILE --to my_data" in reason for reason in reasons)
    for path in (
        as_object(pictures, coco(), indent=1),
        as_parquet(pictures, [row["image"] for row in in_base64(pictures)]),
    ):
        with pytest.raises(UsageError, match=f"python scripts/make_dataset.py {path} --to my_data"):
            read(path, tokenizer, pictures)


def test_large_sizes_leave_small_pictures_as_they_are(pictures):
    source = as_table(pictures, ["image", "caption"])
    made, _ = make(source, "--images_path", pictures, "--size", LARGEST_SIZE)
    assert (len(made.keys), made.left_out) == (3, [])


def test_flags_that_make_no_sense(pictures, capsys):
    source, to = as_table(pictures, ["image", "caption"]), ["--to", str(pictures.parent / "new")]
    for flags, words in {
        (source, "--size", 0): "--size: 0: must be from 1 to 4096",
        (source, "--size", 10**9): "--size: 1000000000: must be from 1 to",
        (source, "--heldout", 2): "--heldout: 2: must be from 0 to 0.5",
        (source, "--heldout", "nan"): "--heldout: nan: must be from 0 to 0.5",
        (): "required: SOURCE",
        ("--mix", "a.jsonl", "b=0.3"): "--mix: 'a.jsonl' lacks its share or its source: write a.jsonl=0.3",
        ("--mix", "b="): "--mix: 'b=' lacks",
        ("--mix", "=0.3"): "--mix: '=0.3' lacks",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            parse_arguments([*map(str, flags), *to])
        assert words in capsys.readouterr().err
    with pytest.raises(UsageError, match="--images_path: no such folder"):
        make(source, "--images_path", pictures / "none")
    with pytest.raises(UsageError, match="none.csv cannot be read: no such file"):
        make(pictures.parent / "none.csv")


def test_a_source_with_the_name_of_a_part_is_no_temporary_folder(pictures, run):
    source = as_folder(pictures).rename(pictures.with_name("photos.part"))
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    printed, error = run(source, "--to", source.with_name("photos"), "--heldout", 0)
    assert error == ""
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert {path.name for path in source.parent.iterdir()} == {"photos", "photos.part", "cache"}
    assert "--save_weight photos_sft --epochs 60" in printed  # not the quick start's sft_vlm


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"info": "x", "image": "a.png", "caption": "y"}\n{"image": "b.png"', file_kinds.LINES),
        ('{"images": [{"path": "a.png"}], "messages": []}', file_kinds.LINES),
        ('{"half\n{"image": "a.png", "caption": "y"}', file_kinds.LINES),
        ('{"image": "a.png",\n "caption": "y"}', file_kinds.OBJECT),
        (json.dumps(coco() | {"licenses": ["long"] * 9000}), file_kinds.OBJECT),
    ],
)
def test_one_object_is_told_from_an_object_a_line(tmp_path, text, form):
    (tmp_path / "rows.json").write_text(text)
    assert file_kinds.kind_of_file(tmp_path / "rows.json") == form
