"""transformers alone reads an exported folder, and gets the tokens and logits of the weights that it came from."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import EVAL, draw_pictures, turn
from tiny_models import save_siglip, save_tower

from common.errors import UsageError
from common.files import RECORD, remove_leftovers
from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from dataset.chat import ChatEncoder, load_tokenizer
from dataset.pictures import load_picture
from dataset.prompts import prompt_batch
from model.answers import generate
from model.model_vlm import MiniMindVLM, VLMConfig
from scripts import export

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


SHAPES = {
    "linear": ({}, True),
    "mlp": ({"projector": "mlp"}, True),
    "experts": ({"use_moe": True}, True),
    "text": ({}, False),
    "text of experts": ({"use_moe": True}, False),
}


def flags_for(out: Path, tower: Path) -> list[str]:
    flags = ["--save_dir", out, "--vision_model_path", tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    return list(map(str, flags))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each shape's model, folder, conversations and images; transformers has answered beside the folder."""
    root = tmp_path_factory.mktemp("exports")
    tower, images, made = save_tower(root / "tower"), draw_pictures(root / "images"), {}
    for name, (shape, sees_images) in SHAPES.items():
        model, folder = random_weights(root / name, tower if sees_images else None, **shape), root / f"{name}-hf"
        export.main([*flags_for(root / name, tower), "--folder", str(folder)])
        chosen = CONVERSATIONS if sees_images else CONVERSATIONS[:1]
        counts = [sum(turn["content"].count("<image>") for turn in ours) for ours, _ in chosen]
        paths = [images / f"{number}.jpg" for number in range(sum(counts))]
        chats = {"conversations": [theirs for _, theirs in chosen], "images": list(map(str, paths))}
        Path(f"{folder}.chats.json").write_text(json.dumps(chats), encoding="utf-8")
        made[name] = model, folder, [ours for ours, _ in chosen], counts, paths
    command = [sys.executable, "-W", "ignore", USER, *(folder for _, folder, *_ in made.values())]
    done = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_gives_the_same_tokens_and_logits(exported, name):
    model, folder, conversations, counts, paths = exported[name]
    theirs = torch.load(f"{folder}.pt")
    encoder = ChatEncoder(load_tokenizer(BUILTIN_TOKENIZER_DIR), model.config.image_tokens)
    pixels = iter([load_picture(path) for path in paths])
    inputs = prompt_batch(encoder, conversations, [[next(pixels) for _ in range(count)] for count in counts])
    is_image = theirs["input_ids"] == 190
    assert int(is_image.sum()) == 196 * sum(counts)
    assert torch.equal(torch.where(is_image, 34, theirs["input_ids"]), inputs["input_ids"])
    with torch.inference_mode():
        logits = model(**{name: value for name, value in inputs.items() if value is not None}).logits
    is_text = inputs["attention_mask"].bool()
    assert float((theirs["logits"] - logits)[is_text].abs().max()) < 1e-4
    assert torch.equal(theirs["new"], generate(model, inputs, 8))


def test_a_folder_gives_the_answers_of_its_weights_and_is_not_overwritten_unasked(world, tmp_path):
    out, tower = tmp_path / "out", save_tower(tmp_path / "tower")
    random_weights(out, tower)
    first, again, files = out / "sft_vlm_64-hf", tmp_path / "again", flags_for(out, tower)
    assert f"{first}: " in world.run(EXPORT, *files).passed().out
    ask = ["--image", world.images / "0.jpg", "--temperature", 0, "--max_new_tokens", 4, "--device", "cpu"]
    from_file = world.run(EVAL, *files, *ask).passed().out.splitlines()
    from_folder = world.run(EVAL, "--load_from", first, *ask).passed().out.splitlines()
    assert from_folder[1:-2] == from_file[1:-2] and len(from_file) > 3
    with pytest.raises(UsageError, match="is there already: --overwrite"):
        export.main(files)
    (out / "sft_vlm_64-hf.part").mkdir()  # no temporary folder of ours
    (first / "model.safetensors").unlink()
    export.main([*files, "--overwrite"])
    assert (first / "model.safetensors").is_file()
    assert {path.name for path in out.iterdir()} == {"sft_vlm_64.pth", "sft_vlm_64-hf", "sft_vlm_64-hf.part"}
    # Exporting an export changes nothing but its name.
    export.main(["--load_from", str(first), "--folder", str(again)])
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "config.json"):
        assert json.loads((again / name).read_text()) == json.loads((first / name).read_text())


