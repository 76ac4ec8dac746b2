"""minimind-3v: the numbers recorded from it, plain mathematics, and a configuration that its tensors alone give."""

import math

import plain_model
import pytest
import torch
from tiny_models import save_siglip

from common.errors import UsageError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MoEFeedForward
from model.model_vlm import CONFIG_3V, MiniMindVLM, VLMConfig, fit_config_to_tower
from model.projectors import PROJECTORS
from model.weights import config_of, load_into, read_weights

IMAGE_ID, PATCHES = 12, 64


def width_of_3v(hidden_size: int) -> int:
    return 64 * math.ceil(hidden_size * math.pi / 64)


def model_3v(hidden_size=64, tower=None, **shape) -> MiniMindVLM:
    """Makes a model of that generation with the weights behind the recorded figures."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "n_shared_experts": 0} | shape
    width = {"hidden_size": hidden_size, "intermediate_size": width_of_3v(hidden_size), "qk_norm": True}
    model = MiniMindVLM(VLMConfig(**CONFIG_3V | width | shape), vision_model_path=tower).eval()
    plain_model.fill_decoder(model)
    return model


def read_back(model: MiniMindVLM, tmp_path, tower=None) -> MiniMindVLM:
    """Writes the tensors alone, and reads the model from them."""
    path = tmp_path / "llm_768.pth"
    torch.save(dict(model.state_dict()), path)
    weights = read_weights(path)
    again = MiniMindVLM(weights.config, vision_model_path=tower).eval()
    load_into(again, weights)
    return again


@pytest.mark.parametrize("case", ["3v_text", "3v_experts", "3v_image"])
def test_recorded_logits_and_loss_from_the_tensors_alone(tmp_path, case):
    recorded = plain_model.recorded(case, side=256)
    shape = recorded["shape"]
    tower = save_siglip(tmp_path / "tower", 768, intermediate_size=1024, num_attention_heads=12)
    heads = {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv"]}
    made = model_3v(shape["h"], tower, num_hidden_layers=shape["layers"], use_moe=shape["moe"], **heads)
    model, ids = read_back(made, tmp_path, tower), recorded["input_ids"]
    labels = ids.masked_fill(ids == IMAGE_ID, -100)
    with torch.no_grad():
        output = model(ids, pixel_values=recorded["pixel_values"], labels=labels)
    torch.testing.assert_close(output.logits[..., recorded["columns"]], recorded["logits"], atol=1e-4, rtol=0)
    balance = output.aux_loss if shape["moe"] else 0  # recorded without
    assert float(output.loss - balance) == pytest.approx(recorded["loss"], abs=1e-4)


YARN = {"inference_rope_scaling": True, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("shape", [{}, {"use_moe": True}, YARN], ids=["dense", "experts", "yarn"])
def test_equals_plain_mathematics(shape):
    model = model_3v(**shape)
    ids = torch.randint(3, 6400, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    for sample, row in enumerate(ids.tolist()):
        expected, _ = plain_model.decode(model, plain_model.embed(model, row))
        torch.testing.assert_close(logits[sample].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_attention_factor_of_yarn_is_one():
    assert VLMConfig(**CONFIG_3V, inference_rope_scaling=True).yarn_attention_factor == 1
    assert VLMConfig(inference_rope_scaling=True).yarn_attention_factor == pytest.approx(0.1 * math.log(16) + 1)


def test_the_experts_are_balanced_over_the_batch():
    config = MiniMindConfig(
        hidden_size=32,
        num_experts_per_tok=1,
        n_shared_experts=0,
        aux_loss_alpha=5e-4,
        balance_over_batch=True,
        use_moe=True,
    )
    torch.manual_seed(0)
    layer, x_BLD = MoEFeedForward(config), torch.randn(3, 8, 32)
    is_token = torch.ones(3, 8, dtype=torch.long)
    is_token[2, 3:] = 0
    weights = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    expected, balance = plain_model.experts(x_BLD.flatten(0, 1).double(), weights, config, is_token.flatten().tolist())
    out, loss = layer(x_BLD, is_token)
    torch.testing.assert_close(out.flatten(0, 1).double(), expected, atol=1e-5, rtol=1e-5)
    assert loss.shape == (1,) and loss.item() == pytest.approx(balance, rel=1e-5)


def test_the_projection_is_plain_mathematics():
    torch.manual_seed(0)
    projection, x_PW = PROJECTORS["norm_mlp"](32, 48), torch.randn(PATCHES, 32)
    torch.nn.init.normal_(projection.mlp[0].bias)
    weights = {name: tensor.double() for name, tensor in projection.state_dict().items()}
    expected = plain_model.norm_mlp(x_PW.double(), weights)
    torch.testing.assert_close(projection(x_PW).double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no pixel_shuffle 2"):
        VLMConfig(projector="norm_mlp", vision_patches=64, pixel_shuffle=2)


def test_the_published_shape_is_read_from_its_97_tensors(tmp_path):
    with torch.device("meta"):
        shape = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
        made = MiniMindVLM(VLMConfig(**CONFIG_3V, **shape, hidden_size=768, intermediate_size=2432, qk_norm=True))
    tensors = made.state_dict()
    assert len(tensors) == 97
    assert {name: tuple(tensors[f"vision_proj.mlp.{name}"].shape) for name in ("0.weight", "1.weight", "3.bias")} == {
        "0.weight": (768,), "1.weight": (768, 768), "3.bias": (768,)}  # fmt: skip
    count = sum(parameter.numel() for parameter in made.parameters())
    projection = sum(parameter.numel() for parameter in made.vision_proj.parameters())
    assert (round((count - projection) / 1e6, 2), round(projection / 1e6, 3)) == (63.91, 1.183)
    config = config_of(tensors, tmp_path / "llm_768.pth")
    expected = shape | CONFIG_3V | {"hidden_size": 768, "head_dim": 96, "intermediate_size": 2432, "qk_norm": True}
    assert {name: getattr(config, name) for name in expected} == expected
    # The name is the older generation's too, whose tensors say otherwise.
    with torch.device("meta"):
        older = MiniMindForCausalLM(MiniMindConfig(hidden_size=768, num_hidden_layers=16)).state_dict()
    config = config_of(older, tmp_path / "llm_768.pth")
    assert (config.qk_norm, config.rms_norm_eps, config.image_token_id, config.num_hidden_layers) == (
        False,
        1e-5,
        34,
        16,
    )
    assert (config.projector, config.num_attention_heads, config.num_experts_per_tok) == ("linear", 8, 2)


@pytest.mark.parametrize("shape", [(768, 3072), (3072,)])
def test_earlier_files_are_refused(tmp_path, shape):
    tensors = model_3v().state_dict() | {"vision_proj.mlp.0.weight": torch.zeros(shape)}
    with pytest.raises(UsageError, match=r"llm_768.pth belongs to an earlier minimind-3v.*\(.*3072.*\)"):
        config_of(tensors, tmp_path / "llm_768.pth")


def test_the_tower_of_another_generation_is_refused(tmp_path):
    from model.vision_tower import read_tower_settings

    config = config_of(model_3v().state_dict(), tmp_path / "llm_768.pth")
    tower = read_tower_settings(save_siglip(tmp_path / "tower", patch_size=16))
    with pytest.raises(ValueError, match="64 patches.*this tower has 256.*--vision_model_path"):
        fit_config_to_tower(config, tower, from_tensors=True)
