"""The card of a published model: what it says of the run, and that what it tells to type runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from publishing import HF_FILES, NAME, REPO, TOKEN, card_of, published
from test_export import flags_for, random_weights
from tiny import EVAL, read_jsonl, write_jsonl
from tiny_models import save_tower

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT, TOWER_DIR
from scripts import export
from scripts.publish import Model, card_files, parse_arguments
from trainer.report.page import Record, read_record

pytest_plugins = ["tiny", "publishing"]


def commands_of(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]


def test_the_card_says_what_the_record_says(publish, hub, trained):
    publish(trained / f"{NAME}-hf").passed()
    metadata, text = card_of(hub)
    record = read_record(trained, NAME)
    last, commit = record.evaluations[-1], record.sidecar["git_commit"]
    [results] = metadata["model-index"][0]["results"]
    assert results["task"]["type"] == "image-text-to-text" and results["dataset"]["name"] == "26 held-out samples"
    values = {metric["name"]: metric["value"] for metric in results["metrics"]}
    assert values["loss, right images"] == last["loss"] and values["grounding gap"] == last["gap_shuffled"]
    assert f"| 26 held-out samples | loss, right images | {last['loss']:.3f} |" in text
    assert f"| grounding gap | {last['gap_shuffled']:.3f} |" in text and "**Fine-tuning**" in text
    for setting in ("| --batch\\_size | 8 |", "| hidden\\_size | 32 |", "torch 2", f"this project {commit[:12]}"):
        assert setting in text
    assert f"{record.sidecar['config']['num_hidden_layers']} layers of width 32" in text
    files = published(hub)
    for number in range(8):
        assert f"(samples/{number}.jpg)" in text
        picture = trained / f"{NAME}_samples" / f"{number}.jpg"
        assert files[f"samples/{number}.jpg"] == picture.read_bytes()
    rows = {row["picture"]: row for row in read_jsonl(trained / f"{NAME}_samples" / "samples.jsonl")}
    assert rows["3.jpg"]["reference"] in text and len(rows) == 8
    assert "- It was trained on sft.jsonl" in text and "It is small." in text


def test_without_a_record_the_card_says_less(publish, hub, out):
    (out / f"{NAME}.metrics.jsonl").unlink()
    done = publish(out / f"{NAME}-hf").passed()
    assert f"the card says less: {out / NAME}.metrics.jsonl is missing" in done.out
    assert published(hub).keys() == HF_FILES | {"README.md"}
    metadata, text = card_of(hub)
    assert metadata["license"] == "apache-2.0" and "**Fine-tuning**" in text and "loss" not in text
    assert "model-index" not in metadata

    shutil.rmtree(out / f"{NAME}_samples")
    write_jsonl(out / f"{NAME}.metrics.jsonl", [{"step": 1, "epoch": 1, "loss": 2.5}])
    done = publish(out / f"{NAME}-hf").passed()
    assert f"{NAME}_samples/samples.jsonl is not there" in done.out
    assert "Nothing was held out" in card_of(hub)[1]


def test_what_is_no_number_is_not_shown(publish, hub, out):
    lost = {"loss": float("nan"), "loss_blind": 3.5, "gap_shuffled": "plenty", "samples": "|"}
    write_jsonl(out / f"{NAME}.metrics.jsonl", [{"step": 1, "epoch": 1, "eval": lost}])
    publish(out / f"{NAME}.pth").passed()
    metadata, text = card_of(hub)
    [results] = metadata["model-index"][0]["results"]
    assert [metric["value"] for metric in results["metrics"]] == [3.5] and "plenty" not in text


def test_the_record_of_a_later_training_is_not_shown(publish, hub, out):
    sidecar = json.loads((out / f"{NAME}.json").read_text())
    (out / f"{NAME}.json").write_text(json.dumps(sidecar | {"written": "2030-01-01T00:00:00+00:00"}))
    for ending in ("-hf", "-gguf"):
        done = publish(out / f"{NAME}{ending}").passed()
        assert "was trained after this was exported" in done.out and "export it again" in done.out
        assert "loss" not in card_of(hub)[1]


def test_text_of_the_run_cannot_become_markup(publish, hub, out):
    rows = read_jsonl(out / f"{NAME}_samples" / "samples.jsonl")
    hostile = "a | b\n<script>alert(1)</script> ![x](http://x) `y`"
    shutil.copy(out / f"{NAME}.json", out / "0.jpg")  # what a name with folders would lead to
    rows = [row | {"picture": f"../{row['picture']}"} for row in rows]
    rows = [row | {"prompt": f"{hostile} '\"", "reference": hostile, "description": hostile} for row in rows]
    rows.insert(0, rows[0] | {"prompt": "another question about it"})
    write_jsonl(out / f"{NAME}_samples" / "samples.jsonl", rows)
    publish(out / f"{NAME}-hf").passed()
    assert published(hub)["samples/0.jpg"] == (out / f"{NAME}_samples" / "0.jpg").read_bytes()
    _, text = card_of(hub)
    table = text.split("Greedy answers")[1].split("## ")[0]
    assert table.count("(samples/0.jpg)") == 2 and "(samples/6.jpg)" in table
    assert "\\<script" in table and not re.search(r"(?<!\\)<", table) and "![x]" not in table
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table.splitlines() if line.startswith("|"))
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(snippet, "snippet", "exec")


def test_a_language_model_is_published_as_one(publish, hub, tmp_path):
    random_weights(tmp_path / "out", None)
    for kind, ending in (("transformers", "hf"), ("gguf", "gguf")):
        export.main([*flags_for(tmp_path / "out", save_tower(tmp_path / "tower")), "--to", kind])
        publish(tmp_path / "out" / f"sft_vlm_64-{ending}").passed()
        metadata, text = card_of(hub)
        assert metadata["pipeline_tag"] == "text-generation" and "llava" not in metadata["tags"]
        assert "sees no images" in text and "not recorded" in text and "image-text" not in text
        assert ("llama-server -hf" if kind == "gguf" else f'pipeline("text-generation", model="{REPO}")') in text
        assert "mmproj" not in text and "0.jpg" not in text
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            compile(snippet, "snippet", "exec")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model/vision_model/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        (None, "openai/clip-vit-base-patch16"),  # the original's weights, which have no sidecar
        ("siglip", None),
    ],
)
def test_the_published_tower_is_the_base_model(path, name):
    assert path is None or "clip" not in path or ROOT / path == TOWER_DIR
    arguments = {"vision_model_path": path} if path else {}
    sidecar = {"config": {"vision_hidden_size": 768}, "versions": {}, "arguments": arguments}
    args, record = parse_arguments(["x", REPO, "--license", "mit"]), Record(Path(), "x", [], [])
    for sees_images, more, expected in ((True, {}, name), (False, {}, None), (True, {"assets": "built-in"}, None)):
        model = Model("weights", "x", {"x.pth": b""}, sees_images, sidecar | more, None)
        card = card_files(model, record, args)["README.md"].decode()
        assert re.findall("^base_model: (.*)", card, re.MULTILINE) == ([expected] if expected else [])


def download(hub, folder: Path, names=None):
    """Does what `hf download` does."""
    for name in names or published(hub):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(published(hub)[name])


def test_the_cards_snippet_and_commands_run_as_they_stand_there(publish, world, hub, trained, tmp_path):
    """Of a transformers folder, whose model answers at random: both say the same."""
    random_weights(tmp_path / "here", world.tower)
    export.main(flags_for(tmp_path / "here", world.tower))
    shutil.copytree(trained / f"{NAME}_samples", tmp_path / "here" / "sft_vlm_64_samples")
    shutil.copy(trained / f"{NAME}.metrics.jsonl", tmp_path / "here" / "sft_vlm_64.metrics.jsonl")
    publish(tmp_path / "here" / "sft_vlm_64-hf").passed()
    text = card_of(hub)[1]
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", snippet]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    fetch, ask = commands_of(text)
    assert fetch == ["hf", "download", REPO, "--local-dir", "out/sft_vlm_64-hf"]
    download(hub, tmp_path / "out" / "sft_vlm_64-hf")
    greedy = ["--temperature", 0, "--max_new_tokens", 64, "--device", "cpu"]
    assert done.stdout.strip() in world.run(EVAL, *ask[2:], *greedy, cwd=tmp_path).passed().out


def test_the_command_for_a_weight_file_runs(publish, world, hub, trained, tmp_path):
    publish(trained / f"{NAME}.pth").passed()
    fetch, ask = commands_of(card_of(hub)[1])
    assert fetch == ["hf", "download", REPO, f"{NAME}.pth", f"{NAME}.json", "--local-dir", "out"]
    download(hub, tmp_path / "out", fetch[3:-2])
    shutil.copy(world.images / "0.jpg", tmp_path / "photo.jpg")
    files = ["--vision_model_path", world.tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR, "--device", "cpu"]
    world.run(EVAL, *ask[2:], *files, "--max_new_tokens", 4, cwd=tmp_path).passed()