def test_what_transformers_cannot_express_is_refused_and_leaves_nothing(tmp_path):
    out, tower, siglip = tmp_path / "out", save_tower(tmp_path / "tower"), save_siglip(tmp_path / "siglip")
    cases = {
        "pixel shuffle": ({"pixel_shuffle": 2}, tower),
        "SigLIP": ({"vision_patches": 64}, siglip),
        "2 shared experts": ({"use_moe": True, "n_shared_experts": 2}, tower),
    }
    for words, (shape, folder) in cases.items():
        random_weights(out, folder, **shape)
        with pytest.raises(UsageError, match=words):
            export.main([*flags_for(out, folder), "--use_moe", str(int("use_moe" in shape))])
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
    "a file": (lambda folder: folder.write_text("mine", encoding="utf-8"), "is not a folder"),
    "the root": (lambda folder: Path("/"), "/ is not replaced"),
    "a record": (lambda folder: (thesis(folder), (folder / RECORD).write_text("[]")), "thesis.txt"),
    "another's": (lambda folder: (thesis(folder), (folder / RECORD).write_text('{"dataset_by": ""}')), "thesis.txt"),
    "files no dict": (lambda folder: (thesis(folder), (folder / RECORD).write_text(FORGED)), "thesis.txt"),
}
FORGED = '{"exported_by": "", "files": ["thesis.txt"]}'


def listed(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_only_an_export_is_replaced(tmp_path):
    random_weights(tmp_path / "out", None)
    flags = [*flags_for(tmp_path / "out", save_tower(tmp_path / "tower")), "--overwrite", "--folder"]
    for number, (make, named) in enumerate(OTHERS.values()):
        made = make(tmp_path / f"folder{number}")
        folder = made if isinstance(made, Path) else tmp_path / f"folder{number}"
        before = listed(tmp_path)
        with pytest.raises(UsageError, match=re.escape(named)):
            export.main([*flags, str(folder)])
        assert listed(tmp_path) == before
    empty, exported = tmp_path / "empty", tmp_path / "exported"
    empty.mkdir()
    (tmp_path / "link").symlink_to(exported)
    for folder in (empty, tmp_path / "link", tmp_path / "link"):
        export.main([*flags, str(folder)])
    assert (exported / "model.safetensors").is_file() and (empty / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_a_full_disk_ends_in_one_message(tmp_path, to):
    """A limit on the file size stands for it: the kernel raises it."""
    if to == "gguf":
        pytest.importorskip("gguf")
    random_weights(tmp_path / "out", None)
    flags = flags_for(tmp_path / "out", save_tower(tmp_path / "tower"))
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, most))  # the tokenizer's files are smaller
    try:
        with pytest.raises(UsageError, match="sft_vlm_64-.* cannot be written: the disk is probably full"):
            export.main([*flags, "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sft_vlm_64.pth"]


def test_a_killed_replacement_loses_nothing(tmp_path, monkeypatch):
    random_weights(tmp_path / "out", None)
    flags = flags_for(tmp_path / "out", save_tower(tmp_path / "tower"))
    folder, rename = tmp_path / "out" / "sft_vlm_64-hf", Path.rename
    export.main(flags)
    (folder / "config.json").unlink()  # so that the two differ
    before = listed(folder)
    # The process ends between the two renames that replace a folder.
    kill = lambda self, target: os.kill(os.getpid(), 9) if self.name == "new" else rename(self, target)  # noqa: E731
    monkeypatch.setattr(Path, "rename", kill)
    if (process := os.fork()) == 0:
        try:
            export.main([*flags, "--overwrite"])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    monkeypatch.undo()
    assert not folder.exists() and len(list((tmp_path / "out").glob(".*"))) == 1
    remove_leftovers(tmp_path / "out")
    assert listed(folder) == before and not list((tmp_path / "out").glob(".*"))
