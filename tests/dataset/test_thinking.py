"""minimind-3v's think blocks, system turns and tools: learned and asked for as in the original."""

import json
import os

import pytest
import torch
from tiny import EVAL, PRETRAIN, turn, write_jsonl
from tiny_models import save_siglip, save_tokenizer_3v, tiny_vlm
from transformers import AutoTokenizer

from dataset.chat import SYSTEM_PROMPTS, ChatEncoder, RowError, load_tokenizer
from dataset.lm_dataset import VLMDataset
from dataset.row_forms import TOOL_CALLS, parse_conversation, read_row
from dataset.rows import Variation

pytest_plugins = ["tiny"]
EMPTY = "<think>\n\n</think>\n\n"
LISTS_TOOLS = """{%- if tools %}{{- '<|im_start|>system\\n' + messages[0].content + '\\nTools: ' + (tools | tojson) }}
{{- '<|im_end|>\\n' }}{%- else %}{{- '' }}{%- endif %}"""
FUNCTIONS = [{"name": "look", "parameters": {"type": "object"}}]
WITH_TOOLS = [
    {"role": "system", "content": "Be brief", "functions": FUNCTIONS},
    turn("user", "How warm is it?"),
    {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]},
    turn("tool", "7"),
    turn("tool", "8 <|im_end|>"),
    turn("assistant", "7 or 8"),
]


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer_3v(tmp_path / "tokenizer"))
    tokenizer.chat_template = LISTS_TOOLS
    return tokenizer


def rows_of(path, tokenizer, variation=None) -> tuple[VLMDataset, list[str]]:
    data = VLMDataset(path, None, tokenizer, 400, 64, cache_dir=path.parent / "cache", variation=variation)
    rows = data.read_rows(data.row_indices.tolist())
    return data, [tokenizer.decode(row["input_ids"]) for row in rows]


def test_rows_vary_by_their_shares_and_the_seed(tmp_path, tokenizer):
    rows = [{"conversations": [turn("user", f"q{number}"), turn("assistant", f"a{number}")]} for number in range(400)]
    rows += [{"conversations": [turn("system", "S"), *rows[0]["conversations"]]}] * 20
    thought = [turn("user", "q"), turn("assistant", "a") | {"reasoning_content": "hm"}]
    write_jsonl(path := tmp_path / "rows.jsonl", rows + [{"conversations": thought}] * 20)
    _, plain = rows_of(path, tokenizer)
    _, same = rows_of(path, tokenizer, Variation(1.0, 0.0, 42))
    assert same == plain and all(EMPTY in text for text in plain[:420])
    _, varied = rows_of(path, tokenizer, Variation(0.2, 0.2, 42))
    assert rows_of(path, tokenizer, Variation(0.2, 0.2, 42))[1] == varied
    assert rows_of(path, tokenizer, Variation(0.2, 0.2, 43))[1] != varied
    assert 0.1 < sum(EMPTY in text for text in varied[:420]) / 420 < 0.3
    added = [text for text in varied[:400] if text.startswith("<|im_start|>system\n")]
    assert 0.1 < len(added) / 400 < 0.3
    assert {text.split("\n")[1].removesuffix("<|im_end|>") for text in added} == set(SYSTEM_PROMPTS)
    assert all(text.startswith("<|im_start|>system\nS<|im_end|>") for text in varied[400:420])
    assert all("<think>\nhm\n</think>\n\na" in text for text in varied[420:])
    without = [text.replace(EMPTY, "") for text in plain[:400]]
    assert [text.partition("user\n")[2].replace(EMPTY, "") for text in varied[:400]] == [
        text.partition("user\n")[2] for text in without
    ]


def test_an_answer_without_its_think_block_is_learned_from_its_first_token(tokenizer):
    turns = [turn("user", "q"), turn("assistant", "a") | {"no_think": True}]
    [chat] = ChatEncoder(tokenizer, 64).encode([turns])
    [(start, end)] = chat.learned
    assert tokenizer.decode(chat.input_ids[start:end]) == "a<|im_end|>\n"


def test_turns_of_tools_are_learned_from_where_the_form_has_them(tmp_path, tokenizer):
    write_jsonl(path := tmp_path / "rows.jsonl", [{"conversations": WITH_TOOLS}])
    data, [text] = rows_of(path, tokenizer)
    assert text == (
        f"<|im_start|>system\nBe brief\nTools: {json.dumps(FUNCTIONS)}<|im_end|>\n"
        "<|im_start|>user\nHow warm is it?<|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n"
        "<tool_response>\n8 <|im_end|>\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY}7 or 8<|im_end|>\n"
    )
    [row] = data.read_rows([0])
    spans = zip(row["learned"][::2], row["learned"][1::2], strict=True)
    learned = [tokenizer.decode(row["input_ids"][start:end]) for start, end in spans]
    assert learned == [f"{EMPTY}<|im_end|>\n", f"{EMPTY}7 or 8<|im_end|>\n"]
    assert row["input_ids"].count(2) == 5  # what a tool gives ends nothing
    assert "tools" in data.rules


