"""The report of a run: one HTML file that needs nothing else, from whatever of the run's files there are."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UsageError
from common.paths import ROOT
from scripts.report import find_run
from trainer.report.page import line_chart, ticks, write_report

pytest_plugins = ["tiny"]

NAME = "sft_vlm_128"
VOID = {"meta", "img", "br", "hr", "link"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Checks that every tag is closed in its turn; keeps tags, attributes and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def training_row(step: int, **changed) -> dict:
    row = {"step": step, "epoch": 1 + step // 50, "loss": 5 / (step + 1), "learning_rate": 4e-3, "data_wait": 0.01}
    row |= {"samples_per_second": 31.5, "tokens_per_second": 900.0, "learned_tokens": 1000, "seconds": step * 2.0}
    return row | {"skipped_pictures": 3, "skipped_steps": 0} | changed


def evaluation_row(step: int, loss: float = 0.321, gap: float = 1.789) -> dict:
    losses = {"loss": loss, "loss_shuffled": loss + gap, "loss_blind": loss + 2, "gap_shuffled": gap, "gap_blind": 2.0}
    return {"step": step, "epoch": 1, "eval": losses | {"samples": 50, "tokens": 612, "seconds": 3.2}}


def sample_row(step: int, description: str, **changed) -> dict:
    row = {"step": step, "picture": "0.jpg", "prompt": "描述这张图片\n<image>", "reference": "一个红色圆形。"}
    return row | {"description": description} | changed


def write_jsonl(path: Path, rows: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_metrics(folder: Path, rows: list, name: str = NAME):
    write_jsonl(folder / f"{name}.metrics.jsonl", rows)


@pytest.fixture
def out(tmp_path) -> Path:
    """A run with all its files."""
    write_metrics(
        tmp_path, [training_row(step) for step in range(10, 110, 10)] + [evaluation_row(50), evaluation_row(100)]
    )
    sidecar = {
        "stage": "sft",
        "title": "Fine-tuning",
        "assets": "built-in",
        "versions": {"torch": "2.13.0"},
        "git_commit": "abcdef0123456789+",
    }
    sidecar |= {"config": {"hidden_size": 128, "vocab_size": 6400}, "written": "2026-11-21T21:52:51+00:00"}
    sidecar |= {"arguments": {"epochs": 3, "learning_rate": 0.001, "log_interval": 77, "device": None}}
    (tmp_path / f"{NAME}.json").write_text(json.dumps(sidecar), encoding="utf-8")
    samples = tmp_path / f"{NAME}_samples"
    rows = [sample_row(step, f"描述{step}") for step in range(0, 100, 10)] + [sample_row(100, "一个红色圆形。")]
    write_jsonl(samples / "samples.jsonl", rows)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(samples / "0.jpg")
    return tmp_path


def test_the_page_shows_all_of_a_run_and_needs_nothing_else(out):
    path = write_report(out, NAME)
    assert path == out / f"{NAME}.report.html"
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    page = Page(path)
    assert "http:" not in page.source and "https:" not in page.source
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not re.search(r"@import|url\(", page.source)
    assert "prefers-color-scheme: dark" in page.source
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert len(page.all("img")) == 1 and len(page.all("svg")) == 4
    texts = "Held-out loss 0.321|grounding gap 1.789 nats|100 steps in 03:20|2026-11-21 21:52|2.110"
    texts += "|Its answers depend on the images"
    texts += "|31.5|--learning_rate|0.001|not given|2.13.0|描述这张图片|✓"
    texts += "|Fine-tuning · built-in model · data built-in scenes|abcdef0123456789+"
    assert [text for text in texts.split("|") if text not in page.text] == []
    assert "Left out" not in page.text


def test_an_image_is_described_at_six_steps_the_first_and_the_last_five(out):
    page = Page(write_report(out, NAME))
    assert re.findall(r"描述(\d+)", page.text) == ["0", "60", "70", "80", "90"]
    assert page.text.count("一个红色圆形。") == 2  # the last description, and the reference


def test_at_most_eight_images_and_the_later_of_two_descriptions_at_a_step(out):
    rows = [sample_row(5, f"words of {i}", picture=f"{i}.jpg") for i in range(12)]
    rows.append(sample_row(5, "said again", picture="3.jpg"))
    write_jsonl(out / f"{NAME}_samples" / "samples.jsonl", rows)
    page = Page(write_report(out, NAME))
    assert len(page.all("article")) == 8 and "said again" in page.text and "words of 3" not in page.text


def test_only_metrics_are_needed_and_what_is_missing_is_said(tmp_path):
    write_metrics(tmp_path, [training_row(10), training_row(20)])
    page = Page(write_report(tmp_path, NAME))
    assert "Training loss 0.238" in page.text and "20 steps in 00:40" in page.text
    assert len(page.all("svg")) == 3
    for path in (f"{NAME}.json", "samples.jsonl"):
        assert re.search(rf"Left out: \S*{path} is not there", page.text)
    assert "Grounding gap" not in page.text and "Settings" not in page.text
    assert "built-in scenes" not in page.text  # nothing says that this run was on the built-in set


@pytest.mark.parametrize("content", ["{", "\xff"])
def test_damaged_optional_files_are_left_out(out, content):
    for path in (out / f"{NAME}.json", out / f"{NAME}_samples" / "samples.jsonl"):
        path.write_bytes(content.encode("latin-1"))
    page = Page(write_report(out, NAME))
    assert page.text.count("cannot be read") == 2


def test_text_from_files_is_escaped(tmp_path):
    hostile_name = "a<b>&c"
    write_metrics(tmp_path, [training_row(1), evaluation_row(1)], hostile_name)
    sidecar = dict.fromkeys(("stage", "assets", "git_commit", "written"), HOSTILE)
    sidecar |= {part: {HOSTILE: HOSTILE, "hidden_size": HOSTILE} for part in ("config", "arguments", "versions")}
    (tmp_path / f"{hostile_name}.json").write_text(json.dumps(sidecar))
    samples = tmp_path / f"{hostile_name}_samples"
    row = sample_row(1, HOSTILE, prompt=HOSTILE, reference=HOSTILE, picture=HOSTILE)
    write_jsonl(samples / "samples.jsonl", [row])
    page = Page(write_report(tmp_path, hostile_name))
    assert not page.all("script") and not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert(1)") >= 9 and hostile_name in page.text


def test_a_row_cannot_bring_another_file_onto_the_page(out):
    Image.new("RGB", (8, 8)).save(out / "secret.jpg")
    names = ["../secret.jpg", str(out / "secret.jpg"), "..", ".", "", "gone.jpg", "0.jpg"]
    rows = [sample_row(1, "words", picture=name) for name in names]
    write_jsonl(out / f"{NAME}_samples" / "samples.jsonl", rows)
    page = Page(write_report(out, NAME))
    assert len(page.all("img")) == 1 and page.text.count("cannot be shown") == 6


def test_null_nan_and_infinity_make_gaps(tmp_path):
    losses = [3.0, 2.0, None, float("nan"), 1.5, float("inf"), 1.2, 1.1]
    write_metrics(tmp_path, [training_row(i, loss=loss) for i, loss in enumerate(losses)])
    path = tmp_path / f"{NAME}.metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 9, "loss": 9.')  # cut off while it was written
    page = Page(write_report(tmp_path, NAME))
    loss = page.source[: page.source.index("Learning rate")]
    assert re.findall(r'class="curve c1" points="(.*?) "', loss)[0].count(" ") == 1
    assert loss.count('class="curve c1"') == 3 and loss.count("<circle") == 5
    assert not re.search(r"\bnan\b|\binf\b", page.source, re.IGNORECASE)
    assert "Training loss 1.100" in page.text


@pytest.mark.parametrize("loss", [None, 0.0, 2.5, -1.0, 1e30])
def test_metrics_of_one_row(tmp_path, loss):
    write_metrics(tmp_path, [training_row(1, loss=loss)])
    page = Page(write_report(tmp_path, NAME))
    assert len(page.all("circle")) == (2 if loss is None else 3)
    assert ("nats per token" in page.text) == (loss is not None)


def test_a_resumed_run_counts_the_time_of_its_parts(tmp_path):
    seconds = [100.0, 200.0, 40.0]
    write_metrics(tmp_path, [training_row(step, seconds=value) for step, value in enumerate(seconds, 1)])
    assert "3 steps in 04:00" in Page(write_report(tmp_path, NAME)).text


def test_ticks_are_round_and_enclose_the_values():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 0.001) == [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]
    assert ticks(0, 3) == [0, 1, 2, 3]
    assert ticks(-1.3, 2.2) == [-2, -1, 0, 1, 2, 3]


def test_a_logarithmic_axis():
    steep = [(1, 2.0), (2, 0.1), (3, 0.019)]
    chart = line_chart("nats", {"training": steep}, may_be_log=True)
    assert chart["unit"] == "nats, log scale"
    marks = [text for _, _, anchor, text in chart["texts"] if anchor == "end"]
    assert marks == ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert line_chart("nats", {"training": steep})["unit"] == "nats"
    assert line_chart("nats", {"training": [(1, 8.0), (2, 0.0)]}, may_be_log=True)["unit"] == "nats"


@pytest.mark.parametrize(
    "ending", ["", ".pth", ".json", ".metrics.jsonl", ".report.html", "_resume.pth", "_samples", "_samples.md"]
)
def test_a_run_is_named_by_any_of_its_files(tmp_path, monkeypatch, ending):
    write_metrics(tmp_path / "out", [training_row(1)])
    assert find_run(tmp_path / "out" / f"{NAME}{ending}") == (tmp_path / "out", NAME)
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("out") / f"{NAME}{ending}") == (tmp_path / "out", NAME)


def test_a_folder_names_the_one_run_in_it(tmp_path):
    with pytest.raises(UsageError, match=r"is no run: it has no \*\.metrics\.jsonl"):
        find_run(tmp_path)
    with pytest.raises(UsageError, match=r"gone is no run: it has no \*\.metrics\.jsonl"):
        find_run(tmp_path / "gone")
    write_metrics(tmp_path, [training_row(1)], "a")
    assert find_run(tmp_path) == (tmp_path, "a")
    write_metrics(tmp_path, [training_row(1)], "b")
    with pytest.raises(UsageError, match=r"holds 2 runs \(a, b\)"):
        find_run(tmp_path)


def test_metrics_that_are_missing_or_empty(tmp_path):
    missing = rf"{NAME}.metrics.jsonl is missing or holds no training step"
    with pytest.raises(UsageError, match=missing):
        write_report(tmp_path, NAME)
    write_metrics(tmp_path, [])
    with pytest.raises(UsageError, match=missing):
        write_report(tmp_path, NAME)


def test_the_command_from_another_folder(world, tmp_path):
    write_metrics(tmp_path / "out", [training_row(1)])
    done = world.run(ROOT / "scripts" / "report.py", f"out/{NAME}.pth", cwd=tmp_path).passed()
    assert done.out == f"wrote {tmp_path / 'out' / NAME}.report.html\n"
    assert (tmp_path / "out" / f"{NAME}.report.html").is_file()


def test_equal_descriptions_of_several_steps_are_one_line(out):
    rows = [sample_row(step, "first" if step < 30 else "then") for step in (10, 20, 30, 40, 50)]
    write_jsonl(out / f"{NAME}_samples" / "samples.jsonl", rows)
    text = Page(write_report(out, NAME)).text
    assert "steps 10 to 20" in text and "steps 30 to 50" in text
    assert (text.count("first"), text.count("then")) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([evaluation_row(50, gap=0.001)], "It hardly looks at the images"),
        ([evaluation_row(50, 0.3), evaluation_row(100, 0.4)], "lowest at step 50 (0.300) and has risen since"),
        ([evaluation_row(50, 0.4), evaluation_row(100, 0.3)], "The held-out loss fell to the end."),
        ([evaluation_row(50, 5.0), evaluation_row(100, 4.9)], "The held-out loss is far above the training loss"),
        ([], "Nothing was held out"),
    ],
)
def test_the_page_says_what_its_figures_mean(out, rows, words):
    write_metrics(out, [training_row(step) for step in range(10, 110, 10)] + rows)
    assert words in Page(write_report(out, NAME)).text


def test_the_page_names_own_data(out):
    sidecar = json.loads((out / f"{NAME}.json").read_text())
    sidecar["arguments"] |= {"data_path": "mine/photos.jsonl"}
    (out / f"{NAME}.json").write_text(json.dumps(sidecar))
    assert "built-in model · data mine/photos.jsonl" in Page(write_report(out, NAME)).text
