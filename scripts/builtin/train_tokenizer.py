"""Train the shipped tokenizer: byte-level BPE with 6400 entries, for Chinese and English.

    python scripts/builtin/train_tokenizer.py   into out/tokenizer; needs jieba's word list: pip install jieba==0.42.1

The corpus is jieba's word list (MIT licence), each word repeated in proportion to its frequency;
the docstrings of Python's standard library (PSF licence); and words of simple image descriptions, listed below. The
result is reproducible byte for byte with the same jieba, Python and tokenizers (shipped: 0.42.1, 3.11.7, 0.23.3).

Byte pair encoding: Sennrich et al. 2016, arXiv:1508.07909; over bytes: GPT-2 (Radford et al. 2019).
"""

import ast
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser
from common.files import write_atomically
from common.paths import BUILTIN_TOKENIZER_DIR, SAVE_DIR
from dataset.chat import IMAGE_CHARACTER

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0 (padding, unknown), 1 (begin), 2 (end)
VOCAB_SIZE = 6400
OUT = SAVE_DIR / "tokenizer"
MAX_TOKEN_BYTES = 12  # four Chinese characters; longer tokens would be phrases, too rare for a small model to learn

JIEBA_DIVISOR = 80  # jieba's frequencies sum to 60 million; this gives about two Chinese merges for each English one
SCENE_REPEATS = 3000  # for words of image descriptions, which are too rare in the other sources
SCENE_WORDS = """
红色 黄色 蓝色 绿色 紫色 橙色 黑色 白色 灰色 粉色 棕色 红 黄 蓝 绿 紫 橙 黑 白 灰
圆形 正方形 三角形 五角星 菱形 十字形 长方形 圆 方 角
左上角 上方 右上角 左边 中间 右边 左下角 下方 右下角 左 右 上 下 中 大 小 大的 小的
一个 两个 三个 四个 一 二 三 四 五 六 七 八 九 十 零 个 张 只
图 图中 图片 图像 照片 画面 这张 描述 物体 颜色 形状 位置 背景 什么 哪里 多少 几个 是 有 在 的 和 没有 请 看到 吗 呢
""".split()
SCENE_ENGLISH = """
image picture photo shape color object position background red yellow blue green purple orange black white circle square
triangle star diamond cross large small left right top bottom middle center corner upper lower above below describe
""".split()
PUNCTUATION = list("，。！？：；（）、“”‘’《》【】—…·,.!?:;()[]{}\"'-+*/=<>%#&~") + ["……", "——"]

# Standard-library folders that hold third-party code or little prose.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "__pycache__"}
NOT_PROSE = (">>>", "...", "==", "--", "+-", "|")  # code examples, rules and tables


def built_in_corpus() -> Iterator[str]:
    package = importlib.util.find_spec("jieba")  # not imported: that is slow and prints
    for line in Path(package.origin).with_name("dict.txt").read_text(encoding="utf-8").splitlines():
        word, frequency = line.split(" ")[:2]
        # Outside GB 2312 the frequent "words" are nearly all pieces of wrongly decoded text.
        if word == word.encode("gb2312", "ignore").decode("gb2312"):
            yield f"{word}\n" * round(int(frequency) / JIEBA_DIVISOR)

    library, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (" ".join(line.split()) for line in (ast.get_docstring(node) or "").splitlines())
                text = "\n".join(line for line in lines if line and not line.startswith(NOT_PROSE))
                if text not in seen:  # generated modules repeat the same docstrings
                    seen.add(text)
                    yield text

    for word in SCENE_WORDS + PUNCTUATION:
        yield f"{word}\n" * SCENE_REPEATS
    for word in SCENE_ENGLISH:
        yield f"{word}\n {word}\n" * (SCENE_REPEATS // 10)


def main():
    ArgumentParser(description=__doc__).parse_args()
    # No merge may hold an image character or special token, so each becomes a line break, which separates words.
    unwanted = re.compile("|".join(map(re.escape, (IMAGE_CHARACTER, *SPECIAL_TOKENS))))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    limits = {"vocab_size": VOCAB_SIZE, "max_token_length": MAX_TOKEN_BYTES, "special_tokens": SPECIAL_TOKENS}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(**limits, initial_alphabet=alphabet, show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator((unwanted.sub("\n", text) for text in built_in_corpus()), trainer)
    config = BUILTIN_TOKENIZER_DIR / "tokenizer_config.json"  # special tokens and chat template are the same
    write_atomically(OUT / "tokenizer.json", lambda file: file.write(tokenizer.to_str(pretty=True).encode()))
    write_atomically(OUT / config.name, lambda file: file.write(config.read_bytes()))
    print(f"vocabulary: {tokenizer.get_vocab_size()} entries, saved: {OUT}")


if __name__ == "__main__":
    main()
