"""A language model's tokenizer, and conversations as its token ids: learned spans, and where images stand."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UsageError
from common.paths import TOKENIZER_3V_DIR, display_path
from model.weights import Weights

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
IMAGE_TAG, IMAGE_CHARACTER = "<image>", "@"  # where an image stands in a text, and MiniMind's token for it
NEIGHBOUR_TEXTS = ("", "\n", "a", "图")
# minimind-3v: the image placeholder is a special token, which no text can hold; every answer begins by thinking.
IMAGE_PAD = "<|image_pad|>"
IMAGE_NAMES = ("image_pad", "image", "reserved", "unused")  # in names of special tokens, the best first
THINK, END_OF_THINKING = "<think>", "</think>"
SLOT, SLOTS = "\ue000{}\ue001", re.compile("\ue000([0-9]+)\ue001")  # stands for a turn's text in a rendering
IMAGE, ANSWER, END = -1, -2, -3  # marks between texts and ids (0 and up): an image, an answer's begin and end


class RowError(ValueError):
    """A row that cannot be learned from; the message says why."""


class EncodedChat(NamedTuple):
    """A conversation as token ids."""

    input_ids: list[int]
    learned: list[tuple[int, int]]  # spans [start, end) of them
    image_starts: list[int]  # each image's first position


class ChatEncoder:
    """Turns conversations into token ids in MiniMind's prompt form; raises ValueError if the tokenizer does not fit it.

    The text is tokenised turn by turn with special tokens switched off, so `<|im_end|>` typed by a user is plain text
    and ends nothing; the special tokens around each turn, and `image_tokens` placeholders for each image, are added by
    their ids. With minimind-3v's tokenizer an image's placeholder is the special token `<|image_pad|>`, there is no
    default system turn, and every answer begins with a think block, its own or an empty one.
    """

    open_thinking = False  # whether an answer begins within its think block

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int):
        self.tokenizer, self.image_tokens, self.image_token_id = tokenizer, image_tokens, image_token_id(tokenizer)
        self.begin_id, self.end_id, self.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.user_marks = f"{tokenizer.bos_token}user\n", tokenizer.eos_token
        self.is_3v = self.can_think = has_image_pad(tokenizer)
        self.beside = "" if self.is_3v else IMAGE_CHARACTER
        self.backends = [text_backend(tokenizer)] * 2
        texts = [f"{left}@@@{right}" for left in NEIGHBOUR_TEXTS for right in NEIGHBOUR_TEXTS]
        encodings = self.backends[0].encode_batch(texts, add_special_tokens=False)
        is_alone = self.is_3v or all(encoding.ids.count(self.image_token_id) == 3 for encoding in encodings)
        if None in (self.begin_id, self.end_id, self.pad_id) or not is_alone:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, which other language models need, nor "
                "MiniMind's form: begin, end and padding tokens, and `@` as a token of its own that is part of no "
                f"other, or a special token {IMAGE_PAD}"
            )

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        for backend in self.backends:
            backend.encode_special_tokens = True  # pickling loses it

    def encode(self, conversations: list[list[dict]], add_generation_prompt: bool = False) -> list[EncodedChat]:
        """Encodes parsed conversations; raises RowError if another model's template refuses or changes one."""
        chats = []
        for turns in conversations:
            try:
                pieces = self.pieces(turns, add_generation_prompt)
            except Exception as error:  # a template may refuse a conversation by any exception
                raise RowError(str(error) or type(error).__name__) from error
            chats.append(chat := EncodedChat([], [], []))
            ids, before = chat.input_ids, None
            for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
                if isinstance(piece, str):
                    # What is beside an image is tokenised as beside its placeholder, which is taken off again.
                    left, right = self.beside * (before == IMAGE), self.beside * (after == IMAGE)
                    backend = self.backends[isinstance(before, str)]  # a text after a text goes on from it
                    found = backend.encode(left + piece + right, add_special_tokens=False).ids
                    ids += found[len(left) : len(found) - len(right)]
                elif piece == IMAGE:
                    chat.image_starts.append(len(ids))
                    ids += [self.image_token_id] * self.image_tokens
                elif piece == ANSWER:
                    start = len(ids)
                elif piece == END:
                    chat.learned.append((start, len(ids)))
                else:
                    ids.append(piece)
                before = before if piece in (ANSWER, END) else piece
        return chats

    def pieces(self, turns: list[dict], add_generation_prompt: bool) -> list[str | int]:
        """Returns a conversation as texts, ids of special tokens, and IMAGE, ANSWER and END."""
        if not self.is_3v and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": SYSTEM_PROMPT}, *turns]
        pieces = []
        for turn in turns:
            role, content = turn["role"], turn["content"]
            if role == "assistant":
                # An answer is tokenised apart from its header: generation continues after the header, so no token that
                # is learned may span the two.
                answer = with_thinking(turn) if self.is_3v else content
                pieces += [self.begin_id, "assistant\n", ANSWER, answer, self.end_id, "\n", END]
                continue
            if turn.get("functions") is not None:  # as the tokenizer's own template lists them
                content = self.tokenizer.apply_chat_template([turn], tools=turn["functions"], tokenize=False)
                content = content.removeprefix(f"{self.tokenizer.bos_token}system\n")
                content = content.rpartition(self.tokenizer.eos_token)[0]
            text = f"{role}\n{content}"
            pieces += [self.begin_id, *(with_marks(text) if role == "user" else [text]), self.end_id, "\n"]
        if add_generation_prompt:
            block = f"{THINK}\n" if self.open_thinking else with_thinking({"content": ""})
            pieces += [self.begin_id, f"assistant\n{block if self.is_3v else ''}"]
        return pieces

    def truncate(self, chat: EncodedChat, max_length: int) -> EncodedChat:
        """Returns the first `max_length` tokens; raises RowError if an image is cut off, or nothing left to learn."""
        end = chat.image_starts[-1] + self.image_tokens if chat.image_starts else 0
        if end > max_length:
            raise RowError(f"an image is cut off: it ends at token {end}, max_seq_len is {max_length}")
        learned = [(start, min(end, max_length)) for start, end in chat.learned if start < max_length]
        if not learned:
            raise RowError(f"nothing left to learn: no answer begins within max_seq_len {max_length}")
        return EncodedChat(chat.input_ids[:max_length], learned, chat.image_starts)


