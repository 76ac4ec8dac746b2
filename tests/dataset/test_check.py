"""What `python -m dataset.check` says about a data file, and that its exit status is what training would do."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import (
    PICTURES,
    PRETRAIN,
    PRETRAIN_ROWS,
    ROOT,
    TOKENIZER,
    pretrain_row,
    read_jsonl,
    sft_row,
    turn,
)
from tiny_models import save_tokenizer_3v
from transformers import AutoTokenizer

from dataset.chat import SYSTEM_PROMPT
from dataset.check import by_reason

pytest_plugins = ["tiny"]
CHECK = ROOT / "dataset/check.py"
WOULD_START, WOULD_REFUSE = "Training would start with this file: ", "Training would refuse this file: "


@pytest.fixture
def check(world, tmp_path):
    """Checks a file of these rows (a path, dicts, or lines as they are) in some other folder than the project's."""

    def check(rows, *flags, **how):
        path = rows
        if isinstance(rows, list):
            lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        flags = ["--images_path", world.images, "--tokenizer_path", TOKENIZER, *flags]
        return world.run(CHECK, path, *flags, cwd=tmp_path, **how)

    return check


def words(text: str) -> str:
    """The report without its layout: lines joined, runs of spaces as one."""
    return " ".join(text.split())


def row(answer="红色。", asked="描述<image>", image="0.jpg") -> dict:
    return {"conversations": [turn("user", asked), turn("assistant", answer)]} | ({"image": image} if image else {})


def test_a_good_file(check, world):
    done = check(world.root / "pretrain.jsonl").passed()
    report = words(done.out)
    assert f"rows {PRETRAIN_ROWS}: {PRETRAIN_ROWS} good, 0 bad " in report
    assert f"pictures {PICTURES} files, shown {PRETRAIN_ROWS} times; pictures by row: 1 in {PRETRAIN_ROWS}" in report
    assert "cut at 640 nothing (the longest row has " in report
    assert "tokenizer model/tokenizer " in report
    assert "duplicates none" in report
    assert "bad rows" not in done.out
    assert "broken pictures:" not in done.out
    assert done.out.endswith(f"\n{WOULD_START}{PRETRAIN_ROWS} usable rows.\n")
    assert all(len(line) <= 80 for line in done.out.splitlines() if str(world.root) not in line)


def test_the_default_tokenizer(world):
    done = world.run(CHECK, world.root / "sft.jsonl", "--images_path", world.images, cwd=ROOT)
    assert WOULD_START in done.passed().out
    assert re.search(r"tokenizer +model/tokenizer(_minimind2)?\n", done.out)


def test_the_newest_tokenizer_is_taken_where_it_alone_was_downloaded(world, tmp_path):
    alone = f"import common.paths as paths\npaths.TOKENIZER_3V_DIR = paths.Path({str(save_tokenizer_3v(tmp_path))!r})\n"
    alone += "paths.TOKENIZER_DIR = paths.ROOT / 'nowhere'"
    files = [world.root / "sft.jsonl", "--images_path", world.images]
    said = world.run(CHECK, *files, hook=alone).passed().out
    assert str(tmp_path) in "".join(said.split())  # a long path is broken over lines


def test_tokens_and_learned_share_counted_by_hand(check):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers, asked = ["蓝色的方形。", "在左边。"], "描述"
    around = 2 + count("\n")  # <|im_start|> ... <|im_end|>\n
    learned = sum(count(answer) + 1 + count("\n") for answer in answers)
    system, user = count(f"system\n{SYSTEM_PROMPT}"), count(f"user\n{asked}")
    tokens = 196 + sum(3 * around + system + user + count("assistant\n") + count(answer) for answer in answers)
    rows = [row(answers[0], f"{asked}<image>"), row(answers[1], asked, image=None)]
    report = words(check(rows).passed().out)
    share, of_pictures = 100 * learned / tokens, 100 * 196 / tokens
    assert f"tokens {tokens}: {share:.1f} % learned ({learned}), {of_pictures:.1f} % pictures" in report


BAD_LINES = [
    *(json.dumps(pretrain_row(number)) for number in range(3)),
    json.dumps(row(image="gone.jpg")),  # line 4
    '{"conversations": ',
    "",
    json.dumps(row(asked="<image><image>")),
    json.dumps(row(image="gone 2.jpg")),
    json.dumps(row(answer=" ")),  # 9
    json.dumps({"conversations": [turn("user", "<image>"), turn("it's", "x")], "image": "0.jpg"}),
    json.dumps(row(image="../0.jpg")),
    "[1]",
    *(json.dumps(row(asked="<image>" * number)) for number in range(2, 12)),  # 13 to 22
]


