"""--from_resume 1: a run that was stopped, however roughly, goes on as if it had not been."""

import pickle

import pytest
import torch
from tiny import PRETRAIN, SFT, read_jsonl

pytest_plugins = ["tiny"]

BATCH, STEPS = 4, 7  # 25 rows
RESUMED = ["--from_weight", "llm", "--batch_size", BATCH, "--epochs", 2, "--learning_rate", 1e-3, "--grad_clip", 0.5]
RESUMED += ["--save_interval", 3, "--log_interval", 1, "--num_workers", 1]
# Ends the process, as a power cut does, where the N-th save would rename this file into its place.
KILLED_AT = """
import os, signal
rename, renamed = os.replace, []
def replace(source, target):
    renamed.append(os.path.basename(target))
    if renamed[-1] == "{file}" and renamed.count("{file}") == {save}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
"""


@pytest.fixture(scope="module")
def in_one_go(world, tmp_path_factory):
    """14 steps without a stop, saved at the steps 3, 6, 7, 9, 12 and 14."""
    out = world.copy_of_out(tmp_path_factory.mktemp("whole") / "out")
    world.run(SFT, *world.files("sft", out), *RESUMED).passed()
    return out


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_end(out, other):
    a, b = (load(folder / "sft_vlm_32_resume.pth") for folder in (out, other))
    assert a["step"] == b["step"] == 2 * STEPS
    for name, tensor in a["learned"].items():
        assert torch.equal(tensor, b["learned"][name]), name  # float32, to the last bit
    a, b = (load(folder / "sft_vlm_32.pth") for folder in (out, other))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# A save writes weights, sidecar and state, in this order.
@pytest.mark.parametrize(
    ("file", "save", "saved"),
    [("sft_vlm_32_resume.pth", 2, 3), ("sft_vlm_32.pth", 3, 6), ("sft_vlm_32.json", 4, 7)],
)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(world, tmp_path, in_one_go, file, save, saved):
    out = world.copy_of_out(tmp_path / "out")
    killed = world.run(SFT, *world.files("sft", out), *RESUMED, hook=KILLED_AT.format(file=file, save=save))
    assert killed.code == -9
    assert load(out / "sft_vlm_32_resume.pth")["step"] == saved
    reported = [record["step"] for record in read_jsonl(out / "sft_vlm_32.metrics.jsonl")]
    assert max(reported) > saved  # of steps that are now done again
    result = world.run(SFT, *world.files("sft", out), *RESUMED, "--from_resume", 1).passed()
    assert f"goes on      after step {saved}, {2 * STEPS - saved} to go" in result.out
    assert_same_end(out, in_one_go)
    metrics, expected = (read_jsonl(folder / "sft_vlm_32.metrics.jsonl") for folder in (out, in_one_go))
    assert [record["step"] for record in metrics] == list(range(1, 2 * STEPS + 1))
    for field in ("loss", "learning_rate", "epoch", "learned_tokens"):
        assert [record[field] for record in metrics] == [record[field] for record in expected]


def test_a_run_of_one_process_goes_on_in_two(world, tmp_path, in_one_go):
    out = world.copy_of_out(tmp_path / "out")
    world.run(SFT, *world.files("sft", out), *RESUMED, hook=KILLED_AT.format(file="sft_vlm_32.pth", save=3))
    flags = [*RESUMED, "--from_resume", 1, "--batch_size", BATCH // 2]
    world.run(SFT, *world.files("sft", out), *flags, ranks=2).passed()
    metrics, expected = (read_jsonl(folder / "sft_vlm_32.metrics.jsonl") for folder in (out, in_one_go))
    assert [record["loss"] for record in metrics] == pytest.approx([record["loss"] for record in expected], rel=1e-4)


def test_from_resume_of_a_finished_run_has_nothing_to_do(world, tmp_path, in_one_go):
    result = world.run(SFT, *world.files("sft", in_one_go), *RESUMED, "--from_resume", 1).passed()
    assert f"after step {2 * STEPS}, 0 to go" in result.out
    assert len(read_jsonl(in_one_go / "sft_vlm_32.metrics.jsonl")) == 2 * STEPS


def test_from_resume_without_a_state_starts_from_the_beginning_and_says_so(world, tmp_path, in_one_go):
    out = world.copy_of_out(tmp_path / "out")
    result = world.run(SFT, *world.files("sft", out), *RESUMED, "--from_resume", 1).passed()
    assert "sft_vlm_32_resume.pth yet, so this run starts from the beginning" in result.out
    assert_same_end(out, in_one_go)


def test_a_state_of_another_run_is_refused(world, in_one_go):
    files = [*world.files("sft", in_one_go), *RESUMED, "--from_resume", 1]
    before = {path: path.read_bytes() for path in in_one_go.glob("sft_vlm_32*")}
    other_rows = ["--data_path", world.root / "pretrain.jsonl"]
    for flags, said in (
        (["--seed", 5], "other seed"),
        (other_rows, "other data"),
        (["--freeze_llm", 1], "another run"),
    ):
        world.run(SFT, *files, *flags).refused("sft_vlm_32_resume.pth is of", said, "--from_resume out")
    assert before == {path: path.read_bytes() for path in in_one_go.glob("sft_vlm_32*")}


@pytest.mark.parametrize("content", [b"", b"not a state", pickle.dumps({"a": 1})])
def test_a_garbled_state_is_refused(world, tmp_path, content):
    out = world.copy_of_out(tmp_path / "out")
    (out / "sft_vlm_32_resume.pth").write_bytes(content)
    world.run(SFT, *world.files("sft", out), *RESUMED, "--from_resume", 1).refused("sft_vlm_32_resume.pth")


def test_the_state_holds_neither_tower_nor_frozen_weights(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, "--freeze_llm", 2).passed()
    state = load(out / "pretrain_vlm_32_resume.pth")
    learned = {name.split(".")[0] + name.split(".")[1] for name in state["learned"]}
    assert learned == {"modellayers", "vision_projvision_proj"}
    assert len(state["optimizer"]["state"]) == len(state["learned"]) == 20
    elements = sum(tensor.numel() for tensor in state["learned"].values())
    # Float32 weights and two moments; the tower alone would be 160 kB, the frozen embedding 819 kB more.
    assert (out / "pretrain_vlm_32_resume.pth").stat().st_size < 4 * 3 * elements + 40_000
