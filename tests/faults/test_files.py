"""Broken files, odd images and failing machines: what the user sees, and what is kept.

More of such faults: test_weights.py, test_resume.py, test_bad_input.py, test_eval.py, and each reader by itself in
test_lm_dataset.py, test_pictures.py and test_vision_tower.py.
"""

import io
import json
import pickle
import shutil
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import EVAL, PRETRAIN, as_file, png, pretrain_row, read_jsonl, turn, write_jsonl

from dataset.pictures import load_picture

pytest_plugins = ["tiny"]

ONE_EPOCH = ["--epochs", 1, "--batch_size", 13]
STEPS = 2  # an epoch of 26 rows
NAME = "pretrain_vlm_32"


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Returns a --save_dir after one epoch."""
    out = world.copy_of_out(tmp_path_factory.mktemp("trained") / "out")
    world.run(PRETRAIN, *world.files("pretrain", out), *ONE_EPOCH).passed()
    return out


@pytest.fixture
def out(trained, tmp_path):
    """Returns a copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(world, out, *flags, parts=(), script=PRETRAIN, **how) -> str:
    """Returns the one error message of a run, which must leave --save_dir unchanged."""
    files = world.eval_files(out) if script == EVAL else world.files("pretrain", out)
    before = contents(out)
    message = world.run(script, *files, *flags, **how).refused(*parts)
    assert contents(out) == before
    return message


# ---- weight files and states


@pytest.mark.parametrize("left", ["half", "all but a byte"])
def test_a_truncated_state_is_refused(world, out, left):
    path = out / f"{NAME}_resume.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 if left == "half" else -1])
    refused(world, out, "--epochs", 2, "--from_resume", 1, parts=[f"{NAME}_resume.pth cannot be read"])
    # Only resuming needs it.
    world.run(EVAL, *world.eval_files(out), "--weight", "pretrain_vlm", "--image", world.images / "0.jpg").passed()


def test_weights_in_place_of_a_state_are_refused(world, out):
    shutil.copy(out / f"{NAME}.pth", out / f"{NAME}_resume.pth")
    refused(world, out, "--from_resume", 1, parts=[f"{NAME}_resume.pth is no checkpoint"])


