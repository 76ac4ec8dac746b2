"""scripts/benchmark.py measures what it says, here with tiny models, in this process."""

import json
import math
import sys
from functools import partial

import pytest
import torch
from transformers import CLIPVisionConfig, CompileConfig

from common.errors import UsageError
from model import answers
from scripts import benchmark
from scripts.bench import gpu, speed


def here(function, *arguments):
    return function(*arguments)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script; returns its figures and its output."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = {
        speed: {
            "TOWER": CLIPVisionConfig(**tower, patch_size=16),
            "FOLDER": tmp_path,
            "LAYERS": {512: 1},
            **{"BATCHES": 3, "LOADED_BATCHES": 3, "TURNS": 1, "PROMPT_TOKENS": 8, "NEW_TOKENS": 4},
            "matrix_product_flops": lambda device: 1e11,
        },
        gpu: {"CHECKED": 2},
        benchmark: {"alone": here},
        # Compiled code itself is tested elsewhere: here a backend that takes no time.
        torch: {"compile": partial(torch.compile, backend="eager")},
        answers: {"CompileConfig": partial(CompileConfig, backend="eager")},
    }
    for module, values in tiny.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*flags):
        fixed = ["--device", "cpu", "--batch_size", "2", "--steps", "1", "--repeats", "1", "--num_workers", "0"]
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *fixed, *flags, "--json", str(path)])
        benchmark.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def test_training_is_measured_beside_the_plain_loop(run):
    figures, printed = run("pretrain", "--max_seq_len", "320")
    lines = figures["pretrain"]
    assert tuple(lines) == speed.TRAINING_LINES
    assert all(math.isfinite(value) and value > 0 for line in lines.values() for value in line.values())
    assert lines["plain"]["x plain"] == 1
    assert lines["plain"]["useful"] < 0.9 < lines["this project, kept features"]["useful"]
    assert all(text in printed for text in (*lines, "x plain", "useful", "product", "GB"))


def test_a_gpu_is_measured_in_every_way(run, monkeypatch, tmp_path, capsys):
    """On a CPU, where nothing is captured; a way that fails is reported, and the others are measured."""
    lines = {way: ("sft", 2, way) for way in ("plain", "captured", gpu.WAYS[-1])}
    monkeypatch.setitem(benchmark.MEASUREMENTS, "gpu", (lines, gpu.measure_gpu))
    for name, value in {"GPU_LINES": lines, "LARGE": 2, "TIMED": 1, "FED": 1, "ON_DEVICE": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    graphs = iter((False, True))

    def captured_step(step, context, pad):
        if not next(graphs):
            raise RuntimeError("no graphs here")
        return partial(step, context)

    monkeypatch.setattr(speed, "compile_or_not", lambda model, *_: CompiledOnPaper(model))
    monkeypatch.setattr(speed, "CapturedStep", captured_step)
    with pytest.raises(UsageError, match="1 line"):
        run("gpu")
    found, printed = json.loads((tmp_path / "figures.json").read_text())["gpu"], capsys.readouterr().out
    assert found["captured"] == {"failed": "no graphs here"}
    assert all(found[way]["samples/s"] > 0 for way in ("plain", gpu.WAYS[-1]))
    assert "compiled, captured, fed by the loader: samples/s" in printed and "of peak" in printed


class CompiledOnPaper:
    def __init__(self, model):
        self.model, self.encode_images = model, model.encode_images

    def __call__(self, **inputs):
        return self.model(**inputs)


def test_loader_and_generation_are_measured(run):
    figures, printed = run("data", "generate")
    assert all(line["samples/s"] > 0 for line in figures["data"].values())
    assert tuple(figures["generate"]) == speed.GENERATE_LINES
    assert all(line["x Llama"] > 0 for line in figures["generate"].values())
    assert all(title in printed for title in ("samples/s", "x plain", "tokens/s", "x Llama"))


def test_the_checks_pass(run):
    figures, printed = run("checks", "--max_seq_len", "320")
    assert all("found" in row for row in figures["checks"].values()), printed
    assert "0 graphs, the same weights" in printed


def test_a_line_that_fails_is_reported_after_the_others(run, monkeypatch, capsys):
    def check(args, line):
        if line == "first":
            raise RuntimeError("CUDA broke\nhere")
        return {"found": "fine"}

    monkeypatch.setitem(benchmark.MEASUREMENTS, "checks", (["first", "second"], check))
    with pytest.raises(UsageError, match="1 line"):
        run("checks")
    printed = capsys.readouterr().out
    assert "failed: CUDA broke\n" in printed and "fine" in printed


def test_figures_are_medians_of_all_rounds(run, monkeypatch):
    values = iter([1.0, 10.0, 3.0, 30.0, 8.0, 20.0])
    function = lambda args, line: {"s": next(values), "found": "x"}  # noqa: E731
    monkeypatch.setitem(benchmark.MEASUREMENTS, "data", (["a", "b"], function))
    assert run("data", "--repeats", "3")[0]["data"] == {"a": {"s": 3.0, "found": "x"}, "b": {"s": 20.0, "found": "x"}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["training"], "invalid choice: 'training'"),
        (["sft", "--repeats", "0"], "argument --repeats: 0: must be at least 1"),
        (["sft", "--batch_size", "-1"], "argument --batch_size: -1: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(flags)
    assert message in capsys.readouterr().err


def test_the_operations_counted_are_those_of_the_shape():
    """By hand for one caption: 8 layers of 512, 100 tokens of which 10 are learned, one picture."""
    args = speed.settings_of(benchmark.parse_arguments(["--device", "cpu"]), "pretrain")
    total = {"useful": 100, "squares": 100**2, "learned": 10, "samples": 1}
    projections, rest = 512 * 512 + 2 * 512 * 128, 512 * 512 + 3 * 512 * 1408  # of a block: q, k, v; and what follows
    decoder = 2 * 8 * projections * 100 + 2 * 8 * 512 * 100**2 + 2 * 7 * rest * 100
    decoder += 2 * (rest + 512 * 6400) * 10  # the last block's rest and the logits, where something is learned
    assert speed.model_flops(args, total, is_cached=True) == 2 * decoder
    tower = speed.model_flops(args, total, is_cached=False) - 2 * decoder
    assert tower == pytest.approx(35e9, rel=0.03)  # published: 17.5 G multiply-adds


@pytest.mark.parametrize(
    ("stage", "hidden_size", "tokens", "learned", "gflop"),
    [
        ("pretrain", 512, 275, 50, 60),
        ("sft", 512, 875, 330, 171),
        ("pretrain", 768, 275, 50, 144),
        ("sft", 768, 875, 330, 604),
    ],
)
def test_the_hours_in_the_document_count_these_operations(stage, hidden_size, tokens, learned, gflop):
    flags = [stage, "--device", "cpu", "--hidden_size", str(hidden_size)]
    args = speed.settings_of(benchmark.parse_arguments(flags), stage)
    total = {"samples": 1, "useful": tokens, "learned": learned, "squares": tokens**2}
    assert speed.model_flops(args, total, is_cached=False) == pytest.approx(gflop * 1e9, rel=0.01)


def test_a_matrix_product_is_timed():
    assert speed.matrix_product_flops(torch.device("cpu")) > 1e8
