"""The card of a published model: what it says of the run, and that what it tells to type runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from hub_uploads import UploadHub
from PIL import Image
from publishing import EXPORT, FILES, HF_FILES, NAME, REPO, TOKEN, card_of, published
from test_export import random_weights
from tiny import EVAL, read_jsonl, write_jsonl
from tiny_models import save_tower

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT, TOWER_DIR
from scripts.share.model_card import Model, loss_curve, without_folders
from trainer.watch.page import read_record

pytest_plugins = ["tiny", "publishing"]


def test_the_card_says_what_the_record_says(publish, hub, trained):
    publish(trained / f"{NAME}-hf").passed()
    _, text = card_of(hub)
    record = read_record(trained, NAME)
    last, commit = record.evaluations[-1], record.sidecar["git_commit"]
    assert f"| the right ones | {last['loss']:.3f} |" in text
    assert f"The grounding gap is {last['gap_shuffled']:.3f}" in text and "**Fine-tuning**" in text
    for setting in ("| --batch\\_size | 8 |", "| hidden\\_size | 32 |", "torch 2", f"this project {commit[:12]}"):
        assert setting in text
    tensors = record.sidecar["config"]
    assert f"{tensors['num_hidden_layers']} layers of width 32" in text
    files = published(hub)
    for number in range(8):
        assert f"(samples/{number}.jpg)" in text
        picture = trained / f"{NAME}_samples" / f"{number}.jpg"
        assert files[f"samples/{number}.jpg"] == picture.read_bytes()
    rows = {row["picture"]: row for row in read_jsonl(trained / f"{NAME}_samples" / "samples.jsonl")}
    assert rows["3.jpg"]["reference"] in text and len(rows) == 8
    assert "(loss.png)" in text and files["loss.png"] == loss_curve(record)
    assert "- It was trained on sft.jsonl" in text and "It is small." in text


def test_the_curve_shows_both_losses(trained):
    record = read_record(trained, NAME)
    image = Image.open(BytesIO(loss_curve(record)))
    assert image.format == "PNG" and image.size == (840, 532)
    red, _, blue = np.asarray(image).transpose(2, 0, 1).astype(int)
    assert np.sum(red - blue > 100) > 500 and np.sum(blue - red > 100) > 500  # held out, training
    record.training.clear()
    record.evaluations.clear()
    assert loss_curve(record) is None


def test_no_folder_of_this_machine_is_published(publish, hub, out, trained):
    for ending in (".pth", ".json"):
        (out / f"{NAME}{ending}").rename(out / f"renamed{ending}")
    for source in (*(trained / f"{NAME}{ending}" for ending in FILES), out / "renamed.pth"):
        hub.repos.clear()
        publish(source, "--run", trained / NAME).passed()
        named = [name for name, content in published(hub).items() if str(trained.parent.parent).encode() in content]
        assert named == []
    sidecar = json.loads(published(hub)["renamed.json"])
    assert sidecar["arguments"]["data_path"] == "sft.jsonl" and sidecar["config"]["hidden_size"] == 32
    kept = {"arguments": {"data_path": "dataset/sft_data.jsonl", "epochs": 2, "other": "C:\\me\\data.jsonl"}}
    cut = without_folders(kept | {"step": 3})
    assert cut == {"arguments": kept["arguments"] | {"other": "data.jsonl"}, "step": 3}


def test_without_a_record_the_card_says_less(publish, hub, out):
    (out / f"{NAME}.metrics.jsonl").unlink()
    done = publish(out / f"{NAME}-hf").passed()
    assert f"the card says less: {out / NAME}.metrics.jsonl is missing" in done.out
    assert published(hub).keys() == HF_FILES | {"README.md"}
    metadata, text = card_of(hub)
    assert metadata["license"] == "apache-2.0" and "**Fine-tuning**" in text and "loss" not in text

    shutil.rmtree(out / f"{NAME}_samples")
    write_jsonl(out / f"{NAME}.metrics.jsonl", [{"step": 1, "epoch": 1, "loss": 2.5}])
    done = publish(out / f"{NAME}-hf").passed()
    assert f"{NAME}_samples/samples.jsonl is not there" in done.out
    assert "Nothing was held out" in card_of(hub)[1] and "loss.png" in published(hub)


def test_the_record_of_a_later_training_is_not_shown(publish, hub, out):
    sidecar = json.loads((out / f"{NAME}.json").read_text())
    (out / f"{NAME}.json").write_text(json.dumps(sidecar | {"written": "2030-01-01T00:00:00+00:00"}))
    for ending in ("-hf", "-gguf"):
        done = publish(out / f"{NAME}{ending}").passed()
        assert "was trained after this was exported" in done.out and "export it again" in done.out
        assert "loss.png" not in published(hub)


def test_an_export_that_lies_elsewhere_is_told_its_run(publish, hub, out, tmp_path):
    folder = shutil.move(out / f"{NAME}-gguf", tmp_path / "elsewhere")
    assert "--run names the record" in publish(folder).passed().out
    assert "loss.png" not in published(hub)
    publish(folder, "--run", out / NAME).passed()
    assert "loss.png" in published(hub) and f"# {NAME}" in card_of(hub)[1].replace("\\", "")
    publish(folder, "--run", out / "no_such_run").refused("is no run")


def test_text_of_the_run_cannot_become_markup(publish, hub, out):
    rows = read_jsonl(out / f"{NAME}_samples" / "samples.jsonl")
    hostile = "a | b\n<script>alert(1)</script> ![x](http://x) `y`"
    shutil.copy(out / f"{NAME}.json", out / "0.jpg")  # what a name with folders would lead to
    rows = [row | {"picture": f"../{row['picture']}"} for row in rows]
    rows = [row | {"prompt": f"{hostile} '\"", "reference": hostile, "description": hostile} for row in rows]
    write_jsonl(out / f"{NAME}_samples" / "samples.jsonl", rows)
    publish(out / f"{NAME}-hf").passed()
    assert published(hub)["samples/0.jpg"] == (out / f"{NAME}_samples" / "0.jpg").read_bytes()
    _, text = card_of(hub)
    table = text.split("## What it says")[1].split("## Use it")[0]
    assert "\\<script" in table and not re.search(r"(?<!\\)<", table) and "![x]" not in table
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table.splitlines() if line.startswith("|"))
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(snippet, "snippet", "exec")


def test_a_language_model_is_published_as_one(publish, world, hub, tmp_path):
    random_weights(tmp_path / "out", None)
    tower = save_tower(tmp_path / "tower")
    flags = ["--save_dir", tmp_path / "out", "--vision_model_path", tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    world.run(EXPORT, *flags).passed()
    publish(tmp_path / "out" / "sft_vlm_64-hf").passed()
    metadata, text = card_of(hub)
    assert metadata["pipeline_tag"] == "text-generation" and "llava" not in metadata["tags"]
    assert f'pipeline("text-generation", model="{REPO}")' in text
    assert "sees no images" in text and "not recorded" in text and "image-text" not in text
    run_snippet(hub, tmp_path)
    world.run(EXPORT, *flags, "--to", "gguf").passed()
    publish(tmp_path / "out" / "sft_vlm_64-gguf").passed()
    metadata, text = card_of(hub)
    assert metadata["pipeline_tag"] == "text-generation" and "mmproj" not in text and "llama-server -hf" in text


def test_the_published_tower_is_the_base_model():
    parts = {"config": {"vision_hidden_size": 768}, "versions": {}}
    towers = {
        "model/vision_model/clip-vit-base-patch16": "openai/clip-vit-base-patch16",
        None: "openai/clip-vit-base-patch16",  # the original's weights, which have no sidecar
        "siglip": None,
    }
    assert (ROOT / next(iter(towers))) == TOWER_DIR
    for path, name in towers.items():
        sidecar = parts | {"arguments": {"vision_model_path": path} if path else {}}
        assert Model("weights", "x", {}, True, sidecar, None).tower == name
        assert Model("weights", "x", {}, False, sidecar, None).tower is None
        assert Model("weights", "x", {}, True, sidecar | {"assets": "built-in"}, None).tower is None


def environment_of(hub: UploadHub, tmp_path: Path) -> dict:
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    return os.environ | ours | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}


def run_snippet(hub: UploadHub, tmp_path: Path) -> str:
    """What the card's Python prints, as it stands there."""
    [snippet] = re.findall(r"```python\n(.*?)```", card_of(hub)[1], re.DOTALL)
    command = [sys.executable, "-W", "ignore", "-c", snippet]
    done = subprocess.run(command, cwd=tmp_path, env=environment_of(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cards_snippet_and_commands_run_as_they_stand_there(publish, world, hub, trained, tmp_path):
    """Of a transformers folder, whose model answers at random: both say the same."""
    random_weights(tmp_path / "here", world.tower)
    flags = ["--save_dir", tmp_path / "here", "--vision_model_path", world.tower]
    world.run(EXPORT, *flags, "--tokenizer_path", BUILTIN_TOKENIZER_DIR).passed()
    publish(tmp_path / "here" / "sft_vlm_64-hf", "--run", trained / NAME).passed()
    said = run_snippet(hub, tmp_path)
    lines = [line.strip() for line in card_of(hub)[1].splitlines() if line.startswith("    ")]
    assert [line.split()[0] for line in lines] == ["hf", "python"]
    hf = [str(Path(sys.executable).with_name("hf")), *shlex.split(lines[0])[1:]]
    done = subprocess.run(hf, cwd=tmp_path, env=environment_of(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + str(hub.requests[-3:])
    greedy = ["--temperature", 0, "--max_new_tokens", 64, "--device", "cpu"]
    asked = world.run(EVAL, *shlex.split(lines[1])[2:], *greedy, cwd=tmp_path).passed().out
    assert said.strip() in asked and said.strip()


def test_the_command_for_a_weight_file_runs(publish, world, hub, trained, tmp_path):
    publish(trained / f"{NAME}.pth").passed()
    lines = [line.strip() for line in card_of(hub)[1].splitlines() if line.startswith("    ")]
    fetched = shlex.split(lines[0])[3:-2]
    assert fetched == [f"{NAME}.pth", f"{NAME}.json"]
    (tmp_path / "out").mkdir()
    for name in fetched:
        (tmp_path / "out" / name).write_bytes(published(hub)[name])
    shutil.copy(world.images / "0.jpg", tmp_path / "photo.jpg")
    files = ["--vision_model_path", world.tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR, "--device", "cpu"]
    world.run(EVAL, *shlex.split(lines[1])[2:], *files, "--max_new_tokens", 4, cwd=tmp_path).passed()