def with_a_changed_tensor(file: bytes) -> bytes:
    """Changes four bytes in the largest tensor: the numbers stay finite, only the checksum differs."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    place = file.index(largest) + len(largest) // 2
    return file[:place] + bytes(byte ^ 0x11 for byte in file[place : place + 4]) + file[place + 4 :]


@pytest.mark.parametrize("kind", ["weights", "state"])
def test_a_file_with_changed_bytes_is_refused(world, out, kind):
    path = out / (f"{NAME}.pth" if kind == "weights" else f"{NAME}_resume.pth")
    path.write_bytes(with_a_changed_tensor(path.read_bytes()))
    flags = ["--epochs", 2, "--from_resume", 1] if kind == "state" else ["--from_weight", path]
    refused(world, out, *flags, parts=[f"{path.name} cannot be read", "damaged"])


@pytest.mark.parametrize(("field", "value"), [("tokenizer_sha256", 5), ("arguments", ["a list"])])
def test_a_sidecar_field_of_the_wrong_type_is_refused(world, out, field, value):
    path = out / f"{NAME}.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {field: value}))
    flags = ["--save_dir", out, "--weight", "pretrain_vlm", "--image", world.images / "0.jpg", "--device", "cpu"]
    world.run(EVAL, *flags).refused(path.name, "cannot be read", field)


# ---- files that try to run code


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def files_with_code(mark: Path) -> list[bytes]:
    """Returns the three formats that torch.load reads, each with code in it, and a bare pickle."""
    forms = [pickle.dumps({"model.norm.weight": Code(mark)}, protocol=2), pickle.dumps(Code(mark))]
    for is_zip in (True, False):
        file = io.BytesIO()
        tensors = {"model.norm.weight": torch.ones(3), "vision_model.more": Code(mark)}
        torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
        forms.append(file.getvalue())
    return forms


def damaged_tower(world, folder: Path) -> Path:
    """Copies the tower without model.safetensors; returns the path for a pytorch_model.bin."""
    shutil.copytree(world.tower, folder)
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("place", ["weights", "state", "tower", "transformers folder"])
def test_code_in_a_file_is_not_run(world, out, tmp_path, place):
    mark, folder = tmp_path / "code was run", tmp_path / "folder"
    path = out / f"{NAME}{'_resume' if place == 'state' else ''}.pth"
    flags = {
        "weights": ["--from_weight", path],
        "state": ["--from_resume", 1],
        "tower": ["--vision_model_path", folder],
        "transformers folder": ["--load_from", folder, "--image", world.images / "0.jpg"],
    }[place]
    if place in ("tower", "transformers folder"):
        path = damaged_tower(world, folder)
    for content in files_with_code(mark):
        path.write_bytes(content)
        parts = [str(folder), "--vision_model_path"] if place == "tower" else [path.name]
        script = EVAL if place == "transformers folder" else PRETRAIN
        refused(world, out, *flags, parts=[*parts, "could run code"], script=script)
        assert not mark.exists()
        assert path.read_bytes() == content
    pickle.loads(files_with_code(mark)[0])
    assert mark.exists()  # the code does run if it is let


def test_code_in_a_tokenizer_folder_is_not_run_without_a_prompt(world, out, tmp_path):
    folder = shutil.copytree(world.tokenizer, tmp_path / "tokenizer")
    (folder / "its_own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["its_own.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    result = world.run(PRETRAIN, *world.files("pretrain", out), "--tokenizer_path", folder)
    message = result.refused(str(folder), "cannot be used", "code")
    assert "[y/N]" not in result.out
    assert "trust_remote_code=True" not in message
    assert not (tmp_path / "mark").exists()


# ---- data files


def write_parquet(world, path: Path, compression: str) -> bytes:
    rows = [pretrain_row(number) for number in range(12)]
    columns = {
        "conversations": [json.dumps(row["conversations"]) for row in rows],
        "image_bytes": [(world.images / row["image"]).read_bytes() for row in rows],
    }
    pq.write_table(pa.table(columns), path, compression=compression)
    return path.read_bytes()


def overwritten(content: bytes, place: int, count: int) -> bytes:
    return content[:place] + np.random.default_rng(0).bytes(count) + content[place + count :]


@pytest.mark.parametrize("damage", ["half", "all but its end", "its first page", "compressed pages"])
def test_a_damaged_parquet_file_is_refused(world, out, tmp_path, damage):
    path = tmp_path / "rows.parquet"
    whole = write_parquet(world, path, "snappy")
    damaged = {
        "half": whole[: len(whole) // 2],
        "all but its end": whole[:-10],
        "its first page": overwritten(whole, 4, 200),
        "compressed pages": overwritten(whole, len(whole) // 2, 400),
    }[damage]
    path.write_bytes(damaged)
    refused(world, out, *ONE_EPOCH, "--data_path", path, parts=["rows.parquet cannot be read: "])
    assert path.read_bytes() == damaged


def test_a_damaged_picture_in_a_parquet_file_is_skipped(world, out, tmp_path):
    path = tmp_path / "rows.parquet"
    whole = write_parquet(world, path, "none")
    picture = (world.images / "7.jpg").read_bytes()
    path.write_bytes(whole.replace(picture, overwritten(picture, 2, len(picture) - 2)))
    (tmp_path / "rows.jsonl").touch()
    result = world.run(PRETRAIN, *world.files("pretrain", out), *ONE_EPOCH, "--data_path", path).passed()
    assert f"{path} (the jsonl beside it is not read): " in result.out
    assert result.out.count("skipped a sample, its picture cannot be read: row 8, picture 1: ") == 1
    (last,) = read_jsonl(out / f"{NAME}.metrics.jsonl")
    assert last["skipped_pictures"] == 1


# ---- pictures


def deep_png(pixels: np.ndarray) -> bytes:
    """Writes uint8 pixels (H, W) or (H, W, 3) as a 16-bit PNG: 0 stays 0, 255 becomes 65535."""
    deep = (pixels.astype(">u2") * 257).astype(">u2")
    colour = 0 if pixels.ndim == 2 else 2
    return png(pixels.shape[1], pixels.shape[0], 16, colour, b"".join(b"\0" + row.tobytes() for row in deep))


def smooth(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def odd_pictures() -> dict[str, tuple[bytes, Image.Image]]:
    """Returns odd but valid image files by name, each with the plain RGB image it shows."""
    pictures = {}
    picture = smooth(96, 64, 1)
    grey = picture.convert("L")
    pixel, flat = (Image.new("RGB", size, (200, 30, 90)) for size in ((1, 1), (224, 224)))
    pictures["one_pixel.png"] = as_file(pixel, "PNG"), flat
    inks = as_file(picture.convert("CMYK"), "JPEG", quality=95)
    pictures["cmyk.jpg"] = inks, Image.open(io.BytesIO(inks)).convert("RGB")
    # Checks the colours themselves, not only that both agree with Pillow.
    assert np.abs(np.asarray(pictures["cmyk.jpg"][1], int) - np.asarray(picture, int)).mean() < 4
    pictures["deep_grey.png"] = deep_png(np.asarray(grey)), grey.convert("RGB")
    pictures["deep_colour.png"] = deep_png(np.asarray(smooth(70, 90, 2))), smooth(70, 90, 2)
    frames = [smooth(80, 80, seed).quantize(64) for seed in (3, 4, 5)]
    moving = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(moving)).n_frames == 3
    pictures["animated.gif"] = moving, frames[0].convert("RGB")
    for orientation, upright in ((6, Image.Transpose.ROTATE_270), (3, Image.Transpose.ROTATE_180)):
        exif = Image.Exif()
        exif[0x112] = orientation
        stored = as_file(smooth(90, 60, orientation), "JPEG", exif=exif, quality=90)
        shown = Image.open(io.BytesIO(stored)).transpose(upright)
        pictures[f"rotated_{orientation}.jpg"] = stored, shown
    return pictures


def broken_pictures() -> dict[str, tuple[bytes, str]]:
    """Returns broken image files by name, each with the reported reason in lower case."""
    jpeg, whole_png = as_file(smooth(96, 64, 6), "JPEG"), as_file(smooth(96, 64, 6), "PNG")
    return {
        "cut_off.jpg": (jpeg[:-100], "truncated"),
        "cut_off_in_its_header.jpg": (jpeg[:300], "truncated"),
        "cut_off.png": (whole_png[: len(whole_png) // 2], "truncated"),
        "zero_bytes.jpg": (b"", "not a picture of a known format"),
        "text.jpg": ("描述这张图片".encode(), "not a picture of a known format"),
        # A valid image of one bit per pixel: 50 kB here, 1.2 GB as RGB.
        "bomb.png": (png(20_000, 20_000, 1, 0, bytes(20_000 * 2501)), "400000000 pixels"),
    }


ODD = odd_pictures()
# Saves the pixels that the vision tower is given.
NOTE_PIXELS = """
import torch
from model.model_vlm import MiniMindVLM
encode, seen = MiniMindVLM.encode_images, []
def encode_images(self, pixel_values):
    seen.append(pixel_values.clone())
    torch.save(torch.cat(seen), {path!r})
    return encode(self, pixel_values)
