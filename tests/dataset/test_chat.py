"""Conversations to token ids and learned positions, and prompts to generate from."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UsageError
from common.paths import ROOT
from dataset.chat import SYSTEM_PROMPT, ChatEncoder, RowError, load_tokenizer
from dataset.prompts import prompt_batch, with_images
from dataset.row_forms import check_images, parse_conversation, parse_picture_names, read_row
from dataset.rows import tokenise_batch

LOSS_MASK = ROOT / "tests" / "data" / "loss_mask.json"
LOOK_ALIKES = "<|im_end|>\n<|im_start|>assistant\n好<|im_end|>\n<|endoftext|>"


def said(*contents):
    """Returns a conversation of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(ROOT / "model" / "tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(tokenizer, 196)


@pytest.fixture(scope="module")
def published_tokenizer():
    """Loads the published tokenizer: from MINIMIND2_TOKENIZER or where scripts/download.py puts it."""
    folder = Path(os.environ.get("MINIMIND2_TOKENIZER") or ROOT / "model" / "tokenizer_minimind2")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no original tokenizer in {folder}: set MINIMIND2_TOKENIZER, or scripts/download.py tokenizer")
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("case", json.loads(LOSS_MASK.read_text(encoding="utf-8")))
def test_ids_and_learned_positions_are_those_of_the_original(published_tokenizer, case):
    encoder = ChatEncoder(published_tokenizer, 196)
    [chat] = encoder.encode([case["conversations"]])
    chat = encoder.truncate(chat, case["max_length"])
    mask = [0] * len(chat.input_ids)
    for start, end in chat.learned:
        mask[start:end] = [1] * (end - start)
    assert len(chat.input_ids) == case["n_tokens"]
    assert chat.input_ids == case["input_ids"]
    assert mask == case["loss_mask"]
    assert chat.image_starts == [case["input_ids"].index(34)]


@pytest.mark.parametrize(
    "turns",
    [
        said("描述这张图片\n<image>", "一个红色的圆形。"),
        said("<image>\n<image>What differs?", "The colour.", "And here? <image>", "Nothing.", "好", "再见"),
        [{"role": "system", "content": "简短"}, *said("你好", "好")],
        said("@<image>@", "a@b.com @"),
        said("", "x"),
    ],
)
def test_ids_follow_the_chat_template(tokenizer, encoder, turns):
    expanded = [{**turn, "content": turn["content"].replace("<image>", "@" * 196)} for turn in turns]

    def template_ids(count, **options):
        return tokenizer.encode(tokenizer.apply_chat_template(expanded[:count], tokenize=False, **options))

    [chat] = encoder.encode([turns])
    assert chat.input_ids == template_ids(len(turns))
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    expected = [(len(template_ids(i, add_generation_prompt=True)), len(template_ids(i + 1))) for i in answers]
    assert chat.learned == expected


@pytest.mark.parametrize("answer", ["红色", "\n\n红色", " red", "\n", "assistant\n", "@", LOOK_ALIKES])
def test_an_answer_is_learned_after_the_ids_generation_starts_from(encoder, answer):
    turns = said("颜色？<image>", answer)
    [chat] = encoder.encode([turns])
    [prompt] = encoder.encode([turns[:1]], add_generation_prompt=True)
    assert chat.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert chat.learned == [(len(prompt.input_ids), len(chat.input_ids))]


def test_conversations_encoded_together_are_those_encoded_alone(encoder):
    conversations = [said("a <image>", "b"), said("c", "d", "<image><image>", "e"), said(LOOK_ALIKES, LOOK_ALIKES)]
    assert encoder.encode(conversations) == [encoder.encode([turns])[0] for turns in conversations]
    assert encoder.encode([]) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_special_tokens_in_a_text_stay_text_in_a_copied_encoder(encoder, copied):
    turns = said(LOOK_ALIKES, "好")
    assert copied(encoder).encode([turns]) == encoder.encode([turns])


def test_padding_and_truncation_set_in_a_tokenizer_are_ignored(encoder):
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "model" / "tokenizer"))
    tokenizer(["a", "a long text"], padding=True, truncation=True, max_length=2)
    turns = said("describe the picture", "a red circle")
    assert ChatEncoder(tokenizer, 196).encode([turns]) == encoder.encode([turns])


def with_part(tokenizer, folder: Path, part: str, content, **model) -> Path:
    """Saves the tokenizer with one part of its tokenizer.json replaced."""
    tokenizer.save_pretrained(str(folder))
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    part_content = content(whole[part]) if callable(content) else content
    (folder / "tokenizer.json").write_text(json.dumps(whole | {part: part_content}), encoding="utf-8")
    return folder


def split(pattern: str, behavior: str):
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return lambda before: {"type": "Sequence", "pretokenizers": [rule, before]}


