"""--from_resume 1: a run that was stopped or killed resumes bit-identically."""

import dataclasses
import json
import pickle
import random
import shutil
import types
from pathlib import Path

import pytest
import torch
from tiny import PRETRAIN, SFT, TOKENIZER, language_model, read_jsonl, write_jsonl

from common.errors import UsageError
from dataset.chat import load_tokenizer, tokenizer_hash
from model.model_vlm import VLMConfig
from model.weights import describe, list_weights, load_learned
from trainer.resume import ENDINGS, STATE, check_same_run, read_state, restore_random_state

pytest_plugins = ["tiny"]

EPOCHS, STEPS = 2, 7  # 25 or 26 rows in steps of 4
# Ends the process, as a power cut does, where the N-th save would rename this file into its place.
KILLED_AT_SAVE = """
import os, signal
rename, renamed = os.replace, []
def replace(source, target):
    renamed.append(os.path.basename(target))
    if renamed[-1] == "{file}" and renamed.count("{file}") == {save}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
"""
# Ends it in the N-th forward pass.
KILLED_AT_FORWARD = """
import os, signal, model.model_vlm
forward, calls = model.model_vlm.MiniMindVLM.forward, []
def counted(*inputs, **named):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*inputs, **named)
model.model_vlm.MiniMindVLM.forward = counted
"""
# Ends it after so many seconds, wherever it is.
KILLED_AFTER = """
import os, signal, threading
threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGKILL)).start()
"""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to do the same 14 steps of 4 samples."""

    script: Path
    name: str
    flags: tuple
    ranks: int = 1
    from_weight: str = "llm"

    @property
    def stage(self) -> str:
        return "sft" if self.script == SFT else "pretrain"

    def run(self, world, out, *more, **how):
        flags = ["--from_weight", self.from_weight, "--epochs", EPOCHS, "--learning_rate", 1e-3, "--grad_clip", 0.5]
        flags += ["--save_interval", 3, *self.flags, *more]
        return world.run(self.script, *world.files(self.stage, out), *flags, **{"ranks": self.ranks} | how)


BASE = Way(SFT, "sft_vlm_32", ("--batch_size", 4, "--log_interval", 1, "--num_workers", 1))
WAYS = {
    "sft, a worker, reports of two steps": Way(
        SFT, "sft_vlm_32", ("--batch_size", 4, "--log_interval", 2, "--num_workers", 1)
    ),
    "sft, accumulation, dropout": Way(
        SFT, "sft_vlm_32", ("--batch_size", 2, "--accumulation_steps", 2, "--log_interval", 5), from_weight="dropout"
    ),
    "pretrain, two ranks, a worker": Way(
        PRETRAIN, "pretrain_vlm_32", ("--batch_size", 2, "--log_interval", 2, "--num_workers", 1), ranks=2
    ),
    "sft, two ranks, accumulation, dropout": Way(
        SFT,
        "sft_vlm_32",
        ("--batch_size", 1, "--accumulation_steps", 2, "--log_interval", 3),
        ranks=2,
        from_weight="dropout",
    ),
}


@pytest.fixture(scope="module")
def save_dir(world, tmp_path_factory):
    """Makes a --save_dir with the language model, and with one that drops out a fifth of its activations."""
    from_files = world.copy_of_out(tmp_path_factory.mktemp("start") / "out")
    config = VLMConfig(hidden_size=32, num_hidden_layers=2, dropout=0.2, vision_hidden_size=32)
    sidecar = describe(config, "llm", "own", tokenizer_hash(load_tokenizer(TOKENIZER)), {})
    (from_files / "dropout_32.pth").write_bytes((from_files / "llm_32.pth").read_bytes())
    (from_files / "dropout_32.json").write_text(json.dumps(sidecar))

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for file in from_files.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make


@pytest.fixture(scope="module")
def in_one_go(world, save_dir, tmp_path_factory):
    """14 steps without a stop, saved at the steps 3, 6, 7, 9, 12 and 14, for each way."""
    cache = {}

    def run(way: Way) -> Path:
        if way not in cache:
            cache[way] = save_dir(tmp_path_factory.mktemp("whole") / "out")
            way.run(world, cache[way]).passed()
        return cache[way]

    return run


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def flat(value, path="") -> dict:
    """Every tensor and number in a state, by where it stands."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in flat(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same_end(way: Way, out, other):
    """Compares weights, optimizer, random states and metrics bit by bit."""
    a, b = (load(folder / f"{way.name}_resume.pth") for folder in (out, other))
    assert a["step"] == b["step"] == EPOCHS * STEPS
    for part in ("learned", "optimizer", "random"):
        found, expected = flat(a[part]), flat(b[part])
        assert found.keys() == expected.keys()
        for name, value in found.items():
            same = torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
            assert same, name
    a, b = (load(folder / f"{way.name}.pth") for folder in (out, other))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    metrics, expected = (read_jsonl(folder / f"{way.name}.metrics.jsonl") for folder in (out, other))
    for field in ("step", "loss", "learning_rate", "epoch", "learned_tokens"):
        assert [record[field] for record in metrics] == [record[field] for record in expected]


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_was_killed_in_a_step_goes_on_as_if_it_had_not_been(world, save_dir, tmp_path, in_one_go, name):
    """Twice: in step 5, after the save of step 3, and in step 8, after that at the end of the first epoch."""
    way, out = WAYS[name], save_dir(tmp_path / "out")
    passes = way.flags[way.flags.index("--accumulation_steps") + 1] if "--accumulation_steps" in way.flags else 1
    words = f"{way.name}_resume.pth yet, so this run starts from the beginning", "resumes      after step 3, 11 to go\n"
    for saved, said in zip((3, 7), words, strict=True):
        # In the last pass of the step: with accumulation the others of its group are done.
        killed = way.run(world, out, "--from_resume", 1, hook=KILLED_AT_FORWARD.format(call=passes * 5))
        assert killed.code == -9 and said in killed.out
        assert load(out / f"{way.name}_resume.pth")["step"] == saved
    result = way.run(world, out, "--from_resume", 1).passed()
    assert "resumes      after step 7, 7 to go\n" in result.out
    assert_same_end(way, out, in_one_go(way))


