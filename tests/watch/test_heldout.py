"""Held-out rows: the losses measured on them, the descriptions, and that training stays bit-identical."""

import json
import math
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import EVAL, PRETRAIN, SFT, pretrain_row, read_jsonl, write_jsonl

from dataset.chat import load_tokenizer
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.prompts import first_answer
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer import evaluate as evaluation
from trainer.evaluate import Evaluator
from trainer.report.progress import Progress
from trainer.report.watcher import Watch
from trainer.stage import answer_loss
from trainer.support.processes import Processes

pytest_plugins = ["tiny"]

FLAGS = ["--from_weight", "llm", "--epochs", 2, "--batch_size", 4, "--learning_rate", 1e-3, "--log_interval", 2]
CPU = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world.tokenizer)


def rows_of(world, tokenizer, stage="sft", images=None) -> VLMDataset:
    cache = world.root / "cache"
    return VLMDataset(world.root / f"{stage}.jsonl", images or world.images, tokenizer, 1536, 196, cache_dir=cache)


@pytest.fixture(scope="module")
def model(world):
    torch.manual_seed(0)
    return MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=2), vision_model_path=world.tower).train()


def evaluator_of(data, model, batch_size=4):
    return Evaluator(data, model, answer_loss, VLMCollator(), CPU, torch.float32, batch_size)


def measured(data, model):
    return evaluator_of(data, model).measure()


# ---- the measured losses


@torch.no_grad()
def summed_loss(model, sample, pixel_values) -> tuple[float, int]:
    """Returns the model's own loss of one row, summed over its learned tokens, and their number."""
    learned = int((sample["labels"] != -100).sum())
    starts = torch.stack((torch.zeros_like(sample["image_starts"]), sample["image_starts"]), dim=1)
    inputs = {"input_ids": sample["input_ids"][None], "labels": sample["labels"][None]}
    output = model(**inputs, pixel_values=pixel_values if len(starts) else None, image_starts=starts)
    return output.loss.item() * learned, learned


