"""Converts a conversation to token ids in ChatML form, with its learned spans and image positions."""

import copy
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dataset.conversation import IMAGE_TAG, RowError

SYSTEM_PROMPT = "You are a helpful assistant"
SYSTEM_PROMPTS = (  # that some of minimind-3v's rows get
    "You answer questions about pictures, briefly and truly.",
    "You are minimind, a small model that helps where it can.",
    "Answer what is asked, and say so if you do not know.",
    "You are a patient assistant who looks closely.",
    "你回答关于图片的问题，简短而真实。",
    "你是 minimind，一个乐于助人的小模型。",
    "请回答所问的问题；不知道时请直说。",
    "你是一个耐心、仔细观察的助手。",
)
IMAGE_CHARACTER = "@"
NEIGHBOUR_TEXTS = ("", "\n", "a", "图")
# minimind-3v: the image placeholder is a special token, which no text can hold; every answer begins by thinking.
IMAGE_PAD = "<|image_pad|>"
IMAGE_NAMES = ("image_pad", "image", "reserved", "unused")  # in names of special tokens, the best first
THINK, END_OF_THINKING = "<think>", "</think>"


@dataclass
class EncodedChat:
    """Token ids, the half-open [start, end) spans of them that are learned, and each image's first position.

    `problem` says why it cannot be used.
    """

    input_ids: list[int]
    learned: list[tuple[int, int]]
    image_starts: list[int]
    problem: str = ""


class ChatEncoder:
    """Turns conversations into token ids.

    The text is tokenised turn by turn with special tokens switched off, so `<|im_end|>` typed by a user is plain text
    and ends nothing; the special tokens around each turn, and images' placeholders, are added by their ids.

    With minimind-3v's tokenizer an image's placeholder is the special token `<|image_pad|>`, there is no default system
    turn, and every answer begins with a think block, its own or an empty one.

    Args:
        tokenizer: A fast tokenizer of the project's form (ids 0, 1, 2 special; `@` a token of its own), or 3v's.
        image_tokens: Placeholders that stand for one image (`VLMConfig.image_tokens`).

    Raises:
        ValueError: If the tokenizer is not of that form.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int):
        self.tokenizer = tokenizer
        self.begin_id, self.end_id, self.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.backend = text_backend(tokenizer)
        self.is_3v, self.image_token_id = has_image_pad(tokenizer), image_token_id(tokenizer)
        self.image_tokens, self.image_ids = image_tokens, [self.image_token_id] * image_tokens
        self.user_marks = f"{tokenizer.bos_token}user\n", tokenizer.eos_token
        self.newline_ids = self.backend.encode("\n", add_special_tokens=False).ids
        texts = [f"{left}@@@{right}" for left in NEIGHBOUR_TEXTS for right in NEIGHBOUR_TEXTS]
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        is_alone = self.is_3v or all(encoding.ids.count(self.image_token_id) == 3 for encoding in encodings)
        if None in (self.begin_id, self.end_id, self.pad_id) or not is_alone:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} is not of MiniMind's form: it needs begin, end and padding "
                f"tokens, and `@` as a token of its own that is part of no other, or a special token {IMAGE_PAD}; nor "
                "has it a chat template, as another language model needs"
            )

    open_thinking = False  # whether an answer begins within its think block

    @property
    def can_think(self) -> bool:
        """Whether answers have a think block."""
        return self.is_3v

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # pickling loses it

    def encode(self, conversations: list[list[dict]], add_generation_prompt: bool = False) -> list[EncodedChat]:
        """Encodes conversations: lists of {"role", "content"} turns that `parse_conversation` accepted."""
        if not self.is_3v:
            system = [{"role": "system", "content": SYSTEM_PROMPT}]
            conversations = [turns if turns[0]["role"] == "system" else system + turns for turns in conversations]
        texts = [text for turns in conversations for turn in turns for text in self._texts(turn)]
        # One call for all of them: the tokenizer works on many texts in parallel.
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        chats = [self._join(turns, encodings) for turns in conversations]
        if add_generation_prompt:
            header = "assistant\n" + (thinking("") if self.is_3v else "")
            header = header.partition(f"\n{END_OF_THINKING}")[0] if self.open_thinking else header
            header = [self.begin_id, *self.backend.encode(header, add_special_tokens=False).ids]
            for chat in chats:
                chat.input_ids += header
        return chats

    def truncate(self, chat: EncodedChat, max_length: int) -> EncodedChat:
        """Returns the first `max_length` tokens.

        Raises:
            RowError: If that cuts an image off, or it leaves nothing to learn, or the chat has a problem.
        """
        if chat.problem:
            raise RowError(chat.problem)
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
            return ["assistant\n", with_thinking(turn) if self.is_3v else turn["content"]]
        content = turn["content"] if turn.get("functions") is None else self._with_tools(turn)
        text = f"{turn['role']}\n{content}"
        if turn["role"] != "user":
            return [text]
        # What is beside an image is tokenised as beside its placeholder; `_join` takes that off.
        mark = "" if self.is_3v else IMAGE_CHARACTER
        return text.replace(IMAGE_TAG, f"{mark}{IMAGE_TAG}{mark}").split(IMAGE_TAG)

    def _with_tools(self, turn: dict) -> str:
        """Returns a system turn's text and its functions, as the tokenizer's own template lists them."""
        text = self.tokenizer.apply_chat_template([turn], tools=turn["functions"], tokenize=False)
        return text.removeprefix(f"{self.tokenizer.bos_token}system\n").rpartition(self.tokenizer.eos_token)[0]

    def _join(self, turns: list[dict], encodings) -> EncodedChat:
        chat = EncodedChat([], [], [])
        ids = chat.input_ids
        for turn in turns:
            ids.append(self.begin_id)
            last = len(self._texts(turn)) - 1
            for index in range(last + 1):
                piece = next(encodings).ids
                if index and turn["role"] == "user":  # an image between two texts
                    chat.image_starts.append(len(ids))
                    ids += self.image_ids
                elif index:  # the answer, its <|im_end|> and the newline after it
                    chat.learned.append((len(ids), len(ids) + len(piece) + 1 + len(self.newline_ids)))
                if turn["role"] == "user" and not self.is_3v:
                    piece = piece[index > 0 : len(piece) - (index < last)]
                ids += piece
            ids += [self.end_id, *self.newline_ids]
        return chat


def text_backend(tokenizer: PreTrainedTokenizerBase):
    """Returns a copy of the tokenizer to which special tokens in a text are text, and which neither cuts nor pads."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()  # a tokenizer saved with truncation on would cut texts silently
    backend.no_padding()
    return backend


