"""The rows of a file, parsed and tokenised once: what is learned, where images stand, what is wrong with a row.

The `datasets` library keeps the result as memory-mapped Arrow, so neither start-up time nor memory grows with the file.
"""

import contextlib
import hashlib
import json
import os

import datasets
from transformers import PreTrainedTokenizerBase

from dataset import foreign, formats
from dataset.chat import ChatEncoder, EncodedChat
from dataset.conversation import IMAGE_TAG, RowError, check_images, parse_picture_names
from dataset.forms import FORMS, read_row
from dataset.tokenizer import tokenizer_hash

# Part of the token cache's key: raise it when the same row must give other tokens than before.
ENCODING_VERSION = 8
ROWS_PER_PROCESS = 20_000
BLANK_LINE = "blank"
COLUMNS = datasets.Features(
    {
        "line": datasets.Value("int32"),
        "reason": datasets.Value("string"),  # what is wrong with the row; empty for a good one
        "input_ids": datasets.List(datasets.Value("uint16")),
        "learned": datasets.List(datasets.Value("int32")),  # start, end, start, end ... of the learned spans
        "image_starts": datasets.List(datasets.Value("int32")),
        "pictures": datasets.List(datasets.Value("string")),  # file names; a parquet has none
        "picture_numbers": datasets.List(datasets.Value("int32")),  # of a parquet's pictures, see dataset.parquet
        "picture_hash": datasets.Value("int64"),  # of the first image's bytes or name: equal for the same image
        "tag_added": datasets.Value("bool"),  # the text had no <image>, so the picture was put first
        "text_only": datasets.Value("bool"),  # the text had no <image>, and the picture stands for none
        "reasoning": datasets.Value("bool"),  # an answer has reasoning_content
        "empty_thinking": datasets.Value("bool"),  # an answer began with an empty think block
        "learned_tokens": datasets.Value("int32"),
        "cut_tokens": datasets.Value("int32"),  # lost to max_length; of a row refused for it, all
    }
)
NOTHING = {name: [] if isinstance(column, datasets.List) else 0 for name, column in COLUMNS.items()} | {"reason": ""}


def tokenise_rows(
    raw: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, image_tokens: int
) -> datasets.Dataset:
    """Returns the tokenised rows (COLUMNS) in the file's order, from the cache if they are in it.

    Args:
        raw: Lines of a jsonl (`text`), or the rows of a parquet as `dataset.parquet` keeps them.
    """
    forms = [(name, form.source) for name, form in FORMS.items()]
    key = f"{raw._fingerprint} {tokenizer_hash(tokenizer)} {max_length} {image_tokens} {ENCODING_VERSION} {forms}"
    processes = min(os.cpu_count() or 1, 1 + len(raw) // ROWS_PER_PROCESS)
    with contextlib.nullcontext() if len(raw) >= ROWS_PER_PROCESS else formats.without_bars():
        return raw.map(
            RowTokeniser(ChatEncoder(tokenizer, image_tokens), max_length),
            input_columns=raw.column_names,
            with_indices=True,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=raw.column_names,
            features=COLUMNS,
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            desc="tokenising",
        )


class RowTokeniser:
    """Maps a batch of raw rows to COLUMNS; what is wrong with a row goes into its `reason`."""

    def __init__(self, encoder: ChatEncoder, max_length: int):
        self.encoder, self.max_length = encoder, max_length
        self.forms = FORMS  # a spawned process that unpickles them imports, and so registers, forms from outside

    def __call__(self, *columns: list) -> dict[str, list]:
        *columns, numbers = columns
        parsed = [parse(*values) for values in zip(*columns, strict=True)]
        chats = iter(self.encoder.encode([row["turns"] for row in parsed if "turns" in row]))
        encoded = [self._encoded(row, next(chats)) if "turns" in row else row for row in parsed]
        rows = [NOTHING | row | {"line": number + 1} for number, row in zip(numbers, encoded, strict=True)]
        return {name: [row[name] for row in rows] for name in COLUMNS}

    def _encoded(self, row: dict, chat: EncodedChat) -> dict:
        whole_length = len(chat.input_ids)
        try:
            chat = self.encoder.truncate(chat, self.max_length)
        except RowError as error:
            return {"reason": str(error), "cut_tokens": whole_length}
        thoughts = [turn["reasoning_content"] for turn in row["turns"] if "reasoning_content" in turn]
        return row | {
            "input_ids": chat.input_ids,
            "learned": [edge for span in chat.learned for edge in span],
            "image_starts": chat.image_starts,
            "reasoning": any(thoughts),
            "empty_thinking": "" in thoughts,
            "learned_tokens": sum(end - start for start, end in chat.learned),
            "cut_tokens": whole_length - len(chat.input_ids),
        }


def parse(*values) -> dict:
    """Returns the `turns` of a raw row and what COLUMNS says of its images, or the `reason` why it is refused."""
    try:
        return parse_line(*values) if len(values) == 1 else parse_parquet_row(*values)
    except RowError as error:
        return {"reason": str(error)}


def parse_line(line: str) -> dict:
    if not line.strip():
        raise RowError(BLANK_LINE)
    if "\ufffd" in line:
        raise RowError("the line is not UTF-8 (or holds U+FFFD, the sign of a text once broken)")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise RowError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    turns, images = read_row(row)
    listed = images if isinstance(images, list) else [images]
    if any(isinstance(one, str) and foreign.is_base64(one.rpartition(",")[2]) for one in listed):  # also a data: URL
        raise RowError(f"its picture is base64 text; this makes training data of the file: {foreign.command('FILE')}")
    names = parse_picture_names(images)
    try:
        tag_added = check_images(turns, len(names))
    except RowError as error:
        if not isinstance(images, str) or len(names) < 2:
            raise
        cure = f'a name with a comma goes in a list, ["a, b.jpg"], as {foreign.command("FILE")} writes it'
        raise RowError(f"{error} (commas divide names; {cure})") from error
    picture_hash = formats.hash_63(names[0].encode() if names else line.encode())
    return {"turns": turns, "pictures": names, "picture_hash": picture_hash, "tag_added": tag_added}


def parse_parquet_row(conversations: str | None, pictures: list | None, picture_hash: int, is_blank: bool) -> dict:
    turns, inside = read_row({"conversations": conversations})
    if inside:
        raise RowError(f"its turns name pictures; this makes training data of the file: {foreign.command('FILE')}")
    if pictures is None:
        raise RowError("the parquet holds a picture's path only, not its bytes (write it from opened pictures)")
    text_only = is_blank and not any(IMAGE_TAG in turn["content"] for turn in turns)
    pictures = [] if text_only else pictures
    tag_added = check_images(turns, len(pictures))
    if not pictures:
        picture_hash = formats.hash_63(json.dumps(turns).encode())
    images = {"picture_numbers": pictures, "picture_hash": picture_hash}
    return images | {"turns": turns, "tag_added": tag_added, "text_only": text_only}
