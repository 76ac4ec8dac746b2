"""minimind-3v's prompt: images by the id of a special token, no default system turn, think blocks before answers."""

import copy
import os
import pickle
from pathlib import Path

import pytest
from tiny import turn
from tiny_models import save_tokenizer_3v
from transformers import AutoTokenizer

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.chat import ChatEncoder, image_token_id, load_tokenizer, with_thinking
from dataset.row_forms import parse_conversation

IMAGE_ID, PATCHES = 12, 64
EMPTY = "<think>\n\n</think>\n\n"
CONVERSATIONS = [
    [turn("user", "描述这张图片\n<image>"), turn("assistant", "一个红色的圆形。")],
    [
        turn("user", "<image>\n<image>What  \n\n<image> differs?"),
        turn("assistant", "<think>\nThe colours\n</think>\n\n红色"),
        turn("user", "And?"),
        turn("assistant", "\n\nNothing</think>else</think>here\n"),
    ],
    [turn("system", "简短"), turn("user", "a@<image>@ a@b.com"), turn("assistant", "  @\n")],
    [turn("user", "你好"), turn("assistant", "好")],
    [turn("user", "<image>"), turn("assistant", "\n\n红") | {"reasoning_content": "\n看一看\n"}],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer_3v(tmp_path_factory.mktemp("tokenizer_3v")))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(tokenizer, PATCHES)


@pytest.fixture(scope="module")
def published_tokenizer():
    folder = Path(os.environ.get("MINIMIND3V_TOKENIZER") or "none")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("no original tokenizer: set MINIMIND3V_TOKENIZER")
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_follow_the_published_chat_template(published_tokenizer, turns):
    encoder = ChatEncoder(published_tokenizer, PATCHES)
    shown = [spoken | {"content": spoken["content"].replace("<image>", "<|image_pad|>" * PATCHES)} for spoken in turns]

    def template_ids(count, **options):
        text = published_tokenizer.apply_chat_template(shown[:count], tokenize=False, **options)
        return published_tokenizer.encode(text, add_special_tokens=False)

    [chat] = encoder.encode([turns])
    assert chat.input_ids == template_ids(len(turns))
    asked = turns[:-1]
    [prompt] = encoder.encode([asked], add_generation_prompt=True)
    assert prompt.input_ids == template_ids(len(asked), add_generation_prompt=True)
    assert (encoder.image_token_id, published_tokenizer.convert_tokens_to_ids("@")) == (IMAGE_ID, 67)


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_answers_with_their_think_block_are_learned_and_images_are_ids(tokenizer, encoder, turns):
    [chat] = encoder.encode([turns])
    answers = [with_thinking(spoken) for spoken in turns if spoken["role"] == "assistant"]
    assert all(answer.startswith("<think>\n") for answer in answers)
    learned = [tokenizer.decode(chat.input_ids[start:end]) for start, end in chat.learned]
    assert learned == [f"{answer}<|im_end|>\n" for answer in answers]
    text = "".join(
        f"<|im_start|>{spoken['role']}\n"
        + (answers.pop(0) if spoken["role"] == "assistant" else spoken["content"].replace("<image>", ""))
        + "<|im_end|>\n"
        for spoken in turns
    )
    assert tokenizer.decode([token for token in chat.input_ids if token != IMAGE_ID]) == text
    tags = sum(spoken["content"].count("<image>") for spoken in turns)
    assert len(chat.image_starts) == tags and chat.input_ids.count(IMAGE_ID) == PATCHES * tags
    assert all(chat.input_ids[start : start + PATCHES] == [IMAGE_ID] * PATCHES for start in chat.image_starts)


def test_a_placeholder_that_is_typed_is_text(tokenizer, encoder):
    turns = [turn("user", "<|image_pad|><image><|im_end|>"), turn("assistant", "<|image_pad|>")]
    for copied in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        [chat] = copied.encode([turns])
        assert chat.input_ids.count(IMAGE_ID) == PATCHES
        assert tokenizer.decode(chat.input_ids).count("<|image_pad|>") == PATCHES + 2


def test_generation_starts_after_an_empty_think_block(tokenizer, encoder):
    [prompt] = encoder.encode([CONVERSATIONS[3][:1]], add_generation_prompt=True)
    expected = f"<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n{EMPTY}"
    assert tokenizer.decode(prompt.input_ids) == expected
    [chat] = encoder.encode([CONVERSATIONS[3]])
    assert chat.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_the_tokenizer_chooses_not_the_name():
    builtin = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    assert (image_token_id(builtin), ChatEncoder(builtin, 4).is_3v) == (34, False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("红", f"{EMPTY}红"),
        ("\n红\n", f"{EMPTY}红\n"),
        ("<think>\n看\n</think>\n\n红", "<think>\n看\n</think>\n\n红"),
        ("看</think>红", "<think>\n看\n</think>\n\n红"),
        ("<think>看", f"{EMPTY}<think>看"),
    ],
)
def test_with_thinking(answer, expected):
    assert with_thinking({"content": answer}) == expected
    assert with_thinking({"content": expected}) == expected or "</think>" not in answer


def test_reasoning_content_stands_in_the_think_block():
    row = [turn("user", "什么？"), turn("assistant", "红") | {"reasoning_content": "看一看"}]
    assert with_thinking(parse_conversation(row)[1]) == "<think>\n看一看\n</think>\n\n红"
    row[1]["content"] = "\n\n红\n"  # the template strips an answer's first line breaks
    assert with_thinking(parse_conversation(row)[1]) == "<think>\n看一看\n</think>\n\n红\n"
    row = [turn("user", "什么？"), turn("assistant", f"{EMPTY}红")]
    assert with_thinking(parse_conversation(row)[1]) == f"{EMPTY}红"