def test_bad_rows_by_reason(check):
    done = check(BAD_LINES)
    report = words(done.out)
    assert "rows 21: 3 good, 18 bad (85.7 %), and 1 blank line " in report
    groups = report[report.index("bad rows ") + len("bad rows ") : report.index(" A good line")]
    assert groups.startswith(
        "11 rows 2 <image> in the text, but 1 picture(s) (the first; others differ) "
        "lines 7, 13, 14, 15, 16, 17, 18, 19, ... "
        "2 rows no such picture: gone.jpg (the first; others differ) lines 4, 8 1 row "
    )
    for reason, line in {
        "not JSON: Expecting value: line 1 column 19 (char 18)": 5,
        "turn 2: the answer is empty": 9,
        """turn 2 is of role "it's", expected 'assistant'""": 10,
        "the picture's path leaves images_path: '../0.jpg'": 11,
        "not a JSON object": 12,
    }.items():
        assert f"1 row {reason} line {line}" in groups


def test_reasons_that_differ_in_names_and_numbers_are_of_one_kind():
    kinds = [
        ["no such picture: a.jpg", "no such picture: it's 3.jpg", "no such picture: a:b"],
        ["turn 2: the answer is empty", "turn 14: the answer is empty"],
        ["turn 2 has no role", "turn 3 has no role"],
        ["turn 2 has no text as content"],
        ["turn 2 is of role 'a: b', expected 'user'", "turn 1 is of role \"it's\", expected 'user'"],
        ["2 <image> in the text, but 1 picture(s)", "0 <image> in the text, but 10 picture(s)"],
        ["the picture's path leaves images_path: '../a'", "the picture's path leaves images_path: \"/it's\""],
        ["not JSON: Expecting value: line 1", "not JSON: Extra data: line 1"],
        ["nothing left to learn: no answer begins within max_seq_len 640"],
    ]
    rows = [(f"kind{number}", reason) for number, kind in enumerate(kinds) for reason in kind]
    listed = sorted(line.strip() for line in by_reason(rows) if "kind" in line)
    assert listed == [", ".join([f"kind{number}"] * len(kind)) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("rows", "bad", "flags", "why"),
    [
        (100, 1, [], None),
        (99, 1, [], "1 bad row, more than 0 (1 % of the rows)"),
        (10, 3, ["--max_bad_rows", 3], None),
        (10, 3, ["--max_bad_rows", 2], "3 bad rows, more than --max_bad_rows 2"),
        (2, 2, ["--max_bad_rows", 2], "there are no usable rows"),
    ],
)
def test_the_exit_status_is_what_training_would_do(check, world, tmp_path, rows, bad, flags, why):
    lines = [pretrain_row(number) for number in range(rows - bad)] + ["{}"] * bad
    done = check(lines, *flags)
    last = done.out.splitlines()[-1]
    if why:
        assert (done.code, last) == (1, f"{WOULD_REFUSE}{why}.")
    else:
        expected = f"{WOULD_START}{rows - bad} usable rows, {bad} left out."
        assert (done.code, last) == (0, expected)
    if why or rows < 50:
        out = world.copy_of_out(tmp_path / "out")
        files = [*world.files("pretrain", out), "--data_path", tmp_path / "rows.jsonl", "--epochs", "1", *flags]
        assert world.run(PRETRAIN, *files).code == done.code


def test_only_blank_lines(check):
    done = check(["", " "])
    assert done.code == 1
    assert "rows 0: 0 good, 0 bad, and 2 blank lines" in words(done.out)
    assert done.out.endswith(f"{WOULD_REFUSE}there are no usable rows.\n")


def test_what_is_cut(check, world, tmp_path):
    short, longer = row("红色。"), row("红色的圆形，" * 60)
    picture_cut, nothing_left = row(asked="描述" * 200 + "<image>"), row(asked="描述" * 300, image=None)
    rows = [short, longer, picture_cut, nothing_left]
    lengths = []
    for one in rows:
        report = words(check([one], "--max_seq_len", 5000).passed().out)
        lengths.append(int(re.search(r"the longest row has ([\d,]+) tokens", report)[1].replace(",", "")))
    limit = lengths[0] + 1
    done = check(rows, "--max_seq_len", limit, "--max_bad_rows", 2).passed()
    report = words(done.out)
    lost = lengths[1] - limit
    assert (
        f"cut at {limit} {lost} tokens of 1 row and the whole of 2 rows; --max_seq_len {max(lengths)} fits all"
        in report
    )
    assert "1 row an image is cut off" in report
    assert "1 row nothing left to learn" in report
    assert "cut at" in words(check(rows[2:], "--max_seq_len", limit).out)  # with no good row at all
    turns = pa.array([json.dumps(one["conversations"]) for one in rows])
    picture = (world.images / "0.jpg").read_bytes()
    pq.write_table(
        pa.table({"conversations": turns, "image_bytes": [picture, picture, picture, None]}), tmp_path / "rows.parquet"
    )
    of_parquet = check(tmp_path / "rows.parquet", "--max_seq_len", limit, "--max_bad_rows", 2).passed()
    assert words(re.search(r"  cut at .*?  dup", done.out, re.DOTALL)[0]) in words(of_parquet.out)


def test_duplicates(check):
    rows = [sft_row(number) for number in range(5)]
    copies = [rows[1], rows[3], rows[1]]
    other_picture = pretrain_row(0) | {"image": "5.jpg"}
    report = words(check([*rows, *copies, pretrain_row(0), other_picture]).passed().out)
    assert "duplicates 3 rows seen before: lines 6 (as 2), 7 (as 4), 8 (as 2) " in report