MiniMindVLM.encode_images = encode_images
"""


@pytest.fixture(scope="module")
def pictured(world, trained, tmp_path_factory):
    """Trains on rows with all these images; returns the Result, --save_dir, the images' folder and the tower's input.

    That is a dict: the first image of each row by the bytes of the second.
    """
    folder = tmp_path_factory.mktemp("pictured")
    out, images = shutil.copytree(trained, folder / "out"), shutil.copytree(world.images, folder / "images")
    broken = broken_pictures()
    for name, (content, _) in (ODD | broken).items():
        (images / name).write_bytes(content)
    for name, (_, ordinary) in ODD.items():
        ordinary.save(images / f"{name}.ordinary.png")
    # Each odd image shares a row with its plain version.
    pairs = [f"{name}, {name}.ordinary.png" for name in ODD] + ["0.jpg, 0.jpg", "1.jpg, 1.jpg"]
    asked = turn("user", "左<image>右<image>")
    rows = [{"conversations": [asked, turn("assistant", "一样。")], "image": pair} for pair in pairs]
    for number, name in enumerate(broken):
        rows.insert(2 * number, pretrain_row(number) | {"image": name})
    data = write_jsonl(folder / "rows.jsonl", rows)
    flags = ["--data_path", data, "--images_path", images, "--cache_vision", "off", "--epochs", 1, "--batch_size", 4]
    hook = NOTE_PIXELS.format(path=str(folder / "seen.pt"))
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags, hook=hook).passed()
    seen = torch.load(folder / "seen.pt", weights_only=True)[: 2 * len(pairs)].view(-1, 2, 3, 224, 224)
    return result, out, images, {second.numpy().tobytes(): first for first, second in seen}


def test_broken_pictures_are_named_counted_and_skipped(pictured):
    result, out, images, _ = pictured
    broken = broken_pictures()
    for name, (content, reason) in broken.items():
        (line,) = [line for line in result.out.splitlines() if f"cannot be read: {name}: " in line]
        assert line.startswith("skipped a sample, its picture")
        assert reason in line.lower()
        assert (images / name).read_bytes() == content
    assert f"{len(broken)} sample(s) were skipped, see " in result.out
    last = read_jsonl(out / f"{NAME}.metrics.jsonl")[-1]
    assert last["skipped_pictures"] == len(broken)
    assert last["step"] == -(-(len(broken) + len(ODD) + 2) // 4)
    assert last["learned_tokens"] > 0
    weights = torch.load(out / f"{NAME}.pth", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_reaches_the_tower_as_its_plain_version(pictured, name):
    _, _, images, seen = pictured
    ordinary = load_picture(images / f"{name}.ordinary.png")
    assert torch.equal(seen[ordinary.numpy().tobytes()], ordinary)


# ---- the machine


# Takes from root the right to write anywhere.
WITHOUT_OVERRIDE = """
import ctypes
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~(1 << 1)  # the effective CAP_DAC_OVERRIDE
assert libc.capset(header, sets) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="drops a Linux capability")
def test_a_read_only_save_dir_is_refused_for_training_and_fine_for_eval(world, out):
    how = {"hook": WITHOUT_OVERRIDE}
    out.chmod(0o555)
    try:
        for flags in ([], ["--from_resume", 1, "--epochs", 2], ["--save_dir", out / "new"]):
            parts = ["--save_dir", str(out), "cannot be written to: Permission denied"]
            refused(world, out, *flags, "--from_weight", out / "llm_32.pth", parts=parts, **how)
        flags = ["--weight", "pretrain_vlm", "--image", world.images / "0.jpg"]
        world.run(EVAL, *world.eval_files(out), *flags, **how).passed()
    finally:
        out.chmod(0o755)


