"""The tower's features on disk: the right ones or none, one file for many processes, and the same training."""

import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny import SFT, read_jsonl, sft_row, write_jsonl

from dataset import features as feature_cache
from dataset.features import FeatureCache, FeatureCacheError, cache_bytes, picture_digest, tower_sha256
from dataset.lm_dataset import VLMCollator, VLMDataset
from model.model_vlm import load_vision_tower
from trainer.setup import load_tokenizer

pytest_plugins = ["tiny"]

WIDTH = 8
COUNTS = np.array([1, 0, 2])
FLAGS = ["--from_weight", "llm", "--epochs", 2, "--learning_rate", 1e-3, "--log_interval", 1, "--num_workers", 1]


def features(seed: int) -> torch.Tensor:
    return torch.randn(196, WIDTH, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path, "data" * 8, "tower" * 8, COUNTS, WIDTH)


def test_a_slot_is_empty_until_it_is_filled_and_holds_for_its_picture_only(cache):
    one, other = picture_digest(b"one"), picture_digest(b"other")
    assert cache.get(1, one) is None
    cache.put(1, one, features(1))
    assert torch.equal(cache.get(1, one), features(1))
    assert cache.get(1, other) is None  # the picture was changed
    assert cache.get(0, one) is None
    assert cache.get(2, one) is None


def test_rows_know_their_first_slot_and_the_size_is_as_said(cache):
    assert cache.first_slots.tolist() == [0, 1, 1]
    assert cache.path.stat().st_size == cache.size == cache_bytes(3, 3, WIDTH)
    assert cache_bytes(0, 1, 768) - cache_bytes(0, 0, 768) == pytest.approx(301_000, rel=1e-3)


def test_garbled_features_count_as_empty(cache):
    digest = picture_digest(b"one")
    cache.put(2, digest, features(2))
    cache.features[2, 5, 3] += 1
    assert cache.get(2, digest) is None


def test_it_lasts_and_travels_to_another_process(cache, tmp_path):
    digest = picture_digest(b"one")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(FeatureCache.put, (cache, 0, digest, features(3)))
    assert torch.equal(cache.get(0, digest), features(3))
    again = FeatureCache(tmp_path, "data" * 8, "tower" * 8, COUNTS, WIDTH)
    assert torch.equal(again.get(0, digest), features(3))
    assert len(pickle.dumps(cache)) < 1000


def test_a_full_disk_is_refused_in_advance(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(FeatureCacheError, match=r"take 0\.0 GB, and .* free: .*--cache_vision"):
        FeatureCache(tmp_path, "data" * 8, "tower" * 8, np.array([9]), WIDTH)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_refused(cache, tmp_path):
    with open(cache.path, "r+b") as file:
        header = json.loads(file.read(feature_cache.HEADER_BYTES).rstrip(b"\0"))
        file.seek(0)
        file.write(json.dumps(header | {"preprocessing": "another"}).encode())
    with pytest.raises(FeatureCacheError, match="made with something else; delete it"):
        FeatureCache(tmp_path, "data" * 8, "tower" * 8, COUNTS, WIDTH)


def test_towers_are_told_apart(world):
    tower = load_vision_tower(world.tower)
    before = tower_sha256(tower)
    assert before == tower_sha256(load_vision_tower(world.tower))
    tower.pixel_mean += 1e-3
    assert tower_sha256(tower) != before


def test_samples_come_with_what_the_cache_holds(world, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [sft_row(number) for number in range(10)])
    data = VLMDataset(rows, world.images, load_tokenizer(world.tokenizer), 1536, cache_dir=tmp_path / "tokens")
    plain = [data[index] for index in range(10)]
    cache = data.use_feature_cache(tmp_path, "t" * 64, WIDTH)
    for index in range(10):
        sample = data[index]
        assert torch.equal(sample["pixel_values"], plain[index]["pixel_values"])
        assert not any(found for _, _, found in sample["slots"])
    slots = next(data[index]["slots"] for index in range(10) if data[index]["slots"])
    cache.put(*slots[0][:2], features(4))
    batch = VLMCollator()([data[index] for index in range(10)])
    assert [found for _, _, found in batch["slots"]].count(True) == len(batch["image_features"]) == 1
    assert torch.equal(batch["image_features"][0], features(4))
    assert len(batch["pixel_values"]) == len(batch["slots"]) - 1 == sum(len(s["pixel_values"]) for s in plain) - 1


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Two epochs of the same rows: without a cache, with one, with one that is full, and divided over two processes."""
    folder = tmp_path_factory.mktemp("cached")

    def run(name: str, flags: list, ranks: int = 1) -> list[float]:
        out = world.copy_of_out(folder / name)
        result = world.run(SFT, *world.files("sft", out), *FLAGS, *flags, ranks=ranks).passed()
        return [record["loss"] for record in read_jsonl(out / "sft_vlm_32.metrics.jsonl")], result.out, out

    return {
        "off": run("off", ["--batch_size", 8, "--cache_vision", "off"]),
        "default": run("default", ["--batch_size", 8]),
        "filling": run("filling", ["--batch_size", 8, "--cache_vision", folder / "kept"]),
        "full": run("full", ["--batch_size", 8, "--cache_vision", folder / "kept"]),
        "two processes": run("two", ["--batch_size", 4], ranks=2),
    }


def test_training_is_the_same_with_a_cache(runs):
    """Up to the rounding of features to float16, 2 ** -11 relative."""
    assert runs["filling"][0] == pytest.approx(runs["off"][0], rel=1e-4)


def test_an_empty_a_full_and_a_divided_cache_give_the_same(runs):
    assert runs["default"][0] == runs["filling"][0] == runs["full"][0]
    assert runs["two processes"][0] == pytest.approx(runs["default"][0], rel=1e-5)


def test_the_default_keeps_features_beside_the_weights_on_the_cpu(runs):
    assert "features     computed anew every epoch" in runs["off"][1]
    assert not (runs["off"][2] / "vision_features").exists()
    assert "features     kept in" in runs["default"][1]
    [kept] = (runs["default"][2] / "vision_features").iterdir()
    assert kept.suffix == ".features"


def test_a_folder_that_cannot_be_made_is_an_error_if_it_was_named(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = world.copy_of_out(tmp_path / "out")
    result = world.run(SFT, *world.files("sft", out), *FLAGS, "--cache_vision", tmp_path / "file" / "features")
    result.refused("file/features")
