"""scripts/benchmark.py measures what it says, here with models of a size that takes no time."""

import functools
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from transformers import CLIPVisionConfig

from scripts import benchmark, benchmark_steps, benchmark_world
from scripts.benchmark_report import print_generate, print_loader, print_train, write_svg
from scripts.benchmark_steps import TECHNIQUES, measure

SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The benchmark's own world, with a tower and decoders of one layer."""
    monkeypatch.setattr(benchmark_world.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(benchmark_world, "CLIPVisionConfig", functools.partial(CLIPVisionConfig, **SMALL_TOWER))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for module in (benchmark_world, benchmark_steps):
        monkeypatch.setattr(module, "LAYERS", {512: 1, 768: 1})
    monkeypatch.setattr(
        benchmark_world, "VLMConfig", lambda **given: benchmark_steps.VLMConfig(**given | {"vision_hidden_size": 32})
    )
    for name, value in (("ROWS_A_BATCH", 6), ("LOADER_PICTURES", 20), ("GENERATE_TURNS", 1), ("PROMPT_TOKENS", 8)):
        monkeypatch.setattr(benchmark_steps, name, value)
    monkeypatch.setattr(benchmark_steps, "matrix_product_flops", lambda device: 1e11)

    def arguments(*flags):
        fixed = ["--device", "cpu", "--batch_size", 2, "--steps", 1, "--repeats", 1, "--num_workers", 0]
        return benchmark.parse_arguments([*map(str, fixed), *flags])

    return arguments


def test_every_line_of_the_table_is_measured(small, tmp_path, capsys):
    args = small("train", "--max_seq_len", "320", "--svg", str(tmp_path / "table.svg"))
    names = [name for name in TECHNIQUES if not TECHNIQUES[name].cuda_only]
    results = {name: measure(args, name) for name in names}
    for name, figures in results.items():
        assert all(math.isfinite(value) and value >= 0 for value in figures.values()), name
        assert figures["samples_per_second"] > 0
    useful = [figures["useful_share"] for figures in results.values()]
    assert useful[0] == min(useful)
    assert useful[-1] > 0.9
    print_train(args, results)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    write_svg(args, results)
    drawn = ElementTree.parse(tmp_path / "table.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == len(names)


def test_fine_tuning_is_measured(small):
    figures = measure(small("train", "--stage", "sft"), "this project, first epoch")
    assert figures["samples_per_second"] > 0


def test_loader_and_generation_are_measured(small, capsys):
    args = small()
    print_loader(args, {name: measure(args, name) for name in ("loader, plain", "loader")})
    print_generate(args, measure(args, "generate"))
    printed = capsys.readouterr().out
    assert "pictures/s" in printed
    assert printed.count("in turns") == 2


def test_the_operations_counted_are_those_of_the_shape():
    """By hand for one caption: 8 layers of 512, 100 tokens of which 10 are learned, one picture."""
    args = benchmark.parse_arguments(["train", "--device", "cpu"])
    total = {"useful": 100, "squares": 100**2, "learned": 10, "samples": 1}
    layer = 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408
    decoder = 2 * 8 * layer * 100 + 2 * 8 * 512 * 100**2 + 2 * 512 * 6400 * 10
    assert benchmark_steps.model_flops(args, total, is_cached=True) == 2 * decoder
    tower = benchmark_steps.model_flops(args, total, is_cached=False) - 2 * decoder
    assert tower == pytest.approx(35e9, rel=0.03)  # published: 17.5 G multiply-adds


def test_a_matrix_product_is_timed():
    assert benchmark_steps.matrix_product_flops(torch.device("cpu")) > 1e8
