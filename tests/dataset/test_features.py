"""The cache of vision features: never a stale or damaged one, computed once, shared by runs; training is the same."""

import copy
import errno
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SFT, read_jsonl, sft_row, write_jsonl

from common.errors import UsageError
from dataset import features
from dataset.chat import load_tokenizer
from dataset.features import FeatureFolder, compute_features, tower_key
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.pictures import PictureError
from model.vision_tower import load_vision_tower
from trainer.stage import model_inputs

pytest_plugins = ["tiny"]

CPU = torch.device("cpu")
FLAGS = ["--from_weight", "llm", "--epochs", 2, "--learning_rate", 1e-3, "--log_interval", 1, "--num_workers", 1]


def some_features(seed: int) -> np.ndarray:
    return torch.randn(196, 8, generator=torch.Generator().manual_seed(seed)).half().numpy()


@pytest.fixture
def folder(tmp_path) -> FeatureFolder:
    kept = FeatureFolder(tmp_path, "tower" * 8, (196, 8))
    kept.make_room(np.array([1]))
    return kept


def files_of(folder) -> list:
    return sorted(folder.rglob("*.features"))


def test_features_are_those_of_their_key_and_tower_and_shape(folder, tmp_path):
    assert folder.get(1) is None
    folder.write({1: some_features(1)})
    [file] = files_of(tmp_path)
    assert file.stat().st_size == folder.file_bytes
    assert FeatureFolder(tmp_path, "t", (196, 768)).file_bytes == pytest.approx(301_000, rel=1e-3)
    for again in (folder, pickle.loads(pickle.dumps(folder)), FeatureFolder(tmp_path, "tower" * 8, (196, 8))):
        assert np.array_equal(again.get(1), some_features(1)) and again.get(2) is None
    for other in (
        FeatureFolder(tmp_path, "tower" * 8, (8, 196)),
        FeatureFolder(tmp_path, "tower" * 2 + "to", (196, 8)),
    ):
        assert other.path == folder.path and other.get(1) is None
    shutil.copy(file, file.with_name(f"{2:014x}.features"))
    assert folder.get(2) is None


def test_a_file_that_is_cut_off_or_has_a_bit_flipped_counts_as_missing(folder, tmp_path):
    folder.write({1: some_features(1)})
    [file] = files_of(tmp_path)
    whole = file.read_bytes()
    damaged = [whole[:length] for length in (0, 9, 15, 16, 17, 1000, len(whole) - 1)]
    for bit in [0, 100, 127, 128, *range(1000, 8 * len(whole), 999)]:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(content))
    for content in damaged:
        file.write_bytes(content)
        assert folder.get(1) is None
    folder.write({1: some_features(1)})
    assert np.array_equal(folder.get(1), some_features(1)) and file.read_bytes() == whole


def test_too_little_disk_space_is_refused_in_advance(folder, tmp_path, monkeypatch):
    folder.write({1: some_features(1)})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(UsageError, match=r"take 0\.0 GB more, and .* free\. .*--cache_vision"):
        folder.make_room(np.array([0, 1, 2, 2, 3]))
    monkeypatch.undo()
    assert folder.make_room(np.array([0, 1, 2, 2, 3])) == 2 * folder.file_bytes
    assert folder.make_room(np.array([0, 1])) == 0


