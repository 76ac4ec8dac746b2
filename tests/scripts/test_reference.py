"""Training on the built-in set learns as well as it did when its record was made."""

import json
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from checks import reference, wrong_runs

from common.errors import UsageError
from trainer.flags import build_parser


def in_this_process(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a training script as `subprocess.run` would, without its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command[1:])
        runpy.run_path(command[1])["main"]()
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The curves and the folder of a short run: the real scripts, on the built-in models."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "subprocess", SimpleNamespace(run=in_this_process))
        # The seed that learns best there: another processor's rounding must not look like learning less.
        return reference.run("short", 1, folder), folder


def test_both_stages_on_few_rows_are_no_worse_than_recorded(short):
    """`python tests/checks/reference.py` runs both stages in full."""
    curves, _ = short
    assert list(curves) == ["stage 1, short", "stage 2, short"]
    assert reference.compare(curves) == []
    for curve in curves.values():
        assert curve[-1][2] > 0.5  # nats per token: it looks at the images


def test_a_worse_run_is_found(tmp_path, monkeypatch):
    recorded = {"stage 1": reference.summary({f"seed {s}": [[10, 0.5 + s / 10, 2.0]] for s in range(3)})}
    assert (recorded["stage 1"]["held_out_loss"], recorded["stage 1"]["spread"]) == (0.6, 0.2)
    (tmp_path / "reference.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(reference, "RECORD", tmp_path / "reference.json")
    assert reference.compare({"stage 1": [[10, 0.8, 2.0]]}) == []
    for loss in (0.81, float("nan")):
        [line] = reference.compare({"stage 1": [[10, loss, 2.0]]})
        assert "worse than 0.8000" in line


def test_the_recorded_runs_look_at_the_pictures():
    for name, recorded in json.loads(reference.RECORD.read_text(encoding="utf-8")).items():
        assert len(recorded["curves"]) == len(reference.SEEDS)
        if "wide" not in name:  # 40 steps from random weights teach how the answers are worded
            assert recorded["grounding_gap"] > 1
            assert recorded["spread"] < recorded["grounding_gap"] / (5 if "short" in name else 10)


@pytest.mark.parametrize(
    ("size", "runs_expected", "line"), [("quick", 2, "stage 2, quick"), ("wide", 1, "stage 2, wide")]
)
def test_a_run_in_bfloat16_is_compared_with_those_in_float32(size, runs_expected, line, tmp_path, monkeypatch, capsys):
    runs = []

    def run_stage(stage, seed, folder, *flags, processes):
        runs.append(dict(zip(flags[::2], flags[1::2], strict=True))["--dtype"])
        return [[40, 0.0, 2.0]]

    monkeypatch.setattr(reference, "run_stage", run_stage)
    monkeypatch.setattr(reference, "SAVE_DIR", tmp_path)
    monkeypatch.setattr("sys.argv", ["reference.py", size, "--dtype", "bfloat16"])
    reference.main()
    assert runs == ["bfloat16"] * runs_expected
    assert f"{line}: held-out loss 0.0000, recorded" in capsys.readouterr().out


def test_a_run_that_fails_is_reported(tmp_path, monkeypatch):
    failing = SimpleNamespace(run=lambda command: subprocess.CompletedProcess(command, returncode=2))
    monkeypatch.setattr(reference, "subprocess", failing)
    with pytest.raises(UsageError, match="train_pretrain_vlm.py .* failed"):
        reference.run_stage(reference.PRETRAIN, 0, tmp_path)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file"):
        reference.few_flags(reference.PRETRAIN, [], tmp_path / "file" / "run")


# ---- runs that go wrong on purpose


def test_captions_get_the_pictures_of_other_rows():
    lines = [json.dumps({"conversations": [], "image": f"{number}.jpg"}) + "\n" for number in range(6)]
    rows = [json.loads(line) for line in wrong_runs.with_other_pictures(lines)]
    assert [row["image"] for row in rows] == ["3.jpg", "4.jpg", "5.jpg", "0.jpg", "1.jpg", "2.jpg"]


def test_wrong_runs_end_in_a_table(short, tmp_path, monkeypatch, capsys):
    """Each with the files of a run that was right."""
    monkeypatch.setattr("sys.argv", ["wrong_runs.py"])
    monkeypatch.setattr(wrong_runs, "SAVE_DIR", tmp_path)
    ran, runs = [], tmp_path / "wrong_runs"

    def run_stage(stage, seed, folder, *flags):
        (runs / "1").mkdir(exist_ok=True)
        (runs / "1" / "pretrain_vlm_128.pth").touch()
        args = build_parser(stage, "").parse_args(flags)
        assert args.data_path.parent == folder
        assert args.from_weight == "none" or Path(args.from_weight).is_file()
        ran.append((stage.name, args.learning_rate, args.epochs))
        name = stage.defaults["save_weight"]
        for path in short[1].glob(f"{name}_128[._]*"):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)

    monkeypatch.setattr(wrong_runs, "run_stage", run_stage)
    wrong_runs.main()
    table = capsys.readouterr().out.splitlines()[-11:]
    assert table[0].split()[:4] == ["training", "held", "out", "gap"]
    assert table[1].startswith("stage 1 as it should be") and table[9].startswith("--learning_rate 0.2")
    assert table[1].split()[6:9] == table[2].split()[4:7]
    assert table[10].split()[1] == "图中有一个物体：中间有一个小的绿色五角星。"
    assert [stage for stage, *_ in ran] == ["pretrain"] * 4 + ["sft"] * 5
    assert [epochs for *_, epochs in ran] == [1, 1, wrong_runs.MANY_EPOCHS, *[1] * 6]
