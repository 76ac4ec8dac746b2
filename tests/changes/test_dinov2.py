"""Another family of towers: a DINOv2 folder of transformers works by its entry in the table of model/tower_files.py.

A family that is not there is one more entry. What the entry does not say, the folder's own files do: here pictures are
resized to 72 pixels at their shortest edge and cropped to 56, though the model was trained on 518.
"""

import pytest
import torch
from PIL import Image
from tiny import EVAL, PRETRAIN
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from dataset.pictures import PictureFormat, load_picture
from model.vision_tower import encode_images, load_vision_tower

pytest_plugins = ["tiny"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 518}
KINDS = {
    "DINOv2": (Dinov2Config, Dinov2Model, {}),
    "DINOv2 with registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, {}),
    "DINOv3": (DINOv3ViTConfig, DINOv3ViTModel, {"intermediate_size": 64, "num_register_tokens": 4}),
}


@pytest.fixture(params=KINDS)
def tower(request, tmp_path):
    config, model, shape = KINDS[request.param]
    torch.manual_seed(0)
    model(config(**SHAPE | shape)).save_pretrained(tmp_path / "tower")
    sizes = {"size": {"shortest_edge": 72}, "crop_size": {"height": 56, "width": 56}}
    BitImageProcessorPil(**sizes, do_center_crop=True).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def test_its_features_are_those_of_transformers_and_it_is_trained_with(world, tower, tmp_path):
    ours, theirs = load_vision_tower(tower), AutoModel.from_pretrained(tower).eval()
    picture = world.images / "0.jpg"
    pixels = load_picture(picture, picture_format=PictureFormat(**ours.settings.picture_settings))[None]
    expected = BitImageProcessorPil.from_pretrained(tower)(images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        states = theirs(**expected).last_hidden_state[:, -16:]  # 4 x 4 patches, after class token and registers
    torch.testing.assert_close(encode_images(ours, pixels), states, rtol=1e-4, atol=1e-4)
    out = world.copy_of_out(tmp_path / "out")
    files = [*world.files("pretrain", out), "--vision_model_path", tower, "--from_weight", "llm", "--batch_size", 9]
    assert "3 of 9 samples" in world.run(PRETRAIN, *files, "--epochs", 1).passed().out
    assert "3 to go" in world.run(PRETRAIN, *files, "--epochs", 2, "--from_resume", 1).passed().out
    asked = ["--weight", "pretrain_vlm", "--image", picture, "--vision_model_path", tower]
    world.run(EVAL, *world.eval_files(out), *asked).passed()