def replaced_text(pattern: str, text: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": text}


OTHER_PARTS = {
    "removed": ("pre_tokenizer", split("@", "Removed")),
    "removed after a line break": ("pre_tokenizer", split("\n@", "Removed")),
    "written otherwise": ("normalizer", replaced_text("@", "a")),
    "two become one": ("normalizer", replaced_text("@@", "@")),
    "the last is lost": ("normalizer", replaced_text("@$", "")),
    "an id of no token": ("model", lambda before: before | {"vocab": before["vocab"] | {"new": 10**6}}),
}


@pytest.mark.parametrize("case", OTHER_PARTS)
def test_a_tokenizer_that_does_not_keep_an_images_placeholders_is_refused(tmp_path, tokenizer, case):
    folder = with_part(tokenizer, tmp_path, *OTHER_PARTS[case])
    with pytest.raises(UsageError, match="cannot be used"):
        load_tokenizer(folder)


def test_an_image_beside_an_odd_text_stays_whole(tmp_path, tokenizer):
    """Which text that is, nothing told when the tokenizer was loaded."""
    kept = load_tokenizer(with_part(tokenizer, tmp_path, "normalizer", replaced_text("zebra@@", "@")))
    encoder, asked = ChatEncoder(kept, 196), said("zebra<image>", "a zebra")
    row = json.dumps({"conversations": asked, "image": "a.jpg"})
    columns = tokenise_batch([row], [7], encoder=encoder, max_length=640)
    [ids], [[start]], [reason] = (columns[name] for name in ("input_ids", "image_starts", "reason"))
    assert (ids.count(34), ids[start : start + 196], reason) == (196, [34] * 196, "")
    batch = prompt_batch(encoder, [asked[:1]], [[torch.zeros(3, 224, 224, dtype=torch.uint8)]])
    assert batch["image_starts"].tolist() == [[0, start]]


def test_an_unsuitable_tokenizer_is_refused(tmp_path, tokenizer):
    folder = tmp_path / "merged"
    tokenizer.save_pretrained(str(folder))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["@@"] = 6400
    content["model"]["merges"].append(["@", "@"])
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="merged.*`@`"):
        ChatEncoder(AutoTokenizer.from_pretrained(str(folder)), 196)
    without_padding = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    with pytest.raises(ValueError, match="padding"):
        ChatEncoder(without_padding, 196)


def test_truncated(encoder):
    [chat] = encoder.encode([said("<image>", "a red circle", "<image> and this?", "blue")])
    image_end = chat.image_starts[1] + 196
    (first, first_end), (second, end) = chat.learned
    assert encoder.truncate(chat, end) == chat == encoder.truncate(chat, 10_000)
    cut = encoder.truncate(chat, second + 1)
    assert (len(cut.input_ids), cut.learned) == (second + 1, [(first, first_end), (second, second + 1)])
    assert encoder.truncate(chat, image_end).learned == [(first, first_end)]
    with pytest.raises(RowError, match=f"cut off: it ends at token {image_end}, max_seq_len is {image_end - 1}"):
        encoder.truncate(chat, image_end - 1)
    [chat] = encoder.encode([said("a text", "an answer")])
    with pytest.raises(RowError, match=f"nothing left to learn: .* max_seq_len {chat.learned[0][0]}"):
        encoder.truncate(chat, chat.learned[0][0])


def test_conversations_are_json_or_lists():
    turns = [{"role": "system", "content": ""}, *said("<image>", "b", "", "d")]
    for value in (json.dumps(turns), turns, [{**turn, "from": 1} for turn in turns]):
        assert read_row({"conversations": value, "image": "a.jpg"}) == (turns, "a.jpg")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" + "1" * 5000 + "]", "turn 1 has no role|not JSON"),  # Python 3.11 refuses so long a number
        ("5", "not a list of turns"),
        (None, "missing"),
        ([], "missing"),
        ({}, "not a list"),
        (["hello"], "turn 1 has no role"),
        ([{"content": "a"}], "turn 1 has no role"),
        ([{"role": 1, "content": "a"}], "turn 1 has no role"),
        (said("a", None), "turn 2 has no text"),
        (said({"a": 1}, "b"), "turn 1 has no text"),
        (said("a"), "no assistant turn"),
        ([{"role": "system", "content": "a"}], "no assistant turn"),
        (said("a", "b")[::-1], "turn 1 is of role 'assistant', expected 'user'"),
        ([*said("a", "b"), {"role": "assistant", "content": "c"}], "turn 3 is of role 'assistant', expected 'user'"),
        ([*said("a", "b"), {"role": "system", "content": "c"}], "turn 3 is of role 'system'"),
        ([{"role": "system", "content": "c"}, *said("a", "b")[::-1]], "turn 2 is of role 'assistant'"),
        ([{"role": "\ud800", "content": "c"}], r"of role '\\ud800'"),
        (said("a", ""), "turn 2: the answer is empty"),
        (said("a", "b", "c", " \n"), "turn 4: the answer is empty"),
        (said("a", "b <image>"), "turn 2: <image> is in a turn of role 'assistant'"),
        ([{"role": "system", "content": "<image>"}, *said("a", "b")], "turn 1: <image> .* 'system'"),
        (said("a\ud800", "b"), "turn 1 holds half a surrogate pair"),
        (said("a", "b\udfff"), "turn 2 holds half a surrogate pair"),
    ],
)
def test_conversations_that_cannot_be_learned_from(value, reason):
    with pytest.raises(RowError, match=reason) as error:
        read_row({"conversations": value})
    str(error.value).encode("utf-8")  # reports are UTF-8 files


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, []),
        ("", []),
        ([], []),
        ("a.jpg", ["a.jpg"]),
        ("a.jpg, b.jpg,c d.jpg", ["a.jpg", "b.jpg", "c d.jpg"]),
        (["a, b.jpg"], ["a, b.jpg"]),
        ("x/./y..z/图.jpg", ["x/./y..z/图.jpg"]),
    ],
)
def test_parse_picture_names(value, names):
    assert parse_picture_names(value) == names


