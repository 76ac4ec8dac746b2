"""The precision on a CPU follows from the processor and the model's heads; a resumed run keeps it."""

import pytest
import torch
from tiny import PRETRAIN

from trainer.support import processes

pytest_plugins = ["tiny"]


@pytest.mark.parametrize(
    ("multiplies", "head_size", "expected"),
    [(True, 64, torch.bfloat16), (True, 32, torch.bfloat16), (True, 16, torch.float32), (False, 64, torch.float32)],
)
def test_a_cpu_computes_in_bfloat16_where_it_can_and_heads_are_large(monkeypatch, multiplies, head_size, expected):
    monkeypatch.setattr(processes, "cpu_has_bfloat16", lambda: multiplies)
    assert processes.pick_dtype(None, torch.device("cpu"), head_size) == expected


def test_a_resumed_run_keeps_the_precision(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = [*world.files("pretrain", out), "--from_weight", "llm", "--batch_size", 8]
    hook = "from trainer.support import processes\nprocesses.cpu_has_bfloat16, processes.SMALLEST_HEAD = lambda: {}, 1"
    first = world.run(PRETRAIN, *flags, "--epochs", 1, hook=hook.format(True)).passed()
    more = world.run(PRETRAIN, *flags, "--epochs", 2, "--from_resume", 1, hook=hook.format(False)).passed()
    assert ", bfloat16, " in first.out and ", bfloat16, " in more.out and "changed" not in more.out.split("epochs")[0]
