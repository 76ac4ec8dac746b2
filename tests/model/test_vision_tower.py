"""The vision tower: reading checkpoints, staying frozen and outside the saved weights, and damaged folders."""

import copy
import dataclasses
import gc
import io
import json
import os
import shutil

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from model import vision_tower
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision_tower import TowerError, load_vision_tower

TEXT_WIDTH, TEXT_VOCABULARY = 24, 101
DELETED = object()


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory):
    """Makes a whole CLIP checkpoint in both formats, an image and its features."""
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": TEXT_VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    vision = tiny_models.TOWER_SHAPE | {"hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    safe, pickled = (tmp_path_factory.mktemp(form) for form in ("safetensors", "bin"))
    clip.save_pretrained(safe)
    tensors = load_file(safe / "model.safetensors")
    # The published file has these two buffers as well.
    tensors["vision_model.embeddings.position_ids"] = torch.arange(197)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "config.json").write_bytes((safe / "config.json").read_bytes())
    picture = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = clip.vision_model(pixel_values=picture).last_hidden_state
    return {
        "safetensors": safe,
        "bin": pickled,
        "picture": picture,
        "features": features,
        "vision_parameters": sum(parameter.numel() for parameter in clip.vision_model.parameters()),
    }


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_only_the_vision_half_of_a_whole_clip_is_read(whole_clip, form, capfd):
    tower = load_vision_tower(whole_clip[form])
    torch.testing.assert_close(tower(pixel_values=whole_clip["picture"]).last_hidden_state, whole_clip["features"])
    assert sum(parameter.numel() for parameter in tower.parameters()) == whole_clip["vision_parameters"]
    gc.collect()
    shapes = {tuple(thing.shape) for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)}
    assert (TEXT_VOCABULARY, TEXT_WIDTH) not in shapes
    # No warnings about the unused text half.
    assert capfd.readouterr() == ("", "")


def test_the_model_takes_the_features_before_the_final_norm_without_the_class_token(whole_clip):
    model = tiny_models.tiny_vlm(whole_clip["safetensors"])
    torch.testing.assert_close(model.encode_images(whole_clip["picture"]), whole_clip["features"][:, 1:])


@pytest.mark.parametrize("form", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tower_is_float32_whatever_its_file_has(tmp_path, form):
    folder = tiny_models.save_tower(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(form) for name, tensor in tensors.items()}, folder / "model.safetensors")
    tower = load_vision_tower(folder)
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, tensors["vision_model." + name.removeprefix("vision_model.")].to(form).float())


def test_names_with_and_without_the_prefix_are_read_alike(tmp_path):
    """Which of the two a tower alone is saved with depends on the transformers release."""
    prefixed, bare = load_vision_tower(tiny_models.save_tower(tmp_path / "a")), tmp_path / "b"
    for name, tensor in load_vision_tower(tiny_models.save_tower(bare, prefix="")).state_dict().items():
        assert torch.equal(tensor, prefixed.state_dict()[name])
    prefixed.save_pretrained(tmp_path / "c")
    assert torch.equal(next(load_vision_tower(tmp_path / "c").parameters()), next(prefixed.parameters()))


@pytest.mark.parametrize("width", [32, 48])
def test_the_projection_has_the_towers_width(tmp_path, width):
    model = MiniMindVLM(VLMConfig(hidden_size=64, num_hidden_layers=1), tiny_models.save_tower(tmp_path, width))
    assert model.vision_proj.vision_proj[0].weight.shape == (64, width)
    assert model.config.vision_hidden_size == width


def test_the_published_projection_has_394_thousand_parameters():
    model = MiniMindVLM(VLMConfig(hidden_size=512, num_hidden_layers=1))
    assert sum(parameter.numel() for parameter in model.vision_proj.parameters()) == 393_728
    assert list(model.vision_proj.state_dict()) == ["vision_proj.0.weight", "vision_proj.0.bias"]