def test_a_parquet(check, world, tmp_path):
    pictures = [(world.images / f"{number}.jpg").read_bytes() for number in (0, 1)]
    turns = [json.dumps(row()["conversations"])] * 4 + [json.dumps(row(asked="<image><image>")["conversations"])] * 2
    files = [[pictures[0]], [pictures[1]], [pictures[0]], [b"no picture"], [pictures[0], b"x"], [None]]
    pq.write_table(pa.table({"conversations": turns, "image_bytes": files}), tmp_path / "rows.parquet")
    done = check(tmp_path / "rows.parquet", "--pictures", "--max_bad_rows", 1).passed()
    report = words(done.out)
    assert "rows 6: 5 good, 1 bad" in report
    assert "pictures 4 files, shown 6 times; pictures by row: 1 in 4, 2 in 1 tokens" in report
    assert "duplicates 1 row seen before: row 3 (as 1) " in report
    assert "1 row 2 <image> in the text, but 0 picture(s) row 6 " in report
    assert "broken pictures: 2 of 4; training skips 2 rows picture 3: not a picture" in report
    assert " (row 4) picture 4: not a picture" in report


def test_broken_pictures(check, tmp_path, world):
    folder = tmp_path / "images"
    folder.mkdir()
    whole = (world.images / "0.jpg").read_bytes()
    for name, content in {"0.jpg": whole, "cut.jpg": whole[: len(whole) // 2], "text.jpg": b"hello"}.items():
        (folder / name).write_bytes(content)
    rows = [row(image=name) for name in ("0.jpg", "cut.jpg", "text.jpg", "cut.jpg")]
    rows.append(row(asked="<image><image>", image="cut.jpg, text.jpg"))
    done = check(rows, "--images_path", folder, "--pictures").passed()  # the last --images_path counts
    report = words(done.out)
    assert "broken pictures: 2 of 3; training skips 4 rows cut.jpg: " in report
    assert re.search(
        r"cut\.jpg: (?i:.*truncated.*) \(lines 2, 4, 5\) text\.jpg: not a picture .* \(lines 3, 5\) ", report
    )
    assert done.out.endswith(f"{WOULD_START}5 usable rows.\n")
    assert "pictures 3 files, shown 6 times" in report
    assert "broken pictures:" not in check(rows, "--images_path", folder).passed().out
    assert "broken pictures: 0 of 1" in check(rows[:1], "--images_path", folder, "--pictures").passed().out


def test_mistakes_end_in_one_message(check, world, tmp_path):
    check(tmp_path / "nowhere.jsonl").refused("no such data file", "nowhere.jsonl")
    check([row()], "--images_path", tmp_path / "nowhere").refused("their folder is missing", "nowhere")
    for flag, value, least in (("--max_seq_len", 3, 8), ("--max_bad_rows", -1, 0)):
        done = check([row()], flag, value)
        assert (done.code, f"{flag}: {value}: must be at least {least}" in done.err) == (2, True)
    check([row()], "--tokenizer_path", tmp_path).refused("no tokenizer in", "tokenizer.json is missing")


def test_lengths_and_pictures_by_row(check, world):
    report = words(check(world.root / "sft.jsonl").passed().out)
    assert re.search(r"per row half have up to \d+ tokens, 95 % up to \d+, the longest \d+ ", report)
    counts = [len(one["image"].split(",")) if "image" in one else 0 for one in read_jsonl(world.root / "sft.jsonl")]
    assert "by row: " + ", ".join(f"{number} in {counts.count(number)}" for number in (0, 1, 2)) in report


def test_many_rows_are_shown_as_a_few(check):
    rows = [row(image=f"gone {number}.jpg") for number in range(30)] + [row()] * 30
    out = check(rows).out
    assert len(out.splitlines()) < 25
    assert "30 rows no such picture: gone 0.jpg (the first; others differ) lines 1, 2, 3, 4, 5, 6, 7, 8, ..." in words(
        out
    )
    assert "29 rows seen before: lines 32 (as 31), 33 (as 31)" in words(out)


def test_scripts_that_the_tokenizer_takes_apart_are_named(check):
    russian, emoji, both = row("Красный дом стоит."), row("😀🎉🚗."), row("红色的房子。 A red house.")
    report = words(check([russian, emoji, both]).passed().out)
    found = re.search(r"words cyrillic takes (.*) tokens a character, emoji takes (.*) tokens a character \(", report)
    assert 1.5 < float(found[1]) < 3 and float(found[2]) == 4
    assert "(English 0.4, Chinese 0.8): longer answers, slower learning" in report
    assert "a character" not in words(check([both]).passed().out)


def test_answers_that_are_only_numbers_are_noticed(check):
    noticed = "answers only numbers: if they stand for classes, name the classes instead"
    assert noticed in words(check([row("0"), row("1"), row("0.5")]).passed().out)
    assert noticed not in words(check([row("0"), row("1"), row("2 dogs")]).passed().out)
