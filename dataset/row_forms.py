"""The table of data forms: how to recognise a row and read it as a conversation with images; then its checks.

Another form is a function with `@register(...)`, here or in a file of your own: tests/changes/test_data_form.py.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from dataset.chat import IMAGE_TAG, RowError
from dataset.prompts import NEWLINE, PROMPT, with_images
from dataset.scenes.language import DESCRIBE

# What a field, or a table's column, may be called; the first name that a row has counts.
PICTURE_FIELDS = tuple("image_bytes image images image_path image_name img file_name filename file path".split())
CAPTION_FIELDS = ("caption", "text", "description", "comment", "title")
LABEL_FIELDS = ("label", "class", "category")
CAPTION, LABEL, NUMBERED = "a picture with its caption", "a picture with its label", "numbered images (MiniCPM)"
QUESTIONS = {CAPTION: (DESCRIBE, "Describe this picture."), LABEL: ("这是什么？", "What is this?")}
CHINESE = re.compile("(?s)(?!.*[\u3040-\u30ff]).*[\u4e00-\u9fff]")  # Japanese has kana beside these characters
NUMBERED_TAG = re.compile(r"<image_\d+>")
TOOL_CALLS = "it calls tools, and nothing here answers a call"
EMPTY_THINKING = re.compile(r"\A\s*<think>\s*</think>\s*")
HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON can escape a surrogate, but no file can hold it
CAT = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]


class Form(NamedTuple):
    fits: Callable[[dict], object]  # truthy for a row of this form; values are None where only columns are known
    # Returns a row's turns, {"role", "content"} with an `<image>` for each image, and its images: a name, several with
    # commas, a list of names or of files' bytes, or None. It raises RowError with what is wrong.
    read: Callable[[dict], tuple[list, object]]
    example: dict  # a good row, which errors show
    source: str  # a hash of the file that defines `read`: rows are tokenised again when it changes


FORMS: dict[str, Form] = {}


def register(name: str, fits: Callable[[dict], object], example: dict):
    """Returns a decorator that puts a function into the table as `Form.read`.

    Forms are tried from the last to the first: of several decorators of a function, the top one first.
    """

    def put(read: Callable) -> Callable:
        FORMS.pop(name, None)
        FORMS[name] = Form(fits, read, example, hashlib.sha256(Path(inspect.getfile(read)).read_bytes()).hexdigest())
        return read

    return put


def parse_json(value, what: str = ""):
    """Decodes JSON text, other values stay; raises RowError that says `what` it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise RowError(f"{what}not JSON: {error}") from error


def field(row: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def form_of_row(row: dict) -> str | None:
    return next((name for name, form in reversed(FORMS.items()) if form.fits(row)), None)


def read_row(row: dict) -> tuple[list[dict], object]:
    """Returns a row's turns, checked, and its images as `Form.read` says; raises RowError if it is not learnable."""
    name = form_of_row(row)
    if name is None:
        raise RowError(f"conversations is missing, and no known form has these fields: {', '.join(row):.80}")
    try:
        turns, images = FORMS[name].read(row)
    except RowError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        example = json.dumps(FORMS[name].example, ensure_ascii=False)
        raise RowError(f"not read as {name}: {error!r}. A good row is {example}") from error
    return parse_conversation(turns), images


@register(
    "a picture with question and answer",
    fits=lambda row: field(row, PICTURE_FIELDS) and {"question", "answer"} <= row.keys(),
    example={"image": "a.jpg", "question": "What is this?", "answer": "A cat."},
)
@register(
    CAPTION,
    fits=lambda row: field(row, PICTURE_FIELDS) and field(row, CAPTION_FIELDS),
    example={"image": "a.jpg", "caption": "A cat."},
)
@register(
    LABEL,
    fits=lambda row: field(row, PICTURE_FIELDS) and field(row, LABEL_FIELDS),
    example={"image": "a.jpg", "label": "cat"},
)
def read_asked(row: dict) -> tuple[list, object]:
    """Asks the row's question, or the form's: in Chinese about a Chinese answer, else in English."""
    if {"question", "answer"} <= row.keys():
        question, answer = row["question"], row["answer"]
    else:
        caption = field(row, CAPTION_FIELDS)
        answer = row[caption or field(row, LABEL_FIELDS)]
        chinese, english = QUESTIONS[CAPTION if caption else LABEL]
        question = row.get("question", chinese if CHINESE.match(str(answer)) else english)
    images = row[field(row, PICTURE_FIELDS)]
    if not images:
        raise RowError("no picture is named")
    if not isinstance(question, str):
        raise RowError("the question is not text")
    letters = filter(None, (field(row, (letter, letter.lower())) for letter in "ABCDEF"))
    options = [f"{letter.upper()}. {row[letter]}" for letter in letters if row[letter]]
    asked = with_images(NEWLINE.join([question, *options]), len(images) if isinstance(images, list) else 1)
    answer = json.dumps(answer) if isinstance(answer, (bool, int, float)) else answer
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], images


