"""How a picture is asked about: as typed, or in the form that most training rows have."""

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.lm_dataset import VLMDataset
from dataset.prompts import DEFAULT_FORM, PROMPT_FORMS, usual_form, with_images


@pytest.mark.parametrize(
    ("prompt", "images", "form", "expected"),
    [
        ("what?", 1, DEFAULT_FORM, "what?\n<image>"),
        ("what?", 2, DEFAULT_FORM, "what?\n<image>\n<image>"),
        ("what?", 1, "<image>\n{prompt}", "<image>\nwhat?"),
        ("what?", 1, "<image>{prompt}", "<image>what?"),
        ("is it a {prompt}?", 1, "<image>{prompt}", "<image>is it a {prompt}?"),
        ("see <image> and say", 1, "<image>\n{prompt}", "see <image> and say"),
        ("what?", 0, "<image>\n{prompt}", "what?"),
    ],
)
def test_pictures_stand_where_the_form_says(prompt, images, form, expected):
    assert with_images(prompt, images, form) == expected


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUILTIN_TOKENIZER_DIR)


@pytest.mark.parametrize("form", PROMPT_FORMS)
def test_the_usual_form_of_the_rows_is_found(tmp_path, tokenizer, form):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    other = next(other for other in PROMPT_FORMS if other not in (form, DEFAULT_FORM))
    contents = [form.replace("{prompt}", f"question {n}?") for n in range(5)]
    contents += [other.replace("{prompt}", "question?"), "amid <image> text", "<image>"]
    rows = [{"image": "a.png", "conversations": turns(content)} for content in contents]
    rows.append({"conversations": turns("text only")})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = VLMDataset(tmp_path / "rows.jsonl", tmp_path, tokenizer, 300, 4, cache_dir=tmp_path / "cache")
    assert len(data) == len(rows)
    assert usual_form(data, tokenizer) == form


def turns(content: str) -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "an answer"}]


@pytest.mark.parametrize("defaults", [2, 3])
def test_where_the_default_is_about_as_usual_it_is_taken(tmp_path, tokenizer, defaults):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    contents = ["q?\n<image>"] * defaults + ["<image>\nq?"] * 4
    rows = [{"image": "a.png", "conversations": turns(content)} for content in contents]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = VLMDataset(tmp_path / "rows.jsonl", tmp_path, tokenizer, 300, 4, cache_dir=tmp_path / "cache")
    assert usual_form(data, tokenizer) == ("<image>\n{prompt}" if defaults == 2 else DEFAULT_FORM)
