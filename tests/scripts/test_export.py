"""transformers alone reads an exported folder, and gets the tokens and logits of the weights that it came from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import EVAL, turn
from tiny_models import save_tower

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from dataset.chat import ChatEncoder
from dataset.pictures import load_picture
from dataset.prompts import prompt_batch
from dataset.tokenizer import load_tokenizer
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.watch.answers import generate

pytest_plugins = ["tiny"]
EXPORT = ROOT / "scripts" / "export.py"
USER = Path(__file__).with_name("transformers_user.py")


def parts(*parts) -> dict:
    """A user's turn as a list of contents; None stands for an image."""
    contents = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": contents}


# As our encoder takes them, and as a user of transformers may write them; with none, one and two images.
CONVERSATIONS = [
    ([turn("user", "What is 2 @ 3?")],) * 2,
    ([turn("user", "描述这张图片\n<image>")], [parts("描述这张图片", None)]),
    ([turn("user", "<image>\nHi"), turn("assistant", "Ja."), turn("user", "And?\n<image>")],) * 2,
    ([turn("system", "Be brief"), turn("user", "<image>\n<image>\n这两张")],)
    + ([turn("system", "Be brief"), parts(None, None, "这两张")],),
]


def random_weights(folder: Path, tower: Path | None, **shape) -> MiniMindVLM:
    """Writes a weight file as the original's, in half precision and without a sidecar; returns its model."""
    torch.manual_seed(0)
    config = VLMConfig(hidden_size=64, num_hidden_layers=2, vision_hidden_size=32, **shape)
    model = MiniMindVLM(config, vision_model_path=tower).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.data = parameter.data.half().float()
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if tower is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_proj.")}
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / f"sft_vlm_64{'_moe' * config.use_moe}.pth")
    model.generation_config.eos_token_id = 2
    return model


def used_by_transformers(folder: Path, tmp_path: Path, conversations: list, images: list[Path]) -> dict:
    chats = {"conversations": conversations, "images": [str(image) for image in images]}
    (tmp_path / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", USER, folder, tmp_path / "chats.json", tmp_path / "result.pt"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result.pt")


@pytest.mark.parametrize(
    ("shape", "sees_images"),
    [({}, True), ({"projector": "mlp"}, True), ({"use_moe": True}, True), ({}, False), ({"use_moe": True}, False)],
    ids=["linear", "mlp", "experts", "text", "text of experts"],
)
def test_transformers_gives_the_same_tokens_and_logits(world, tmp_path, shape, sees_images):
    tower = save_tower(tmp_path / "tower")
    model = random_weights(tmp_path / "out", tower if sees_images else None, **shape)
    flags = ["--save_dir", tmp_path / "out", "--vision_model_path", tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    printed = world.run(EXPORT, *flags).passed().out
    folder = tmp_path / "out" / f"sft_vlm_64{'_moe' * ('use_moe' in shape)}-hf"
    assert f"{folder}: " in printed

    chosen = CONVERSATIONS if sees_images else CONVERSATIONS[:1]
    counts = [sum(turn["content"].count("<image>") for turn in ours) for ours, _ in chosen]
    paths = [world.images / f"{number}.jpg" for number in range(sum(counts))]
    theirs = used_by_transformers(folder, tmp_path, [wrote for _, wrote in chosen], paths)

    encoder = ChatEncoder(load_tokenizer(BUILTIN_TOKENIZER_DIR), model.config.image_tokens)
    pixels = iter([load_picture(path) for path in paths])
    pictures = [[next(pixels) for _ in range(count)] for count in counts]
    inputs = prompt_batch(encoder, [ours for ours, _ in chosen], pictures)
    is_image = theirs["input_ids"] == 190
    assert int(is_image.sum()) == 196 * sum(counts)
    assert torch.equal(torch.where(is_image, 34, theirs["input_ids"]), inputs["input_ids"])
    with torch.inference_mode():
        logits = model(**{name: value for name, value in inputs.items() if value is not None}).logits
    is_text = inputs["attention_mask"].bool()
    assert float((theirs["logits"] - logits)[is_text].abs().max()) < 1e-4
    assert torch.equal(theirs["new"], generate(model, inputs, 8))


def test_a_folder_gives_the_answers_of_its_weights_and_is_not_overwritten_unasked(world, tmp_path):
    tower = save_tower(tmp_path / "tower")
    random_weights(tmp_path / "out", tower)
    files = ["--save_dir", tmp_path / "out", "--vision_model_path", tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    world.run(EXPORT, *files).passed()
    ask = ["--image", world.images / "0.jpg", "--temperature", 0, "--max_new_tokens", 4, "--device", "cpu"]
    from_file = world.run(EVAL, *files, *ask).passed().out.splitlines()
    from_folder = world.run(EVAL, "--load_from", tmp_path / "out" / "sft_vlm_64-hf", *ask).passed().out.splitlines()
    assert from_folder[1:-2] == from_file[1:-2] and len(from_file) > 3
    world.run(EXPORT, *files).refused("is there already", "--overwrite")
    world.run(EXPORT, *files, "--overwrite").passed()
    # Exporting an export changes nothing but its name.
    world.run(EXPORT, "--load_from", tmp_path / "out" / "sft_vlm_64-hf", "--folder", tmp_path / "again").passed()
    first, again = tmp_path / "out" / "sft_vlm_64-hf", tmp_path / "again"
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "config.json"):
        assert json.loads((again / name).read_text()) == json.loads((first / name).read_text())


def test_what_transformers_cannot_express_is_refused_and_leaves_nothing(world, tmp_path):
    from safetensors.torch import save_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    out, files = tmp_path / "out", ["--save_dir", tmp_path / "out", "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    tower = save_tower(tmp_path / "tower")
    random_weights(out, tower, pixel_shuffle=2)
    world.run(EXPORT, *files, "--vision_model_path", tower).refused("pixel shuffle")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**shape, vision_use_head=False, patch_size=16, image_size=224))
    siglip.config.save_pretrained(tmp_path / "siglip")
    save_file(siglip.state_dict(), tmp_path / "siglip" / "model.safetensors")
    random_weights(out, tower)
    world.run(EXPORT, *files, "--vision_model_path", tmp_path / "siglip").refused("SigLIP")
    random_weights(out, tower, use_moe=True, n_shared_experts=2)
    world.run(EXPORT, *files, "--use_moe", 1, "--vision_model_path", tower).refused("2 shared experts")
    assert not list(out.glob("*-hf*"))