def test_the_three_losses_are_those_of_each_row_alone(world, tokenizer, model):
    data = rows_of(world, tokenizer)
    samples, first = [data[index] for index in range(len(data))], data.first_pictures
    pictured = [samples[index] for index in sorted(range(len(data)), key=first.__getitem__) if first[index] >= 0]
    partners = pictured[len(pictured) // 2 :] + pictured[: len(pictured) // 2]
    others = {id(sample): partner["pixel_values"] for sample, partner in zip(pictured, partners, strict=True)}
    sums = np.zeros(3)
    tokens = 0
    for sample in samples:
        own = sample["pixel_values"]
        other = others.get(id(sample), own)
        other = torch.cat([other, other])[: len(own)]
        for way, (row, pixels) in enumerate(((sample, own), (sample, other), (data.without_images(sample), own[:0]))):
            loss, learned = summed_loss(model, row, pixels)
            sums[way] += loss
        tokens += learned
    held_out = measured(data, model)
    found = [held_out.loss, held_out.loss_shuffled, held_out.loss_blind]
    assert found == pytest.approx(sums / tokens, rel=1e-4)  # features are cached in half precision
    assert (held_out.samples, held_out.tokens) == (len(data), tokens)
    assert held_out.gap_shuffled == pytest.approx((sums[1] - sums[0]) / tokens, abs=1e-4)
    assert held_out.gap_blind == pytest.approx((sums[2] - sums[0]) / tokens, abs=1e-4)
    assert len(set(np.round(found, 5))) == 3


def test_measuring_changes_nothing(world, tokenizer, model):
    before = [tensor.clone() for tensor in model.state_dict().values()]
    random = torch.get_rng_state()
    first, second = (measured(rows_of(world, tokenizer), model) for _ in range(2))
    assert first.loss == second.loss
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


def test_a_model_that_ignores_the_pictures_has_no_gap(world, tokenizer, model):
    blind = MiniMindVLM(model.config, vision_model_path=world.tower)
    blind.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(blind.vision_proj.vision_proj[0].weight)
    assert measured(rows_of(world, tokenizer), blind).gap_shuffled == pytest.approx(0, abs=1e-6)


def test_a_loss_that_cannot_be_measured_is_none(world, tokenizer, model, tmp_path):
    for name, rows, blind_too in (
        ("text", [{"conversations": pretrain_row(0)["conversations"]}], True),
        ("one", [pretrain_row(0)], False),
    ):
        if blind_too:
            rows[0]["conversations"][0]["content"] = "说。"
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        held_out = measured(VLMDataset(path, world.images, tokenizer, 640, 196, cache_dir=world.root / "cache"), model)
        assert held_out.loss > 0
        assert held_out.loss_shuffled is held_out.gap_shuffled is None
        assert (held_out.loss_blind is None) == blind_too
        assert "-" in str(held_out)


def test_more_pictures_than_are_cached_give_the_same(world, tokenizer, model, monkeypatch):
    data = rows_of(world, tokenizer)
    kept = measured(data, model)
    monkeypatch.setattr(evaluation, "CACHED_PICTURES", 3)
    evaluator = evaluator_of(data, model)
    again = evaluator.measure()
    assert not evaluator.samples
    for name in ("loss", "loss_shuffled", "loss_blind"):
        assert getattr(again, name) == pytest.approx(getattr(kept, name), rel=1e-4)


def test_a_broken_picture_is_skipped_and_named(world, tokenizer, model, tmp_path):
    images = shutil.copytree(world.images, tmp_path / "images")
    (images / "3.jpg").write_bytes(b"no picture")
    data = rows_of(world, tokenizer, "pretrain", images)
    evaluator = evaluator_of(data, model)
    for _ in range(2):
        assert evaluator.measure().samples == len(data) - len(evaluator.skipped) < len(data)
    assert {error.name for error in evaluator.skipped} == {"3.jpg"}


# ---- in a run


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    """Trains on one rank, measuring on the pretraining rows every four steps."""
    return run(world, world.copy_of_out(tmp_path_factory.mktemp("watched") / "out"), *watching(world))


def watching(world) -> list:
    return ["--eval_data", world.root / "pretrain.jsonl", "--eval_interval", 4]


def run(world, out, *flags, **how):
    result = world.run(SFT, *world.files("sft", out), *FLAGS, *flags, **how).passed()
    return result, out


def evals(out) -> list[dict]:
    return [row for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl") if "eval" in row]


def test_it_measures_at_the_interval_and_at_the_end(watched):
    result, out = watched
    assert [row["step"] for row in evals(out)] == [4, 8, 12, 14]
    last = evals(out)[-1]["eval"]
    assert last["samples"] == 26
    assert last["gap_shuffled"] == pytest.approx(last["loss_shuffled"] - last["loss"], abs=2e-6)
    assert f"step 14  held out: loss {last['loss']:.4f}  shuffled images {last['loss_shuffled']:.4f}" in result.out
    assert "held out     26 rows of " in result.out
    assert "measured every 4 steps" in result.out


def test_without_an_interval_it_measures_at_most_ten_times(world, tmp_path):
    _, out = run(world, world.copy_of_out(tmp_path / "out"), "--eval_data", world.root / "pretrain.jsonl")
    assert [row["step"] for row in evals(out)] == [2, 4, 6, 8, 10, 12, 14]


def test_training_is_bit_identical_with_and_without_held_out_rows(world, watched, tmp_path):
    result, out = run(world, world.copy_of_out(tmp_path / "out"), "--eval_data", "none")
    a, b = (torch.load(folder / "sft_vlm_32_resume.pth", weights_only=True) for folder in (out, watched[1]))
    assert all(torch.equal(tensor, b["learned"][name]) for name, tensor in a["learned"].items())
    assert torch.equal(a["random"][0]["cpu"], b["random"][0]["cpu"])
    assert not evals(out)
    trained = [
        [row["loss"] for row in read_jsonl(folder / "sft_vlm_32.metrics.jsonl") if "loss" in row]
        for folder in (out, watched[1])
    ]
    assert trained[0] == trained[1]
    # Its page shows images that were trained on instead.
    assert "the pictures described at the end were trained on" in result.out
    assert "descriptions of training images" in (out / "sft_vlm_32.report.html").read_text(encoding="utf-8")
    assert {row["step"] for row in read_jsonl(out / "sft_vlm_32_samples" / "samples.jsonl")} == {14}


def test_two_ranks_measure_the_same(world, watched, tmp_path):
    _, out = run(world, world.copy_of_out(tmp_path / "out"), *watching(world), "--batch_size", 2, ranks=2)
    for row, expected in zip(evals(out), evals(watched[1]), strict=True):
        assert row["step"] == expected["step"]
        for name in ("loss", "loss_shuffled", "loss_blind"):
            assert row["eval"][name] == pytest.approx(expected["eval"][name], rel=1e-4)
        assert row["eval"]["samples"] == expected["eval"]["samples"]


def test_the_descriptions_are_kept_step_by_step(watched):
    _, out = watched
    folder = out / "sft_vlm_32_samples"
    rows = read_jsonl(folder / "samples.jsonl")
    assert [row["step"] for row in rows[::8]] == [4, 8, 12, 14]
    assert len(rows) == 4 * 8
    names = {f"{number}.jpg" for number in range(8)}
    assert {row["picture"] for row in rows} == {path.name for path in folder.glob("*.jpg")} == names
    assert rows[0]["prompt"] == "描述这张图片"
    assert rows[0]["reference"] == pretrain_row(0)["conversations"][1]["content"]


def test_measuring_time_does_not_count_in_the_speed(tmp_path, monkeypatch):
    now = [0.0]

    def taking(seconds, result):
        def call(*_):
            now[0] += seconds
            return result

        return call

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    args = SimpleNamespace(use_wandb=False, use_swanlab=False, log_interval=2)
    run = SimpleNamespace(device=CPU.device, processes=CPU, state=None, args=args)
    run.files = SimpleNamespace(samples=tmp_path, metrics=tmp_path / "metrics.jsonl")
    progress = Progress(run, 4, 0, {})
    watch = Watch.__new__(Watch)
    watch.run, watch.model, watch.interval = run, None, 1
    watch.evaluator = SimpleNamespace(
        measure=taking(5.0, evaluation.HeldOut(1.0, 2.0, 3.0, 0.1, 8, 80, 5.0, 1.0, 2.0)), skipped=[]
    )
    watch._describe = taking(7.0, None)
    watch.measure_if_due(progress, 1, 1)
    taking(2.0, None)()
    progress.add(torch.tensor([1.0, 1.0]), torch.tensor(False), samples=10, tokens=100, data_seconds=0.0)
    progress.report_if_due(SimpleNamespace(step=2, sample=3, skipped_pictures=0), 1, 1e-3)
    assert json.loads(run.files.metrics.read_text().splitlines()[-1])["samples_per_second"] == 5.0


def test_the_run_ends_in_a_page(watched):
    result, out = watched
    assert f"its page: {out / 'sft_vlm_32.report.html'}" in result.out
    assert "grounding gap" in (out / "sft_vlm_32.report.html").read_text(encoding="utf-8").lower()


def test_a_resumed_run_measures_and_describes_as_an_uninterrupted_one(world, watched, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    killed = """
import os, signal, model.model_vlm, trainer.loop
step, calls = trainer.loop.train_step, []
def counted(*inputs, **named):
    calls.append(1)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*inputs, **named)
trainer.loop.train_step = counted
"""
    flags = [*world.files("sft", out), *FLAGS, *watching(world), "--save_interval", 3]
    assert world.run(SFT, *flags, hook=killed).code == -9
    world.run(SFT, *flags, "--from_resume", 1).passed()

    def without_seconds(folder):
        return [row | {"eval": {k: v for k, v in row["eval"].items() if k != "seconds"}} for row in evals(folder)]

    assert without_seconds(out) == without_seconds(watched[1])
    samples = [(folder / "sft_vlm_32_samples" / "samples.jsonl").read_text() for folder in (out, watched[1])]
    assert samples[0] == samples[1]


def test_missing_eval_data_is_refused(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = [*world.files("sft", out), *FLAGS, "--eval_data", "no_such.jsonl"]
    world.run(SFT, *flags).refused("no such data file", "no_such.jsonl")


# ---- eval_vlm.py


def test_eval_measures_a_file_the_same_on_one_rank_and_two(world, watched, tmp_path):
    _, out = watched
    results = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.json"
        flags = ["--eval_data", world.root / "pretrain.jsonl", "--images_path", world.images, "--json", path]
        done = world.run(EVAL, *world.eval_files(out), *flags, "--batch_size", 4, ranks=ranks).passed()
        results.append(json.loads(path.read_text()))
        assert f"(perplexity {results[-1]['perplexity']:.3f})" in done.out
    one, two = results
    last = evals(out)[-1]["eval"]
    for name in ("loss", "loss_shuffled", "loss_blind"):
        assert one[name] == pytest.approx(last[name], rel=2e-3)  # the weight file has half precision
        assert two[name] == pytest.approx(one[name], rel=1e-4)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    assert one["exact_match"] == two["exact_match"]
    assert one["short_answers"] == two["short_answers"] > 0


def test_short_answers_stand_beside_other_images_and_the_most_frequent_answer(
    world, tokenizer, model, monkeypatch, tmp_path
):
    rows = [pretrain_row(number) for number in range(5)]
    for row, answer in zip(rows, ["红", "红", "蓝", "黄", "长" * 60], strict=True):  # the last is too long
        row["conversations"][1]["content"] = answer
    data = VLMDataset(write_jsonl(tmp_path / "rows.jsonl", rows), world.images, tokenizer, 640, 196, cache_dir=tmp_path)
    pictures = [data[number]["pixel_values"][0] for number in range(5)]

    def answers(model, tokenizer, inputs, longest):
        shown = inputs["pixel_values"].flatten(0, -4)
        number = [next(n for n, picture in enumerate(pictures) if torch.equal(picture, one)) for one in shown]
        return [("红", " 红\n", "别的", "蓝", "蓝")[n] for n in number]

    monkeypatch.setattr(evaluation, "generate_answers", answers)
    evaluator = evaluator_of(data, model, 2)
    found = evaluation.exact_match(evaluator, tokenizer, 16)
    # Row 2 alone is answered rightly with another's image, as its partner is the fifth picture.
    assert found == {"short_answers": 4, "exact_match": 0.5, "exact_shuffled": 0.25, "exact_frequent": 0.5}
    assert evaluation.exact_match(evaluator, tokenizer, 0) == {}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12])
def test_ranks_share_all_rows_however_few_pictures_there_are(world, tokenizer, model, tmp_path, rows):
    path = write_jsonl(tmp_path / "rows.jsonl", [pretrain_row(number) for number in range(rows)])
    data = VLMDataset(path, world.images, tokenizer, 640, 196, cache_dir=tmp_path)
    for ranks in (1, 2, 5):
        shares = []
        for rank in range(ranks):
            processes = Processes(rank, ranks, torch.device("cpu"))
            evaluator = Evaluator(data, model, answer_loss, VLMCollator(), processes, torch.float32, 4)
            shares.append([place for part in evaluator.batches() for place in part])
        assert sorted([place for share in shares for place in share]) == list(range(rows))
        assert sum(map(bool, shares)) == min(ranks, rows)


def test_one_picture_has_no_partner_even_in_several_rows(world, tokenizer, model, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [pretrain_row(0)] * 4)
    held_out = measured(VLMDataset(path, world.images, tokenizer, 640, 196, cache_dir=tmp_path), model)
    assert held_out.gap_shuffled is held_out.gap_error is None


def test_the_gap_s_error_is_over_pictures_not_rows(world, tokenizer, model, tmp_path):
    rows = [pretrain_row(number) for number in range(12)]
    once = write_jsonl(tmp_path / "once.jsonl", rows)
    often = write_jsonl(tmp_path / "often.jsonl", rows * 4)
    held_out = [
        measured(VLMDataset(path, world.images, tokenizer, 640, 196, cache_dir=tmp_path), model)
        for path in (once, often)
    ]
    assert held_out[0].gap_error > 0
    assert held_out[1].gap_error == pytest.approx(held_out[0].gap_error, rel=1e-3)


def talk(world, out, *lines: str) -> str:
    typed = "\n".join([*lines, ""]).encode("utf-8", "surrogateescape")
    done = world.run(EVAL, *world.eval_files(out), "--chat", "--temperature", 0, typed=typed).passed()
    assert "Traceback" not in done.err
    return done.out


def test_a_chat_keeps_its_history_and_takes_pictures(world, watched):
    picture, missing = world.images / "0.jpg", world.images / "none.jpg"
    said = talk(
        world,
        watched[1],
        *("你好", str(picture), str(missing), "图中有什么？", "在哪里？"),
        f"'{picture}' 这是什么？",  # a path and a question in one line
        f"{missing} 这是什么？",  # not asked without its image
        *(f"'{picture}'", "它呢？", "/new", "/help", "/forget it", "\udcff\udcfe", "/quit", "not read"),
    )
    assert said.count("tokens/s") == 6
    assert said.count("1 picture(s) added: ask about them") == 2
    assert said.count("not added, and nothing asked: ") == 2
    assert "a new conversation" in said
    assert said.count("/new starts a new conversation") == 3  # at the start, for /help and for no command


def test_a_question_that_makes_a_chat_too_long_is_refused(world, watched, tmp_path):
    for ending in (".pth", ".json"):
        shutil.copy(watched[1] / f"sft_vlm_32{ending}", tmp_path)
    sidecar = json.loads((tmp_path / "sft_vlm_32.json").read_text())
    sidecar["config"]["max_position_embeddings"] = 3_000
    (tmp_path / "sft_vlm_32.json").write_text(json.dumps(sidecar))
    said = talk(world, tmp_path, "你" * 1_800, "好" * 2_300, "你好", "/new", "好" * 2_300)
    assert said.count("are more than the model's 3,000 positions") == 1
    assert said.count("tokens/s") == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval_data", "no_such.jsonl"], "no such data file"),
        (["--image", *["0.jpg"] * 170], "are more than the model's 32,768 positions"),
        (["--image", "0.jpg", "--prompt", "你" * 40_000], "are more than the model's 32,768 positions"),
    ],
)
def test_eval_refuses_what_cannot_be_asked(world, watched, flags, words):
    world.run(EVAL, *world.eval_files(watched[1]), *flags, cwd=world.images).refused(words)


