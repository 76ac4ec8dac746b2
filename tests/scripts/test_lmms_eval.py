"""lmms-eval's task: it is complete without lmms-eval, and the real one, where it is installed, gets our answers."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from statistics import mean
from types import SimpleNamespace

import pytest
import yaml
from checks.lmms_eval import scenes
from test_export import EXPORT, random_weights
from tiny_models import save_tower

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT
from dataset.chat import ChatEncoder, load_tokenizer
from dataset.pictures import load_picture
from dataset.prompts import DEFAULT_FORM, prompt_batch
from dataset.scenes.draw import draw_builtin_dataset, heldout_scenes
from dataset.scenes.grading import score
from dataset.scenes.language import DESCRIBE, caption
from model.answers import generate_answers
from scripts.export import chat_template

pytest_plugins = ["tiny"]
FOLDER = ROOT / "tests" / "checks" / "lmms_eval"
PYTHON = os.environ.get("LMMS_EVAL_PYTHON") or (sys.executable if importlib.util.find_spec("lmms_eval") else None)
TOKENS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_builtin_dataset(tmp_path_factory.mktemp("data") / "builtin", training=1)


@pytest.fixture(scope="module")
def docs(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw_builtin_dataset", lambda: root)
        return scenes.process_docs(None)


def task(name: str) -> dict:
    """Reads a task as lmms-eval does: `!function scenes.NAME` is that NAME of scenes.py."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: getattr(scenes, node.value.removeprefix("scenes.")))
    return yaml.load((FOLDER / name).read_text(encoding="utf-8"), Loader)


def test_yaml_names_functions_that_exist():
    config = task("scenes.yaml")
    assert config["task"] == "scenes" and (FOLDER / config["dataset_kwargs"]["data_files"]["test"]).is_file()
    for name in ("process_docs", "doc_to_visual", "doc_to_text", "doc_to_messages", "process_results"):
        assert config[name] is getattr(scenes, name)
    aggregations = {metric["metric"]: metric["aggregation"] for metric in config["metric_list"]}
    assert aggregations == {"attributes": scenes.attributes, "captions": "mean"}
    image_first = task("scenes_image_first.yaml")
    assert image_first["include"] == "scenes.yaml" and image_first["doc_to_text"] == DESCRIBE


def test_rows_are_the_held_out_scenes_with_their_images(docs, root):
    rows = (root / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(docs) == len(rows) == 200
    for index in (0, 8, 198):  # every other row is in English; the task asks in Chinese
        row, doc = json.loads(rows[index]), docs[index]
        assert doc["caption"] == row["conversations"][1]["content"]
        assert scenes.doc_to_text(doc) == row["conversations"][0]["content"]
        [image] = scenes.doc_to_visual(doc)
        assert image.mode == "RGB" and image.size == (128, 128)
        assert doc["image"].filename.endswith(row["image"])


def test_text_and_messages_are_the_same_prompt(docs):
    tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    template = chat_template(SimpleNamespace(prompt_form=DEFAULT_FORM, tokenizer=tokenizer))
    plain = [{"role": "user", "content": scenes.doc_to_text(docs[0])}]
    texts = [
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        for turns in (plain, scenes.doc_to_messages(docs[0]))
    ]
    assert texts[0] == texts[1] and texts[0].count("<image>") == 1


def test_figures_are_those_of_the_projects_own_grading(docs):
    facts = [scene.facts for scene in heldout_scenes()]
    said = [caption(facts[0]), caption(facts[2]), "", "左上角有一个大的红色圆形"]
    results = [scenes.process_results(docs[index], [text]) for index, text in enumerate(said)]
    ours = score(said, facts[: len(said)])
    assert scenes.attributes([result["attributes"] for result in results]) == ours.attributes
    assert mean(result["captions"] for result in results) == ours.captions == 0.25
    assert docs[0]["objects"] == [asdict(thing) for thing in facts[0]]


@pytest.mark.skipif(PYTHON is None, reason="no lmms-eval: install it, or name a Python that has it by LMMS_EVAL_PYTHON")
def test_lmms_eval_gets_the_answers_of_the_weights(world, tmp_path):
    out, tower = tmp_path / "out", save_tower(tmp_path / "tower")
    model = random_weights(out, tower)
    flags = ["--save_dir", out, "--vision_model_path", tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    world.run(EXPORT, *flags).passed()
    command = [PYTHON, "-m", "lmms_eval", "--model", "llava_hf", "--tasks", "scenes", "--include_path", FOLDER]
    command += ["--model_args", f"pretrained={out / 'sft_vlm_64-hf'},device=cpu,device_map=cpu", "--limit", 3]
    command += ["--gen_kwargs", f"max_new_tokens={TOKENS}", "--output_path", tmp_path / "results", "--log_samples"]
    command, env = list(map(str, command)), world.environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    [log] = (tmp_path / "results").rglob("*samples_scenes.jsonl")
    samples = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    answers = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]

    tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    paths = sorted((draw_builtin_dataset() / "heldout_images").iterdir())[:3]
    question = [{"role": "user", "content": scenes.doc_to_text({})}]
    encoder = ChatEncoder(tokenizer, model.config.image_tokens)
    inputs = prompt_batch(encoder, [question] * 3, [[load_picture(path)] for path in paths])
    ours = generate_answers(model, tokenizer, inputs, TOKENS)
    assert [answer.strip() for answer in answers] == [answer.strip() for answer in ours]
    assert "attributes" in done.stdout and "captions" in done.stdout
