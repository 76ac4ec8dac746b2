"""scripts/benchmark.py measures what it says, here with models of a size that takes no time."""

import contextlib
import io
import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, CompileConfig

from common.errors import UsageError
from scripts import benchmark
from scripts.measure import checks, generation, gpu, growth, made_up, ranks, training
from scripts.measure.training import FIRST_EPOCH, KEPT_FEATURES, PLAIN_LINES
from trainer.step import Counts
from trainer.support import gradients
from trainer.watch import answers


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script with a tower and decoders of one layer, in this process; returns its figures and its output."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"TOWER": CLIPVisionConfig(**tower, patch_size=16), "FOLDER": tmp_path, "LAYERS": {512: 1, 768: 1}}
    for name, value in values.items():
        monkeypatch.setattr(made_up, name, value)
    values = {"BATCHES": 6, "LOADER_IMAGES": 20, "matrix_product_flops": lambda device: 1e11}
    for name, value in values.items():
        monkeypatch.setattr(training, name, value)
    for name, value in {"TURNS": 1, "PROMPT_TOKENS": 8, "NEW_TOKENS": 4, "FOLDER_PICTURES": 3}.items():
        monkeypatch.setattr(generation, name, value)
    monkeypatch.setattr(
        generation, "FOLDER_LINES", {name: (4, how) for name, (_, how) in generation.FOLDER_LINES.items()}
    )
    monkeypatch.setattr(checks, "STEPS", 2)
    # Compiled code itself is tested elsewhere: here a backend that takes no time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(answers, "CompileConfig", partial(CompileConfig, backend="eager"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run_here(command, **_):
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", command[1:])
            benchmark.main()
        return SimpleNamespace(returncode=0, stdout=out.getvalue(), stderr="")

    monkeypatch.setattr(benchmark.subprocess, "run", run_here)

    def run(*flags):
        fixed = ["--device", "cpu", "--batch_size", "2", "--steps", "1", "--repeats", "1", "--num_workers", "0"]
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, *fixed, "--json", str(path)])
        benchmark.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def test_every_line_of_the_table_is_measured(run):
    figures, printed = run("pretrain", "--max_seq_len", "320")
    lines = figures["pretrain"]
    assert list(lines) == [*PLAIN_LINES, FIRST_EPOCH, KEPT_FEATURES]
    assert all(math.isfinite(value) and value >= 0 for line in lines.values() for value in line.values())
    assert all(line["samples/s"] > 0 and line["waits"] < 1 for line in lines.values())
    assert lines["plain"]["x plain"] == 1
    useful = [line["useful"] for line in lines.values()]
    assert useful[0] == min(useful)
    assert useful[-1] > 0.9
    assert all(name in printed for name in lines)


def test_fine_tuning_is_measured(run, monkeypatch):
    monkeypatch.setitem(benchmark.MEASUREMENTS, "sft", (training.measure_training, (FIRST_EPOCH,)))
    assert run("sft")[0]["sft"][FIRST_EPOCH]["samples/s"] > 0


def test_what_runs_on_cuda_only_is_measured_here_too(run, monkeypatch):
    """The step that is not compiled, and the largest batch: here the second batch is said to be too large."""
    monkeypatch.setattr(
        benchmark, "lines_of", lambda what, args: {"sft": [training.NOT_COMPILED], "batch": ["sft"]}[what]
    )
    step, calls = training.train_step, []

    def train_step(*args):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError
        return step(*args)

    monkeypatch.setattr(training, "train_step", train_step)
    monkeypatch.setattr(training, "MOST_DOUBLINGS", 3)
    figures, _ = run("sft", "batch")
    assert figures["sft"][training.NOT_COMPILED]["samples/s"] > 0
    assert figures["batch"]["sft"]["samples"] == 1


def test_loader_and_answering_are_measured(run):
    figures, printed = run("data", "generate", "folder")
    assert figures["data"]["loader"]["images/s"] > 0
    assert list(figures["generate"]) == list(generation.GENERATE_LINES)
    assert all(line["x Llama"] > 0 for line in figures["generate"].values())
    assert all(line["x one"] > 0 for line in figures["folder"].values())
    titles = ("images/s", "x plain", "tokens/s", "x Llama", "x one")
    assert [title in printed for title in titles] == [True] * 5


@pytest.mark.parametrize("change", [{}, {"processes": 2, "pictures": 2}])
def test_growth_starts_the_real_training_twice(run, monkeypatch, change):
    line = {"rows": 100} | change
    monkeypatch.setitem(growth.GROWTH_LINES, "made up", line)
    monkeypatch.setitem(benchmark.MEASUREMENTS, "growth", (growth.measure_growth, ("made up",)))
    [row] = run("growth")[0]["growth"].values()
    assert row["first s"] > 0 and row["start s"] > 0 and row["step s"] > 0 and row["peak GB"] >= row["own GB"] > 0


