"""Training on the built-in set learns as well as it did when scripts/reference.json was recorded."""

import json

import pytest

from scripts import reference
from trainer.assets import UsageError


def test_both_stages_on_their_first_rows_are_no_worse_than_recorded(tmp_path):
    """The real scripts, on the built-in models; the whole of both stages is `python scripts/reference.py`."""
    curves = reference.run_quick(reference.SEEDS[0], tmp_path / "run")
    assert reference.compare(curves) == []
    assert curves.keys() <= json.loads(reference.RECORD.read_text(encoding="utf-8")).keys()
    for curve in curves.values():
        assert curve[-1][2] > 0.5  # nats per token: it looks at the pictures


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
    for recorded in json.loads(reference.RECORD.read_text(encoding="utf-8")).values():
        assert len(recorded["curves"]) == len(reference.SEEDS)
        assert recorded["grounding_gap"] > 1
        assert recorded["spread"] < recorded["grounding_gap"] / 10


def test_a_run_that_fails_is_told(tmp_path):
    with pytest.raises(UsageError, match="failed"):
        reference.run_stage("pretrain", 0, tmp_path, "--no_such_flag", "1")
