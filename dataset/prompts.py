"""Builds left-padded batches of prompts from conversations, or from rows cut before their first answer."""

from collections import Counter
from itertools import chain

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from common.errors import UsageError
from dataset.chat import IMAGE_TAG, ChatEncoder, RowError, encoder_for
from model.model_vlm import PROMPT_FORMS

PROMPT, NEWLINE = "{prompt}", "\n"
DEFAULT_FORM = PROMPT_FORMS[0]


def with_images(prompt: str, images: int, form: str = DEFAULT_FORM) -> str:
    """Returns the prompt with one `<image>` per image, by `form` where none is typed; ValueError for another number."""
    tags = prompt.count(IMAGE_TAG)
    if tags not in (0, images):
        raise ValueError(f"the prompt has {tags} {IMAGE_TAG} for {images} picture(s)")
    if tags or not images:
        return prompt
    return form.replace(IMAGE_TAG, NEWLINE.join([IMAGE_TAG] * images)).replace(PROMPT, prompt)


def usual_form(data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the most common form of a VLMDataset's rows with one image.

    It is the default form if that is at least half as common as another: a model answers worse when asked in a form it
    was not trained on. Looks at 256 rows, evenly spaced.
    """
    places = np.flatnonzero(data.image_counts == 1)
    places = places[np.linspace(0, len(places) - 1, min(len(places), 256)).astype(int)]
    (begin, end), counts = encoder_for(tokenizer, data.image_tokens).user_marks, Counter()
    for row in data.read_rows(data.row_indices[places].tolist()):
        ids, [start], answer = row["input_ids"], row["image_starts"], row["learned"][0]
        before, after = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start + data.image_tokens : answer])
        if start < answer and before.endswith(begin):
            counts[f"{IMAGE_TAG}{NEWLINE * after.startswith(NEWLINE)}{PROMPT}"] += 1
        elif start < answer and after.startswith(end):  # else it is amid text, or in a later turn
            counts[f"{PROMPT}{NEWLINE * before.endswith(NEWLINE)}{IMAGE_TAG}"] += 1
    [(usual, count)] = counts.most_common(1) or [(DEFAULT_FORM, 0)]
    return DEFAULT_FORM if count < 2 * counts[DEFAULT_FORM] else usual


def prompt_batch(encoder: ChatEncoder, conversations: list[list[dict]], pictures: list[list[torch.Tensor]]) -> dict:
    """Returns the inputs of `generate` for conversations that end with the user's turn, and each one's uint8 images."""
    try:
        chats = encoder.encode(conversations, add_generation_prompt=True)
    except RowError as error:
        raise UsageError(str(error)) from error
    for number, (chat, of_chat) in enumerate(zip(chats, pictures, strict=True), start=1):
        if len(chat.image_starts) != len(of_chat):
            tags = f"{len(chat.image_starts)} {IMAGE_TAG}"
            raise ValueError(f"conversation {number} has {tags}, but {len(of_chat)} picture(s) were given")
    prompts, starts = [torch.tensor(chat.input_ids) for chat in chats], [chat.image_starts for chat in chats]
    return left_padded(prompts, starts, list(chain.from_iterable(pictures)), encoder.pad_id)


def row_prompts(rows: list[dict], pad_token_id: int) -> dict:
    """Returns the inputs of `generate` for samples of `VLMDataset` (with pixels), up to their first answer."""
    prompts, starts, pixels = [], [], []
    for row in rows:
        end, _ = first_answer(row["labels"])
        prompts.append(row["input_ids"][:end])
        starts.append([start for start in row["image_starts"].tolist() if start < end])
        pixels += row["pixel_values"][: len(starts[-1])]
    return left_padded(prompts, starts, pixels, pad_token_id)


def first_answer(labels: torch.Tensor) -> tuple[int, int]:
    """Returns the first learned span [start, end) of (L,) labels."""
    learned = labels != -100
    start = int(learned.int().argmax())
    return start, start + int(learned[start:].int().cumprod(0).sum())


def left_padded(prompts: list[torch.Tensor], image_starts: list[list[int]], pixels: list, pad_token_id: int) -> dict:
    """Returns input_ids, attention_mask (B, L), image_starts (images, 2), pixel_values (images, 3, S, S) or None."""
    how = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(prompts, padding_value=pad_token_id, **how)
    attention_mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], **how)
    left = [input_ids.shape[1] - len(prompt) for prompt in prompts]
    starts = [(row, left[row] + start) for row, of_row in enumerate(image_starts) for start in of_row]
    # Never None, or the model would search: a user's own `@` are text, however many there are.
    starts = torch.tensor(starts, dtype=torch.int64).view(-1, 2)
    pixels = torch.stack(pixels) if pixels else None
    return {"input_ids": input_ids, "attention_mask": attention_mask, "image_starts": starts, "pixel_values": pixels}
