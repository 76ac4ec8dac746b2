"""scripts/benchmark.py measures what it says, here with models of a size that takes no time."""

import math

import pytest
import torch

from scripts import benchmark
from scripts.benchmark import OURS, PLAIN_LINES, measurements


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The benchmark's own world, with a tower and decoders of one layer."""
    monkeypatch.setattr(benchmark.tempfile, "gettempdir", lambda: str(tmp_path))
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(benchmark, "TOWER", tower)
    monkeypatch.setattr(benchmark, "LAYERS", {512: 1, 768: 1})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, value in (("ROWS_A_BATCH", 6), ("LOADER_IMAGES", 20), ("GENERATE_TURNS", 1), ("PROMPT_TOKENS", 8)):
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "matrix_product_flops", lambda device: 1e11)

    def arguments(*flags):
        fixed = ["--device", "cpu", "--batch_size", 2, "--steps", 1, "--repeats", 1, "--num_workers", 0]
        return benchmark.parse_arguments([*map(str, fixed), *flags])

    return arguments


def measured(args, what: str) -> dict:
    measure, names = measurements(args)[what]
    return {name: measure(args, name) for name in names}


def test_every_line_of_the_table_is_measured(small, capsys):
    results = measured(small("--max_seq_len", "320"), "train")
    assert list(results) == [*PLAIN_LINES, *OURS[1:]]
    for name, figures in results.items():
        assert all(math.isfinite(value) and value >= 0 for value in figures.values()), name
        assert figures["samples_per_second"] > 0
    useful = [figures["useful_share"] for figures in results.values()]
    assert useful[0] == min(useful)
    assert useful[-1] > 0.9
    benchmark.print_table("train", results)
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_fine_tuning_is_measured(small):
    figures = benchmark.measure_training(small("--stage", "sft"), "this project, first epoch")
    assert figures["samples_per_second"] > 0


def test_loader_and_generation_are_measured(small, capsys):
    for what in ("data", "generate"):
        benchmark.print_table(what, measured(small(), what))
    printed = capsys.readouterr().out
    assert printed.count("images/s") == 2
    assert printed.count("x transformers' Llama") == 2


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