# A save renames state, weights and sidecar, in this order.
@pytest.mark.parametrize(
    ("file", "save", "saved"),
    [("sft_vlm_32_resume.pth", 2, 3), ("sft_vlm_32.pth", 3, 7), ("sft_vlm_32.json", 4, 9)],
)
def test_a_run_that_was_killed_in_a_save_goes_on_as_if_it_had_not_been(
    world, save_dir, tmp_path, in_one_go, file, save, saved
):
    out = save_dir(tmp_path / "out")
    killed = BASE.run(world, out, hook=KILLED_AT_SAVE.format(file=file, save=save))
    assert killed.code == -9
    assert any(path.suffix == ".tmp" for path in out.iterdir())
    assert load(out / "sft_vlm_32_resume.pth")["step"] == saved
    reported = [record["step"] for record in read_jsonl(out / "sft_vlm_32.metrics.jsonl")]
    assert max(reported) >= saved
    result = BASE.run(world, out, "--from_resume", 1).passed()
    assert f"resumes      after step {saved}, {EPOCHS * STEPS - saved} to go" in result.out
    assert_same_end(BASE, out, in_one_go(BASE))
    assert not any(path.suffix == ".tmp" for path in out.iterdir())


def test_weights_older_than_the_state_are_made_anew_of_it(world, save_dir, tmp_path, in_one_go):
    """As a kill between the two renames leaves them; resuming repairs them even when no step is left."""
    out = save_dir(tmp_path / "out")
    BASE.run(world, out, hook=KILLED_AT_SAVE.format(file="sft_vlm_32.pth", save=6))  # of the last step
    assert load(out / "sft_vlm_32_resume.pth")["step"] == EPOCHS * STEPS
    before = (out / "sft_vlm_32.pth").read_bytes()
    BASE.run(world, out, "--from_resume", 1).passed()
    assert (out / "sft_vlm_32.pth").read_bytes() != before
    assert_same_end(BASE, out, in_one_go(BASE))


