"""The two training scripts, run as their users run them: what they print, what they write, what they learn."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import PRETRAIN, PRETRAIN_ROWS, ROOT, SFT, SFT_ROWS, TOKENIZER, Result, read_jsonl, sft_row, write_jsonl

from dataset.chat import load_tokenizer, tokenizer_hash
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.setup import freeze, round_frozen_weights
from trainer.stage import cosine_learning_rate

pytest_plugins = ["tiny"]

BATCH = 8
STEPS = math.ceil(PRETRAIN_ROWS / BATCH)  # of an epoch
SFT_FLAGS = ["--epochs", 1, "--learning_rate", 1e-3, "--log_interval", 1]


class Ran:
    """A finished run: its output and the files it left."""

    def __init__(self, result: Result, out: Path, name: str):
        self.result, self.out = result.passed(), out
        self.weights = torch.load(out / f"{name}.pth", weights_only=True)
        self.sidecar = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        self.state = torch.load(out / f"{name}_resume.pth", weights_only=True)
        self.metrics = read_jsonl(out / f"{name}.metrics.jsonl")
        self.lines = result.out.splitlines()
        self.text = result.out


def everything_in(folder: Path) -> set[Path]:
    """Returns all files except those of Python and git."""
    return {path for path in folder.rglob("*") if not {"__pycache__", ".git"}.intersection(path.parts)}


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory) -> Ran:
    """Runs two epochs of stage 1 in the repository's root, with relative paths."""
    out = world.copy_of_out(tmp_path_factory.mktemp("trained") / "out")
    flags = ["--epochs", 2, "--batch_size", BATCH, "--log_interval", 3, "--save_interval", 100]
    before = everything_in(ROOT / "out")
    result = world.run("trainer/train_pretrain_vlm.py", *world.files("pretrain", out, cwd=ROOT), *flags, cwd=ROOT)
    assert everything_in(ROOT / "out") == before
    return Ran(result, out, "pretrain_vlm_32")


@pytest.fixture(scope="module")
def fine_tuned(world, pretrained) -> Ran:
    """Runs stage 2 after it inside trainer/, with relative paths."""
    cwd = ROOT / "trainer"
    files = world.files("sft", pretrained.out, cwd=cwd)
    result = world.run(SFT, *files, "--batch_size", BATCH, *SFT_FLAGS, cwd=cwd)
    return Ran(result, pretrained.out, "sft_vlm_32")


