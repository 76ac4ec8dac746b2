"""The rows of a file, parsed and tokenised once: learned spans, image positions, what is wrong with a row.

The `datasets` library keeps the result as memory-mapped Arrow: neither start-up time nor memory grows with the file,
and a loader's worker only decodes images.
"""

import contextlib
import hashlib
import json
import os
from random import Random
from typing import NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from dataset import file_kinds
from dataset.chat import IMAGE_TAG, SYSTEM_PROMPTS, ChatEncoder, RowError, encoder_for, tokenizer_hash
from dataset.row_forms import FORMS, TOOL_CALLS, check_images, form_of_row, parse_json, parse_picture_names, read_row

# Part of the token cache's key: raise it when the same row must give other tokens than before.
ENCODING_VERSION = 9
ROWS_PER_PROCESS = 20_000
BLANK_LINE = "blank"
COLUMNS = datasets.Features(
    line=datasets.Value("int32"),
    reason=datasets.Value("string"),  # what is wrong with the row; empty for a good one
    input_ids=datasets.List(datasets.Value("uint16")),
    learned=datasets.List(datasets.Value("int32")),  # start, end, start, end ... of the learned spans
    image_starts=datasets.List(datasets.Value("int32")),
    pictures=datasets.List(datasets.Value("string")),  # file names; a parquet has none
    picture_numbers=datasets.List(datasets.Value("int32")),  # of a parquet's pictures, see dataset.parquet
    picture_hash=datasets.Value("int64"),  # of the first image's bytes or name: equal for the same image
    kinds=datasets.List(datasets.Value("string")),  # special kinds, and the form unless conversations
    learned_tokens=datasets.Value("int32"),
    cut_tokens=datasets.Value("int32"),  # lost to max_length; all tokens if the row was refused for length
)
WIDE = datasets.Features(COLUMNS | {"input_ids": datasets.List(datasets.Value("int32"))})  # of large vocabularies
EMPTY_ROW = {name: [] if isinstance(column, datasets.List) else 0 for name, column in COLUMNS.items()} | {"reason": ""}
# How special rows are treated, by kind.
KINDS = {
    "no <image>": "the picture is put first",
    "text only": "no <image>, and the black 8 x 8 placeholder picture; learned as text",
    "reasoning": "minimind-3v learns it in the answer's think block, others the answer alone",
    "empty think": "minimind-3v begins every answer so; for others the empty think block is dropped",
    "tool calls": "left out: only minimind-3v's prompt form has tools; not counted as bad",
    "tools": "what a tool gives is learned as a user's turn, calls are not",
}


class BadRow(NamedTuple):
    """A row that is left out: its line in a jsonl or row in a parquet, from 1, and why."""

    line: int
    reason: str


class Variation(NamedTuple):
    """How minimind-3v's rows vary, as the original varies them; each row once, by its number and the seed."""

    empty_think: float  # share of rows that keep their empty think blocks
    system: float  # share of rows without a system turn that get one of SYSTEM_PROMPTS
    seed: int


