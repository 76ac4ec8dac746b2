"""Train a tokenizer: byte-level BPE with 6400 entries, for Chinese and English.

    python trainer/train_tokenizer.py                                    build the shipped one again, into out/tokenizer
    python trainer/train_tokenizer.py --data_path a.jsonl b.txt          train on your own text

model/tokenizer/ already holds a trained one: you need this script only for another vocabulary. A language model and its
tokenizer belong together, so weights that were trained with one tokenizer cannot be used with another.

Without --data_path the corpus is made of what anyone can install:
    Chinese   the words and frequencies of the package jieba (MIT licence), each word as often as its frequency says
    English   the docstrings of Python's own standard library (PSF licence)
    both      the words and punctuation of simple picture descriptions, listed below
The result is the same, byte for byte, for the same jieba, Python and tokenizers (shipped: 0.42.1, 3.11.7, 0.23.3).

Method: byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes, as in GPT-2 (Radford et al. 2019).
"""

import argparse
import ast
import importlib.util
import json
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, file_path  # noqa: E402
from common.paths import SAVE_DIR  # noqa: E402
from dataset.chat import SYSTEM_PROMPT  # noqa: E402

VOCAB_SIZE = 6400
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2: padding and unknown, begin, end
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
# An image is 196 of these in a row, and each must stay a token of its own: no merge may contain it.
IMAGE_CHARACTER, IMAGE_TOKEN_ID = "@", 34
# Four Chinese characters. Longer tokens would be whole phrases, which a small model sees too rarely to learn.
MAX_TOKEN_BYTES = 12
MODEL_MAX_LENGTH = 32768

CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

JIEBA_VERSION = "0.42.1"
# jieba's frequencies sum to 60 million. Divided by this they give about two Chinese merges for each English one.
JIEBA_DIVISOR = 80
# Words of picture descriptions that the general sources hold too rarely, and how often each is added.
SCENE_REPEATS = 3000
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

# Folders of the standard library that are other people's packages, or hold little prose.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "__pycache__"}
_NOT_PROSE = (">>>", "...", "==", "--", "+-", "|")  # code examples, rules and tables


def read_texts(paths: list[Path]) -> Iterator[str]:
    """Yields the texts of .txt files line by line, and of .jsonl files every "text" and every turn's "content".

    Raises:
        ValueError: a file is missing, not UTF-8, of another kind, or a line of it is not as described.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file. Check --data_path.")
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{path}: --data_path takes .txt and .jsonl files.")
    for path in paths:
        try:
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, start=1):
                    if path.suffix == ".txt":
                        yield line
                    elif line.strip():
                        yield from _texts_of_row(line, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}). Convert the file to UTF-8.") from error


def _texts_of_row(line: str, where: str) -> Iterator[str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error
    expected = 'expected {"text": "..."} or {"conversations": [{"role": "...", "content": "..."}]}'
    if not isinstance(row, dict) or not ("text" in row or "conversations" in row):
        raise ValueError(f"{where}: {expected}.")
    turns = row.get("conversations", [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: {expected}.")
    yield from (text for text in [row.get("text"), *(turn.get("content") for turn in turns)] if isinstance(text, str))


def chinese_words() -> Iterator[str]:
    """Yields each word of jieba's list as often as its frequency says, one word a line.

    Raises:
        ValueError: jieba is not installed.
    """
    # The list is read as a file: importing jieba is slow and prints.
    package = importlib.util.find_spec("jieba")
    words_file = Path(package.origin).parent / "dict.txt" if package and package.origin else None
    if words_file is None or not words_file.is_file():
        raise ValueError(
            f"the built-in corpus needs jieba's word list: pip install jieba=={JIEBA_VERSION}, "
            "or give your own text with --data_path."
        )
    with words_file.open(encoding="utf-8") as lines:
        for line in lines:
            word, frequency = line.split(" ")[:2]
            if _is_simplified(word):
                yield f"{word}\n" * round(int(frequency) / JIEBA_DIVISOR)


def _is_simplified(word: str) -> bool:
    # The list's frequent characters include pieces of wrongly decoded text. All but one of them lie outside GB 2312.
    try:
        word.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def english_docstrings() -> Iterator[str]:
    """Yields the docstrings of the standard library's modules, classes and functions, without their code examples."""
    library = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        with tokenize.open(path) as source:
            tree = ast.parse(source.read())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node) or ""
                lines = (" ".join(line.split()) for line in docstring.splitlines())
                text = "\n".join(line for line in lines if line and not line.startswith(_NOT_PROSE))
                if text not in seen:  # some modules are generated and say the same a hundred times
                    seen.add(text)
                    yield text