def test_first_answer():
    labels = torch.tensor([-100, -100, 5, 6, -100, 7])
    assert first_answer(labels) == (2, 4)
    assert first_answer(labels[:4]) == (2, 4)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_it_is_in_the_terminal_and_in_wandb(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = [*watching(world), "--epochs", 1, "--log_interval", 1, "--use_wandb", "--wandb_project", "tiny"]
    how = {"env": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, "cwd": tmp_path, "terminal": True}
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags, **how).passed()
    assert "grounding gap" in result.out
    [log] = out.glob("wandb/offline-run-*/run-*.wandb")
    assert not (tmp_path / "wandb").exists()
    written = log.read_bytes()
    assert b"gap_shuffled" in written and b"train/tokens_per_second" in written
    losses = [row["loss"] for row in read_jsonl(out / "pretrain_vlm_32.metrics.jsonl") if "loss" in row]
    assert losses and all(json.dumps(loss).encode() in written for loss in losses)
    assert torch.load(out / "pretrain_vlm_32_resume.pth", weights_only=True)["wandb_id"] in log.name


@pytest.mark.skipif(find_spec("swanlab") is None, reason="swanlab is not installed")
def test_it_is_in_swanlab_and_goes_on_there(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = [*watching(world), "--log_interval", 1, "--use_swanlab", "--epochs"]
    how = {"env": {"SWANLAB_MODE": "offline", "SWANLAB_SAVE_DIR": str(tmp_path / "swanlab")}}
    ids = []
    for epochs, resume in ((1, []), (2, ["--from_resume", 1])):
        world.run(PRETRAIN, *world.files("pretrain", out), *flags, epochs, *resume, **how).passed()
        ids.append(torch.load(out / "pretrain_vlm_32_resume.pth", weights_only=True)["swanlab_id"])
    assert ids[0] and ids[0] == ids[1]
    logs = [path.read_bytes() for path in out.glob("run-*/**/*") if path.is_file()]
    assert any(b"eval/gap_shuffled" in log for log in logs) and any(b"train/tokens_per_second" in log for log in logs)
    refused = world.run(PRETRAIN, *world.files("pretrain", tmp_path / "new"), *flags, 1, "--from_weight", "none")
    refused.refused("--use_swanlab", "SWANLAB_MODE=offline", "metrics.jsonl")


def test_held_out_rows_that_are_trained_on_are_reported(world, watched, tmp_path):
    flags = ["--eval_data", world.root / "sft.jsonl", "--epochs", 1]
    result, _ = run(world, world.copy_of_out(tmp_path / "out"), *flags)
    assert "warning: 25 held-out rows or images are trained on too" in result.out
    assert "are trained on too" not in watched[0].out