def uses_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer is another language model's than MiniMind's, with a chat template of its own."""
    names = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    return names != ("<|im_start|>", "<|im_end|>", "<|endoftext|>") and bool(tokenizer.chat_template)


def image_placeholder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the token for an image's patches.

    Another language model's is its own, else a special token that its template does not use, else `<image>`.
    """
    if not uses_template(tokenizer):
        return IMAGE_PAD if has_image_pad(tokenizer) else IMAGE_CHARACTER
    if own := getattr(tokenizer, "image_token", None):
        return own
    free = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [name for name in free if name not in tokenizer.chat_template and name not in tokenizer.all_special_tokens]
    return next((name for part in IMAGE_NAMES for name in free if part in name), IMAGE_TAG)


def has_image_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer is minimind-3v's, by its special token for images."""
    if uses_template(tokenizer):
        return False
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return any(token.content == IMAGE_PAD and token.special for token in added)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id of an image's placeholder."""
    return tokenizer.backend_tokenizer.token_to_id(image_placeholder(tokenizer))


def thinking(reasoning: str) -> str:
    return f"{THINK}\n{reasoning}\n{END_OF_THINKING}\n\n"


def with_thinking(turn: dict) -> str:
    """Returns an answer after its think block, which holds its reasoning_content, else the text before `</think>`.

    An answer with `no_think` loses an empty block.
    """
    whole = _with_thinking(turn)
    return whole.removeprefix(thinking("")) if turn.get("no_think") else whole


def _with_thinking(turn: dict) -> str:
    answer = turn["content"]
    if "reasoning_content" in turn:
        return thinking(turn["reasoning_content"].strip("\n")) + answer.lstrip("\n")
    before, _, _ = answer.partition(END_OF_THINKING)
    reasoning = before.split(THINK)[-1] if END_OF_THINKING in answer else ""
    return thinking(reasoning.strip("\n")) + answer.split(END_OF_THINKING)[-1].lstrip("\n")
