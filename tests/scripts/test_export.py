"""transformers alone reads an exported folder, and gets the tokens and logits of the weights that it came from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import EVAL, turn
from tiny_models import save_tower

from common.errors import UsageError
from common.files import RECORD, remove_leftovers
from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from dataset.chat import ChatEncoder
from dataset.pictures import load_picture
from dataset.prompts import prompt_batch
from dataset.tokenizer import load_tokenizer
from model.model_vlm import MiniMindVLM, VLMConfig
from scripts import export
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
    (tmp_path / "out" / "sft_vlm_64-hf.part").mkdir()  # no temporary folder of ours
    (tmp_path / "out" / "sft_vlm_64-hf" / "model.safetensors").unlink()
    world.run(EXPORT, *files, "--overwrite").passed()
    assert (tmp_path / "out" / "sft_vlm_64-hf" / "model.safetensors").is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("sft_vlm_64.pth", "sft_vlm_64-hf", "sft_vlm_64-hf.part")
    }
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


def thesis(folder: Path):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")


def linked(folder: Path):
    folder.mkdir()
    (folder / "pictures").symlink_to(folder.parent)


OTHERS = {
    "weights": (lambda folder: folder.with_name("out"), "sft_vlm_64.pth"),
    "a user's": (lambda folder: thesis(folder), "thesis.txt"),
    "a link": (lambda folder: linked(folder), "pictures"),
    "a file": (lambda folder: folder.write_text("mine", encoding="utf-8"), "Not a directory"),
    "the root": (lambda folder: Path("/"), "/ is not replaced"),
    "a record": (lambda folder: (thesis(folder), (folder / RECORD).write_text("[]")), "thesis.txt"),
    "another's": (lambda folder: (thesis(folder), (folder / RECORD).write_text('{"dataset_by": ""}')), "thesis.txt"),
    "files no dict": (lambda folder: (thesis(folder), (folder / RECORD).write_text(FORGED)), "thesis.txt"),
}
FORGED = '{"exported_by": "", "files": ["thesis.txt"]}'


def listed(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_only_an_export_is_replaced(world, tmp_path, monkeypatch):
    random_weights(tmp_path / "out", None)
    flags = ["--save_dir", str(tmp_path / "out"), "--tokenizer_path", str(BUILTIN_TOKENIZER_DIR)]
    flags += ["--vision_model_path", str(save_tower(tmp_path / "tower"))]
    for number, (make, named) in enumerate(OTHERS.values()):
        made = make(tmp_path / f"folder{number}")
        folder = made if isinstance(made, Path) else tmp_path / f"folder{number}"
        before = listed(tmp_path)
        monkeypatch.setattr(sys, "argv", ["export.py", *flags, "--folder", str(folder), "--overwrite"])
        with pytest.raises(UsageError, match=re.escape(named)):
            export.main()
        assert listed(tmp_path) == before
    empty, exported = tmp_path / "empty", tmp_path / "exported"
    empty.mkdir()
    (tmp_path / "link").symlink_to(exported)
    for folder in (empty, tmp_path / "link", tmp_path / "link"):
        monkeypatch.setattr(sys, "argv", ["export.py", *flags, "--folder", str(folder), "--overwrite"])
        export.main()
    assert (exported / "model.safetensors").is_file() and (empty / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))


# The process ends between the two renames that replace a folder.
KILLED = """
import os, pathlib
rename = pathlib.Path.rename
def killed(self, target):
    if self.name == "new":
        os.kill(os.getpid(), 9)
    return rename(self, target)
pathlib.Path.rename = killed
"""


def test_a_killed_replacement_loses_nothing(world, tmp_path):
    random_weights(tmp_path / "out", None)
    flags = ["--save_dir", tmp_path / "out", "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    flags += ["--vision_model_path", save_tower(tmp_path / "tower")]
    folder = tmp_path / "out" / "sft_vlm_64-hf"
    world.run(EXPORT, *flags).passed()
    (folder / "config.json").unlink()  # so that the two differ
    before = listed(folder)
    assert world.run(EXPORT, *flags, "--overwrite", hook=KILLED).code == -9
    assert not folder.exists() and len(list((tmp_path / "out").glob(".*"))) == 1
    remove_leftovers(tmp_path / "out")
    assert listed(folder) == before and not list((tmp_path / "out").glob(".*"))
