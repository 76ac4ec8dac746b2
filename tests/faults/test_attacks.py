"""Attacks, one line each: what is done, and the words it must end in. None may end in a traceback."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import EVAL, PRETRAIN, SFT, language_model

from common.paths import ROOT, printable

pytest_plugins = ["tiny"]


class Evil:
    """Code in a pickle: it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def out(world, tmp_path):
    return world.copy_of_out(tmp_path / "out")


FLAGS = {
    "--seed -1": "--seed -1: must be at least 0",
    f"--seed {2**64}": "must be below 2**63",
    "--cache_vision=": "--cache_vision: an empty path",
    "--eval_data=": "--eval_data: an empty path",
    "--data_path=": "an empty path",
    "--data_path ~nobody_of_that_name/x.jsonl": "argument --data_path",
    f"--data_path {'n' * 300}.jsonl": "File name too long",
    "--batchsize 4": "did you mean --batch_size?",
    "--learning_rat 1e-3 --lernrate 5": "unknown: --lernrate",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(world, out, flags):
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags.split(" "))
    assert result.code in (1, 2)
    assert FLAGS[flags] in result.err and "Traceback" not in result.text


def test_a_circle_of_links_is_told(world, out, tmp_path):
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
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "file" / "cache")}
    command = [PRETRAIN, *world.files("pretrain", out)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env=world.environment | cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be kept in" in done.stderr and "HF_HOME" in done.stderr


WEIGHTS = {
    "a dangling link": lambda path: (path.unlink(), path.symlink_to(path.with_name("gone"))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_no_weight_file_is_not_taken_for_one(world, out, name):
    WEIGHTS[name](out / "llm_32.pth")
    world.run(PRETRAIN, *world.files("pretrain", out)).refused("language model")
    shutil.rmtree(out)
    out.mkdir()
    torch.save(language_model(), out / "llm_32.pth")
    WEIGHTS[name](rows_named(out, "llm_64.pth"))  # beside a good one it is passed over
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1).passed()


def pickled(path: Path, target: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"model.norm.weight": torch.ones(1), "evil": Evil(target)}, file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["llm_32.pth", "pretrain_vlm_32_resume.pth"])
@pytest.mark.parametrize("kind", ["torch.save", "plain pickle"])
def test_code_in_a_file_is_never_run(world, out, tmp_path, name, kind):
    target = tmp_path / "evil_was_here"
    content = pickled(out / name, target) if kind == "torch.save" else pickle.dumps(Evil(target))
    (out / name).write_bytes(content)
    world.run(PRETRAIN, *world.files("pretrain", out), "--from_resume", 1).refused(name)
    assert not target.exists()


@pytest.mark.parametrize("name", ["tower/pytorch_model.bin"])
def test_code_in_a_tower_is_never_run(world, out, tmp_path, name):
    tower, target = tmp_path / "tower", tmp_path / "evil_was_here"
    shutil.copytree(world.tower, tower)
    (tower / "model.safetensors").unlink()
    (tower / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(target)))
    world.run(PRETRAIN, *world.files("pretrain", out), "--vision_model_path", tower).refused("tower")
    assert not target.exists()


def test_escape_codes_of_names_are_not_obeyed(world, out, tmp_path):
    images = shutil.copytree(world.images, tmp_path / "images")
    (images / "\x1b[31mred.jpg").write_bytes(b"no picture")
    done = world.run(EVAL, *world.eval_files(out), "--weight", "llm", "--image_dir", images)
    assert "\x1b" not in done.text and "\\x1b[31mred.jpg" in done.text
    assert printable("图 a\n\x9b") == "图 a\\n\\x9b"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_an_output_of_ascii_only_ends_nothing(world, out, environment):
    command = [EVAL, *world.eval_files(out), "--weight", "llm", "--image", world.images / "0.jpg"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env=world.environment | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\\u63cf" in done.stdout or "描" in done.stdout


def test_eval_data_whose_pictures_are_all_broken_is_told(world, out, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in world.images.iterdir():
        (images / path.name).write_bytes(b"no picture")
    flags = ["--weight", "llm", "--eval_data", world.root / "pretrain.jsonl", "--images_path", images]
    world.run(EVAL, *world.eval_files(out), *flags).refused("none of its pictures can be read")


def test_a_full_disk_for_the_list_of_bad_rows_ends_no_run(world, out):
    (out / "pretrain_vlm_32.bad_rows.txt").mkdir()
    data = out / "rows.jsonl"
    data.write_text((world.root / "pretrain.jsonl").read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    flags = ["--data_path", data, "--max_bad_rows", 1, "--epochs", 1]
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed()
    assert "bad_rows.txt cannot be written" in result.out


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to become")
def test_a_folder_that_cannot_be_written_to_is_told_to_an_ordinary_user(world, out):
    out.chmod(0o555)
    hook = "import os\nos.setuid(65534)"
    for folder in (out.parent, *out.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o005:
            pytest.skip("the temporary folder is closed to other users")
    world.run(PRETRAIN, *world.files("pretrain", out), hook=hook).refused("--save_dir", "cannot be written to")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"PYTHONHASHSEED": "0"}, {"COLUMNS": "20"}])
def test_odd_environments_and_folders_with_spaces_change_nothing(world, tmp_path, environment):
    cwd = tmp_path / "a folder with spaces"
    cwd.mkdir()
    out = world.copy_of_out(cwd / "my out")
    flags = ["--from_weight", "llm", "--epochs", 1, "--batch_size", 8]
    world.run(SFT, *world.files("sft", out, cwd), *flags, cwd=cwd, env=environment).passed()
    assert (out / "sft_vlm_32.pth").is_file()


def test_nohup_goes_on_after_its_terminal_is_closed(world, out):
    """SIGHUP is ignored there, and stays so."""
    hook = (
        "import os, signal, model.model_vlm\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "encode = model.model_vlm.MiniMindVLM.encode_images\n"
        "def hung_up(*a): os.kill(os.getpid(), signal.SIGHUP); return encode(*a)\n"
        "model.model_vlm.MiniMindVLM.encode_images = hung_up"
    )
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, hook=hook).passed()


def test_evaluation_while_training_saves_sees_whole_files_only(world, out):
    """Weights and sidecar are renamed into place one after the other; eval reads either state of each."""
    flags = ["--from_weight", "llm", "--epochs", 1, "--batch_size", 8]
    world.run(SFT, *world.files("sft", out), *flags).passed()
    (out / ".sft_vlm_32.pth.1.tmp").write_bytes(b"half a file")
    world.run(EVAL, *world.eval_files(out), "--image", world.images / "0.jpg").passed()


@pytest.mark.parametrize("link", ["inside", "outside"])
def test_links_in_the_folder_of_pictures_are_followed(world, out, tmp_path, link):
    """As data sets on another disk are laid out; the names in a data file cannot lead out, the owner's links can."""
    images = shutil.copytree(world.images, tmp_path / "images")
    shutil.move(images / "0.jpg", (images if link == "inside" else tmp_path) / "moved.jpg")
    (images / "0.jpg").symlink_to((images if link == "inside" else tmp_path) / "moved.jpg")
    result = world.run(PRETRAIN, *world.files("pretrain", out), "--images_path", images, "--epochs", 1).passed()
    assert "skipped" not in result.out


SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.py"))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.endswith(("__init__.py", "transfer.py"))])
def test_every_script_explains_itself_and_refuses_what_it_does_not_know(world, script):
    assert "--help" in world.run(ROOT / script, "--help").passed().out
    result = world.run(ROOT / script, "--no_such_flag")
    assert result.code == 2 and "unknown: --no_such_flag" in result.err
