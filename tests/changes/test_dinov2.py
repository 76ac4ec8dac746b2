"""Other families of towers: DINOv2 and DINOv3 of the table, and ViT, which the line `TOWERS["ViT"] = ...` adds.

A file with that line is all that another family takes; the folder's own files say the rest. Here pictures for DINO are
resized to 72 pixels at their shortest edge and cropped to 56, though the model was trained on 518.

    python trainer/train_pretrain_vlm.py --import my_towers.py --vision_model_path vit-base-patch16-224
"""

import pytest
import torch
import transformers
from PIL import Image
from tiny import EVAL, PRETRAIN
from transformers import AutoModel, BitImageProcessorPil, ViTModel

from dataset.pictures import PictureFormat, load_picture
from model.vision_tower import TOWERS, TowerKind, encode_images, load_vision_tower

pytest_plugins = ["tiny"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 518}
SHAPE |= {"intermediate_size": 64, "num_register_tokens": 4}
CROPPED = {"size": {"shortest_edge": 72}, "crop_size": {"height": 56, "width": 56}}
SQUASHED = {"size": {"height": 56, "width": 56}, "do_center_crop": False}
FOLDERS = {"DINOv2": "Dinov2", "DINOv2 with registers": "Dinov2WithRegisters", "DINOv3": "DINOv3ViT", "ViT": "ViT"}
TOWERS["ViT"] = TowerKind(ViTModel, [0.5] * 3, [0.5] * 3, crops=False, arguments={"add_pooling_layer": False})


def save(folder, family: str, whole="Model", **arguments):
    torch.manual_seed(0)
    shape, sizes = (SHAPE | {"image_size": 56}, SQUASHED) if family == "ViT" else (SHAPE, CROPPED)
    config = getattr(transformers, f"{family}Config")(**shape)
    getattr(transformers, family + whole)(config, **arguments).save_pretrained(folder)
    BitImageProcessorPil(**sizes).save_pretrained(folder)


def check_features(tower, picture):
    ours, theirs = load_vision_tower(tower), AutoModel.from_pretrained(tower).eval()
    pixels = load_picture(picture, picture_format=PictureFormat(**ours.settings.picture_settings))[None]
    expected = BitImageProcessorPil.from_pretrained(tower)(images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        states = theirs(**expected).last_hidden_state[:, -16:]  # 4 x 4 patches, after class token and registers
    torch.testing.assert_close(encode_images(ours, pixels), states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_tower_is_trained_with(world, kind, tmp_path):
    tower, picture, out = tmp_path / "tower", world.images / "0.jpg", world.copy_of_out(tmp_path / "out")
    save(tower, FOLDERS[kind])
    check_features(tower, picture)
    own = ["--import", __file__] if kind == "ViT" else []
    files = [
        *own,
        *world.files("pretrain", out),
        "--vision_model_path",
        tower,
        "--from_weight",
        "llm",
        "--batch_size",
        9,
    ]
    assert "3 of 9 samples" in world.run(PRETRAIN, *files, "--epochs", 1).passed().out
    assert "3 to go" in world.run(PRETRAIN, *files, "--epochs", 2, "--from_resume", 1).passed().out
    asked = ["--weight", "pretrain_vlm", "--image", picture, "--vision_model_path", tower]
    world.run(EVAL, *own, *world.eval_files(out), *asked).passed()


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters", "ViT"])
def test_a_classifier_and_a_tower_without_a_pooler_are_read(world, family, tmp_path):
    save(tmp_path / "classifier", family, "ForImageClassification")
    check_features(tmp_path / "classifier", world.images / "0.jpg")
    save(tmp_path / "bare", "ViT", add_pooling_layer=False)
    check_features(tmp_path / "bare", world.images / "0.jpg")
