"""The rows of a file, parsed and tokenised once: what is learned, where images stand, what is wrong with a row.

The `datasets` library keeps the result as memory-mapped Arrow, so neither start-up time nor memory grows with the file.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field

import datasets
from transformers import PreTrainedTokenizerBase

from dataset import formats
from dataset.chat import ChatEncoder
from dataset.conversation import IMAGE_TAG, RowError, check_images, parse_conversation, parse_picture_names
from dataset.tokenizer import tokenizer_hash

# Part of the token cache's key: raise it when the same row must give other tokens than before.
ENCODING_VERSION = 7
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


@dataclass
class Row:
    """A row that can be learned from: its turns, and what COLUMNS says of it before it is tokenised."""

    turns: list[dict]
    pictures: list[str] = field(default_factory=list)
    picture_numbers: list[int] = field(default_factory=list)
    picture_hash: int = 0
    tag_added: bool = False
    text_only: bool = False

    def columns(self) -> dict:
        thoughts = [turn["reasoning_content"] for turn in self.turns if "reasoning_content" in turn]
        return vars(self) | {"reasoning": any(thoughts), "empty_thinking": "" in thoughts}


def tokenise_rows(
    raw, tokenizer: PreTrainedTokenizerBase, max_length: int, image_tokens: int, num_proc: int | None
) -> datasets.Dataset:
    """Returns the tokenised rows (COLUMNS) in the file's order, from the cache where they are there.

    Args:
        raw: Lines of a jsonl (`text`), or the rows of a parquet as `dataset.parquet` keeps them.
        num_proc: Processes; by default one per 20,000 rows, as far as there are cores.
    """
    key = f"{raw._fingerprint} {tokenizer_hash(tokenizer)} {max_length} {image_tokens} {ENCODING_VERSION}"
    processes = num_proc or min(os.cpu_count() or 1, 1 + len(raw) // ROWS_PER_PROCESS)
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

    def __call__(self, *columns: list) -> dict[str, list]:
        *columns, indices = columns  # the last are the rows' numbers
        parse = parse_line if len(columns) == 1 else parse_parquet_row
        parsed = []
        for values in zip(*columns, strict=True):
            try:
                parsed.append(parse(*values))
            except RowError as error:
                parsed.append(str(error))
        chats = iter(self.encoder.encode([row.turns for row in parsed if isinstance(row, Row)]))
        rows = [
            self._row(index, next(chats), row) if isinstance(row, Row) else refused_row(index, row)
            for index, row in zip(indices, parsed, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in COLUMNS}

    def _row(self, index: int, chat, row: Row) -> dict:
        whole_length = len(chat.input_ids)
        try:
            chat = self.encoder.truncate(chat, self.max_length)
        except RowError as error:
            return refused_row(index, str(error)) | {"cut_tokens": whole_length}
        return row.columns() | {
            "line": index + 1,
            "reason": "",
            "input_ids": chat.input_ids,
            "learned": [edge for span in chat.learned for edge in span],
            "image_starts": chat.image_starts,
            "learned_tokens": sum(end - start for start, end in chat.learned),
            "cut_tokens": whole_length - len(chat.input_ids),
        }


def refused_row(index: int, reason: str) -> dict:
    nothing = {name: [] if isinstance(column, datasets.List) else 0 for name, column in COLUMNS.items()}
    return nothing | {"line": index + 1, "reason": reason}


def parse_line(line: str) -> Row:
    """Returns the row of a jsonl line.

    Raises:
        RowError: If it cannot be learned from.
    """
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
    formats.check_row(row)
    turns, names = parse_conversation(row.get("conversations")), parse_picture_names(row.get("image"))
    try:
        tag_added = check_images(turns, len(names))
    except RowError as error:
        if not isinstance(row.get("image"), str) or len(names) < 2:
            raise
        cure = f'a name with a comma goes in a list, ["a, b.jpg"], as {formats.foreign.command("FILE")} writes it'
        raise RowError(f"{error} (commas divide names; {cure})") from error
    return Row(turns, names, [], formats.hash_63(names[0].encode() if names else line.encode()), tag_added)


def parse_parquet_row(conversations: str | None, pictures: list | None, picture_hash: int, is_blank: bool) -> Row:
    """Returns a parquet's row, given as `dataset.parquet` keeps it; raises RowError as `parse_line` does."""
    turns = parse_conversation(conversations)
    if pictures is None:
        raise RowError("the parquet holds a picture's path only, not its bytes (write it from opened pictures)")
    text_only = is_blank and not any(IMAGE_TAG in turn["content"] for turn in turns)
    pictures = [] if text_only else pictures
    tag_added = check_images(turns, len(pictures))
    if not pictures:
        picture_hash = formats.hash_63(json.dumps(turns).encode())
    return Row(turns, [], pictures, picture_hash, tag_added, text_only)