def built_in_corpus() -> Iterator[str]:
    """Yields the corpus of the shipped tokenizer (see the top of this file)."""
    yield from chinese_words()
    yield from english_docstrings()
    for word in SCENE_WORDS + PUNCTUATION:
        yield f"{word}\n" * SCENE_REPEATS
    for word in SCENE_ENGLISH:
        yield f"{word}\n {word}\n" * (SCENE_REPEATS // 10)


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains a byte-level BPE tokenizer of exactly `vocab_size` entries.

    Args:
        texts: the corpus. Image characters and special tokens in it are ignored.
        vocab_size: number of entries: 3 special tokens, 256 bytes, the rest merges. At least 259.

    Raises:
        ValueError: the corpus is too small for that many entries.
    """
    # A line break in its place keeps the words on both sides apart.
    unwanted = re.compile("|".join(map(re.escape, (IMAGE_CHARACTER, *SPECIAL_TOKENS))))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((unwanted.sub("\n", text) for text in texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the corpus is too small: it gives {tokenizer.get_vocab_size()} entries of {vocab_size}. "
            "Give more text with --data_path or ask for fewer with --vocab_size."
        )
    _check_form(tokenizer)
    return tokenizer


def _check_form(tokenizer: Tokenizer) -> None:
    """Everything else relies on these ids; a change in the tokenizers library must not go unnoticed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    expected = [*SPECIAL_TOKENS, *alphabet]
    found = [tokenizer.id_to_token(index) for index in range(len(expected))]
    image_tokens = [token for token in tokenizer.get_vocab() if IMAGE_CHARACTER in token]
    if found != expected or tokenizer.token_to_id(IMAGE_CHARACTER) != IMAGE_TOKEN_ID or len(image_tokens) != 1:
        raise RuntimeError("the tokenizers library gave an unexpected vocabulary: please report its version.")


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads, into `folder`."""
    padding, begin, end = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": padding,
        "unk_token": padding,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")


def print_summary(tokenizer: Tokenizer, folder: Path) -> None:
    """Prints what was made: entries, compression on a line of each language, where it is, what to do with it."""
    merges = [token for token, index in tokenizer.get_vocab().items() if index >= MIN_VOCAB_SIZE]
    ascii_merges = sum(token.lstrip("Ġ").isascii() for token in merges)
    size = tokenizer.get_vocab_size()
    print(f"vocabulary: {size} = {len(SPECIAL_TOKENS)} special + 256 bytes + {len(merges)} merges")
    print(f"merges: {len(merges) - ascii_merges} Chinese and other, {ascii_merges} English")
    samples = {
        "Chinese": "图中左上角有一个红色的圆形，右边有两个小的三角形，今天的天气很好。",
        "English": "There is a red circle in the upper left corner of the image, and the sky is blue.",
    }
    for language, sample in samples.items():
        tokens = len(tokenizer.encode(sample).ids)
        print(f"{language}: {len(sample.encode()) / tokens:.2f} bytes per token, {tokens} tokens for: {sample}")
    print(f"saved: {folder}")
    print(f"next: train a language model with it, then pass --tokenizer_path {folder}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Train a byte-level BPE tokenizer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data_path",
        type=file_path,
        nargs="+",
        help="texts: .txt or .jsonl files; left out, the built-in corpus is used",
    )
    parser.add_argument("--save_dir", type=file_path, default=SAVE_DIR / "tokenizer", help="folder to write")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="number of entries")
    args = parser.parse_args()
    problems = []
    if args.vocab_size < MIN_VOCAB_SIZE:
        problems.append(f"--vocab_size must be at least {MIN_VOCAB_SIZE} (special tokens and bytes)")
    if args.save_dir.exists() and not args.save_dir.is_dir():
        problems.append(f"--save_dir {args.save_dir} is a file, not a folder")
    if problems:
        parser.error("; ".join(problems))
    return args


def main() -> None:
    args = parse_arguments()
    texts = read_texts(args.data_path) if args.data_path else built_in_corpus()
    try:
        tokenizer = train(texts, args.vocab_size)
        save(tokenizer, args.save_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer.py: error: {error}")
    print_summary(tokenizer, args.save_dir)


if __name__ == "__main__":
    main()
