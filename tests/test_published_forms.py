"""Both published generations in their own form, at small widths: fetched, checked, trained, talked to, exported."""

import argparse
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from downloads import command
from hub_stand_in import HubStandIn
from modelscope_stand_in import ModelScopeStandIn
from published_parquet import write_published_form
from tiny import EVAL, PRETRAIN, SFT, turn
from tiny_models import save_siglip, save_tokenizer_3v, save_tower

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from dataset.chat import ChatEncoder, load_tokenizer
from model.model_vlm import CONFIG_3V, MiniMindVLM, VLMConfig
from model.weights import Weights, read_weights
from scripts.web_demo_vlm import parse_arguments
from trainer import bundles
from trainer.answering.assistant import add_model_flags, find_model

pytest_plugins = ["tiny"]
CHECK, EXPORT = ROOT / "dataset" / "check.py", ROOT / "scripts" / "export.py"
USER = ROOT / "tests" / "scripts" / "transformers_user.py"
WIDTH, ROWS, BATCH, STEPS = 64, 14, 5, 3
SHAPE_3V = CONFIG_3V | {
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "qk_norm": True, "n_shared_experts": 0},
    "intermediate_size": 64 * math.ceil(WIDTH * math.pi / 64),
}
CLIP_PIXELS = {
    **{"do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224, "do_normalize": True},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
}


@dataclass
class Published:
    """A generation's repositories, and where a download put their files.

    Attributes:
        fetched: The folder that scripts/download.py filled, and what it printed.
        settings: Of both stages, as their recipe gives them: flag -> value.
    """

    parts: list[str]
    weights: str
    tower: str
    tokenizer: str
    image_tokens: int
    tensors: int
    settings: list[dict]
    fetched: Path | None = None
    printed: str = ""

    @property
    def files(self) -> list:
        folders = {"--vision_model_path": self.tower, "--tokenizer_path": self.tokenizer}
        return [word for flag, folder in folders.items() for word in (flag, self.fetched / folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_files(folder: Path) -> dict[str, bytes]:
    """Returns both stages' data as it is published today."""
    for seed, name in enumerate(("pretrain_i2t.parquet", "sft_i2t.parquet")):
        write_published_form(folder / name, ROWS, seed)
    return {path.name: path.read_bytes() for path in folder.glob("*_i2t.parquet")}


def weight_file(folder: Path, with_projection: bool, **shape) -> tuple[bytes, int]:
    """Returns a state dict in half precision without a sidecar, and how many tensors it has."""
    torch.manual_seed(0)
    model = MiniMindVLM(VLMConfig(**{"num_hidden_layers": 8} | shape, hidden_size=WIDTH, vision_hidden_size=32))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if not with_projection:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_proj.")}
    torch.save(tensors, folder / "weights.pth")
    return (folder / "weights.pth").read_bytes(), len(tensors)


def old_form(folder: Path) -> tuple[HubStandIn, Published]:
    """Makes the hub with the first generation on it."""
    tower = save_tower(folder / "clip")
    (tower / "preprocessor_config.json").write_text(json.dumps(CLIP_PIXELS), encoding="utf-8")
    trained, tensors = weight_file(folder, True)
    weights = {"sft_vlm_64.pth": trained, "pretrain_vlm_64.pth": trained, "llm_64.pth": weight_file(folder, False)[0]}
    repos = {
        "models/openai/clip-vit-base-patch16": contents(tower),
        "models/jingyaogong/MiniMind2-V-PyTorch": weights,
        "models/jingyaogong/MiniMind2-V": contents(BUILTIN_TOKENIZER_DIR),
        "datasets/jingyaogong/minimind-v_dataset": data_files(folder),
    }
    settings = [{"learning_rate": 4e-4, "max_seq_len": 640}, {"learning_rate": 1e-6, "max_seq_len": 1536}]
    folders = "out", "model/vision_model/clip-vit-base-patch16", "model/tokenizer_minimind2"
    parts = ["sft_vlm", "pretrain_vlm", "llm", "pretrain", "sft"]
    return HubStandIn(repos), Published(parts, *folders, 196, tensors, settings)


def newest_form(folder: Path) -> tuple[HubStandIn, Published]:
    """Makes ModelScope with minimind-3v on it."""
    trained, tensors = weight_file(folder, True, **SHAPE_3V)
    repos = {
        "models/gongjy/siglip2-base-p32-256-ve": contents(save_siglip(folder / "siglip")),
        "models/gongjy/minimind-3v-pytorch": {
            "sft_vlm_64.pth": trained,
            "llm_64.pth": weight_file(folder, False, **SHAPE_3V)[0],
        },
        "models/gongjy/minimind-3v": contents(save_tokenizer_3v(folder / "tokenizer")),
        "datasets/gongjy/minimind-v_dataset": data_files(folder),
    }
    settings = [{"learning_rate": 4e-4, "max_seq_len": 450}, {"learning_rate": 5e-6, "max_seq_len": 768}]
    folders = "out/minimind-3v", "model/vision_model/siglip2-base-p32-256-ve", "model/tokenizer_minimind3v"
    parts = ["minimind-3v", "llm_3v", "pretrain", "sft", "--source", "modelscope"]
    return ModelScopeStandIn(repos), Published(parts, *folders, 64, tensors, settings)


@pytest.fixture(scope="module", params=[old_form, newest_form], ids=["MiniMind2-V", "minimind-3v"])
def published(request, tmp_path_factory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    server, published = request.param(folder)
    with server as source:
        asked = command(source.endpoint, folder / "project", *published.parts, "--hidden_size", str(WIDTH))
        done = subprocess.run(**asked, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    published.fetched, published.printed = folder / "project", done.stdout
    return published


def test_the_download_ends_with_the_lines_that_talk_to_it(world, published):
    lines = published.printed.split("Talk to it: ")[1:]
    assert len(lines) == len(list((published.fetched / published.weights).glob("*_vlm_*.pth")))  # llm is for training
    for line in lines:
        first, script, *flags = shlex.split(line)
        assert (first, ROOT / script) == ("python", EVAL)
        said = world.run(EVAL, *flags, "--device", "cpu", "--max_new_tokens", 4, cwd=ROOT).passed().out
        assert f"{published.fetched / published.weights}" in said and "4 tokens" in said
    assert len(read_weights(published.fetched / published.weights / "sft_vlm_64.pth").tensors) == published.tensors


def test_each_generation_draws_answers_as_its_recipe_says(published):
    """The web page's sliders start there too, unless a flag says another."""
    where = ["--save_dir", str(published.fetched / published.weights), *map(str, published.files)]
    flags = [parse_arguments([*where, *given]) for given in ([], ["--top_p", "1"])]
    trained = find_model(flags[0])
    temperature, top_k = (0.7, 50) if trained.config.qk_norm else (0.65, 0)
    recipe = {"temperature": temperature, "top_p": 0.85, "top_k": top_k}
    assert [trained.sampling(given) for given in flags] == [recipe, recipe | {"top_p": 1}]


def test_weights_and_tokenizer_of_different_generations_are_refused(world, published, tmp_path):
    """Both ways: to eval_vlm.py and to training."""
    is_3v = published.weights.endswith("3v")
    tokenizer = BUILTIN_TOKENIZER_DIR if is_3v else save_tokenizer_3v(tmp_path / "tokenizer")
    save_dir = published.fetched / published.weights
    files = ["--vision_model_path", published.fetched / published.tower, "--tokenizer_path", tokenizer]
    words = ("an image is token 12 ", "but 34 in") if is_3v else ("an image is token 34 ", "but 12 in")
    ask = ["--image", world.images / "0.jpg", "--device", "cpu"]
    world.run(EVAL, "--save_dir", save_dir, *files, *ask).refused(*words, "name the right one with --tokenizer_path")
    data = ["--data_path", world.root / "sft.jsonl", "--images_path", world.images, "--save_dir", tmp_path / "out"]
    start = ["--from_weight", save_dir / "sft_vlm_64.pth", "--device", "cpu"]
    world.run(SFT, *data, *files, *start).refused(*words, "of different generations")


def test_the_data_is_checked_with_its_tokenizer(world, published):
    path, flags = published.fetched / "dataset/sft_data.parquet", published.files[2:]
    world.run(CHECK, path, *flags, "--pictures").passed()  # says what is kept once
    said = world.run(CHECK, path, *flags).passed().out
    flags += ["--image_tokens", published.image_tokens]
    assert f"{ROWS} usable rows" in said and "text only" in said
    assert said == world.run(CHECK, path, *flags).passed().out


def test_in_their_default_places_the_files_need_no_flags(published, monkeypatch):
    is_3v = published.weights.endswith("3v")
    for part, folder in (("tower", published.tower), ("tokenizer", published.tokenizer)):
        monkeypatch.setitem(vars(bundles.MINIMIND_3V if is_3v else bundles.MINIMIND2), part, published.fetched / folder)
    weights = published.fetched / published.weights
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    trained = find_model(parser.parse_args(["--save_dir", str(weights)]))
    start = {"from_weight": str(weights / "llm_64.pth"), "save_dir": "out", "hidden_size": None, "use_moe": None}
    start["save_weight"] = "sft_vlm"
    start |= {"data_path": Path("rows.parquet"), "images_path": None, "eval_data": None, "llm_path": None}
    _, chosen = bundles.choose_bundle(argparse.Namespace(**start, tokenizer_path=None, vision_model_path=None), "sft")
    for tower, tokenizer in (
        (trained.tower_path, trained.tokenizer_path),
        (chosen["vision_model_path"], chosen["tokenizer_path"]),
    ):
        assert (tower, tokenizer) == (published.fetched / published.tower, published.fetched / published.tokenizer)


def three_steps(world, published: Published, llm: Path, out: Path, name: str = "64") -> dict[str, Weights]:
    """Trains both stages on the published data; returns their weights."""
    common, weights = ["--num_workers", 0, "--device", "cpu", "--eval_data", "none", "--epochs", 1], {}
    common += ["--batch_size", BATCH, "--save_dir", out, "--ignore_high_loss", *published.files]
    for script, stage, start in ((PRETRAIN, "pretrain", llm), (SFT, "sft", out / f"pretrain_vlm_{name}.pth")):
        data = ["--data_path", published.fetched / f"dataset/{stage}_data.parquet", "--from_weight", start]
        said = world.run(script, *data, *common).passed().out
        assert "text only: in " in said
        assert ("(the minimind-3v recipe)" in said) == (published.image_tokens == 64)
        weights[stage] = read_weights(out / f"{stage}_vlm_{name}.pth")
        sidecar = weights[stage].sidecar
        expected = published.settings[stage == "sft"]
        assert {name: sidecar["arguments"][name] for name in expected} == expected
        assert sidecar["step"] == STEPS == math.ceil(ROWS / BATCH)
    return weights


def test_three_steps_of_both_stages_then_talk_then_export(world, published, tmp_path):
    out, llm = tmp_path / "out", published.fetched / published.weights / "llm_64.pth"
    weights = three_steps(world, published, llm, out)
    before, after = read_weights(llm).tensors, weights["pretrain"].tensors
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(weights["sft"].tensors) == published.tensors

    ask = ["--image", world.images / "0.jpg", "--temperature", 0, "--max_new_tokens", 4, "--device", "cpu"]
    said = world.run(EVAL, "--save_dir", out, *ask).passed().out  # tower and tokenizer: the sidecar's
    world.run(EXPORT, "--save_dir", out).passed()
    world.run(EXPORT, "--save_dir", out, "--to", "gguf").passed()
    again = world.run(EVAL, "--load_from", out / "sft_vlm_64-hf", *ask).passed().out
    assert again.splitlines()[1:-2] == said.splitlines()[1:-2]


@pytest.mark.parametrize("published", [newest_form], indirect=True, ids=["minimind-3v"])
def test_three_steps_with_the_newest_experts_then_talk(world, published, tmp_path):
    out, llm = tmp_path / "out", tmp_path / "llm_64_moe.pth"
    content, tensors = weight_file(tmp_path, False, **SHAPE_3V, use_moe=True, num_hidden_layers=2)
    llm.write_bytes(content)
    weights = three_steps(world, published, llm, out, "64_moe")
    before, after, last = read_weights(llm).tensors, weights["pretrain"].tensors, weights["sft"].tensors
    assert len(before) == tensors
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    changed = {name for name, tensor in before.items() if not torch.equal(last[name], tensor)}
    assert any(".mlp.experts." in name for name in changed)
    config = weights["sft"].config
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (4, 1, 0)
    ask = ["--image", world.images / "0.jpg", "--temperature", 0, "--max_new_tokens", 4, "--device", "cpu"]
    world.run(EVAL, "--save_dir", out, *ask).passed()


def test_the_newest_language_model_is_a_qwen3_to_transformers(world, tmp_path):
    """Without and with experts: the same prompts' ids, the same logits; reading the folder back gives the weights."""
    tokenizer, tower = save_tokenizer_3v(tmp_path / "tokenizer"), save_siglip(tmp_path / "siglip")
    chat = [turn("user", "What is 2 @ 3?"), turn("assistant", "<think>\nsum\n</think>\n\n5"), turn("user", "你好")]
    chat += [turn("assistant", "\n好") | {"reasoning_content": "\n想\n"}, turn("user", "Sure?")]
    folders = {"qwen3": tmp_path / "llm_64-hf", "qwen3_moe": tmp_path / "llm_64_moe-hf"}
    for kind, folder in folders.items():
        use_moe = kind == "qwen3_moe"
        path = folder.with_name(f"{folder.name.removesuffix('-hf')}.pth")
        path.write_bytes(weight_file(tmp_path, False, **SHAPE_3V, use_moe=use_moe)[0])
        files = ["--save_dir", tmp_path, "--weight", "llm", "--tokenizer_path", tokenizer, "--vision_model_path", tower]
        world.run(EXPORT, *files, "--use_moe", int(use_moe)).passed()
        as_gguf = world.run(EXPORT, *files, "--use_moe", int(use_moe), "--to", "gguf")
        as_gguf.refused("experts are not exported to GGUF") if use_moe else as_gguf.passed()
        assert json.loads((folder / "config.json").read_text())["model_type"] == kind
        Path(f"{folder}.chats.json").write_text(json.dumps({"conversations": [chat], "images": []}), encoding="utf-8")
    user = [sys.executable, "-W", "ignore", USER, *folders.values()]
    done = subprocess.run(list(map(str, user)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [ours] = ChatEncoder(load_tokenizer(tokenizer), 64).encode([chat], add_generation_prompt=True)
    for folder in folders.values():
        theirs = torch.load(f"{folder}.pt")
        assert theirs["input_ids"].tolist() == [ours.input_ids]
        weights = read_weights(folder.with_name(f"{folder.name.removesuffix('-hf')}.pth"))
        model = MiniMindVLM(weights.config).eval()
        model.load_state_dict({**model.state_dict(), **weights.tensors})
        with torch.inference_mode():
            logits = model(theirs["input_ids"]).logits
        torch.testing.assert_close(theirs["logits"], logits, atol=1e-4, rtol=0)
        ask = ["--prompt", "你好", "--image_dir", world.images, "--max_new_tokens", 1, "--device", "cpu"]
        world.run(EVAL, "--load_from", folder, "--vision_model_path", tower, *ask).passed()


def test_the_helps_name_the_settings_of_minimind_3v(world):
    trained = "From minimind-3v's weights the defaults are: "
    for script, said in (
        (PRETRAIN, f"{trained}epochs 2, max_seq_len 450, empty_think_ratio 0.2, add_system_ratio 0.2."),
        (SFT, f"{trained}learning_rate 5e-06, max_seq_len 768, empty_think_ratio 0.2, add_system_ratio 0.2."),
        (CHECK, "640, fine-tuning 1536 (minimind-3v: 450, 768)"),
    ):
        assert said in " ".join(world.run(script, "--help").passed().out.split())