def test_empty_fields_of_tools_are_none():
    system = {"role": "system", "content": "Be brief", "tools": "", "functions": ""}
    turns, _ = read_row({"conversations": [system, turn("user", "q"), turn("assistant", "a")]})
    assert "functions" not in turns[0]


def test_the_order_of_turns_is_checked_before_they_are():
    calls = {"role": "assistant", "content": "", "tool_calls": "[{}]"}
    with pytest.raises(RowError, match=TOOL_CALLS):
        read_row({"conversations": [turn("user", "q"), turn("assistant", ""), calls]})


@pytest.mark.parametrize("functions", ["{", "[1]", 5, '"x"'])
def test_functions_that_are_none_are_refused(functions):
    turns = [{"role": "system", "content": "", "functions": functions}, turn("user", "q"), turn("assistant", "a")]
    with pytest.raises(RowError, match="turn 1: functions"):
        parse_conversation(turns)


@pytest.mark.skipif("MINIMIND3V_TOKENIZER" not in os.environ, reason="the published tokenizer is not at hand")
def test_tools_are_the_tokens_of_the_published_template():
    tokenizer = AutoTokenizer.from_pretrained(os.environ["MINIMIND3V_TOKENIZER"])
    for turns in (WITH_TOOLS, WITH_TOOLS[1:], [WITH_TOOLS[0] | {"content": ""}, *WITH_TOOLS[1:2], WITH_TOOLS[-1]]):
        turns = [one | {"content": one["content"].replace("<|im_end|>", "")} for one in turns]
        [chat] = ChatEncoder(tokenizer, 64).encode([parse_conversation(turns)])
        plain = [{"role": one["role"], "content": one["content"]} for one in turns]
        whole = tokenizer.apply_chat_template(plain, tools=turns[0].get("functions"), tokenize=False)
        assert chat.input_ids == tokenizer(whole).input_ids
        header, end = tokenizer("<|im_start|>assistant\n").input_ids, tokenizer("<|im_end|>\n").input_ids
        starts = [i + len(header) for i in range(len(chat.input_ids)) if chat.input_ids[i : i + len(header)] == header]
        ends = [i + len(end) for i in range(len(chat.input_ids)) if chat.input_ids[i : i + len(end)] == end]
        assert chat.learned == [(start, next(stop for stop in ends if stop > start)) for start in starts]


def test_a_model_can_be_let_think(world, tmp_path):
    tower, out = save_siglip(tmp_path / "tower"), tmp_path / "out"
    flags = ["--vision_model_path", tower, "--tokenizer_path", save_tokenizer_3v(tmp_path / "tokenizer")]
    flags += ["--save_dir", out, "--device", "cpu", "--image", world.images / "0.jpg", "--max_new_tokens", 4]
    shape = {"qk_norm": True, "n_shared_experts": 0, "vocab_size": 300, "image_token_id": 12, "projector": "norm_mlp"}
    model = tiny_vlm(tower, **shape, num_key_value_heads=2, vision_hidden_size=32)
    out.mkdir()
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, out / "sft_vlm_32.pth")
    plain, thinking = (world.run(EVAL, *flags, "--open_thinking", thinks).passed().out for thinks in (0, 1))
    assert (
        "tokens/s" in plain
        and "tokens/s" in thinking
        and "tokens/s" not in world.run(EVAL, *flags, "--show_speed", 0).passed().out
    )
    refused = world.run(EVAL, *world.eval_files(world.out), "--weight", "llm", "--open_thinking", 1)
    refused.refused("the prompt form of these weights has no think block")
    encoder = ChatEncoder(load_tokenizer(tmp_path / "tokenizer"), 64)
    encoder.open_thinking = True
    [chat] = encoder.encode([[turn("user", "q")]], add_generation_prompt=True)
    assert encoder.tokenizer.decode(chat.input_ids).endswith("<|im_start|>assistant\n<think>\n")


def test_shares_are_for_minimind_3v(world, tmp_path):
    flags = [*world.files("pretrain", tmp_path / "out"), "--from_weight", "none", "--empty_think_ratio", 0.5]
    world.run(PRETRAIN, *flags).refused("are for minimind-3v's prompt form")
