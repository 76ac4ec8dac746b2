"""Checks of what a row may hold: its turns, and the names of its pictures."""

import json
import re
from pathlib import PurePosixPath, PureWindowsPath

IMAGE_TAG = "<image>"
TOOL_CALLS = "it calls tools, and nothing here answers a call"
NO_CALLS = (None, "", "[]", [])
EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")


class RowError(ValueError):
    """A row that cannot be learned from; the message says why."""


def parse_conversation(turns: list) -> list[dict]:
    """Returns the turns of a row: at most one system turn, first, then user and assistant in turn.

    An answer's `reasoning_content` stays; an empty think block becomes reasoning_content ''. What tools give is a
    user's turn, and a system turn keeps its `functions`; turns with either, and calls, are marked with `tool`.

    Raises:
        RowError: If it is not a conversation that can be learned from.
    """
    if not turns:
        raise RowError("conversations is missing or not a list of turns")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RowError(f"turn {number} has no role")
    parsed, turns = [parse_turn(turn, number) for number, turn in enumerate(turns, start=1)], []
    for turn in parsed:
        if turns and turn["role"] == turns[-1]["role"] == "user" and "tool" in turn and "tool" in turns[-1]:
            turns[-1]["content"] += f"\n{turn['content']}"  # several tools after each other
        else:
            turns.append(turn)
    offset = int(turns[0]["role"] == "system")
    for index, turn in enumerate(turns[offset:]):
        expected = ("user", "assistant")[index % 2]
        if turn["role"] != expected and any("tool" in turn for turn in turns):
            raise RowError(TOOL_CALLS)  # in an order that no prompt form has
        if turn["role"] != expected:
            raise RowError(f"turn {index + offset + 1} is of role {turn['role']!r}, expected {expected!r}")
    if len(turns) < offset + 2:
        raise RowError("nothing to learn: no assistant turn")
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and not (turn["content"].strip() or "tool" in turn):
            raise RowError(f"turn {number}: the answer is empty")
        if turn["role"] != "user" and IMAGE_TAG in turn["content"]:
            raise RowError(f"turn {number}: {IMAGE_TAG} stands in a turn of role {turn['role']!r}, not of the user")
        check_characters(turn["content"] + turn.get("reasoning_content", ""), f"turn {number}")
    return turns


def parse_turn(turn: dict, number: int) -> dict:
    role, content, calls = turn["role"], turn.get("content"), turn.get("tool_calls") not in NO_CALLS
    content = "" if content is None and (calls or role == "system") else content
    if not isinstance(content, str):
        raise RowError(f"turn {number} has no text as content")
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>", "tool": True}
    parsed = {"role": role, "content": content}
    if role == "system" and (functions := turn.get("functions")):
        try:
            functions = json.loads(functions) if isinstance(functions, str) else functions
        except (ValueError, RecursionError) as error:
            raise RowError(f"turn {number}: functions is not JSON: {error}") from error
        if not isinstance(functions, list) or not all(isinstance(function, dict) for function in functions):
            raise RowError(f"turn {number}: functions is no list of objects")
        parsed |= {"tool": True, "functions": functions} if functions else {}
    if role == "assistant":
        reasoning, empty = turn.get("reasoning_content"), EMPTY_THINKING.match(content)
        has_reasoning = isinstance(reasoning, str) and reasoning.strip() != ""
        if empty:
            parsed["content"] = content[empty.end() :]
        if has_reasoning or empty:
            parsed["reasoning_content"] = reasoning if has_reasoning else ""
        if calls:
            parsed["tool"] = True
    return parsed


def check_characters(text: str, what: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape it, but no file can hold it
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
        Whether a single picture had no tag: it is then put first, as in LLaVA's loaders.
    """
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in turns if turn["role"] == "user")
    if tags == 0 and pictures == 1:
        asked = next(turn for turn in turns if turn["role"] == "user")
        asked["content"] = f"{IMAGE_TAG}\n{asked['content']}"
        return True
    if tags != pictures:
        raise RowError(f"{tags} {IMAGE_TAG} in the text, but {pictures} picture(s)")
    return False
