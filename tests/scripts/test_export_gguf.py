"""GGUF files hold what llama.cpp must find in them; where llama-server is at hand, it gives our tokens and answers."""

import os
import re
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import flags_for, random_weights
from tiny_models import save_tower

import scripts.share
from common.errors import UsageError
from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from dataset.chat import SYSTEM_PROMPT, load_tokenizer
from dataset.pictures import load_picture
from scripts import export

pytest_plugins = ["tiny"]
SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


@pytest.fixture
def exported(tmp_path):
    def run(*more, class_embedding=None, **shape):
        tower = save_tower(tmp_path / "tower")
        if class_embedding is not None:
            tensors = load_file(tower / "model.safetensors")
            [name] = (name for name in tensors if name.endswith("class_embedding"))
            save_file(tensors | {name: class_embedding}, tower / "model.safetensors")
        model = random_weights(tmp_path / "out", tower, **shape)
        export.main([*flags_for(tmp_path / "out", tower), "--to", "gguf", "--overwrite", *more])
        return model, tmp_path / "out" / "sft_vlm_64-gguf"

    return run


def read(path: Path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def projected(tensors: dict, features: torch.Tensor, between=gelu) -> torch.Tensor:
    """Returns what llama.cpp makes of features: Linear, GELU, Linear."""
    mm = {name: torch.from_numpy(array).double() for name, array in tensors.items() if name.startswith("mm.")}
    hidden = between(features.double() @ mm["mm.0.weight"].T + mm["mm.0.bias"])
    return hidden @ mm["mm.2.weight"].T + mm["mm.2.bias"]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_projection_is_exact_as_linear_gelu_linear(exported, kind):
    model, folder = exported(projector=kind)
    _, tensors = read(folder / "mmproj-sft_vlm_64-f32.gguf")
    features = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = projected(tensors, features, gelu if kind == "linear" else torch.nn.functional.gelu)
    torch.testing.assert_close(out, model.vision_proj.double()(features), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_patches_are_projected_exactly_and_the_class_token_to_zero(exported):
    model, folder = exported(class_embedding=10 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    fields, tensors = read(folder / "mmproj-sft_vlm_64-f32.gguf")
    assert list(fields["clip.vision.feature_layer"]) == [0, 2]  # before the first and after the last of two layers
    images = torch.rand(5, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 4 - 2
    states = model.vision_encoder(pixel_values=images, output_hidden_states=True).hidden_states
    out = projected(tensors, torch.cat((states[0], states[-1]), dim=-1))
    right = model.vision_proj.double()(states[-1].double())
    torch.testing.assert_close(out[:, 1:], right[:, 1:], atol=1e-9, rtol=1e-9)
    assert out[:, 0].abs().max() < 1e-2 * right[:, 0].abs().max()  # float32 weights around a large threshold


def test_a_class_token_like_a_patch_is_left_as_it_is(exported):
    _, folder = exported()  # the tiny tower's class embedding is not unlike its patches
    fields, tensors = read(folder / "mmproj-sft_vlm_64-f32.gguf")
    assert list(fields["clip.vision.feature_layer"]) == [2] and tensors["mm.0.weight"].shape == (128, 32)


def test_every_patch_gets_its_own_position(exported):
    model, folder = exported()
    fields, tensors = read(folder / "mmproj-sft_vlm_64-f32.gguf")
    ours = model.vision_encoder.state_dict()
    [name] = (name for name in ours if name.endswith("position_embedding.weight"))
    rows = [*range(1, 197), 0]
    assert np.array_equal(tensors["v.position_embd.weight"], ours[name].numpy()[rows])
    assert fields["clip.vision.feature_layer"][-1] == 2  # the output of the last of two layers
    assert not any(name.startswith("v.post_ln") for name in tensors)


def test_rotating_neighbours_is_rotating_halves(exported):
    """The same queries and keys, up to the order that both share."""
    model, folder = exported()
    _, tensors = read(folder / "sft_vlm_64-f16.gguf")
    weight, heads = model.state_dict()["model.layers.1.self_attn.k_proj.weight"], model.config.num_key_value_heads
    x, angles = torch.ones(64), torch.arange(model.config.head_dim // 2) * 0.3
    halves = (weight @ x).view(heads, 2, -1)
    pairs = (torch.from_numpy(tensors["blk.1.attn_k.weight"]) @ x).view(heads, -1, 2)

    def rotate(a, b):
        return torch.stack((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))

    assert torch.equal(rotate(halves[:, 0], halves[:, 1]), rotate(pairs[..., 0], pairs[..., 1]))


def test_text_model_and_tokenizer(exported):
    model, folder = exported()
    fields, tensors = read(folder / "sft_vlm_64-f16.gguf")
    tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    assert fields["general.architecture"] == "llama" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(6400)] == fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "output.weight" not in tensors  # tied
    ours = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], ours)
    lines = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["FROM ./sft_vlm_64-f16.gguf", "FROM ./mmproj-sft_vlm_64-f32.gguf"]
    for named in lines[:2]:
        assert (folder / named.removeprefix("FROM ")).is_file()


def test_the_modelfile_follows_the_documented_grammar(exported):
    """Ollama's: `INSTRUCTION arguments` by line, several lines between triple quotes; FROM is required."""
    _, folder = exported()
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    argument = r'"""(?:.|\n)*?"""|"[^"\n]*"|[^"\s]\S*'
    pattern = rf"(FROM|TEMPLATE|SYSTEM) ({argument})\n|PARAMETER (stop|repeat_penalty) ({argument})\n"
    found = list(re.finditer(pattern, text))
    assert "".join(match.group() for match in found) == text
    said = {match[1] or match[3]: (match[2] or match[4]).strip('"') for match in found}
    assert said.keys() == {"FROM", "TEMPLATE", "SYSTEM", "stop", "repeat_penalty"}
    assert said["stop"] == "<|im_end|>" and said["SYSTEM"] == SYSTEM_PROMPT
    assert said["TEMPLATE"].count("{{") == said["TEMPLATE"].count("}}") and "range .Messages" in said["TEMPLATE"]


def test_a_picture_is_cropped_to_what_the_tower_takes(tmp_path, capsys):
    source, other = tmp_path / "wide.jpg", tmp_path / "other" / "wide.jpg"
    Image.effect_mandelbrot((640, 360), (-2, -1, 1, 1), 50).convert("RGB").save(source)
    other.parent.mkdir()
    Image.new("RGB", (300, 200)).save(other)

    def crop(folder: str, *pictures: Path):
        export.main(["--weight", "llm", "--folder", str(tmp_path / folder), "--picture", *map(str, pictures)])

    crop("cropped", source)
    crop("cropped", source)  # the same once more
    [cropped] = (tmp_path / "cropped").iterdir()
    assert cropped.name == "wide_224.png" and str(cropped) in capsys.readouterr().out
    with Image.open(cropped) as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), load_picture(source).numpy())
    before = cropped.read_bytes()
    for pictures in ((source, other), (other,)):
        with pytest.raises(UsageError, match=f"--picture {other} would overwrite {cropped}"):
            crop("cropped", *pictures)
    assert cropped.read_bytes() == before
    source.write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"--picture .*wide\.jpg.* not a picture"):
        crop("cropped", source)


def test_experts_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    flags = [*flags_for(tmp_path / "out", save_tower(tmp_path / "tower")), "--to", "gguf"]
    random_weights(tmp_path / "out", None, use_moe=True)
    with pytest.raises(UsageError, match="experts are not exported to GGUF: use --to transformers"):
        export.main(flags)
    random_weights(tmp_path / "out", None)
    monkeypatch.delitem(sys.modules, "scripts.share.gguf_files")
    monkeypatch.delattr(scripts.share, "gguf_files")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install -r scripts/requirements-export.txt"):
        export.main(flags)


@pytest.mark.skipif(SERVER is None, reason="no llama-server: name it by LLAMA_SERVER, or put it on the PATH")
def test_llama_cpp_gives_our_tokens_and_answers(world, exported, tmp_path):
    exported()
    files = [*flags_for(tmp_path / "out", tmp_path / "tower"), "--server", SERVER]
    table = world.run(ROOT / "tests" / "checks" / "check_llama_cpp.py", *files).passed().out
    assert "llama.cpp f16" in table and table.count("200 of 200") == 2
