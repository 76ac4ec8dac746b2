"""Another learning rate schedule with a flag of its own, added from outside: linear warm-up, then cosine decay.

A stage's record says which schedule it has, and which flags of its own. Without its test, this file is all it takes, as
a script in the project's folder:

    python my_warmup.py --warmup_steps 100
"""

import dataclasses
from functools import partial

import pytest
from tiny import read_jsonl

from common.errors import run_script
from trainer import train_sft_vlm as sft
from trainer.stage import cosine_learning_rate

pytest_plugins = ["tiny"]


def add_flags(add):
    add("--warmup_steps", type=int, default=100, help="optimizer steps in which the learning rate rises")


def schedule(args, done: float, step: int) -> float:
    return cosine_learning_rate(args, done, step) * min(1.0, (step + 1) / max(1, args.warmup_steps))


STAGE = dataclasses.replace(sft.STAGE, add_flags=add_flags, schedule=schedule)


def test_the_learning_rate_rises_and_a_run_resumes_on_it(world, tmp_path):
    for epochs in ([2], [1, 2]):
        out = world.copy_of_out(tmp_path / str(len(epochs)) / "out")
        flags = ["--from_weight", "llm", "--batch_size", 9, "--learning_rate", 1e-3, "--log_interval", 1]
        for turn, number in enumerate(epochs):
            resumed = ["--from_resume", turn, "--warmup_steps", 4, "--epochs", number]
            done = world.run(__file__, *world.files("sft", out), *flags, *resumed).passed()
        rates = [row["learning_rate"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl") if "learning_rate" in row]
        assert rates[0] == pytest.approx(0.25e-3) and rates[0] < rates[1] and rates[-1] == pytest.approx(1e-4)
    assert "--warmup_steps" in world.run(__file__, "--help").passed().out
    assert "3 to go" in done.out
    resumed = ["--from_resume", 1, "--warmup_steps", 5, "--epochs", 3]
    done = world.run(__file__, *world.files("sft", out), *flags, *resumed).passed()
    assert "changed: epochs 2 -> 3, warmup_steps 4 -> 5\n" in done.out


if __name__ == "__main__":
    run_script(partial(sft.main, STAGE, __doc__), outlives_output=True)
