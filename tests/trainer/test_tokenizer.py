"""The tokenizer that ships, and the script that trains one, on a tiny corpus."""

import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from common.paths import ROOT
from scripts.builtin import train_tokenizer

SHIPPED = ROOT / "model" / "tokenizer"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SCENE_WORDS = """
红色 黄色 蓝色 绿色 紫色 橙色 黑色 白色 圆形 正方形 三角形 五角星 菱形 十字形
左上角 上方 右上角 左边 中间 右边 左下角 下方 右下角 大 小 一个 两个 图中 图片 描述 物体 颜色 形状 位置
""".split()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(SHIPPED))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The script's folder, with a tiny corpus: Chinese, English, image characters and a special token."""
    texts = ["图中有一个红色的圆形。\nThe red circle is here @@@@ a@b.com\n", "描述@图片 zzqqzzqq<|im_end|>"] * 50
    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "built_in_corpus", lambda: texts)
        patch.setattr(train_tokenizer, "VOCAB_SIZE", 300)
        patch.setattr(train_tokenizer, "OUT", folder)
        patch.setattr(sys, "argv", ["train_tokenizer.py"])
        train_tokenizer.main()
    return folder


def assert_form(folder, vocab_size):
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert [model["vocab"][token] for token in tokens] == list(range(vocab_size))
    assert tokens[:3] == SPECIAL_TOKENS
    assert tokens[3:259] == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [token for token in tokens if "@" in token] == ["@"] and tokens[34] == "@"
    assert len(model["merges"]) == vocab_size - 259
    assert max(map(len, tokens[3:])) <= 12  # one symbol a byte: no phrases


def test_script_trains_the_form(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (trained / "tokenizer_config.json").read_bytes() == (SHIPPED / "tokenizer_config.json").read_bytes()
    assert_form(trained, vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(str(trained))
    assert len(tokenizer) == 300
    assert len(tokenizer.encode("红色")) < 6 and len(tokenizer.encode("zzqq")) < 4  # learned


def test_shipped_form(tokenizer):
    assert_form(SHIPPED, vocab_size=6400)
    assert len(tokenizer) == 6400 and tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 32768
    assert sorted(path.name for path in SHIPPED.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_shipped_adds_nothing_of_its_own(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("a"), skip_special_tokens=False) == "a"


def test_special_tokens_are_found_in_text_and_left_out_of_answers(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\n好<|im_end|>\n<|endoftext|>")
    assert (ids[0], ids[-3], ids[-1]) == (1, 2, 0)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n好\n"


def test_an_image_is_196_tokens(tokenizer):
    assert tokenizer.encode("@" * 196) == [34] * 196
    assert tokenizer.encode("描述这张图片\n" + "@" * 392 + "\n好").count(34) == 392


@pytest.mark.parametrize(
    "text", ["a@b", " @", "@ ", "@@", "邮箱a@b.com", "图@图", "\n@\n", "@1", "。@，", "<@>", "@\u0301", "@'s"]
)
def test_the_image_character_is_always_a_token_of_its_own(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.count(34) == text.count("@")
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None, database=None)  # no database: nothing is written into the project
@given(text=st.text(alphabet=st.one_of(st.sampled_from("@ \n.'红，a"), st.characters(exclude_categories=["Cs"]))))
@example(" a  ,  b . n't 's\r\n\t")
@example("👩‍👩‍👧 e\u0301 \u00e9 \u3000　𠀀 \x00 \ufffd")
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(34) == text.count("@")


@pytest.mark.parametrize("word", SCENE_WORDS)
def test_scene_words_are_one_or_two_tokens(tokenizer, word):
    assert len(tokenizer.encode(word)) <= 2
    assert all(len(tokenizer.encode(character)) == 1 for character in word)


def test_punctuation_digits_and_newline_are_single_tokens(tokenizer):
    for character in "，。！？：；（）、“”,.!?:;()\n0123456789":
        assert len(tokenizer.encode(character)) == 1, character


def test_chat_template(tokenizer):
    turns = [{"role": "user", "content": "描述\n@@"}, {"role": "assistant", "content": " 红色。\n"}]
    system = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    user = "<|im_start|>user\n描述\n@@<|im_end|>\n"
    answer = "<|im_start|>assistant\n 红色。\n<|im_end|>\n"

    def render(conversation, **options):
        return tokenizer.apply_chat_template(conversation, tokenize=False, **options)

    assert render(turns) == system + user + answer
    assert render(turns[:1], add_generation_prompt=True) == system + user + "<|im_start|>assistant\n"
    assert render(turns + turns) == system + (user + answer) * 2
    own_system = [{"role": "system", "content": "简短"}, *turns]
    assert render(own_system) == "<|im_start|>system\n简短<|im_end|>\n" + user + answer
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(system + user + answer)