class TemplateEncoder(ChatEncoder):
    """Turns conversations into token ids as a tokenizer's chat template renders them.

    The template is rendered once with a mark in place of each turn's text: what stands between the marks stands around
    the texts. Each conversation is rendered by the template too, and must come out the same. Learned is each answer,
    with the special token that ends it. A prompt ends where the template's own prompt does, or where the answer begins
    if the template's own prompt is not what precedes an answer. The tokenizer has `image_placeholder` among its tokens.
    Raises ValueError if its template cannot be used.
    """

    is_3v, beside = False, ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int):
        self.tokenizer, self.image_tokens, self.image_token_id = tokenizer, image_tokens, image_token_id(tokenizer)
        # The second is for a text that goes on from another, an answer from the words before it.
        self.backends = [text_backend(tokenizer, ("first",)), text_backend(tokenizer, ("first", "always"))]
        self.can_think = "enable_thinking" in tokenizer.chat_template
        self.render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        self.special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.splits = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        try:
            (_, before), (_, between), (lead, after) = self.skeleton(("user", "assistant"))
        except Exception as error:  # a template is a program
            raise ValueError(f"its chat template cannot be used: {error}") from error
        if not (end := self.splits.search(after)):
            raise ValueError("its chat template ends no answer with a special token")
        self.end_id = self.special[end[0]]
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Around a user's text: from the last special token before it, and what follows.
        self.user_marks = "".join(self.splits.split(before)[-2:]), between + lead

    @functools.cache  # noqa: B019 (an encoder lives as long as its process)
    def skeleton(self, roles: tuple[str, ...]) -> list[tuple[str, str]]:
        """Returns (lead, after) of each text, where turns have these roles; the first is an empty text before them all.

        `lead`: blanks before an answer that the model writes itself, as the template's own prompt ends before them.
        `after`: what the template puts behind the text.
        """
        turns = [{"role": role, "content": SLOT.format(number)} for number, role in enumerate(roles)]
        whole = self.render(turns)
        parts = SLOTS.split(whole)
        if parts[1::2] != [str(number) for number in range(len(roles))]:
            raise RowError(f"the language model's chat template takes no turns of {', '.join(roles)}")
        around, leads = parts[::2], [""] * len(parts[::2])
        for number in (number for number, role in enumerate(roles) if role == "assistant"):
            prompt = self.render(turns[:number], add_generation_prompt=True, enable_thinking=False)
            lead = whole[len(prompt) : whole.index(turns[number]["content"])] if whole.startswith(prompt) else ""
            leads[number + 1] = "" if lead.strip() else lead
            around[number] = around[number].removesuffix(leads[number + 1])
        return list(zip(leads, around, strict=True))

    def pieces(self, turns: list[dict], add_generation_prompt: bool) -> list[str | int]:
        """As a ChatEncoder's; raises RowError if the template renders the conversation otherwise."""
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        thinks = add_generation_prompt and self.open_thinking
        if add_generation_prompt and not thinks:
            turns.append({"role": "assistant", "content": SLOT})
        skeleton, rendered = self.skeleton(tuple(turn["role"] for turn in turns)), self.render(turns)
        changed = RowError("the language model's chat template changes the text of a turn")
        pieces, rest = [], rendered
        for turn, (lead, after) in zip([{"role": "", "content": ""}, *turns], skeleton, strict=True):
            text = turn["content"]
            forms = (text, text.strip(), text.lstrip(), text.rstrip())  # a template may take blanks off
            text = next((lead + form for form in forms if rest.startswith(lead + form + after)), None)
            if text is None:
                raise changed
            rest, after = rest[len(text + after) :], self.split(after)
            if turn["role"] == "assistant":
                if len(after) == 1:
                    raise RowError("the language model's chat template ends this answer with no special token")
                answer_at = len(pieces)
                pieces += [ANSWER, text, *after[:2], END, *after[2:]]
            else:
                pieces += with_marks(text) + after
        if rest:
            raise changed
        if thinks:
            asked = self.render(turns, add_generation_prompt=True, enable_thinking=True)
            pieces += self.split(asked.removeprefix(rendered))
        elif add_generation_prompt:
            del pieces[answer_at:]
        merged = []
        for piece in pieces:
            if isinstance(piece, str) and merged and isinstance(merged[-1], str):
                merged[-1] += piece
            elif piece != "":
                merged.append(piece)
        return merged

    def split(self, text: str) -> list[str | int]:
        """Splits a text of the template at its special tokens, which become ids."""
        return [self.special.get(part, part) for part in self.splits.split(text)]


