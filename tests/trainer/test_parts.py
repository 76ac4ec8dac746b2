"""Parts can be swapped: another tower, another projection, fewer tokens per image, a third stage."""

import json
import re

import pytest
import torch
from tiny import EVAL, PRETRAIN, ROOT, SFT, read_jsonl
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dataset.features import CHECKSUM_BYTES

pytest_plugins = ["tiny"]

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
# 12 rows in steps of 4: three steps.
FLAGS = ["--epochs", 1, "--batch_size", 4, "--learning_rate", 1e-3, "--log_interval", 1]


@pytest.fixture
def run(world, tmp_path):
    """Returns a function that trains three steps of a stage and returns its output and --save_dir."""
    for stage in ("pretrain", "sft"):
        lines = (world.root / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:12]
        (tmp_path / f"{stage}.jsonl").write_text("".join(lines), encoding="utf-8")
    out = world.copy_of_out(tmp_path / "out")

    def run(script, *flags):
        stage = "pretrain" if script == PRETRAIN else "sft"
        files = [*world.files(stage, out), "--data_path", tmp_path / f"{stage}.jsonl"]
        result = world.run(script, *files, *FLAGS, *flags).passed()
        return result.out, out

    return run


def losses(out, name: str) -> list[float]:
    return [row["loss"] for row in read_jsonl(out / f"{name}_32.metrics.jsonl")]


def tower(folder, kind: str):
    torch.manual_seed(0)
    if kind == "clip 96 px":
        CLIPVisionModel(CLIPVisionConfig(**SHAPE, patch_size=32, image_size=96)).save_pretrained(folder)
    elif kind == "siglip":
        SiglipVisionModel(SiglipVisionConfig(**SHAPE, patch_size=32, image_size=128)).save_pretrained(folder)
    else:
        vision = {**SHAPE, "patch_size": 32, "image_size": 128}
        text = {**SHAPE, "vocab_size": 99, "max_position_embeddings": 16}
        SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "tokens"), [("clip 96 px", 9), ("siglip", 16), ("whole siglip", 16)])
def test_another_tower(world, run, tmp_path, kind, tokens):
    """Its number of patches is the number of tokens per image, in both stages and in eval_vlm.py."""
    flags = ["--vision_model_path", tower(tmp_path / "tower", kind)]
    printed, out = run(PRETRAIN, *flags)
    run(SFT, *flags)
    assert len(losses(out, "pretrain_vlm")) == len(losses(out, "sft_vlm")) == 3
    config = json.loads((out / "sft_vlm_32.json").read_text(encoding="utf-8"))["config"]
    assert (config["vision_patches"], config["pixel_shuffle"]) == (tokens, 1)
    image = ["--image", world.images / "0.jpg", "--max_new_tokens", 4]
    assert "tokens/s" in world.run(EVAL, "--save_dir", out, *image).passed().out
    sizes = {features.stat().st_size for features in (out / "vision_features").rglob("*.features")}
    assert CHECKSUM_BYTES + tokens * 32 * 2 in sizes


@pytest.mark.parametrize(("projector", "shuffle"), [("mlp", 1), ("linear", 2), ("mlp", 2), ("linear", 7)])
def test_another_projection(world, run, projector, shuffle):
    """The flags are given in stage 1 only; later the sidecar or the tensors' shapes tell."""
    printed, out = run(PRETRAIN, "--projector", projector, "--pixel_shuffle", shuffle)
    assert ("mlp projection" in printed) == (projector == "mlp")
    assert (f"{196 // shuffle**2} tokens an image" in printed) == (shuffle > 1)
    run(SFT)
    with_sidecar = losses(out, "sft_vlm")
    (out / "pretrain_vlm_32.json").unlink()
    run(SFT)
    assert losses(out, "sft_vlm") == with_sidecar
    rows = ["--eval_data", world.root / "sft.jsonl", "--images_path", world.images, "--max_seq_len", 2000]
    assert " no images " in world.run(EVAL, *world.eval_files(out), *rows, "--short_answer", 0).passed().out
    image = ["--image", world.images / "0.jpg", "--temperature", 0]
    said = [world.run(EVAL, *world.eval_files(out), *image).passed().out]
    (out / "sft_vlm_32.json").unlink()
    said.append(world.run(EVAL, *world.eval_files(out), *image).passed().out)
    assert [re.sub(r"\d+ tokens/s", "", text) for text in said][0] == re.sub(r"\d+ tokens/s", "", said[1])


def test_a_flag_that_contradicts_the_weights_is_refused(world, run):
    _, out = run(PRETRAIN, "--pixel_shuffle", 2)
    wrong = world.run(SFT, *world.files("sft", out), *FLAGS, "--pixel_shuffle", 7)
    wrong.refused("--pixel_shuffle 7 contradicts", "which has 2")
    wrong = world.run(PRETRAIN, *world.files("pretrain", out), *FLAGS, "--pixel_shuffle", 3)
    wrong.refused("pixel_shuffle 3 does not divide the tower's 196 patches")


def test_rows_cached_for_another_number_of_tokens_are_not_used(run):
    """The same data file and token cache, with 196 tokens per image, then with 49."""
    longest = [int(re.search(r"longest row (\d+) tokens", run(PRETRAIN, *flags)[0])[1])
               for flags in ([], ["--pixel_shuffle", 2], [])]  # fmt: skip
    assert longest[0] == longest[2] == longest[1] + 196 - 49


THIRD_STAGE = """
import functools, sys
sys.path.insert(0, {root!r})
from common.errors import run_script
from trainer import train_sft_vlm
from trainer.stage import Stage, answer_loss

def half_the_loss(model, inputs):
    loss, aux_loss = answer_loss(model, inputs)
    return loss / 2, aux_loss

STAGE = Stage(
    name="polish",
    title="Polishing",
    story="stage 3, polishing: what the test says",
    defaults=train_sft_vlm.STAGE.defaults | {{"from_weight": "sft_vlm", "save_weight": "polished"}},
    data="sft",
    following="eval_vlm.py",
    loss=half_the_loss,
)

if __name__ == "__main__":
    run_script(functools.partial(train_sft_vlm.main, STAGE))
"""


def test_a_third_stage_is_a_script_with_its_own_stage(world, run, tmp_path):
    _, out = run(SFT, "--from_weight", "llm")
    script = tmp_path / "train_polished.py"
    script.write_text(THIRD_STAGE.format(root=str(ROOT)))
    printed, _ = run(script, "--epochs", 1)
    assert printed.startswith("stage 3, polishing")
    assert f"\nnext: python {EVAL} --weight polished" in printed
    sidecar = json.loads((out / "polished_32.json").read_text(encoding="utf-8"))
    assert (sidecar["stage"], sidecar["title"]) == ("polish", "Polishing")
    run(SFT, "--from_weight", "sft_vlm", "--save_weight", "other")
    assert losses(out, "polished")[0] == pytest.approx(losses(out, "other")[0] / 2, rel=1e-5)