@register(
    "texts about images (FineVision)",
    fits=lambda row: "texts" in row and field(row, PICTURE_FIELDS) is not None,
    example={"images": ["a.jpg"], "texts": [{"user": "What is this?", "assistant": "A cat."}]},
)
@register(
    "query and response (ms-swift)",
    fits=lambda row: {"query", "response"} <= row.keys(),
    example={"images": ["a.jpg"], "query": "<image>What is this?", "response": "A cat."},
)
def read_pairs(row: dict) -> tuple[list, object]:
    if "texts" in row:
        pairs = [(text["user"], text["assistant"]) for text in row["texts"]]
    else:
        pairs = [*(row.get("history") or []), (row["query"], row["response"])]
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    images = row.get(field(row, PICTURE_FIELDS))
    images_first(turns, len(images) if isinstance(images, list) else int(bool(images)))
    return turns, images


@register("conversations", fits=lambda row: "conversations" in row, example={"image": "a.jpg", "conversations": CAT})
@register("messages", fits=lambda row: "messages" in row, example={"images": ["a.jpg"], "messages": CAT})
def read_turns(row: dict) -> tuple[list, object]:
    """Reads this project's turns, LLaVA's and ShareGPT's ("from", "value"), and OpenAI's (content in parts)."""
    turns = parse_json(row["conversations"] if "conversations" in row else row["messages"], "conversations is ")
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        # Columns of roles and of contents, as older versions of `datasets` write a list of dicts.
        turns = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations is missing or not a list of turns")
    found, images = [], []
    for turn in turns:
        if isinstance(turn, dict):
            turn = {name: value for name, value in turn.items() if value is not None}  # as `datasets` fills columns
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            if isinstance(content, list):
                content = NEWLINE.join(read_part(part, images) for part in content)
            role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
            turn |= {"role": role, "content": content, "functions": turn.get("functions") or turn.get("tools") or None}
        found.append(turn)
    return found, images or row.get(field(row, PICTURE_FIELDS))


@register(
    NUMBERED,
    fits=lambda row: (
        {"image", "conversations"} <= row.keys()
        and NUMBERED_TAG.search(f"{row['conversations']}{list(row['image']) if isinstance(row['image'], dict) else ''}")
    ),
    example={"image": {"<image_00>": "a.jpg"}, "conversations": [{**CAT[0], "content": "<image_00>\nWhat?"}, CAT[1]]},
)
def read_numbered(row: dict) -> tuple[list, object]:
    images = row["image"] if isinstance(row["image"], dict) else {"<image_00>": row["image"]}
    turns, _ = read_turns(row)
    tags = [tag for turn in turns for tag in NUMBERED_TAG.findall(turn["content"])]
    if unnamed := [tag for tag, image in images.items() if image is not None and tag not in tags]:
        raise RowError(f"the text does not say where the picture {unnamed[0]} belongs")
    turns = [turn | {"content": NUMBERED_TAG.sub(IMAGE_TAG, turn["content"])} for turn in turns]
    return turns, [images[tag] for tag in tags]


