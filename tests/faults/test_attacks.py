"""Hostile and odd input: each must end in the given message or in a normal run, never in a traceback."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import EVAL, PRETRAIN, SFT

from common.paths import ROOT, printable

pytest_plugins = ["tiny"]


@pytest.fixture
def out(world, tmp_path):
    return world.copy_of_out(tmp_path / "out")


FLAGS = {
    "--seed -1": "--seed: -1: must be from 0 to 9223372036854775807",
    f"--seed {2**64}": "must be from 0",
    "--cache_vision=": "--cache_vision: an empty path",
    "--eval_data=": "--eval_data: an empty path",
    "--data_path=": "an empty path",
    "--images_path=https://example.org/pictures": "is an address: download the file",
    "--data_path ~nobody_of_that_name/x.jsonl": "argument --data_path",
    f"--data_path {'n' * 300}.jsonl": "File name too long",
    "--batchsize 4": "did you mean --batch_size?",
    "--learning_rat 1e-3 --lernrate 5": "unknown: --lernrate",
    "--no_such_flag 1": "--help shows all flags",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(world, out, flags):
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags.split(" "))
    assert result.code in (1, 2)
    assert FLAGS[flags] in result.err and "Traceback" not in result.text


def test_a_loop_of_links_is_an_error(world, out, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    result = world.run(PRETRAIN, *world.files("pretrain", out), "--data_path", tmp_path / "a")
    assert result.code in (1, 2) and "Traceback" not in result.text
    assert "error: " in result.err


def rows_named(folder: Path, name: str) -> Path:
    row = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder / name


def empty_parquet(folder: Path) -> Path:
    table = pa.table({"conversations": pa.array([], pa.string()), "image_bytes": pa.array([], pa.binary())})
    pq.write_table(table, folder / "empty.parquet")
    return folder / "empty.parquet"


DATA = {
    "a name with ::": (lambda folder: rows_named(folder, "a::b.jsonl"), "rename the file"),
    "a parquet of no rows": (empty_parquet, "empty.parquet"),
    "a folder": (lambda folder: folder, "is a folder, not a data file"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(world, out, tmp_path, name):
    make, words = DATA[name]
    world.run(PRETRAIN, *world.files("pretrain", out), "--data_path", make(tmp_path)).refused(words)


def test_a_cache_that_cannot_be_made_is_not_blamed_on_the_data(world, out, tmp_path):
    (tmp_path / "file").touch()
    hook = f"import datasets.config\ndatasets.config.HF_DATASETS_CACHE = {str(tmp_path / 'file' / 'cache')!r}"
    world.run(PRETRAIN, *world.files("pretrain", out), hook=hook).refused("cannot be kept in", "HF_HOME")


WEIGHTS = {
    "a dangling link": lambda path: (path.unlink(), path.symlink_to(path.with_name("gone"))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_only_files_count_as_weight_files(world, out, name):
    WEIGHTS[name](out / "llm_32.pth")
    missing = world.run(PRETRAIN, *world.files("pretrain", out))
    missing.refused("missing:\n  language model: ", "scripts/download.py llm", "llm_32.pth (unexpected name)")
    shutil.rmtree(out)
    world.copy_of_out(out)
    WEIGHTS[name](rows_named(out, "llm_64.pth"))  # ignored beside a good one
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1).passed()


def test_escape_codes_in_file_names_are_printed_escaped(world, out, tmp_path):
    images = shutil.copytree(world.images, tmp_path / "images")
    (images / "\x1b[31mred.jpg").write_bytes(b"no picture")
    done = world.run(EVAL, *world.eval_files(out), "--weight", "llm", "--image_dir", images)
    assert "\x1b" not in done.text and "\\x1b[31mred.jpg" in done.text
    assert printable("图 a\n\x9b") == "图 a\\n\\x9b"


def test_it_runs_where_stdout_and_files_are_ascii(world, out, tmp_path):
    flags = [EVAL, *world.eval_files(out), "--weight", "llm", "--image", world.images / "0.jpg"]
    done = world.start(*flags, cwd=tmp_path, env={"LC_ALL": "C", "PYTHONUTF8": "0"}).passed()
    strict = world.run(*flags, hook="import sys\nsys.stdout.reconfigure(encoding='ascii', errors='strict')").passed()
    assert "\\u63cf" in done.out and "\\u63cf" in strict.out


def test_eval_data_with_only_broken_pictures_is_an_error(world, out, tmp_path):
    images = shutil.copytree(world.images, tmp_path / "images")
    for path in images.iterdir():
        path.write_bytes(b"no picture")
    flags = ["--weight", "llm", "--eval_data", world.root / "pretrain.jsonl", "--images_path", images]
    world.run(EVAL, *world.eval_files(out), *flags).refused("no row of", "none of its pictures can be read")


def test_a_list_of_bad_rows_that_cannot_be_written_is_a_warning(world, out):
    (out / "pretrain_vlm_32.bad_rows.txt").mkdir()
    data = out / "rows.jsonl"
    data.write_text((world.root / "pretrain.jsonl").read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    flags = ["--data_path", data, "--max_bad_rows", 1, "--epochs", 1]
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed()
    assert "bad_rows.txt cannot be written" in result.out


def test_a_narrow_dumb_terminal_and_folders_with_spaces(world, tmp_path):
    cwd = tmp_path / "a folder with spaces"
    cwd.mkdir()
    out = world.copy_of_out(cwd / "my out")
    flags = ["--from_weight", "llm", "--epochs", 1, "--batch_size", 8]
    world.run(SFT, *world.files("sft", out, cwd), *flags, cwd=cwd, env={"TERM": "dumb", "COLUMNS": "20"}).passed()
    assert (out / "sft_vlm_32.pth").is_file()


def test_under_nohup_training_outlives_its_terminal(world, out):
    """nohup sets SIGHUP to be ignored; the script must leave it so."""
    hook = (
        "import os, signal, model.model_vlm\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "encode = model.model_vlm.MiniMindVLM.encode_images\n"
        "def hung_up(*a): os.kill(os.getpid(), signal.SIGHUP); return encode(*a)\n"
        "model.model_vlm.MiniMindVLM.encode_images = hung_up"
    )
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, hook=hook).passed()


def test_eval_ignores_a_half_written_file_of_a_running_training(world, out):
    flags = ["--from_weight", "llm", "--epochs", 1, "--batch_size", 8]
    world.run(SFT, *world.files("sft", out), *flags).passed()
    (out / ".sft_vlm_32.pth.1.tmp").write_bytes(b"half a file")
    world.run(EVAL, *world.eval_files(out), "--image", world.images / "0.jpg").passed()


def test_links_in_the_folder_of_pictures_are_followed(world, out, tmp_path):
    """A data file cannot lead out of the folder, its owner's links can: data sets may lie on another disk."""
    images = shutil.copytree(world.images, tmp_path / "images")
    for name, folder in (("0.jpg", images), ("1.jpg", tmp_path)):
        shutil.move(images / name, folder / f"moved_{name}")
        (images / name).symlink_to(folder / f"moved_{name}")
    result = world.run(PRETRAIN, *world.files("pretrain", out), "--images_path", images, "--epochs", 1).passed()
    assert "skipped" not in result.out


SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.py"))

COMMANDS = [name for name in SCRIPTS if "__main__" in (ROOT / name).read_text()]


@pytest.mark.parametrize("script", COMMANDS)
def test_every_script_explains_itself_and_refuses_what_it_does_not_know(world, script):
    assert "--help" in world.run(ROOT / script, "--help").passed().out
    result = world.run(ROOT / script, "--no_such_flag")
    assert result.code == 2 and "unknown: --no_such_flag" in result.err