@pytest.fixture(scope="module")
def fine_tuned_by_two(world, pretrained, tmp_path_factory) -> Ran:
    """Runs the same with two ranks, from a folder outside the repository."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    out = cwd / "my" / "out"
    start = ["--from_weight", os.path.relpath(pretrained.out / "pretrain_vlm_32.pth", cwd)]
    files = world.files("sft", out, cwd=cwd)
    script = os.path.relpath(SFT, cwd)
    result = world.run(script, *files, *start, "--batch_size", BATCH // 2, *SFT_FLAGS, cwd=cwd, ranks=2)
    assert {path.name for path in cwd.iterdir()} == {"my"}
    return Ran(result, out, "sft_vlm_32")


def test_save_dir_has_exactly_these_files(pretrained, fine_tuned, fine_tuned_by_two):
    endings = (".pth", ".json", "_resume.pth", ".metrics.jsonl", ".report.html", "_samples")
    sft = {f"sft_vlm_32{ending}" for ending in endings} | {"vision_features"}
    both = {f"pretrain_vlm_32{ending}" for ending in endings} | sft | {"llm_32.pth"}
    assert {path.name for path in pretrained.out.iterdir()} == both
    assert {path.name for path in fine_tuned_by_two.out.iterdir()} == sft


@pytest.mark.parametrize("stage", ["pretrained", "fine_tuned", "fine_tuned_by_two"])
def test_weights_are_a_plain_state_dict_in_half_precision(stage, request):
    weights = request.getfixturevalue(stage).weights
    names = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=2, vision_hidden_size=32)).state_dict().keys()
    assert type(weights) is dict
    assert weights.keys() == names
    assert not any("vision_encoder" in name for name in names)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()


def test_the_sidecar_describes_the_weights(pretrained, fine_tuned):
    for ran, stage, rows in ((pretrained, "pretrain", 2 * PRETRAIN_ROWS), (fine_tuned, "sft", SFT_ROWS)):
        sidecar = ran.sidecar
        assert sidecar["config"]["hidden_size"] == 32
        assert sidecar["config"]["num_hidden_layers"] == 2
        assert sidecar["config"]["vision_hidden_size"] == 32
        assert sidecar["tokenizer_sha256"] == tokenizer_hash(load_tokenizer(TOKENIZER))
        assert sidecar["stage"] == stage
        assert sidecar["arguments"]["batch_size"] == BATCH
        assert sidecar["arguments"]["tokenizer_path"] == "model/tokenizer"
        assert sidecar["arguments"]["save_dir"] == str(ran.out)
        assert sidecar["versions"]["torch"] == torch.__version__
        assert {"python", "transformers", "datasets"} <= sidecar["versions"].keys()
        assert sidecar["step"] == math.ceil(rows / BATCH) + (stage == "pretrain")


def test_the_sidecar_names_the_commit(fine_tuned):
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        assert fine_tuned.sidecar["git_commit"] is None
    else:
        assert fine_tuned.sidecar["git_commit"].rstrip("+") == git.stdout.strip()


def test_the_header_describes_the_run(pretrained, fine_tuned_by_two):
    model = tiny_model(frozen="all")
    total, learned = model.num_parameters(), model.num_parameters(only_trainable=True)
    header = pretrained.result.out
    for part in (
        "stage 1, pretraining",
        "llm_32.pth (a language model: the projection starts untrained)",
        f"{PRETRAIN_ROWS} rows, 12 pictures",
        f"hidden_size 32, 2 layers: {total / 1e6:.3f} M parameters, {learned / 1e6:.3f} M learn",
        "epochs 2, batch_size 8, learning_rate 0.0004",
        "max_seq_len 640, freeze_llm all",
        f"steps        {2 * STEPS} of 8 samples ({STEPS} an epoch)",
        "CPU, 1 process(es), float32",
    ):
        assert part in header, header
    header = fine_tuned_by_two.result.out
    for part in ("stage 2, fine-tuning", f"{SFT_ROWS} rows", "4 of 8 samples", "CPU, 2 process(es)"):
        assert header.count(part) == 1, header  # only one rank prints it
    assert "untrained" not in header


def test_log_lines_at_the_interval_the_first_step_and_the_end_of_an_epoch(pretrained):
    pattern = re.compile(
        r"epoch (\d)  step (\d+)/8  loss (\d+\.\d{4})  lr \d\.\d\de-\d\d  samples/s [\d.,]+  tokens/s [\d,]+  "
        r"data wait \d+\.\d%(  ETA \d+:\d\d)?"
    )
    logged = [match.groups() for line in pretrained.lines if (match := pattern.fullmatch(line))]
    assert [(int(epoch), int(step)) for epoch, step, *_ in logged] == [(1, 1), (1, 3), (1, 4), (2, 6), (2, 8)]
    metrics = pretrained.metrics
    assert [(record["epoch"], record["step"]) for record in metrics] == [(1, 1), (1, 3), (1, 4), (2, 6), (2, 8)]
    assert [f"{record['loss']:.4f}" for record in metrics] == [loss for _, _, loss, _ in logged]
    assert [eta is None for *_, eta in logged] == [True] + [False] * 4  # the first step is no estimate of the rest
    fields = "learning_rate samples_per_second tokens_per_second data_wait learned_tokens skipped_pictures seconds"
    assert all(set(fields.split()) <= record.keys() for record in metrics)
    # Every row is learned once an epoch, including those of its smaller last step.
    tokens = int(re.search(r"([\d,]+) learned tokens", pretrained.result.out)[1].replace(",", ""))
    for epoch in (1, 2):
        assert sum(record["learned_tokens"] for record in metrics if record["epoch"] == epoch) == tokens


def test_the_last_step_is_saved(pretrained):
    assert pretrained.state["step"] == pretrained.sidecar["step"] == 2 * STEPS
    assert (pretrained.state["epoch"], pretrained.state["sample"]) == (2, 0)
    for name, tensor in pretrained.state["learned"].items():
        assert torch.equal(tensor.half(), pretrained.weights[name]), name


def test_what_comes_next_starts_from_these_weights(world, pretrained, tmp_path):
    said = " ".join(pretrained.text.partition("\nnext: ")[2].replace("\\", "").split())
    assert said == (
        "python trainer/train_sft_vlm.py --from_weight pretrain_vlm --save_weight sft_vlm "
        f"--save_dir {pretrained.out} --data_path {world.root / 'pretrain.jsonl'} --images_path {world.images}"
    )
    out = world.copy_of_out(tmp_path / "out")
    flags = ["--save_weight", "mine", "--epochs", 1, "--batch_size", PRETRAIN_ROWS]
    said = world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed().out
    said = " ".join(said.replace("\\", "").split())
    assert f"next: python {SFT} --from_weight mine --save_weight mine_sft" in said  # from another folder
    assert "--data_path pretrain.jsonl --images_path images" in said


def test_the_learning_rate_falls_to_a_tenth(pretrained, fine_tuned):
    args = SimpleNamespace(learning_rate=4e-4)
    assert [cosine_learning_rate(args, done, 0) for done in (0.0, 0.5, 1.0)] == pytest.approx([4e-4, 2.2e-4, 4e-5])
    rates = [record["learning_rate"] for record in fine_tuned.metrics]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-4)
    assert pretrained.metrics[-1]["learning_rate"] == pytest.approx(4e-5)


def test_pretraining_changes_the_projection_and_nothing_else(world, pretrained):
    before = torch.load(world.out / "llm_32.pth", weights_only=True)
    changed = {name for name, tensor in pretrained.weights.items() if not torch.equal(tensor, before.get(name, tensor))}
    assert changed == set()
    learned = {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}
    assert pretrained.weights.keys() - before.keys() == learned == pretrained.state["learned"].keys()
    torch.manual_seed(42)
    untrained = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=2), vision_model_path=world.tower).state_dict()
    assert all(not torch.equal(pretrained.weights[name], untrained[name].half()) for name in learned)


@pytest.mark.parametrize("freeze_llm", ["all", "ends"])
def test_weights_held_in_bfloat16_are_saved_as_they_were(world, tmp_path, freeze_llm):
    """Frozen weights are rounded in memory only; those that learn stay in float32."""
    out = world.copy_of_out(tmp_path / "out")
    flags = ["--dtype", "bfloat16", "--freeze_llm", freeze_llm, "--epochs", 1, "--batch_size", BATCH]
    world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed()
    before = torch.load(out / "llm_32.pth", weights_only=True)
    after = torch.load(out / "pretrain_vlm_32.pth", weights_only=True)
    learned = torch.load(out / "pretrain_vlm_32_resume.pth", weights_only=True)["learned"]
    assert {tensor.dtype for tensor in learned.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == learned.keys() & before.keys()
    assert any(not torch.equal(tensor, tensor.bfloat16().half()) for tensor in before.values())
    assert after["lm_head.weight"].data_ptr() == after["model.embed_tokens.weight"].data_ptr()


def test_only_frozen_weights_are_held_in_half_precision(world):
    model = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=3, use_moe=True), vision_model_path=world.tower)
    freeze(model, "ends")
    round_frozen_weights(model, torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == kinds["model.layers.1.self_attn.q_proj.weight"] == torch.bfloat16
    assert kinds["model.layers.1.mlp.gate.weight"] == kinds["model.layers.1.input_layernorm.weight"] == torch.float32
    assert {kinds[name] for name in kinds if "layers.0" in name or "vision_proj" in name} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.vision_encoder.parameters()} == {torch.bfloat16}
    assert model.vision_encoder.pixel_mean.dtype == torch.float32  # rounded to 8 bits it would shift every image


def test_fine_tuning_changes_everything_but_the_tower(world, pretrained, fine_tuned):
    before = pretrained.weights
    assert fine_tuned.weights.keys() == before.keys()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in fine_tuned.weights.items())
    assert not any("vision_encoder" in name for name in fine_tuned.state["learned"])


def test_two_ranks_give_the_losses_of_one(fine_tuned, fine_tuned_by_two):
    """25 rows in steps of 8: in the last step one rank has no row."""
    one, two = fine_tuned.metrics, fine_tuned_by_two.metrics
    assert len(one) == len(two) == math.ceil(SFT_ROWS / BATCH)
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["learned_tokens"] == alone["learned_tokens"]
    assert fine_tuned_by_two.state["step"] == fine_tuned.state["step"]


def tiny_model(frozen: str) -> MiniMindVLM:
    layers = 3 if frozen == "ends" else 2
    model = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=layers, vision_hidden_size=32))
    freeze(model, frozen)
    return model


def test_freeze_modes():
    def learned(frozen: str) -> set[str]:
        return {name for name, parameter in tiny_model(frozen).named_parameters() if parameter.requires_grad}

    projection = {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}
    assert learned("none") == {name for name, _ in tiny_model("none").named_parameters()}
    assert learned("all") == projection
    prefixes = ("model.layers.0.", "model.layers.2.")
    outer = {name for name, _ in tiny_model("ends").named_parameters() if name.startswith(prefixes)}
    assert len(outer) == 18
    assert learned("ends") == projection | outer


def test_a_terminal_gets_a_progress_bar_below_the_lines(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = ["--epochs", 1, "--batch_size", BATCH, "--log_interval", 1]
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags, terminal=True).passed()
    assert re.search(rf"100% step {STEPS}/{STEPS}, ETA \d\d:\d\d █", result.out), result.out
    assert f"epoch 1  step {STEPS}/{STEPS}  loss " in result.out
    assert len(read_jsonl(out / "pretrain_vlm_32.metrics.jsonl")) == STEPS


def test_the_seed_decides_the_order_and_a_new_run_begins_a_new_curve(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")

    def losses(seed: int) -> list[float]:
        flags = ["--epochs", 1, "--batch_size", BATCH, "--log_interval", 1, "--seed", seed]
        world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed()
        records = read_jsonl(out / "pretrain_vlm_32.metrics.jsonl")
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        return [record["loss"] for record in records]

    assert losses(1) == losses(1) != losses(2)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_named_and_counted_and_the_run_goes_on(world, tmp_path, workers):
    images = shutil.copytree(world.images, tmp_path / "images")
    (images / "1.jpg").write_bytes(b"no picture")
    (images / "2.jpg").write_bytes((images / "2.jpg").read_bytes()[:300])
    rows = [sft_row(2) | {"image": f"{number}.jpg"} for number in range(6)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = world.copy_of_out(tmp_path / "out")
    # One sample a step: the two with a broken image learn nothing.
    flags = ["--batch_size", 1, "--epochs", 1, "--log_interval", 1, "--from_weight", "llm", "--num_workers", workers]
    files = [*world.files("sft", out), "--data_path", data, "--images_path", images]
    result = world.run(SFT, *files, *flags).passed()
    for name in ("1.jpg", "2.jpg"):
        assert result.out.count(f"skipped a sample, its picture cannot be read: {name}: ") == 1
    assert "2 sample(s) were skipped, see " in result.out
    metrics = read_jsonl(out / "sft_vlm_32.metrics.jsonl")
    assert len(metrics) == 6
    assert sum(record["learned_tokens"] == 0 for record in metrics) == 2
    assert metrics[-1]["skipped_pictures"] == 2
    weights = torch.load(out / "sft_vlm_32.pth", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_cut_rows_are_reported(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = ["--batch_size", 32, "--epochs", 1, "--from_weight", "llm", "--max_seq_len", 440]
    assert "rows are cut at max_seq_len" in world.run(SFT, *world.files("sft", out), *flags).passed().out


PUBLISHED_FLAGS = """
save_dir save_weight epochs batch_size learning_rate device dtype num_workers accumulation_steps grad_clip log_interval
save_interval hidden_size num_hidden_layers max_seq_len use_moe data_path images_path from_weight from_resume freeze_llm
use_wandb wandb_project
"""


def test_help_lists_every_flag_of_the_original(world):
    for script in (PRETRAIN, SFT):
        text = world.run(script, "--help", cwd=ROOT.anchor).passed().out
        assert {f"--{name}" for name in PUBLISHED_FLAGS.split()} <= set(re.findall(r"^  (--\w+)", text, re.MULTILINE))