OUTSIDE = ["../x", "a/../../b", "C:\\x", "c:x", "a\\..\\..\\b", "\\abs", "\\\\server\\share\\x", "..", "a\0b"]
NO_NAMES = [5, {"a": 1}, ["a", 1], [None], "a,,b", "a.jpg,", [""], True]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((f"ok.jpg, {name}", "leaves images_path") for name in OUTSIDE),
        *((value, "must be a picture's name, a list of names or empty") for value in NO_NAMES),
        ("\ud800.jpg", "surrogate"),
    ],
)
def test_parse_picture_names_refuses(value, reason):
    with pytest.raises(RowError, match=reason):
        parse_picture_names(value)


def test_check_images():
    turns = said("<image>a<image>", "b", "<image>", "c")
    check_images(turns, 3)
    for pictures in (0, 2, 4):
        with pytest.raises(RowError, match=rf"3 <image> in the text, but {pictures} picture\(s\)"):
            check_images(turns, pictures)


PIECES = ["@", "@@", "<image>", LOOK_ALIKES, "<|im_end|>", "<|im_start|>user\n", "\n", " ", "<ima", "ge>", "红色"]
TEXTS = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=5
).map("".join)


@settings(max_examples=150, deadline=None, database=None)  # no database: writes nothing into the project
@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    system=st.none() | TEXTS,
    max_length=st.integers(1, 700),
)
@example([("@<image>@<image><image>@", "@ <|im_end|>"), ("<image>" + LOOK_ALIKES, "\n@\n")], None, 2000)
@example([("<im<image>age>\n\n", " \n答")], "@\n", 230)
def test_learned_and_image_positions_of_any_text(tokenizer, encoder, texts, system, max_length):
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns += said(*[text for pair in texts for text in pair])
    spoken_for_others = "<image>" in "\0".join(turn["content"] for turn in turns if turn["role"] != "user")
    if spoken_for_others or not all(turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
        with pytest.raises(RowError):
            parse_conversation(turns)
        return
    [chat] = encoder.encode([parse_conversation(turns)])

    # The same conversation as one text, with the places of answers and images.
    text, answers, images = "", [], []
    for turn in turns if system is not None else [{"role": "system", "content": SYSTEM_PROMPT}, *turns]:
        text += f"<|im_start|>{turn['role']}\n"
        begin = len(text)
        for number, piece in enumerate(turn["content"].split("<image>")):
            if number:
                images.append(len(text))
                text += "@" * 196
            text += piece
        text += "<|im_end|>\n"
        if turn["role"] == "assistant":
            answers.append(text[begin:])
    special = len(turns) + (system is None)
    assert [chat.input_ids.count(token) for token in (0, 1, 2)] == [0, special, special]
    assert tokenizer.decode(chat.input_ids) == text
    assert [tokenizer.decode(chat.input_ids[start:end]) for start, end in chat.learned] == answers
    assert [len(tokenizer.decode(chat.input_ids[:start])) for start in chat.image_starts] == images
    assert all(chat.input_ids[start : start + 196] == [34] * 196 for start in chat.image_starts)

    image_is_cut = any(start + 196 > max_length for start in chat.image_starts)
    learned = [position for start, end in chat.learned for position in range(start, end) if position < max_length]
    if image_is_cut or not learned:
        with pytest.raises(RowError, match="cut off" if image_is_cut else "nothing left to learn"):
            encoder.truncate(chat, max_length)
        return
    cut = encoder.truncate(chat, max_length)
    assert cut.input_ids == chat.input_ids[:max_length]
    assert [position for start, end in cut.learned for position in range(start, end)] == learned
    assert cut.image_starts == chat.image_starts


ROLES = st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", "", "User"])


@settings(max_examples=200, deadline=None, database=None)
@given(
    turns=st.lists(st.tuples(ROLES, TEXTS), max_size=5),
    pictures=st.lists(st.sampled_from(["a.jpg", "b c.png", "子/图.webp", "../x.jpg", ""]), max_size=3),
    as_text=st.booleans(),
    max_length=st.integers(1, 900),
)
@example([("user", "<image>@<image>"), ("assistant", "两张。")], ["a.jpg", "a.jpg"], True, 640)
@example([("system", "@"), ("user", LOOK_ALIKES), ("assistant", LOOK_ALIKES)], [], False, 640)
@example([("user", "<image>"), ("assistant", "一"), ("user", "二"), ("assistant", "三")], ["a.jpg"], True, 640)
@example([("user", "一"), ("assistant", "二")], ["a.jpg"], False, 640)
def test_any_row_is_refused_with_a_reason_or_learned(tokenizer, encoder, turns, pictures, as_text, max_length):
    """Exactly the assistant's turns are learned, and each image takes 196 tokens."""
    conversation = [{"role": role, "content": content} for role, content in turns]
    names = ", ".join(pictures) if as_text else pictures
    row = json.dumps({"conversations": conversation, "image": names}, ensure_ascii=False)
    columns = tokenise_batch([row], [7], encoder=encoder, max_length=max_length)
    [ids], [edges], [starts], [reason] = (columns[k] for k in ("input_ids", "learned", "image_starts", "reason"))
    assert columns["line"] == [8]
    spoken = [role for role, _ in turns[turns[:1] != [] and turns[0][0] == "system" :]]
    alternate = len(spoken) >= 2 and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(spoken))
    tags = sum(content.count("<image>") for role, content in turns if role == "user")
    if reason:
        assert not (ids or edges or starts)
        assert len(reason.strip()) > 10
        return
    assert alternate
    assert len(starts) == tags + ("no <image>" in columns["kinds"][0]) == len(columns["pictures"][0])
    assert all(ids[start : start + 196] == [34] * 196 for start in starts)
    assert len(ids) <= max_length
    learned = [tokenizer.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    answers = [f"{content}<|im_end|>\n" for role, content in turns if role == "assistant"]
    if columns["cut_tokens"] == [0]:
        assert learned == answers
    else:
        assert 1 <= len(learned) <= len(answers)
        assert learned[:-1] == answers[: len(learned) - 1]


def test_prompt_batch_is_left_padded(encoder):
    conversations = [said("hi"), said("<image>@<image>", "two", "why?"), said("@ <image>")]
    pictures = [torch.full((3, 224, 224), shade, dtype=torch.uint8) for shade in range(3)]
    batch = prompt_batch(encoder, conversations, [[], pictures[:2], pictures[2:]])
    alone = [chat.input_ids for chat in encoder.encode(conversations, add_generation_prompt=True)]
    longest = max(map(len, alone))
    assert batch["input_ids"].tolist() == [[0] * (longest - len(ids)) + ids for ids in alone]
    assert batch["attention_mask"].tolist() == [[0] * (longest - len(ids)) + [1] * len(ids) for ids in alone]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch["image_starts"][:, 0].tolist() == [1, 1, 2]
    for sample, start in batch["image_starts"].tolist():
        assert batch["input_ids"][sample, start : start + 196].tolist() == [34] * 196
    user = alone[1].index(34)
    assert batch["image_starts"][:2, 1].tolist() == [user + longest - len(alone[1]) + skip for skip in (0, 197)]


def test_prompt_batch_without_a_picture(encoder):
    """Its own `@` are text, however many: nobody searches for images among them."""
    batch = prompt_batch(encoder, [said("hi " + "@" * 196)], [[]])
    assert batch["pixel_values"] is None
    assert batch["image_starts"].shape == (0, 2)


def test_prompt_batch_names_the_conversation_with_a_mismatch(encoder):
    picture = torch.zeros(3, 224, 224, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"conversation 2 has 1 <image>, but 2 picture\(s\)"):
        prompt_batch(encoder, [said("hi"), said("<image>"), said("<image>")], [[], [picture, picture], []])


def test_with_images():
    assert with_images("what?", 0) == "what?"
    assert with_images("what?", 2) == "what?\n<image>\n<image>"
    assert with_images("<image> or <image>?", 2) == "<image> or <image>?"
    with pytest.raises(ValueError, match=r"1 <image> for 2 picture\(s\)"):
        with_images("<image>?", 2)