def test_a_full_disk_while_writing_is_said_and_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(features.os, "replace", full)
    with pytest.raises(UsageError, match="cannot be kept in .*: No space left on device. Name another folder"):
        folder.write({1: some_features(1)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_towers_are_told_apart(world):
    tower = load_vision_tower(world.tower)
    before = tower_key(tower)
    assert before == tower_key(load_vision_tower(world.tower))
    tower.pixel_mean += 1e-3
    assert tower_key(tower) != before


class Encoder:
    """Makes features from the mean of each image's pixels and counts the images."""

    def __init__(self):
        self.images = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.images += len(pixels)
        return pixels.float().mean(dim=(1, 2, 3))[:, None, None].expand(-1, 196, 8)


@pytest.fixture
def data(world, tmp_path) -> VLMDataset:
    images = tmp_path / "images"
    shutil.copytree(world.images, images)
    rows = write_jsonl(tmp_path / "rows.jsonl", list(map(sft_row, range(15))))
    return VLMDataset(rows, images, load_tokenizer(world.tokenizer), 1536, 196, cache_dir=tmp_path / "tokens")


def computed(data, folder, encoder, **share) -> FeatureFolder:
    data.__dict__.pop("picture_keys", None)  # as a new process, which reads the pictures again
    kept = FeatureFolder(folder, "t" * 16, (196, 8))
    kept.make_room(data.picture_keys)
    compute_features(data, kept, encoder, CPU, **share)
    return kept


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_come_with_the_features_of_their_images(data, tmp_path, ranks):
    expected = [data[index]["pixel_values"].float().mean(dim=(1, 2, 3)).half() for index in range(15)]
    encoder = Encoder()
    for rank in range(ranks):
        kept = computed(data, tmp_path, encoder, rank=rank, ranks=ranks)
    assert encoder.images == len(np.unique(data.shown_pictures)) == 10 < len(data.shown_pictures) == data.image_count
    data.features = kept
    for index, means in enumerate(expected):
        sample = data[index]
        assert "pixel_values" not in sample
        assert torch.equal(sample["image_features"][:, 0, 0], means)
    batch = VLMCollator()([data[index] for index in range(15)])
    assert torch.equal(batch["image_features"][:, 0, 0], torch.cat(expected))


def test_only_what_is_missing_or_changed_is_computed(data, tmp_path):
    computed(data, tmp_path, first := Encoder())
    computed(data, tmp_path, again := Encoder())
    assert (first.images, again.images) == (10, 0)
    Image.new("RGB", (9, 9), "red").save(data.images_path / "1.jpg")
    computed(data, tmp_path, changed := Encoder())
    shutil.copytree(data.images_path, tmp_path / "copied")
    data.images_path = tmp_path / "copied"
    computed(data, tmp_path, elsewhere := Encoder())
    assert (changed.images, elsewhere.images) == (1, 0)


@pytest.mark.parametrize("seed", range(2))
def test_a_picture_edited_in_place_is_encoded_again_though_size_and_time_are_the_same(data, tmp_path, seed):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    path = data.images_path / "1.jpg"
    Image.fromarray(pixels).save(path, "BMP")
    computed(data, tmp_path, Encoder())
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(int(random.integers(54, before.st_size)))
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ 255]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    data.features = computed(data, tmp_path, changed := Encoder())
    assert changed.images == 1
    assert all(torch.equal(data[i]["image_features"][:, 0, 0], means_of(data, i)) for i in range(15))


def means_of(data: VLMDataset, index: int) -> torch.Tensor:
    return data.changed(features=None)[index]["pixel_values"].float().mean(dim=(1, 2, 3)).half()


def test_a_picture_that_several_files_hold_is_encoded_once(data, tmp_path):
    first, *others = sorted({name for row in data.read_rows(range(15)) for name in row["pictures"]})[:4]
    for name in others:
        shutil.copy(data.images_path / first, data.images_path / name)
    kept = computed(data, tmp_path, encoder := Encoder())
    assert encoder.images == 10 - 3
    data.features = kept
    assert all(torch.equal(data[i]["image_features"][:, 0, 0], means_of(data, i)) for i in range(15))


def test_files_that_swap_their_pictures_swap_their_features(data, tmp_path):
    computed(data, tmp_path, Encoder())
    for name, other in (("1.jpg", "2.jpg"), ("2.jpg", "3.jpg"), ("3.jpg", "1.jpg")):
        shutil.copy(data.images_path / other, data.images_path / f"new {name}")
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (data.images_path / f"new {name}").replace(data.images_path / name)
    data.features = computed(data, tmp_path, Encoder())
    assert all(torch.equal(data[i]["image_features"][:, 0, 0], means_of(data, i)) for i in range(15))


def test_another_run_with_other_pictures_of_the_same_names_changes_nothing(data, tmp_path):
    other = copy.copy(data)
    other.images_path = shutil.copytree(data.images_path, tmp_path / "other")
    data.features = computed(data, tmp_path, Encoder())
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    for number, path in enumerate(sorted(other.images_path.iterdir())):
        Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(path, "PNG")
    other.features = computed(other, tmp_path, encoder := Encoder())
    assert encoder.images == 10 and len(files_of(tmp_path)) == 20
    assert all(path.read_bytes() == content for path, content in before.items())
    for rows in (data, other):
        assert all(torch.equal(rows[i]["image_features"][:, 0, 0], means_of(rows, i)) for i in range(15))


def test_an_interrupted_computation_continues(data, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)

    class Interrupted(Encoder):
        def __call__(self, pixels):
            if self.images == 6:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        computed(data, tmp_path, Interrupted())
    computed(data, tmp_path, rest := Encoder())
    assert rest.images < 10
    assert len(files_of(tmp_path)) == 10


DAMAGES = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
    "cut off": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "another's": lambda path: shutil.copy(files_of(path.parents[1])[-1], path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_computed_again_also_while_training(data, tmp_path, damage):
    data.features = computed(data, tmp_path, encoder := Encoder())
    samples = data.__getitems__(range(15))
    for path in files_of(tmp_path)[:3]:
        DAMAGES[damage](path)
    batch, now = (VLMCollator()(rows) for rows in (samples, data.__getitems__(range(15))))
    shown = batch["unencoded"].sum(), now["unencoded"].sum()
    assert shown[0] == 0 < shown[1] == len(now["pixel_values"]) and "pixel_values" not in batch
    model = SimpleNamespace(encode_images=encoder)
    assert torch.equal(model_inputs(model, now)["image_features"], batch["image_features"])
    if damage != "a folder":
        computed(data, tmp_path, again := Encoder())
        assert again.images == 3
        assert not VLMCollator()(data.__getitems__(range(15)))["unencoded"].any()


def test_a_broken_image_is_named_when_its_sample_is_read(data, tmp_path):
    (data.images_path / "3.jpg").write_bytes(b"no picture")
    data.features = computed(data, tmp_path, Encoder())
    broken = [i for i, row in enumerate(data.read_rows(data.row_indices.tolist())) if "3.jpg" in row["pictures"]]
    for index, sample in enumerate(data.__getitems__(range(15))):
        assert isinstance(sample, PictureError) == (index in broken)
    with pytest.raises(PictureError, match="3.jpg: not a picture of a known format"):
        data[broken[0]]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Trains two epochs on the same rows: without a cache, with an empty one, the same full, and on two ranks."""
    folder = tmp_path_factory.mktemp("cached")

    def run(name: str, flags: list, ranks: int = 1) -> tuple:
        out = world.copy_of_out(folder / name)
        result = world.run(SFT, *world.files("sft", out), *FLAGS, *flags, ranks=ranks).passed()
        return [record["loss"] for record in read_jsonl(out / "sft_vlm_32.metrics.jsonl")], result, out

    return {
        "off": run("off", ["--batch_size", 8, "--cache_vision", "off"]),
        "default": run("default", ["--batch_size", 8]),
        "full": run("full", ["--batch_size", 8, "--cache_vision", folder / "default" / "vision_features"]),
        "two ranks": run("two", ["--batch_size", 4], ranks=2),
    }


def test_training_is_the_same_with_a_cache(runs):
    """Up to the rounding of features to float16: 2 ** -11 relative."""
    assert runs["default"][0] == pytest.approx(runs["off"][0], rel=1e-4)


def test_an_empty_a_full_and_a_shared_cache_give_the_same(runs):
    assert runs["default"][0] == runs["full"][0]
    assert runs["two ranks"][0] == pytest.approx(runs["default"][0], rel=1e-5)
    assert "encoding images, once" in runs["default"][1].err
    assert "encoding images, once" not in runs["full"][1].err


def test_the_default_keeps_features_beside_the_weights_on_the_cpu(runs):
    assert "features     computed in every epoch" in runs["off"][1].out
    assert not (runs["off"][2] / "vision_features").exists()
    assert "features     kept in" in runs["default"][1].out
    assert len(files_of(runs["default"][2] / "vision_features")) == 12


@pytest.mark.parametrize("flags", [[], ["--cache_vision", "off"]])
def test_a_resumed_run_says_which_pictures_changed(world, tmp_path, flags):
    images = shutil.copytree(world.images, tmp_path / "images")
    out = world.copy_of_out(tmp_path / "out")
    files = [*world.files("sft", out), "--images_path", images]
    command = [SFT, *files, "--from_weight", "llm", "--num_workers", 0, *flags]
    world.run(*command, "--epochs", 1).passed()
    resumed = world.run(*command, "--epochs", 2, "--from_resume", 1).passed()
    assert "changed since" not in resumed.out
    for name in ("1.jpg", "2.jpg"):
        times = (images / name).stat()
        shutil.copy(images / "3.jpg", images / name)
        os.utime(images / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    resumed = world.run(*command, "--epochs", 3, "--from_resume", 1).passed()
    assert "warning: 2 of the 12 pictures changed since this run was saved, the first is 1.jpg: the run" in resumed.out


def test_a_named_folder_that_cannot_be_made_is_an_error(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = world.copy_of_out(tmp_path / "out")
    result = world.run(SFT, *world.files("sft", out), *FLAGS, "--cache_vision", tmp_path / "file" / "features")
    result.refused("file/features")