# As the out-of-memory killer: kills the loader's worker as it reads its eighth batch.
WORKER_KILLED = """
import os, signal, torch
from dataset.lm_dataset import VLMDataset
read, batches = VLMDataset.__getitems__, []
def killed(self, indices):
    if torch.utils.data.get_worker_info() is not None:
        batches.append(indices)
    if len(batches) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, indices)
VLMDataset.__getitems__ = killed
"""
WORKER_FLAGS = ["--epochs", 2, "--batch_size", 2, "--num_workers", 1, "--save_interval", 1, "--log_interval", 1]


def test_a_killed_worker_is_an_error_and_the_saved_step_resumes(world, out):
    for path in out.glob(f"{NAME}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    files = [*world.files("pretrain", out), *WORKER_FLAGS]
    started = time.perf_counter()
    result = world.run(PRETRAIN, *files, hook=WORKER_KILLED)
    result.refused("worker", "memory", "--num_workers 1", "--from_resume 1")
    assert time.perf_counter() - started < 30
    state = torch.load(out / f"{NAME}_resume.pth", weights_only=True)
    # The worker prefetches four batches, so it reads the eighth when the fourth is taken.
    assert 3 <= state["step"] <= 7
    reported = [record["step"] for record in read_jsonl(out / f"{NAME}.metrics.jsonl")]
    assert reported == list(range(1, max(reported) + 1))
    result = world.run(PRETRAIN, *files, "--from_resume", 1).passed()
    assert f"after step {state['step']}, {26 - state['step']} to go" in result.out


NOBODY_THERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
# To keep the tests short.
NOBODY_THERE |= {"WANDB_INIT_TIMEOUT": "1", "WANDB__GRAPHQL_RETRY_MAX": "1"}
NOBODY_THERE |= {"WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "0.1", "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "0.2"}
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


@needs_wandb
def test_a_resumed_run_is_refused_if_wandb_cannot_be_reached(world, out):
    path = out / f"{NAME}_resume.pth"
    torch.save(torch.load(path, weights_only=True) | {"wandb_id": "abcdefgh"}, path)
    before = contents(out)
    flags = [*ONE_EPOCH, "--epochs", 2, "--from_resume", 1, "--use_wandb"]
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags, env=NOBODY_THERE)
    result.refused("--use_wandb", "http://127.0.0.1:9", "WANDB_MODE=offline", "metrics.jsonl")
    assert before.items() <= contents(out).items()


@needs_wandb
def test_an_invalid_wandb_key_is_refused(world, out):
    environment = NOBODY_THERE | {"WANDB_API_KEY": "short"}
    before = {path: path.read_bytes() for path in out.glob(f"{NAME}*") if path.is_file()}
    result = world.run(PRETRAIN, *world.files("pretrain", out), *ONE_EPOCH, "--use_wandb", env=environment)
    result.refused("--use_wandb", "WANDB_API_KEY", "WANDB_MODE=offline")
    assert {path: path.read_bytes() for path in out.glob(f"{NAME}*") if path.is_file()} == before
