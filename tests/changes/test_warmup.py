"""Another learning rate schedule with a flag of its own, added from outside: linear warm-up, then cosine decay.

A stage's record says which schedule it has and which flags are its own, so a script of one's own is a copy of the
record with both changed:

    python train_with_warmup.py --warmup 0.1
"""

import pytest
from tiny import SFT, read_jsonl

pytest_plugins = ["tiny"]
WARMED_UP = """
import dataclasses
from trainer import train_sft_vlm as script
from trainer.stage import cosine_learning_rate

def add_flags(add):
    add("--warmup", type=float, default=0.1, help="share of the run in which the learning rate rises")

def schedule(args, done):
    return cosine_learning_rate(args, done) * min(1.0, (done + 1e-3) / args.warmup)

script.STAGE = dataclasses.replace(script.STAGE, add_flags=add_flags, schedule=schedule)
"""


@pytest.fixture
def script(tmp_path):
    """A user's own script, which runs from any folder."""
    path = tmp_path / "train_with_warmup.py"
    start = f"import sys\nsys.path.insert(0, {str(SFT.parents[1])!r})\n{WARMED_UP}"
    path.write_text(f"{start}\nfrom common.errors import run_script\nrun_script(script.main, outlives_output=True)\n")
    return path


def test_the_learning_rate_rises_and_a_run_resumes_on_it(world, tmp_path, script):
    rates = []
    for epochs in ([2], [1, 2]):
        out = world.copy_of_out(tmp_path / str(len(epochs)) / "out")
        flags = ["--from_weight", "llm", "--batch_size", 9, "--learning_rate", 1e-3, "--log_interval", 1]
        for turn, number in enumerate(epochs):
            resumed = ["--from_resume", turn, "--warmup", 0.5, "--epochs", number]
            done = world.run(script, *world.files("sft", out), *flags, *resumed).passed()
        rates = [row["learning_rate"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl") if "learning_rate" in row]
        assert rates[0] < 1e-5 and rates[1] > 10 * rates[0] and rates[-1] == pytest.approx(1e-4)
    assert "--warmup" in world.run(script, "--help").passed().out
    assert "3 to go" in done.out