def encoder_for(tokenizer: PreTrainedTokenizerBase, image_tokens: int) -> ChatEncoder:
    """Returns the encoder of a tokenizer's form; raises ValueError if it is of none."""
    return (TemplateEncoder if uses_template(tokenizer) else ChatEncoder)(tokenizer, image_tokens)


def text_backend(tokenizer: PreTrainedTokenizerBase, schemes: tuple[str, ...] = ()) -> Tokenizer:
    """Returns a copy that reads special tokens as text, never cuts or pads, and adds no blank by these schemes."""

    def without_prefix(part: dict) -> dict:
        if part.get("prepend_scheme") in schemes:
            part["prepend_scheme"] = "never"
        if "always" in schemes and part.get("type") == "ByteLevel":  # no Metaspace, but it may add a blank too
            part["add_prefix_space"] = False
        is_prefix = "always" in schemes and part.get("type") == "Prepend"
        return {"type": "Sequence", "normalizers": []} if is_prefix else part

    content = json.loads(tokenizer.backend_tokenizer.to_str(), object_hook=without_prefix)
    # One that was saved with truncation on would cut texts silently.
    backend = Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))
    backend.encode_special_tokens = True
    return backend


def uses_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer is another language model's than MiniMind's, with a chat template of its own."""
    names = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    return names != ("<|im_start|>", "<|im_end|>", "<|endoftext|>") and bool(tokenizer.chat_template)


def image_placeholder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the token for an image's patches: another language model's own, or one that its template does not use."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not uses_template(tokenizer):
        return IMAGE_PAD if IMAGE_PAD in special else IMAGE_CHARACTER
    if own := getattr(tokenizer, "image_token", None):
        return own
    used = {*tokenizer.all_special_tokens}
    free = [name for name in special if name not in tokenizer.chat_template and name not in used]
    return next((name for part in IMAGE_NAMES for name in free if part in name), IMAGE_TAG)


def has_image_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer is minimind-3v's, by its special token for images."""
    return not uses_template(tokenizer) and image_placeholder(tokenizer) == IMAGE_PAD


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.backend_tokenizer.token_to_id(image_placeholder(tokenizer))


