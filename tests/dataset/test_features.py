"""The cache of vision features: never a stale one, computed once, shared by ranks; training is the same."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SFT, read_jsonl, sft_row, write_jsonl

from dataset import features
from dataset.features import FeatureCacheError, FeatureFile, compute_features, file_bytes, image_slots, tower_sha256
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.pictures import PictureError
from dataset.tokenizer import load_tokenizer
from model.vision_tower import load_vision_tower

pytest_plugins = ["tiny"]

CPU = torch.device("cpu")
SHAPE = (17, 196, 8)
FLAGS = ["--from_weight", "llm", "--epochs", 2, "--learning_rate", 1e-3, "--log_interval", 1, "--num_workers", 1]


def some_features(seed: int) -> np.ndarray:
    return torch.randn(196, 8, generator=torch.Generator().manual_seed(seed)).half().numpy()


@pytest.fixture
def file(tmp_path) -> FeatureFile:
    return FeatureFile(tmp_path, "data" * 8, "tower" * 8, SHAPE)


def test_a_slot_is_valid_for_its_image_only(file):
    stamps = np.array([[5, 6]])
    assert not file.is_current(np.array([1]), stamps).any()
    file.write([(1, (5, 6), 11, some_features(1)), (2, (7, 8), 12, None)])
    assert file.is_current(np.array([1]), stamps).all()
    assert not file.is_current(np.array([1]), stamps + [[0, 1]]).any()  # changed since
    assert not file.is_current(np.array([0]), stamps).any()
    assert np.array_equal(file.get(1), some_features(1))
    assert file.is_current(np.array([2]), np.array([[7, 8]])).all()
    assert file.get(2) is None  # known to be unreadable


def test_it_persists_and_a_worker_maps_it_itself(file, tmp_path):
    file.write([(3, (1, 1), 13, some_features(3))])
    assert file.path.stat().st_size == file.size == file_bytes(SHAPE)
    assert file_bytes((1, 196, 768)) - file_bytes((0, 196, 768)) == pytest.approx(301_000, rel=1e-3)
    again = FeatureFile(tmp_path, "data" * 8, "tower" * 8, SHAPE)
    assert np.array_equal(again.get(3), some_features(3))
    assert len(pickle.dumps(file)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(file)).get(3), some_features(3))


def test_too_little_disk_space_is_refused_in_advance(tmp_path, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(FeatureCacheError, match=r"take 0\.0 GB, and .* free: .*--cache_vision"):
        FeatureFile(tmp_path, "data" * 8, "tower" * 8, SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_tower_is_refused(file, tmp_path):
    with open(file.path, "r+b") as opened:
        header = json.loads(opened.read(features.HEADER_BYTES).rstrip(b"\0"))
        opened.seek(0)
        opened.write(json.dumps(header | {"tower": "another"}).encode())
    with pytest.raises(FeatureCacheError, match="made from something else; delete it"):
        FeatureFile(tmp_path, "data" * 8, "tower" * 8, SHAPE)


def test_towers_are_told_apart(world):
    tower = load_vision_tower(world.tower)
    before = tower_sha256(tower)
    assert before == tower_sha256(load_vision_tower(world.tower))
    tower.pixel_mean += 1e-3
    assert tower_sha256(tower) != before


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


def computed(data, folder, encoder, **share) -> FeatureFile:
    file = FeatureFile(folder, "d" * 16, "t" * 16, (data.distinct_pictures, 196, 8))
    compute_features(data, file, encoder, CPU, 0, **share)
    return file


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_come_with_the_features_of_their_images(data, tmp_path, ranks):
    expected = [data[index]["pixel_values"].float().mean(dim=(1, 2, 3)).half() for index in range(15)]
    encoder = Encoder()
    for rank in range(ranks):
        file = computed(data, tmp_path, encoder, rank=rank, ranks=ranks)
    assert encoder.images == data.distinct_pictures == 10 < len(image_slots(data)) == data.picture_count
    data.use_features(file)
    for index, means in enumerate(expected):
        sample = data[index]
        assert "pixel_values" not in sample
        assert torch.equal(sample["image_features"][:, 0, 0], means)
    batch = VLMCollator()([data[index] for index in range(15)])
    assert torch.equal(batch["image_features"][:, 0, 0], torch.cat(expected))


def test_only_what_is_missing_or_changed_is_computed(data, tmp_path):
    computed(data, tmp_path, first := Encoder())
    computed(data, tmp_path, again := Encoder())
    assert (first.images, again.images) == (data.distinct_pictures, 0)
    Image.new("RGB", (9, 9), "red").save(data.images_path / "1.jpg")
    computed(data, tmp_path, changed := Encoder())
    assert changed.images == 1


def means_of(data: VLMDataset, index: int) -> torch.Tensor:
    return data.with_pixels()[index]["pixel_values"].float().mean(dim=(1, 2, 3)).half()


def test_a_picture_that_several_files_hold_is_encoded_once(data, tmp_path):
    first, *others = sorted({name for row in data.read_rows(range(15)) for name in row["pictures"]})[:4]
    for name in others:
        shutil.copy(data.images_path / first, data.images_path / name)
    file = computed(data, tmp_path, encoder := Encoder())
    assert encoder.images == data.distinct_pictures - 3
    data.use_features(file)
    assert all(torch.equal(data[i]["image_features"][:, 0, 0], means_of(data, i)) for i in range(15))


def test_files_that_swap_their_pictures_swap_their_features(data, tmp_path):
    computed(data, tmp_path, Encoder())
    for name, other in (("1.jpg", "2.jpg"), ("2.jpg", "3.jpg"), ("3.jpg", "1.jpg")):
        shutil.copy(data.images_path / other, data.images_path / f"new {name}")
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (data.images_path / f"new {name}").replace(data.images_path / name)
    data.use_features(computed(data, tmp_path, Encoder()))
    assert all(torch.equal(data[i]["image_features"][:, 0, 0], means_of(data, i)) for i in range(15))


def test_an_interrupted_computation_continues(data, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "IMAGES_PER_FLUSH", 4)

    class Interrupted(Encoder):
        def __call__(self, pixels):
            if self.images == 6:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        computed(data, tmp_path, Interrupted())
    computed(data, tmp_path, rest := Encoder())
    assert rest.images == data.distinct_pictures - 4  # what was written before the interruption


def test_a_broken_image_is_named_when_its_sample_is_read(data, tmp_path):
    (data.images_path / "3.jpg").write_bytes(b"no picture")
    data.use_features(computed(data, tmp_path, Encoder()))
    broken = [i for i, row in enumerate(data.read_rows(data.positions.tolist())) if "3.jpg" in row["pictures"]]
    for index, sample in enumerate(data.__getitems__(range(15))):
        assert isinstance(sample, PictureError) == (index in broken)
    with pytest.raises(PictureError, match="3.jpg: not a picture of a known format"):
        data[broken[0]]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Trains two epochs on the same rows: without a cache, with an empty and a full one, and on two ranks."""
    folder = tmp_path_factory.mktemp("cached")

    def run(name: str, flags: list, ranks: int = 1) -> tuple:
        out = world.copy_of_out(folder / name)
        result = world.run(SFT, *world.files("sft", out), *FLAGS, *flags, ranks=ranks).passed()
        return [record["loss"] for record in read_jsonl(out / "sft_vlm_32.metrics.jsonl")], result, out

    return {
        "off": run("off", ["--batch_size", 8, "--cache_vision", "off"]),
        "default": run("default", ["--batch_size", 8]),
        "filling": run("filling", ["--batch_size", 8, "--cache_vision", folder / "kept"]),
        "full": run("full", ["--batch_size", 8, "--cache_vision", folder / "kept"]),
        "two ranks": run("two", ["--batch_size", 4], ranks=2),
    }


def test_training_is_the_same_with_a_cache(runs):
    """Up to the rounding of features to float16: 2 ** -11 relative."""
    assert runs["filling"][0] == pytest.approx(runs["off"][0], rel=1e-4)


def test_an_empty_a_full_and_a_shared_cache_give_the_same(runs):
    assert runs["default"][0] == runs["filling"][0] == runs["full"][0]
    assert runs["two ranks"][0] == pytest.approx(runs["default"][0], rel=1e-5)
    assert "encoding images, once" in runs["filling"][1].err
    assert "encoding images, once" not in runs["full"][1].err


def test_the_default_keeps_features_beside_the_weights_on_the_cpu(runs):
    assert "features     computed anew every epoch" in runs["off"][1].out
    assert not (runs["off"][2] / "vision_features").exists()
    assert "features     kept in" in runs["default"][1].out
    [kept] = (runs["default"][2] / "vision_features").iterdir()
    assert kept.suffix == ".features"


def test_a_named_folder_that_cannot_be_made_is_an_error(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = world.copy_of_out(tmp_path / "out")
    result = world.run(SFT, *world.files("sft", out), *FLAGS, "--cache_vision", tmp_path / "file" / "features")
    result.refused("file/features")
