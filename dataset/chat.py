"""A conversation to token ids: the ChatML prompt, which tokens are learned, and where its images stand."""

import copy
import json
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = "You are a helpful assistant"
IMAGE_TAG = "<image>"
IMAGE_CHARACTER = "@"
# Of minimind-3v: an image's placeholder is a special token, which no text can hold; every answer begins by thinking.
IMAGE_PAD = "<|image_pad|>"
THINK, END_OF_THINKING = "<think>", "</think>"


class RowError(ValueError):
    """A row that cannot be learned from; the message says why."""


@dataclass
class EncodedChat:
    """Token ids, the half-open [start, end) spans of them that are learned, and each image's first position."""

    input_ids: list[int]
    learned: list[tuple[int, int]]
    image_starts: list[int]


class ChatEncoder:
    """Turns conversations into token ids.

    The text is tokenised turn by turn with special tokens switched off, so `<|im_end|>` typed by a user is plain text
    and ends nothing; the special tokens around each turn are added by their ids.

    A tokenizer with the special token `<|image_pad|>` is minimind-3v's. That token is then an image's placeholder,
    added by its id; there is no default system turn, and every answer begins with a think block, its own or empty.

    Args:
        tokenizer: A fast tokenizer of the project's form (ids 0, 1, 2 special; `@` a token of its own) or of
            minimind-3v's.
        image_tokens: Placeholders that stand for one image (`VLMConfig.image_tokens`).

    Raises:
        ValueError: If the tokenizer is not of that form.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int):
        self.begin_id, self.end_id, self.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()  # a tokenizer saved with truncation on would cut texts silently
        self.backend.no_padding()
        self.image_tokens, self.placeholders = image_tokens, IMAGE_CHARACTER * image_tokens
        self.is_3v = has_image_pad(tokenizer)
        self.image_token_id = image_token_id(tokenizer)
        placeholder_ids = self.backend.encode(self.placeholders, add_special_tokens=False).ids
        is_alone = self.is_3v or placeholder_ids == [self.image_token_id] * image_tokens
        special_ids = self.begin_id, self.end_id, self.pad_id
        if None in special_ids or not is_alone:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} is not of MiniMind's form: it needs begin, end and padding "
                f"tokens, and `@` as a token of its own that is part of no other, or a special token {IMAGE_PAD}"
            )
        self.newline_ids = self.backend.encode("\n", add_special_tokens=False).ids

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # pickling loses it

    def encode(self, conversations: list[list[dict]], add_generation_prompt: bool = False) -> list[EncodedChat]:
        """Encodes conversations: lists of {"role", "content"} turns that `parse_conversation` accepted."""
        if not self.is_3v:
            conversations = [with_system_turn(turns) for turns in conversations]
        texts = [text for turns in conversations for turn in turns for text in self._texts(turn)]
        # One call for all of them: the tokenizer works on many texts in parallel.
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        chats = [self._join(turns, encodings) for turns in conversations]
        if add_generation_prompt:
            header = "assistant\n" + (thinking("") if self.is_3v else "")
            header = [self.begin_id, *self.backend.encode(header, add_special_tokens=False).ids]
            for chat in chats:
                chat.input_ids += header
        return chats

    def truncate(self, chat: EncodedChat, max_length: int) -> EncodedChat:
        """Returns the first `max_length` tokens.

        Raises:
            RowError: If that cuts an image off, or leaves nothing to learn.
        """
        end = chat.image_starts[-1] + self.image_tokens if chat.image_starts else 0
        if end > max_length:
            raise RowError(f"an image is cut off: it ends at token {end}, max_seq_len is {max_length}")
        learned = [(start, min(end, max_length)) for start, end in chat.learned if start < max_length]
        if not learned:
            raise RowError(f"nothing left to learn: no answer begins within max_seq_len {max_length}")
        return EncodedChat(chat.input_ids[:max_length], learned, chat.image_starts)

    def _texts(self, turn: dict) -> list[str]:
        # An answer is tokenised apart from its header: generation continues after the header, so no token that is
        # learned may span the two.
        if turn["role"] == "assistant":
            return ["assistant\n", with_thinking(turn["content"]) if self.is_3v else turn["content"]]
        text = f"{turn['role']}\n{turn['content']}"
        if turn["role"] != "user":
            return [text]
        return text.split(IMAGE_TAG) if self.is_3v else [text.replace(IMAGE_TAG, self.placeholders)]

    def _join(self, turns: list[dict], encodings) -> EncodedChat:
        chat = EncodedChat([], [], [])
        ids = chat.input_ids
        for turn in turns:
            ids.append(self.begin_id)
            for index in range(len(self._texts(turn))):
                encoding = next(encodings)
                if index and turn["role"] == "user":  # minimind-3v's: an image between two texts
                    chat.image_starts.append(len(ids))
                    ids += [self.image_token_id] * self.image_tokens
                elif index:  # the answer, its <|im_end|> and the newline after it
                    chat.learned.append((len(ids), len(ids) + len(encoding.ids) + 1 + len(self.newline_ids)))
                for character in self._image_characters(turn):
                    chat.image_starts.append(len(ids) + encoding.char_to_token(character))
                ids += encoding.ids
            ids += [self.end_id, *self.newline_ids]
        return chat

    def _image_characters(self, turn: dict) -> list[int]:
        """Where each image begins in the turn's expanded text; a user's own `@` beside it is not part of it."""
        if turn["role"] != "user" or self.is_3v:
            return []
        positions, position = [], len("user\n")
        for piece in turn["content"].split(IMAGE_TAG)[:-1]:
            positions.append(position + len(piece))
            position += len(piece) + self.image_tokens
        return positions


def has_image_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer is minimind-3v's, by its special token for images."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return any(token.content == IMAGE_PAD and token.special for token in added)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id of an image's placeholder."""
    return tokenizer.backend_tokenizer.token_to_id(IMAGE_PAD if has_image_pad(tokenizer) else IMAGE_CHARACTER)


