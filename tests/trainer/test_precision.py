"""The precision on a CPU is the faster one, measured; the same on every rank and in a resumed run."""

import pytest
import torch
from tiny import PRETRAIN

from model.model_vlm import VLMConfig
from trainer.support import precision
from trainer.support.processes import Processes

pytest_plugins = ["tiny"]
TINY = VLMConfig(hidden_size=32, num_hidden_layers=1)
HOOK = """
import torch, trainer.support.precision as precision
precision.has_bfloat16 = lambda: True
precision.block_seconds = lambda config, dtype: {seconds}[dtype == torch.bfloat16]
"""


@pytest.mark.parametrize(("half", "expected"), [(0.5, torch.bfloat16), (0.95, torch.float32), (3.0, torch.float32)])
def test_the_faster_one_is_chosen(monkeypatch, capsys, half, expected):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "block_seconds", lambda config, dtype: half if dtype == torch.bfloat16 else 1.0)
    assert precision.faster_dtype(TINY, Processes(0, 1, torch.device("cpu"))) == expected
    assert f"bfloat16 is {1 / half:.1f} times as fast" in capsys.readouterr().out


def test_nothing_is_measured_where_bfloat16_is_emulated(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    monkeypatch.setattr(precision, "block_seconds", lambda *_: pytest.fail("measured"))
    assert precision.faster_dtype(TINY, Processes(0, 1, torch.device("cpu"))) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_block_is_measured_and_no_random_number_is_drawn(dtype, use_moe):
    before = torch.get_rng_state()
    assert precision.block_seconds(VLMConfig(hidden_size=32, num_hidden_layers=1, use_moe=use_moe), dtype) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_measures_and_a_resumed_one_keeps_what_it_found(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = [*world.files("pretrain", out), "--from_weight", "llm", "--batch_size", 8]
    first = world.run(PRETRAIN, *flags, "--epochs", 1, hook=HOOK.format(seconds=(1.0, 0.5)), ranks=2).passed()
    assert "bfloat16 is 2.0 times as fast as float32 here" in first.out and ", bfloat16, " in first.out
    more = world.run(PRETRAIN, *flags, "--epochs", 2, "--from_resume", 1, hook=HOOK.format(seconds=(1.0, 9.0))).passed()
    assert "times as fast" not in more.out and ", bfloat16, " in more.out
    chosen = world.run(PRETRAIN, *flags, "--from_resume", 0, "--dtype", "float32", hook=HOOK.format(seconds=(1.0, 0.5)))
    assert ", float32, " in chosen.passed().out and "times as fast" not in chosen.out
