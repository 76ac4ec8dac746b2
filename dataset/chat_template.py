"""Converts a conversation to token ids as the chat template of another language model does."""

import json
import re
from itertools import groupby

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dataset.chat import ChatEncoder, EncodedChat, image_placeholder, text_backend, uses_template
from dataset.conversation import IMAGE_TAG, RowError

SLOT, SLOTS = "\ue000{}\ue001", re.compile("\ue000([0-9]+)\ue001")  # stands for a turn's text in a rendering
IMAGE, ANSWER, END = -1, -2, -3  # between texts and the ids of special tokens


def encoder_for(tokenizer: PreTrainedTokenizerBase, image_tokens: int) -> ChatEncoder:
    """Returns the encoder of a tokenizer's form; raises ValueError if it is of none."""
    return (TemplateEncoder if uses_template(tokenizer) else ChatEncoder)(tokenizer, image_tokens)


class TemplateEncoder(ChatEncoder):
    """Turns conversations into token ids as a tokenizer's chat template renders them.

    The template is rendered with a mark in place of each turn's text, which tells what stands around the texts. The
    same must come out as when it renders the conversation itself. Learned is each answer, with the special token that
    ends it. A prompt ends where the template's own does, if an answer follows that, else where the answer begins.

    Args:
        tokenizer: With a chat template, and `image_placeholder` among its tokens.
        image_tokens: Placeholders that stand for one image.

    Raises:
        ValueError: If the template cannot be used.
    """

    is_3v = False

    @property
    def can_think(self) -> bool:
        """Whether the template can be asked to begin an answer by thinking."""
        return "enable_thinking" in self.tokenizer.chat_template

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int):
        self.tokenizer, self.image_tokens, self.skeletons = tokenizer, image_tokens, {}
        self.backend = prefixed(text_backend(tokenizer), {"first"})
        self.inner = prefixed(self.backend, {"always"})  # for a text that no special token precedes
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_placeholder(tokenizer))
        self.special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.splits = re.compile("|".join(map(re.escape, longest_first)))
        try:
            (before, between, after), _ = self.skeleton(("user", "assistant"))
        except Exception as error:  # a template is a program
            raise ValueError(f"its chat template cannot be used: {error}") from error
        if not (end := self.splits.search(after)):
            raise ValueError("its chat template ends no answer with a special token")
        self.end_id = self.special[end[0]]
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Around a user's text: from the last special token before it, and what follows.
        marks = [match.start() for match in self.splits.finditer(before)]
        self.user_marks = before[marks[-1] if marks else 0 :], between

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self.inner.encode_special_tokens = True

    def render(self, roles, texts: list[str], **options) -> str:
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def skeleton(self, roles: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Returns what the template puts around turns of these roles, before the first, ..., after the last; and what
        of the blanks before each turn the model writes itself, as the template's own prompt ends before them.

        Raises:
            RowError: If it leaves one out.
        """
        if roles not in self.skeletons:
            texts = [SLOT.format(number) for number in range(len(roles))]
            whole = self.render(roles, texts)
            parts = SLOTS.split(whole)
            if parts[1::2] != [str(number) for number in range(len(roles))]:
                raise RowError(f"the language model's chat template takes no turns of {', '.join(roles)}")
            leads = [""] * len(roles)
            for number in (number for number, role in enumerate(roles) if role == "assistant"):
                options = {"add_generation_prompt": True, "enable_thinking": False}
                prompt = self.render(roles[:number], texts[:number], **options)
                lead = whole[len(prompt) : whole.index(texts[number])] if whole.startswith(prompt) else ""
                leads[number] = "" if lead.strip() else lead
            self.skeletons[roles] = parts[::2], leads
        return self.skeletons[roles]

    def encode(self, conversations: list[list[dict]], add_generation_prompt: bool = False) -> list[EncodedChat]:
        """Encodes conversations; one that the template changes gets a `problem`."""
        chats, texts = [], {False: [], True: []}
        for turns in conversations:
            problem, groups = "", []
            try:
                pieces = self.pieces(turns, add_generation_prompt)
            except Exception as error:  # a template may refuse a conversation by any exception
                problem, pieces = str(error) or type(error).__name__, []
            for is_text, group in groupby((piece for piece in pieces if piece != ""), lambda it: isinstance(it, str)):
                some = list(group)
                # An answer goes on from the text before it, other texts come after a special token.
                is_inner = is_text and len(groups) > 1 and groups[-1] == [ANSWER]
                groups.append((is_inner, "".join(some)) if is_text else some)
                if is_text:
                    texts[is_inner].append(groups[-1][1])
            chats.append((problem, groups))
        backends = {False: self.backend, True: self.inner}
        encodings = {
            is_inner: iter(backend.encode_batch(texts[is_inner], add_special_tokens=False))
            for is_inner, backend in backends.items()
        }
        return [self.join(problem, groups, encodings) for problem, groups in chats]

    def pieces(self, turns: list[dict], add_generation_prompt: bool) -> list[str | int]:
        """Returns a conversation as texts, ids of special tokens, and IMAGE, ANSWER and END.

        Raises:
            RowError: If the template renders it otherwise.
        """
        roles, texts = [turn["role"] for turn in turns], [turn["content"] for turn in turns]
        thinks = add_generation_prompt and self.open_thinking
        if add_generation_prompt and not thinks:
            roles, texts = [*roles, "assistant"], [*texts, SLOT]
        around, leads = self.skeleton(tuple(roles))
        rendered = self.render(roles, texts)
        texts = texts_in(rendered, around, texts)
        before = [text[: len(text) - len(lead)] for text, lead in zip(around, [*leads, ""], strict=True)]
        pieces = self.split(before[0])
        for role, lead, text, after in zip(roles, leads, texts, before[1:], strict=True):
            after = self.split(after)
            if role == "assistant":
                end = next((i + 1 for i, piece in enumerate(after) if not isinstance(piece, str)), None)
                if end is None:
                    raise RowError("the language model's chat template ends this answer with no special token")
                pieces += [ANSWER, lead + text, *after[:end], END, *after[end:]]
            else:
                first, *others = text.split(IMAGE_TAG) if role == "user" else [text]
                pieces += [first, *(piece for other in others for piece in (IMAGE, other)), *after]
        if thinks:
            asked = self.render(roles, texts, add_generation_prompt=True, enable_thinking=True)
            return pieces + self.split(asked.removeprefix(rendered))
        return pieces[: len(pieces) - 1 - pieces[::-1].index(ANSWER)] if add_generation_prompt else pieces

    def split(self, text: str) -> list[str | int]:
        """Splits a text of the template at its special tokens."""
        pieces, start = [], 0
        for match in self.splits.finditer(text):
            pieces += [text[start : match.start()], self.special[match[0]]]
            start = match.end()
        return [*pieces, text[start:]]

    def join(self, problem: str, groups: list, encodings: dict) -> EncodedChat:
        chat = EncodedChat([], [], [], problem)
        ids = chat.input_ids
        for group in groups:
            if isinstance(group, tuple):
                ids += next(encodings[group[0]]).ids
                continue
            for number in group:
                if number == IMAGE:
                    chat.image_starts.append(len(ids))
                    ids += [self.image_token_id] * self.image_tokens
                elif number == ANSWER:
                    start = len(ids)
                elif number == END:
                    chat.learned.append((start, len(ids)))
                else:
                    ids.append(number)
        return chat


def texts_in(rendered: str, around: list[str], texts: list[str]) -> list[str]:
    """Returns the turns' texts as rendered, some without blanks around; raises RowError if the template changed one."""
    found, end = [], len(around[0]) if rendered.startswith(around[0]) else len(rendered) + 1
    for text, after in zip(texts, around[1:], strict=True):
        forms = (text, text.strip(), text.lstrip(), text.rstrip())
        form = next((form for form in forms if rendered.startswith(form + after, end)), None)
        if form is None:
            break
        found.append(form)
        end += len(form) + len(after)
    if end != len(rendered):
        raise RowError("the language model's chat template changes the text of a turn")
    return found


def prefixed(backend: Tokenizer, schemes: set[str]) -> Tokenizer:
    """Returns a tokenizer that puts no blank before a text by these schemes ("always" is also done by other parts)."""

    def changed(node):
        if isinstance(node, list):
            return [changed(part) for part in node if not ("always" in schemes and part.get("type") == "Prepend")]
        if not isinstance(node, dict):
            return node
        node = {name: changed(part) for name, part in node.items()}
        if node.get("type") == "Metaspace" and node.get("prepend_scheme") in schemes:
            node["prepend_scheme"] = "never"
        if "always" in schemes and node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        return node

    content = json.loads(backend.to_str())
    parts = {name: changed([content[name]] if content[name] else []) for name in ("normalizer", "pre_tokenizer")}
    backend = Tokenizer.from_str(
        json.dumps(content | {name: part[0] if part else None for name, part in parts.items()})
    )
    backend.encode_special_tokens = True
    return backend