def test_kills_at_random_instants(world, save_dir, tmp_path, in_one_go):
    """The files load after each kill, and the final weights are those of an undisturbed run."""
    frequent = Way(SFT, "sft_vlm_32", ("--batch_size", 4, "--log_interval", 1, "--save_interval", 2))
    rng, kills, runs = random.Random(0), 0, 0
    expected = load(in_one_go(BASE) / "sft_vlm_32.pth")
    while kills < 8:
        out, runs = save_dir(tmp_path / f"out_{runs}"), runs + 1
        while True:
            hook = KILLED_AFTER.format(seconds=rng.uniform(0.1, 1.5)) if kills < 8 else ""
            result = frequent.run(world, out, "--from_resume", 1, hook=hook)
            for path in out.glob("sft_vlm_32*.pth"):
                load(path)
            if result.code == 0:
                break
            assert result.code == -9
            kills += 1
        weights = load(out / "sft_vlm_32.pth")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
        assert [row["step"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl")] == list(range(1, 2 * STEPS + 1))


@pytest.mark.parametrize(
    ("flags", "ranks", "said"),
    [
        (["--batch_size", 2], 2, "changed: batch_size 4 -> 2, processes 1 -> 2"),
        (["--batch_size", 2, "--accumulation_steps", 2], 1, "changed: batch_size 4 -> 2, accumulation_steps 1 -> 2"),
    ],
)
def test_a_run_goes_on_with_another_division_of_its_samples(world, save_dir, tmp_path, in_one_go, flags, ranks, said):
    out = save_dir(tmp_path / "out")
    BASE.run(world, out, hook=KILLED_AT_SAVE.format(file="sft_vlm_32.pth", save=3))
    result = BASE.run(world, out, *flags, "--from_resume", 1, ranks=ranks).passed()
    assert said in result.out
    metrics, expected = (read_jsonl(folder / "sft_vlm_32.metrics.jsonl") for folder in (out, in_one_go(BASE)))
    assert [row["learned_tokens"] for row in metrics] == [row["learned_tokens"] for row in expected]
    assert [row["loss"] for row in metrics] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


def test_a_run_goes_on_with_batches_of_another_size_and_skips_and_repeats_nothing(world, save_dir, tmp_path, in_one_go):
    out = save_dir(tmp_path / "out")
    BASE.run(world, out, hook=KILLED_AT_FORWARD.format(call=5))  # saved after 12 samples
    BASE.run(world, out, "--from_resume", 1, "--batch_size", 8).passed()
    metrics, expected = (read_jsonl(folder / "sft_vlm_32.metrics.jsonl") for folder in (out, in_one_go(BASE)))
    for epoch in (1, 2):
        learned = [sum(row["learned_tokens"] for row in of if row["epoch"] == epoch) for of in (metrics, expected)]
        assert learned[0] == learned[1]
    assert [row["step"] for row in metrics] == list(range(1, 1 + 3 + 2 + 4))


def test_more_epochs_and_another_learning_rate_are_allowed_and_said(world, save_dir, tmp_path):
    out = save_dir(tmp_path / "out")
    BASE.run(world, out).passed()
    result = BASE.run(world, out, "--from_resume", 1, "--epochs", 3, "--learning_rate", 2e-3).passed()
    assert "after step 14, 7 to go; changed: epochs 2 -> 3, learning_rate 0.001 -> 0.002" in result.out
    rates = [row["learning_rate"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl")]
    assert len(rates) == 21
    assert rates[-1] == pytest.approx(2e-4)


def test_from_resume_of_a_finished_run_has_nothing_to_do(world, in_one_go):
    out = in_one_go(BASE)
    result = BASE.run(world, out, "--from_resume", 1).passed()
    assert f"after step {2 * STEPS}, 0 to go" in result.out
    assert len(read_jsonl(out / "sft_vlm_32.metrics.jsonl")) == 2 * STEPS


def test_the_same_data_in_another_place_is_the_same_data(world, save_dir, tmp_path, in_one_go):
    """On another machine, with another modification time: only the content counts."""
    out = save_dir(tmp_path / "out")
    BASE.run(world, out, hook=KILLED_AT_FORWARD.format(call=5))
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes((world.root / "sft.jsonl").read_bytes())
    BASE.run(world, out, "--from_resume", 1, "--data_path", copy).passed()
    assert_same_end(BASE, out, in_one_go(BASE))


def test_a_state_of_another_run_is_refused_with_both_values(world, in_one_go, tmp_path):
    out = in_one_go(BASE)
    before = {path: path.read_bytes() for path in out.glob("sft_vlm_32*") if path.is_file()}
    rows = read_jsonl(world.root / "sft.jsonl")
    rows[7]["conversations"][1]["content"] = rows[7]["conversations"][1]["content"].replace("蓝", "红")
    for flags, said in (
        (["--seed", 5], "its seed (42; now 5)"),
        (["--max_seq_len", 900], "its max_seq_len (1536; now 900)"),
        (["--data_path", world.root / "pretrain.jsonl"], "its data (25 rows, "),
        (["--data_path", write_jsonl(tmp_path / "one_word.jsonl", rows)], "its data (25 rows, "),
        (["--freeze_llm", 1], "Repeat that run's flags (--freeze_llm none)"),
    ):
        message = BASE.run(world, out, "--from_resume", 1, *flags)
        message.refused("sft_vlm_32_resume.pth ", said, "--from_resume")
    assert before == {path: path.read_bytes() for path in out.glob("sft_vlm_32*") if path.is_file()}


@pytest.mark.parametrize(("number", "word"), [(1, "all"), (2, "ends")])
def test_a_state_that_holds_the_old_number_resumes(world, save_dir, tmp_path, number, word):
    """Before --freeze_llm had words, state and sidecar held its number."""
    way = Way(PRETRAIN, "pretrain_vlm_32", ("--batch_size", 8, "--epochs", 1, "--freeze_llm", word))
    out = save_dir(tmp_path / "out")
    way.run(world, out).passed()
    state, sidecar = load(out / "pretrain_vlm_32_resume.pth"), out / "pretrain_vlm_32.json"
    state["arguments"]["freeze_llm"] = str(number)
    torch.save(state, out / "pretrain_vlm_32_resume.pth")
    described = json.loads(sidecar.read_text())
    described["arguments"]["freeze_llm"] = number
    sidecar.write_text(json.dumps(described))
    if number == 2:
        refused = way.run(world, out, "--from_resume", 1, "--freeze_llm", 2)
        assert refused.code == 2 and "--freeze_llm: 2 is not the same" in refused.err and "write ends" in refused.err
    again = way.run(world, out, "--from_resume", 1, "--epochs", 2, *(["--freeze_llm", 1] if number == 1 else []))
    assert "epochs 1 -> 2" in again.passed().out


def test_a_state_is_refused_with_another_frozen_model(world, save_dir, tmp_path):
    """In pretraining the state holds only the projection; the frozen weights must still be the same."""
    way = Way(PRETRAIN, "pretrain_vlm_32", ("--batch_size", 8))
    out = save_dir(tmp_path / "out")
    way.run(world, out).passed()
    torch.save(language_model(num_hidden_layers=3), tmp_path / "deeper.pth")
    torch.save(language_model(steps=21), tmp_path / "other.pth")
    for weights, said in (
        ("deeper.pth", "model (hidden_size 32, 2 layers, 8 and 2 heads"),
        ("other.pth", "frozen weights ("),
    ):
        again = way.run(world, out, "--from_resume", 1, "--from_weight", tmp_path / weights)
        again.refused("pretrain_vlm_32_resume.pth differs from this run in its", said, "; now ")


def changed(state: dict, place: str, value) -> dict:
    """Returns a copy of a state with another value at a place such as `optimizer/state/0/step`."""
    name, _, rest = place.partition("/")
    key = int(name) if name.isdecimal() else name
    if isinstance(state, list):
        return state[:key] + [changed(state[key], rest, value) if rest else value] + state[key + 1 :]
    return state | {key: changed(state[key], rest, value) if rest else value}


NAN, ROWS = float("nan"), 25
NO_STATES = [
    *(("epoch", value, "epoch") for value in (-1, "x", 1.0, NAN, None, True, 10**9, 2**70)),
    *(("sample", value, "sample") for value in (-3, "x", NAN, 10**9, ROWS, [3])),
    *(("step", value, "step") for value in (-1, NAN, "7", 0, EPOCHS * ROWS + 1)),
    ("epoch", EPOCHS + 1, f"{EPOCHS + 1}, sample 0 is not a valid position in a run of {EPOCHS} epochs over {ROWS} "),
    ("arguments/epochs", "many", "many epochs"),
    ("arguments", ["a list"], "arguments"),
    ("fingerprint", {"model": 5}, "fingerprint"),
    ("processes", 0, "processes"),
    ("bad_steps", [0, 0], "a list of 3"),
    ("progress/samples", None, "progress.samples"),
    ("progress/learned_from/0", NAN, "progress.learned_from[0]"),
    ("learned", [torch.ones(2)], "learned"),
    ("optimizer/state/0", {"exp_avg": torch.ones(3)}, "(0, 'step') is missing"),
    ("optimizer/state/0/exp_avg", torch.ones(3), "(0, 'exp_avg') is (3,)"),
    ("optimizer/state/0/step", torch.tensor(NAN), "(0, 'step') holds NaN"),
    ("optimizer/state/999", {"step": torch.ones(())}, "(999, 'step') is unknown"),
    ("random/0/cpu", torch.ones(5), "random state is damaged"),
    ("random", torch.ones(5), "random"),
    ("scaler", {"scale": "x"}, "scaler.scale"),
    ("wandb_id", 5, "wandb_id"),
]


@pytest.fixture(scope="module")
def finished(in_one_go) -> dict:
    """The state of a run of 14 steps."""
    return load(in_one_go(BASE) / f"{BASE.name}_resume.pth")


@pytest.mark.parametrize(("place", "value", "word"), NO_STATES)
def test_a_state_that_no_run_can_have_is_refused(finished, tmp_path, place, value, word):
    """As a resumed run reads it: what its kinds are, whether its tensors fit, and whether it is a place in the run."""
    state, path = changed(finished, place, value), tmp_path / "sft_vlm_32_resume.pth"
    torch.save(state, path)
    parameters = finished["learned"]
    model = types.SimpleNamespace(
        named_parameters=lambda: ((name, torch.nn.Parameter(value)) for name, value in parameters.items()),
        state_dict=dict,
        load_state_dict=lambda state: None,
    )
    with pytest.raises(UsageError) as error:
        read = read_state(path, STATE, 1, print)
        load_learned(model, read, path)
        check_same_run(read, {}, ROWS, path)
        restore_random_state(read["random"], 0, torch.device("cpu"))
    assert word in str(error.value) and "resume" in str(error.value)


@pytest.mark.parametrize("place", [("sample", -3), ("sample", 10**6), ("optimizer/state/0/exp_avg", torch.ones(3))])
def test_a_run_that_such_a_state_would_begin_ends_in_words(world, finished, in_one_go, tmp_path, place):
    out = shutil.copytree(in_one_go(BASE), tmp_path / "out")
    torch.save(changed(finished, *place), out / "sft_vlm_32_resume.pth")
    BASE.run(world, out, "--from_resume", 1, "--epochs", 3).refused("sft_vlm_32_resume.pth ")


@pytest.mark.parametrize("content", [b"", b"not a state", pickle.dumps({"a": 1})])
def test_a_garbled_state_is_refused(world, save_dir, tmp_path, content):
    out = save_dir(tmp_path / "out")
    (out / "sft_vlm_32_resume.pth").write_bytes(content)
    BASE.run(world, out, "--from_resume", 1).refused("sft_vlm_32_resume.pth")


def test_the_state_holds_neither_tower_nor_frozen_weights(world, save_dir, tmp_path):
    out = save_dir(tmp_path / "out")
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, "--freeze_llm", "ends").passed()
    state = load(out / "pretrain_vlm_32_resume.pth")
    learned = {name.split(".")[0] + name.split(".")[1] for name in state["learned"]}
    assert learned == {"modellayers", "vision_projvision_proj"}
    assert len(state["optimizer"]["state"]) == len(state["learned"]) == 20
    elements = sum(tensor.numel() for tensor in state["learned"].values())
    # Float32 weights and two moments; the tower alone would be 160 kB, the frozen embedding 819 kB more.
    assert (out / "pretrain_vlm_32_resume.pth").stat().st_size < 4 * 3 * elements + 40_000


def test_the_state_of_pretraining_at_512_is_below_10_megabytes(world, save_dir, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, patch_size=16, image_size=224)).save_pretrained(tmp_path / "tower")
    rows = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(world.root / "pretrain.jsonl")[:2])
    flags = ["--from_weight", "none", "--hidden_size", 512, "--num_hidden_layers", 8, "--data_path", rows]
    out = save_dir(tmp_path / "out")
    files = [*world.files("pretrain", out), "--vision_model_path", tmp_path / "tower"]
    world.run(PRETRAIN, *files, *flags, "--epochs", 1, "--batch_size", 1).passed()
    size = (out / "pretrain_vlm_512_resume.pth").stat().st_size
    assert 3 * 4 * 768 * 512 < size < 10_000_000
    assert (out / "pretrain_vlm_512.pth").stat().st_size > 50_000_000


def test_an_unfinished_run_is_not_overwritten_without_a_word(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    BASE.run(world, out, hook=KILLED_AT_FORWARD.format(call=5))
    before = {path.name: path.read_bytes() for path in out.glob("sft_vlm_32*") if path.is_file()}
    BASE.run(world, out).refused("did not finish", "--from_resume 1 resumes it", "--from_resume 0 starts over")
    assert before == {path.name: path.read_bytes() for path in out.glob("sft_vlm_32*") if path.is_file()}
    result = BASE.run(world, out, "--from_resume", 0).passed()
    assert "kept the unfinished run as " in result.out
    [kept] = out.glob("sft_vlm_32.*_resume.pth")
    assert kept.read_bytes() == before["sft_vlm_32_resume.pth"]
    assert (out / f"{kept.name.removesuffix('_resume.pth')}.pth").read_bytes() == before["sft_vlm_32.pth"]
    BASE.run(world, out).passed()  # the new one did finish


def test_the_weights_it_starts_from_are_not_overwritten(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    before = (out / "llm_32.pth").read_bytes()
    flags = ["--from_weight", "llm", "--save_weight", "llm"]
    BASE.run(world, out, *flags).refused("--save_weight llm would overwrite", "llm_32.pth", "another name")
    assert (out / "llm_32.pth").read_bytes() == before


# All runs begin within one second.
ONE_SECOND = "import time; time.strftime = lambda *_: '2026-01-31-120000'"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_finished_run_is_kept_under_another_name_and_no_weights_are_taken_there(world, tmp_path, ranks):
    out = world.copy_of_out(tmp_path / "out")
    rows = write_jsonl(tmp_path / "rows.jsonl", [*read_jsonl(world.root / "sft.jsonl"), {"conversations": []}])
    flags = ["--epochs", 1, "--data_path", rows, "--images_path", world.images, "--max_bad_rows", 1]
    runs, names = [], ["sft_vlm_32", "sft_vlm_32.2026-01-31-120000", "sft_vlm_32.2026-01-31-120000-2"]
    for number, name in enumerate(names):
        again = ["--from_resume", number % 2, "--seed", number]  # with --from_resume 1, which finds no checkpoint
        if number % 2:
            (out / "sft_vlm_32_resume.pth").unlink()
        before = contents(out, "sft_vlm_32")
        result = BASE.run(world, out, *flags, *again, hook=ONE_SECOND, ranks=ranks).passed()
        assert result.out.count("kept the ") == (number > 0)
        if number:
            assert f"kept the earlier run as {out / name}\n" in result.out
            runs.append((name, before))
    assert {".pth", ".json", ".bad_rows.txt", ".report.html", "_samples/0.jpg"} <= runs[0][1].keys()
    for name, before in runs:
        assert contents(out, name) == before
    assert list(list_weights(out)) == [out / "llm_32.pth", out / "sft_vlm_32.pth"]
    kept = ["--from_weight", out / f"{names[1]}.pth"]
    BASE.run(world, out, *flags, *kept, "--save_weight", "more").passed()  # a name like any other


def contents(out: Path, name: str) -> dict[str, bytes]:
    """The files of a run, by what follows its name."""
    paths = [path for ending in ENDINGS for path in (out / f"{name}{ending}", *(out / f"{name}{ending}").glob("*"))]
    return {str(path.relative_to(out)).removeprefix(name): path.read_bytes() for path in paths if path.is_file()}


def test_a_run_that_fails_before_its_first_save_leaves_the_weights_where_they_are(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    (out / "sft_vlm_32.pth").write_bytes(b"somebody's")
    for call in (1, 3):
        BASE.run(world, out, "--epochs", 1, hook=KILLED_AT_FORWARD.format(call=call))
        assert (out / "sft_vlm_32.pth").read_bytes() == b"somebody's"
    result = BASE.run(world, out, "--epochs", 1).passed()
    [kept] = out.glob("sft_vlm_32.*.pth")
    assert kept.read_bytes() == b"somebody's" and f"kept the earlier run as {kept.with_suffix('')}\n" in result.out
