"""scripts/benchmark.py measures what it says, here with models of a size that takes no time."""

import contextlib
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig

from scripts import benchmark
from scripts.benchmark import FIRST_EPOCH, KEPT_FEATURES, PLAIN_LINES


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script with a tower and decoders of one layer, in this process; returns its figures and its output."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"TOWER": CLIPVisionConfig(**tower, patch_size=16), "LAYERS": {512: 1, 768: 1}, "FOLDER": tmp_path}
    values |= {"BATCHES": 6, "LOADER_IMAGES": 20, "GENERATE_TURNS": 1, "PROMPT_TOKENS": 8}
    for name, value in (values | {"matrix_product_flops": lambda device: 1e11}).items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run_here(command, **_):
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", command[1:])
            benchmark.main()
        return SimpleNamespace(returncode=0, stdout=out.getvalue())

    monkeypatch.setattr(benchmark.subprocess, "run", run_here)

    def run(*flags):
        fixed = ["--device", "cpu", "--batch_size", "2", "--steps", "1", "--repeats", "1", "--num_workers", "0"]
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, *fixed, "--json", str(path)])
        benchmark.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def test_every_line_of_the_table_is_measured(run):
    figures, printed = run("train", "--max_seq_len", "320")
    lines = figures["train"]
    assert list(lines) == [*PLAIN_LINES, FIRST_EPOCH, KEPT_FEATURES]
    assert all(math.isfinite(value) and value >= 0 for line in lines.values() for value in line.values())
    assert all(line["samples/s"] > 0 for line in lines.values())
    assert lines["plain"]["x plain"] == 1
    useful = [line["useful"] for line in lines.values()]
    assert useful[0] == min(useful)
    assert useful[-1] > 0.9
    assert all(name in printed for name in lines)


def test_fine_tuning_is_measured(run, monkeypatch):
    monkeypatch.setattr(benchmark, "MEASUREMENTS", {"train": (benchmark.measure_training, (FIRST_EPOCH,))})
    assert run("--stage", "sft")[0]["train"][FIRST_EPOCH]["samples/s"] > 0


def test_loader_and_generation_are_measured(run):
    figures, printed = run("data", "generate")
    assert figures["data"]["loader"]["images/s"] > 0
    assert figures["generate"]["generation, batch 16"]["x Llama"] > 0
    assert [title in printed for title in ("images/s", "x plain", "tokens/s", "x Llama")] == [True] * 4


def test_an_unknown_measurement_is_told(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["training"])
    assert "unknown: training; choose from train, data, generate" in capsys.readouterr().err


def test_the_operations_counted_are_those_of_the_shape():
    """By hand for one caption: 8 layers of 512, 100 tokens of which 10 are learned, one picture."""
    args = benchmark.parse_arguments(["train", "--device", "cpu"])
    total = {"useful": 100, "squares": 100**2, "learned": 10, "samples": 1}
    layer = 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408
    decoder = 2 * 8 * layer * 100 + 2 * 8 * 512 * 100**2 + 2 * 512 * 6400 * 10
    assert benchmark.model_flops(args, total, is_cached=True) == 2 * decoder
    tower = benchmark.model_flops(args, total, is_cached=False) - 2 * decoder
    assert tower == pytest.approx(35e9, rel=0.03)  # published: 17.5 G multiply-adds


def test_a_matrix_product_is_timed():
    assert benchmark.matrix_product_flops(torch.device("cpu")) > 1e8