def with_marks(text: str) -> list[str | int]:
    return [IMAGE if part == IMAGE_TAG else part for part in re.split(f"({IMAGE_TAG})", text)]


def with_thinking(turn: dict) -> str:
    """Returns an answer after its think block, which may be empty; one with `no_think` loses an empty block."""
    reasoning, answer = turn.get("reasoning_content"), turn["content"]
    if reasoning is None:
        before, end, _ = answer.partition(END_OF_THINKING)
        reasoning, answer = before.split(THINK)[-1] if end else "", answer.split(END_OF_THINKING)[-1]
    reasoning, answer = reasoning.strip("\n"), answer.lstrip("\n")
    if turn.get("no_think") and not reasoning:
        return answer
    return f"{THINK}\n{reasoning}\n{END_OF_THINKING}\n\n{answer}"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer's folder, adding a placeholder for images if it has none; raises UsageError if unusable."""
    if not (path / "tokenizer.json").is_file():
        part = "tokenizer_3v" if path == TOKENIZER_3V_DIR else "tokenizer"
        raise UsageError(
            f"no tokenizer in {display_path(path)}: tokenizer.json is missing; --tokenizer_path names another folder "
            f"(python scripts/download.py {part})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError("it is none of the tokenizers library")
        if max(tokenizer.get_vocab().values(), default=0) >= len(tokenizer):
            raise ValueError(f"it has {len(tokenizer)} tokens, and ids above them")
        if uses_template(tokenizer) and image_token_id(tokenizer) is None:
            tokenizer.add_tokens([image_placeholder(tokenizer)], special_tokens=True)
        encoder_for(tokenizer, image_tokens=2)
    except Exception as error:  # the tokenizers library raises plain Exception on a garbled file
        has_code = "trust_remote_code" in str(error)  # transformers would advise to run it
        reason = "it brings code of its own, which is never run" if has_code else error
        raise UsageError(f"the tokenizer in {display_path(path)} cannot be used: {reason}") from error
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 (hex) of everything that decides which ids a text gets."""
    template = str(tokenizer.chat_template) if uses_template(tokenizer) else ""
    return hashlib.sha256((tokenizer.backend_tokenizer.to_str() + template).encode("utf-8")).hexdigest()


def check_tokenizer(weights: Weights, tokenizer_sha256: str, tokenizer_path: Path, tokenizer: PreTrainedTokenizerBase):
    """Raises UsageError if the weights were trained with another tokenizer, or have fewer rows than it has tokens.

    Weights without a sidecar do not name their tokenizer, but their generation fixes the id of an image's placeholder.
    """
    expected, problem = weights.sidecar.get("tokenizer_sha256"), None
    placeholder, its_placeholder = image_token_id(tokenizer), weights.config.image_token_id
    if expected is not None and expected != tokenizer_sha256:
        problem = f"SHA-256 {expected[:12]}..., this one {tokenizer_sha256[:12]}..."
    elif expected is None and placeholder != its_placeholder:
        problem = f"of different generations: an image is token {its_placeholder} to it, but {placeholder} in this"
    elif len(tokenizer) > weights.config.vocab_size:
        problem = f"{weights.config.vocab_size} tokens, this one has {len(tokenizer)}"
    if problem:
        raise UsageError(
            f"{display_path(weights.path)} was trained with another tokenizer than {display_path(tokenizer_path)} "
            f"({problem}): name the right one with --tokenizer_path"
        )