def tokenise_rows(
    raw: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, image_tokens: int, variation=None
) -> datasets.Dataset:
    """Returns the tokenised rows (COLUMNS) in the file's order, from the cache if they are in it."""
    forms = [(name, form.source) for name, form in FORMS.items()]
    key = raw._fingerprint, tokenizer_hash(tokenizer), max_length, image_tokens, ENCODING_VERSION, forms, variation
    encoder = encoder_for(tokenizer, image_tokens)
    processes = min(os.cpu_count() or 1, 1 + len(raw) // ROWS_PER_PROCESS)
    with contextlib.nullcontext() if len(raw) >= ROWS_PER_PROCESS else file_kinds.without_bars():
        return raw.map(
            tokenise_batch,
            # A spawned process that unpickles FORMS imports those from outside.
            fn_kwargs={"encoder": encoder, "max_length": max_length, "variation": variation, "forms": FORMS},
            input_columns=raw.column_names,
            with_indices=True,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=raw.column_names,
            features=COLUMNS if len(tokenizer) <= 1 << 16 else WIDE,
            new_fingerprint=hashlib.sha256(" ".join(map(str, key)).encode()).hexdigest()[:32],
            desc="tokenising",
        )


def tokenise_batch(*columns: list, encoder: ChatEncoder, max_length: int, variation=None, forms=FORMS) -> dict:
    """Maps a batch of raw rows and their numbers to COLUMNS; what is wrong with a row goes into its `reason`."""
    *columns, numbers = columns
    rows = []
    for number, *values in zip(numbers, *columns, strict=True):
        whole_length = 0
        try:
            row = parse_line(*values) if len(values) == 1 else parse_parquet_row(*values)
            turns = row["turns"]
            if any("tool" in turn for turn in turns):
                if not encoder.is_3v:
                    raise RowError(TOOL_CALLS)
                if any("functions" in turn for turn in turns) and not encoder.tokenizer.chat_template:
                    raise RowError("it lists functions, and the tokenizer has no chat template that says how")
                row["kinds"].append("tools")
            if variation is not None:
                random = Random(f"{variation.seed} {number}")
                prompt, keeps = random.choice(SYSTEM_PROMPTS), random.random() < variation.empty_think
                if random.random() < variation.system and turns[0]["role"] != "system":
                    turns = [{"role": "system", "content": prompt}, *turns]
                turns = [turn if keeps or turn["role"] != "assistant" else turn | {"no_think": True} for turn in turns]
            [chat] = encoder.encode([turns])
            whole_length = len(chat.input_ids)
            chat = encoder.truncate(chat, max_length)
            thoughts = [turn["reasoning_content"] for turn in turns if "reasoning_content" in turn]
            row["kinds"] += ["reasoning"] * any(thoughts) + ["empty think"] * ("" in thoughts)
            row["input_ids"], row["image_starts"] = chat.input_ids, chat.image_starts
            row["learned"] = [edge for span in chat.learned for edge in span]
            row["learned_tokens"] = sum(end - start for start, end in chat.learned)
            row["cut_tokens"] = whole_length - len(chat.input_ids)
        except RowError as error:
            row = {"reason": str(error), "cut_tokens": whole_length}
        rows.append(EMPTY_ROW | row | {"line": number + 1})
    return {name: [row[name] for row in rows] for name in COLUMNS}


def parse_line(line: str) -> dict:
    if not line.strip():
        raise RowError(BLANK_LINE)
    if "\ufffd" in line:
        raise RowError("the line is not UTF-8 (or holds U+FFFD, the replacement character)")
    row = parse_json(line)
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    turns, images = read_row(row)
    names = parse_picture_names(images)
    if any(file_kinds.BASE64.fullmatch(name.rpartition(",")[2]) for name in names):  # also a data: URL
        raise RowError(f"its picture is base64 text; convert it with: {file_kinds.command('FILE')}")
    hint = ""
    if isinstance(images, str) and len(names) > 1:
        in_a_list = f'a name with a comma goes in a list, ["a, b.jpg"], as {file_kinds.command("FILE")} writes it'
        hint = f" (commas divide names; {in_a_list})"
    tag_added = check_images(turns, len(names), hint)
    picture_hash = file_kinds.hash_63(names[0].encode() if names else line.encode())
    form = form_of_row(row)
    kinds = [form] * (form != "conversations") + ["no <image>"] * tag_added
    return {"turns": turns, "pictures": names, "picture_hash": picture_hash, "kinds": kinds}


def parse_parquet_row(conversations: str | None, pictures: list | None, picture_hash: int, is_blank: bool) -> dict:
    turns, inside = read_row({"conversations": conversations})
    if inside:
        raise RowError(f"its turns name pictures; convert it with: {file_kinds.command('FILE')}")
    if pictures is None:
        raise RowError("the parquet holds a picture's path only, not its bytes (write it from opened pictures)")
    text_only = is_blank and not any(IMAGE_TAG in turn["content"] for turn in turns)
    pictures = [] if text_only else pictures
    kinds = ["no <image>"] * check_images(turns, len(pictures)) + ["text only"] * text_only
    if not pictures:
        picture_hash = file_kinds.hash_63(json.dumps(turns).encode())
    return {"turns": turns, "picture_numbers": pictures, "picture_hash": picture_hash, "kinds": kinds}