def read_part(part, images: list) -> str:
    """Returns the text of a part of a content; appends its picture."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise RowError(f"a part that is neither text nor picture: {kind}")
    source = next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name) is not None), None)
    source = source["url"] if isinstance(source, dict) and source.get("url") is not None else source
    images += [] if source in (None, "") else [source]
    return IMAGE_TAG


EXAMPLE_ROW = json.dumps(FORMS["conversations"].example)


def parse_conversation(turns: list) -> list[dict]:
    """Returns the turns of a row: at most one system turn, first, then user and assistant in turn.

    An answer's `reasoning_content` stays; an empty think block becomes reasoning_content ''. What tools give is a
    user's turn, and a system turn keeps its `functions`; turns with either, and calls, are marked with `tool`.
    Raises RowError if it is not a conversation that can be learned from.
    """
    parsed = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RowError(f"turn {number} has no role")
        role, content, calls = turn["role"], turn.get("content"), (turn.get("tool_calls") or "[]") != "[]"
        content = "" if content is None and (calls or role == "system") else content
        if not isinstance(content, str):
            raise RowError(f"turn {number} has no text as content")
        marks = {}
        if role == "tool":
            role, content, marks = "user", f"<tool_response>\n{content}\n</tool_response>", {"tool": True}
            if parsed and parsed[-1]["role"] == "user" and "tool" in parsed[-1]:  # several tools after each other
                before = parsed.pop()
                content = f"{before['content']}\n{content}"
        elif role == "system" and (functions := parse_json(turn.get("functions"), f"turn {number}: functions is ")):
            if not isinstance(functions, list) or not all(isinstance(function, dict) for function in functions):
                raise RowError(f"turn {number}: functions is not a list of objects")
            marks = {"tool": True, "functions": functions}
        elif role == "assistant":
            content, empty_blocks = EMPTY_THINKING.subn("", content)
            thought = turn.get("reasoning_content")
            thought = thought if isinstance(thought, str) and thought.strip() else ""
            marks = {"reasoning_content": thought} if empty_blocks or thought else {}
            marks |= {"tool": True} if calls else {}
        parsed.append({"role": role, "content": content} | marks)
    roles = [turn["role"] for turn in parsed]
    has_system = roles[:1] == ["system"]
    for index, role in enumerate(roles[has_system:]):
        if role != (expected := ("user", "assistant")[index % 2]):
            wrong = f"turn {index + has_system + 1} is of role {role!r}, expected {expected!r}"
            # Tools come in orders that no prompt form has.
            raise RowError(TOOL_CALLS if any("tool" in turn for turn in parsed) else wrong)
    for number, turn in enumerate(parsed, start=1):
        role, content = turn["role"], turn["content"]
        if role == "assistant" and not (content.strip() or "tool" in turn):
            raise RowError(f"turn {number}: the answer is empty")
        if role != "user" and IMAGE_TAG in content:
            raise RowError(f"turn {number}: {IMAGE_TAG} is in a turn of role {role!r}, not in the user's")
        if HALF_A_PAIR.search(content + turn.get("reasoning_content", "")):
            raise RowError(f"turn {number} holds half a surrogate pair, which is not a character")
    if "assistant" not in roles:
        raise RowError("nothing to learn: no assistant turn")
    return parsed


def parse_picture_names(value) -> list[str]:
    """Returns the names in a row's `image`; raises RowError for anything else, and for a path that leads upwards."""
    if value is None or value == "":
        return []
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RowError(f"image must be a picture's name, a list of names or empty: {value!r:.80}")
    for name in names:
        if HALF_A_PAIR.search(name):
            raise RowError("a picture's name holds half a surrogate pair, which is not a character")
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if name.startswith("\\") or ".." in parts or PureWindowsPath(name).drive or "\0" in name:
            raise RowError(f"the picture's path leaves images_path: {name!r}")
    return names


def images_first(turns: list[dict], images: int) -> bool:
    """Puts the images before the first question if none has its place, as LLaVA's loaders; returns whether it did."""
    if any(IMAGE_TAG in str(turn["content"]) for turn in turns):
        return False
    asked = next((turn for turn in turns if turn["role"] == "user"), turns[0])
    asked["content"] = with_images(asked["content"], images, f"{IMAGE_TAG}{NEWLINE}{PROMPT}")
    return images > 0


def check_images(turns: list[dict], images: int, hint: str = "") -> bool:
    """Returns whether a single image had no tag and was put first; raises RowError unless each has its `<image>`."""
    tag_added = images == 1 and images_first(turns, images)
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in turns if turn["role"] == "user")
    if tags != images:
        raise RowError(f"{tags} {IMAGE_TAG} in the text, but {images} picture(s){hint}")
    return tag_added