def thinking(reasoning: str) -> str:
    return f"{THINK}\n{reasoning}\n{END_OF_THINKING}\n\n"


def with_thinking(answer: str) -> str:
    """Returns an answer after its think block: what stands before the first `</think>`, from its last `<think>` on."""
    before, _, _ = answer.partition(END_OF_THINKING)
    reasoning = before.split(THINK)[-1] if END_OF_THINKING in answer else ""
    return thinking(reasoning.strip("\n")) + answer.split(END_OF_THINKING)[-1].lstrip("\n")


def with_system_turn(turns: list[dict]) -> list[dict]:
    """Returns the turns, with the default system turn first where they have none."""
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": SYSTEM_PROMPT}, *turns]


def parse_conversation(value: str | list) -> list[dict]:
    """Returns the turns of a row's `conversations` (JSON text or a list).

    Raises:
        RowError: If it is not a conversation that can be learned from.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise RowError(f"conversations is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise RowError("conversations is missing or not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RowError(f"turn {number} has no role")
        if not isinstance(turn.get("content"), str):
            raise RowError(f"turn {number} has no text as content")
        turns.append({"role": turn["role"], "content": turn["content"]})
    check_turns(turns)
    return turns


def check_turns(turns: list[dict]):
    """Raises RowError unless there is at most one system turn, first, and then user and assistant alternate."""
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    offset = len(turns) - len(spoken) + 1
    for index, turn in enumerate(spoken):
        expected = ("user", "assistant")[index % 2]
        if turn["role"] != expected:
            raise RowError(f"turn {index + offset} is of role {turn['role']!r}, expected {expected!r}")
    if len(spoken) < 2:
        raise RowError("nothing to learn: no assistant turn")
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise RowError(f"turn {number}: the answer is empty")
        if turn["role"] != "user" and IMAGE_TAG in turn["content"]:
            raise RowError(f"turn {number}: {IMAGE_TAG} stands in a turn of role {turn['role']!r}, not of the user")
        check_characters(turn["content"], f"turn {number}")


def check_characters(text: str, what: str):
    """Raises RowError if the text holds half a surrogate pair, which JSON can escape but no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a surrogate pair, which is no character") from error


def parse_picture_names(value) -> list[str]:
    """Returns the names in a row's `image`: "a.jpg, b.jpg", a list, or nothing.

    Raises:
        RowError: If it is something else, or a name leads upwards. Absolute ones are left to the data set.
    """
    if value is None or value == "":
        return []
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RowError(f"image is neither names of pictures nor empty: {value!r:.80}")
    for name in names:
        check_characters(name, "a picture's name")
        path = PurePosixPath(name.replace("\\", "/"))
        is_foreign = path.is_absolute() and not name.startswith("/")
        if is_foreign or ".." in path.parts or PureWindowsPath(name).drive or "\0" in name:
            raise RowError(f"the picture's path leaves images_path: {name!r}")
    return names


def check_images(turns: list[dict], pictures: int) -> bool:
    """Raises RowError unless the conversation has as many `<image>` as there are pictures.

    Returns:
        Whether a single picture had none: it is then put first, as LLaVA's loaders do.
    """
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in turns if turn["role"] == "user")
    if tags == 0 and pictures == 1:
        asked = next(turn for turn in turns if turn["role"] == "user")
        asked["content"] = f"{IMAGE_TAG}\n{asked['content']}"
        return True
    if tags != pictures:
        raise RowError(f"{tags} {IMAGE_TAG} in the text, but {pictures} picture(s)")
    return False