def test_the_checks_pass(run):
    figures, printed = run("checks")
    assert all(row["passed"] for row in figures["checks"].values()), printed
    assert "all weights are equal" in printed


def test_a_failed_line_and_a_failed_check_are_told_after_the_others(run, monkeypatch, capsys):
    monkeypatch.setitem(checks.CHECKS, "no sync in a step", lambda args: (False, "it waits"))
    monkeypatch.setattr(benchmark, "lines_of", lambda what, args: ["no sync in a step"])
    with pytest.raises(UsageError, match="1 line"):
        run("checks")
    assert "NO: it waits" in capsys.readouterr().out
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: CUDA broke\n")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match="1 line"):
        run("checks")
    assert "failed: RuntimeError: CUDA broke" in capsys.readouterr().out


def test_several_ranks_are_measured(run, monkeypatch):
    """One of two ranks, in this process."""
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(gradients, "dist", gradients.dist)  # put back afterwards
    monkeypatch.setattr(ranks, "Processes", lambda rank, *_: ranks.gradients.Processes(rank, 2, torch.device("cpu")))
    monkeypatch.setattr(ranks, "count", lambda batches, _: Counts(100, 2, 100, 0))
    monkeypatch.setattr(ranks.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(ranks.mp, "start_processes", lambda run, args, **_: run(0, *args))
    figures, _ = run("ranks")
    lines = list(figures["ranks"].values())
    assert lines[0]["MB"] == lines[1]["MB"] > 1 and lines[0]["link s"] == lines[1]["link s"] > 0


def test_a_slow_link_carries_one_sum_after_the_other(monkeypatch):
    """By a clock of the test: two sums of two seconds each, and one second of work between sending and waiting."""
    clock = [10.0]
    sleep = lambda seconds: clock.__setitem__(0, clock[0] + seconds)  # noqa: E731
    monkeypatch.setattr(ranks, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    link = ranks.SlowLink(8.0)  # bytes a second
    works = [link.all_reduce(torch.zeros(4), async_op=True) for _ in range(2)]
    sleep(1.0)
    for work in works:
        work.wait()
    assert (clock[0], link.bytes, link.waited) == (14.0, 32, 3.0)


def test_the_hours_on_a_gpu_follow_from_the_operations(run):
    figures, _ = run("cost")
    row = figures["cost"]["pretrain, 1.27 M rows"]
    assert row["h, 8 x H100"] == pytest.approx(row["h, H100"] / 8)
    assert row["h, H100"] == pytest.approx(1.27e6 * row["GFLOP"] * 1e9 / (0.4 * 989e12) / 3600)


def test_a_gpu_is_measured_line_by_line(run, monkeypatch, capsys):
    """Here on a CPU: every way a step is taken; a way that fails is told, and the others are measured."""
    sizes = {"LARGE": {"sft": 2, "pretrain": 2}, "SMALL": {"pretrain": 2}}
    for name, value in (sizes | {"ON_DEVICE": 2, "TIMED": 1, "FED": 3}).items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "compile_or_not", lambda *args: [][0])
    run("gpu")
    printed = capsys.readouterr().out
    assert "sft of 2, captured" in printed and "pretrain of 2, ordinary" in printed
    assert "compiled, captured: failed: IndexError" in printed
    assert printed.count("samples/s") == 2 * 3 + 1 and "the loader alone, 0 workers" in printed


def test_an_unknown_measurement_is_told(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["training"])
    assert "unknown: training; choose from gpu, pretrain, sft, data" in capsys.readouterr().err


def test_the_operations_counted_are_those_of_the_shape():
    """By hand for one caption: 8 layers of 512, 100 tokens of which 10 are learned, one picture."""
    args = benchmark.settings_of("pretrain", "plain", benchmark.parse_arguments(["pretrain", "--device", "cpu"]))
    total = {"useful": 100, "squares": 100**2, "learned": 10, "samples": 1}
    projections, rest = 512 * 512 + 2 * 512 * 128, 512 * 512 + 3 * 512 * 1408  # of a block: q, k, v; and what follows
    decoder = 2 * 8 * projections * 100 + 2 * 8 * 512 * 100**2 + 2 * 7 * rest * 100
    decoder += 2 * (rest + 512 * 6400) * 10  # the last block's rest and the logits, where something is learned
    assert training.model_flops(args, total, is_cached=True) == 2 * decoder
    tower = training.model_flops(args, total, is_cached=False) - 2 * decoder
    assert tower == pytest.approx(35e9, rel=0.03)  # published: 17.5 G multiply-adds


def test_a_matrix_product_is_timed():
    assert training.matrix_product_flops(torch.device("cpu")) > 1e8