def test_the_tower_is_neither_trained_nor_saved():
    model, without = tiny_models.tiny_vlm(), MiniMindVLM(tiny_models.tiny_vlm().config)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in without.named_parameters()}
    assert set(model.state_dict()) == set(without.state_dict())
    assert not any("vision_encoder" in name for name, _ in model.named_modules())
    model.train().requires_grad_(True)
    assert model.training
    assert not any(module.training for module in model.vision_encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.vision_encoder.parameters())
    before = copy.deepcopy(model.vision_encoder.state_dict())
    inputs = tiny_models.batch([tiny_models.prompt([1], tiny_models.IMAGE, [5, 6])])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 34, -100)
    model(**inputs, pixel_values=tiny_models.pictures(1), labels=labels).loss.backward()
    assert model.vision_proj.vision_proj[0].weight.grad.abs().max() > 0
    optimizer.step()
    for name, tensor in model.vision_encoder.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_tower_follows_the_models_dtype_and_device():
    model = tiny_models.tiny_vlm().to(torch.float64)
    assert {parameter.dtype for parameter in model.vision_encoder.parameters()} == {torch.float64}
    assert model.vision_encoder.pixel_mean.dtype == torch.float64
    model.to("meta")
    assert {tensor.device.type for tensor in model.vision_encoder.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in model.vision_encoder.buffers()} == {"meta"}


def test_the_towers_own_mean_and_std(tmp_path):
    folder = tiny_models.save_tower(tmp_path)
    clips_own = load_vision_tower(folder)
    assert clips_own.pixel_mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert clips_own.pixel_std.flatten().tolist() == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    settings_file = folder / "preprocessor_config.json"
    settings_file.write_text(json.dumps({"image_mean": [0.5, 0.25, 0], "image_std": [0.5, 1, 2], "size": 224}))
    model = MiniMindVLM(VLMConfig(hidden_size=64, num_hidden_layers=1), folder)
    bytes_in = tiny_models.pictures(2)
    mean, std = torch.tensor([0.5, 0.25, 0]).view(3, 1, 1), torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    by_hand = torch.stack([(picture / 255 - mean) / std for picture in bytes_in.float()])
    torch.testing.assert_close(model.encode_images(bytes_in), model.encode_images(by_hand))


def test_a_picture_for_a_model_without_a_tower_is_an_error():
    model = MiniMindVLM(VLMConfig(hidden_size=64, num_hidden_layers=1))
    inputs = tiny_models.batch([tiny_models.prompt([1], tiny_models.IMAGE)])
    assert model(torch.tensor([[1, 5, 34]])).logits.shape == (1, 3, 6400)
    with pytest.raises(TowerError, match="vision_model_path"):
        model(**inputs, pixel_values=tiny_models.pictures(1))


# ---- a folder without a usable tower


def assert_tower_error(folder, *words):
    with pytest.raises(TowerError) as caught:
        load_vision_tower(folder)
    message = str(caught.value)
    for word in (str(folder), "--vision_model_path", *words):
        assert word in message
    assert "\n" not in message
    assert "weights_only" not in message


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not DELETED}
    (folder / "config.json").write_text(json.dumps(config))


def without_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def replace_by(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def as_bin(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_tensor(folder, name, value, dtype=torch.float32):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.full_like(tensors[name], value).to(dtype)}, folder / "model.safetensors")


def test_what_a_tower_has_no_use_for_may_be_anything(tmp_path):
    """transformers would take these for its own settings, some of which change what a model returns."""
    others = {"return_dict": False, "num_labels": 10**9, "attn_implementation": "unheard_of", "id2label": 5}
    whole = load_vision_tower(tiny_models.save_tower(tmp_path))
    edit_config(tmp_path, **others, output_hidden_states="x", experts_implementation=3, text_config=None)
    assert load_vision_tower(tmp_path).config.to_dict() == whole.config.to_dict()


def test_a_whole_models_config_as_the_published_one_is_read(whole_clip, tmp_path):
    """It is of an old transformers, which wrote every setting that it knew, null where there was none."""
    shutil.copytree(whole_clip["safetensors"], tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "config.json").read_text())
    old = {"architectures": None, "torch_dtype": None, "dtype": None, "_name_or_path": "", "top_k": 50, "id2label": {}}
    old |= {"problem_type": None, "decoder_start_token_id": None, "dropout": 0.0, "chunk_size_feed_forward": 0}
    content["vision_config"] |= old
    (tmp_path / "config.json").write_text(json.dumps(content | {"vision_config_dict": content["vision_config"]}))
    (tmp_path / "preprocessor_config.json").write_text('{"do_center_crop": null, "crop_size": null, "size": 224}')
    tower = load_vision_tower(tmp_path)
    assert tower.settings.picture_settings["crop"] is False
    features = tower(pixel_values=whole_clip["picture"]).last_hidden_state
    torch.testing.assert_close(features, whole_clip["features"])


LAST_WEIGHT = "vision_model.encoder.layers.1.mlp.fc2.weight"
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "garbage weights": (replace_by("model.safetensors", b"garbage" * 99), "cannot be read"),
    "empty weights": (replace_by("model.safetensors", b""), "cannot be read"),
    "web page for weights": (as_bin(b"<!DOCTYPE html><html>404"), "cannot be read"),
    "empty bin": (as_bin(b""), "cannot be read"),
    "broken JSON": (replace_by("config.json", b'{"hidden_size": 32,'), "config.json"),
    "config of bytes": (replace_by("config.json", b"\xff\xfe\x00"), "config.json"),
    "config is a list": (replace_by("config.json", b"[]"), "cannot be read"),
    "config is null": (replace_by("config.json", b"null"), "cannot be read"),
    "broken preprocessor": (replace_by("preprocessor_config.json", b"{"), "cannot be read"),
    "two means": (replace_by("preprocessor_config.json", b'{"image_mean": [1, 2]}'), "cannot be read"),
    **{
        f"{name} is {kind}": (replace_by(f"{name}.json", content), f"{name}.json", "cannot be read")
        for name in ("config", "preprocessor_config")
        for kind, content in {
            **{"a number": b"5", "a text": b'"x"', "a list of null": b"[null]", "not a number": b"NaN"},
            **{"deep": b"[" * 10_000 + b"]" * 10_000, "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000},
            **{"long": b'{"a": "' + b" " * (1 << 22) + b'"}', "half a character": b'{"a": "\\ud800"}'},
        }.items()
    },
    **{
        f"{fields}": (lambda folder, fields=fields: edit_config(folder, **fields), "cannot be read", *fields)
        for fields in (
            *({"hidden_act": value} for value in ("unheard_of", 5, None, ["gelu"])),
            *({name: 10**9} for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size")),
            *({"layer_norm_eps": value} for value in (float("nan"), -1, "small")),
            *({"patch_size": -16}, {"num_attention_heads": True}, {"num_channels": 1}, {"model_type": 5}),
            *({"vision_config": [1]}, {"dtype": "float999"}),
        )
    },
    **{
        f"{field} {value}": (replace_by("preprocessor_config.json", json.dumps({field: value}).encode()), field)
        for field, values in {
            "image_std": (0, [0, 1, 1], [float("nan")] * 3, [1e-300] * 3, [-1, 1, 1], None),
            "image_mean": ([float("inf")] * 3, "x", [True] * 3),
            **{"resample": (99, "bicubic", None), "do_center_crop": ("no", 0)},
        }.items()
        for value in values
    },
    "a tensor alone": (as_bin(saved(torch.ones(2))), "a plain dict of tensors is expected"),
    "a list for tensors": (as_bin(saved([torch.ones(2)])), "a plain dict of tensors is expected"),
    "words for tensors": (as_bin(saved({"vision_model.x": "y"})), "a plain dict of tensors is expected"),
    "NaN": (lambda folder: with_tensor(folder, LAST_WEIGHT, torch.nan), LAST_WEIGHT, "finite"),
    "float8": (lambda folder: with_tensor(folder, LAST_WEIGHT, 1, torch.float8_e4m3fn), LAST_WEIGHT, "finite"),
    "patch 32": (lambda folder: edit_config(folder, patch_size=32), "does not fit its config.json"),
    "patch 0": (lambda folder: edit_config(folder, patch_size=0), "cannot be read"),
    "patch a word": (lambda folder: edit_config(folder, patch_size="sixteen"), "cannot be read"),
    "no patch size": (lambda folder: edit_config(folder, patch_size=DELETED), "does not fit its config.json"),
    "336 px": (lambda folder: edit_config(folder, image_size=336, patch_size=24), "does not fit its config.json"),
    "heads do not divide": (lambda folder: edit_config(folder, num_attention_heads=5), "cannot be read"),
    "wider tower": (lambda folder: edit_config(folder, hidden_size=64), "does not fit its config.json"),
    "deeper tower": (lambda folder: edit_config(folder, num_hidden_layers=3), "16 tensor(s)", "layers.2."),
    "shallower tower": (lambda folder: edit_config(folder, num_hidden_layers=1), "16 tensor(s)", "layers.1."),
    "missing tensor": (lambda folder: without_tensor(folder, LAST_WEIGHT), "1 tensor(s)", "mlp.fc2.weight"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tower_is_an_error_with_a_remedy(tmp_path, damage):
    change, *words = DAMAGES[damage]
    change(tiny_models.save_tower(tmp_path))
    assert_tower_error(tmp_path, *words)


@pytest.mark.parametrize(
    ("damage", "words"),
    {
        "wider": (lambda folder: edit_config(folder, hidden_size=64), ["27 tensor(s)", "embeddings.cls_token"]),
        "huge": (lambda folder: edit_config(folder, mlp_ratio=16, num_hidden_layers=1024), ["mlp.fc1.bias"]),
        "deeper": (lambda folder: edit_config(folder, num_hidden_layers=3), ["18 tensor(s)", "layer.2."]),
        "missing": (lambda folder: without_tensor(folder, "layernorm.weight"), ["1 tensor(s)", "layernorm.weight"]),
    }.values(),
)
def test_the_error_names_a_tensor_of_another_family_too(tmp_path, damage, words):
    Dinov2Model(Dinov2Config(**tiny_models.TOWER_SHAPE | {"hidden_size": 32})).save_pretrained(tmp_path)
    damage(tmp_path)
    assert_tower_error(tmp_path, *words)


@pytest.mark.parametrize("model", [CLIPVisionModel, Dinov2Model])
def test_a_tower_is_read_where_transformers_builds_the_model_around_it_without_memory(tmp_path, model):
    model(model.config_class(**tiny_models.TOWER_SHAPE | {"hidden_size": 32})).save_pretrained(tmp_path)
    with torch.device("meta"):
        tower = load_vision_tower(tmp_path)
    assert {tensor.device.type for tensor in (*tower.parameters(), *tower.buffers())} == {"cpu"}


def test_a_missing_folder_is_an_error_with_a_remedy(tmp_path):
    assert_tower_error(tmp_path / "nowhere", "config.json is missing")
    with pytest.raises(TowerError, match="nowhere"):
        MiniMindVLM(VLMConfig(hidden_size=64, num_hidden_layers=1), vision_model_path=tmp_path / "nowhere")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Returns a tower's folder, which a test may damage, and the bytes of its two files."""
    folder = tiny_models.save_tower(tmp_path_factory.mktemp("tower"))
    return folder, {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_a_tower_error(intact, name, fraction):
    folder, contents = intact
    for other, content in contents.items():
        (folder / other).write_bytes(content)
    os.truncate(folder / name, int(len(contents[name].rstrip(b"}\n ")) * fraction))
    assert_tower_error(folder)


@pytest.mark.parametrize("error", [AttributeError, TypeError, NameError])
def test_a_bug_in_a_custom_tower_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch, error):
    class Tinkered:
        config_class = CLIPVisionConfig

        def __init__(self, config):
            raise error("typo")

    tinkered = dataclasses.replace(vision_tower.TOWERS["CLIP"], model=Tinkered)
    monkeypatch.setitem(vision_tower.TOWERS, "CLIP", tinkered)
    with pytest.raises(error, match="typo"):
        load_vision_tower(tiny_models.save_tower(tmp_path))
