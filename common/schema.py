"""What a file from outside may hold: checked before anything is built from it, so that nobody else has to doubt it.

A schema is a type; a `Range` of numbers; None; a frozenset of choices; a list of one schema, for a list of any length,
or of several, one for each element; a dict of schemas by key, where a key that ends in ? may be missing and * stands
for all others; or a tuple of alternatives. Keys that a dict does not name may hold anything.
"""

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path

LONGEST = 1 << 22  # bytes of a file
WORDS = {str: "text", bool: "true or false", dict: "an object", list: "a list", int: "a whole number"}
WORDS |= {float: "a number", type(None): "null"}


class SchemaError(ValueError):
    """Something in a file is not what it must be; the message says where, and what it must be."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; of `kind` float whole ones too. NaN is in no range."""

    kind: type
    low: float
    high: float


def check(value, schema, where: str = ""):
    """Raises SchemaError unless a value fits a schema."""
    needed = []
    for option in schema if isinstance(schema, tuple) else (schema,):
        if isinstance(option, Range):
            fits = type(value) in (int, option.kind) and option.low <= value <= option.high
            words = f"{WORDS[option.kind]} from {option.low:g} to {option.high:g}"
        elif isinstance(option, frozenset):
            fits = any(type(value) is type(choice) and value == choice for choice in option)
            words = "one of " + ", ".join(sorted(map(str, option))[:12]) if option else "nothing of this name"
        elif isinstance(option, list):
            fits = isinstance(value, list | tuple) and len(option) in (1, len(value))
            words = "a list" if len(option) == 1 else f"a list of {len(option)}"
        else:
            kind = dict if isinstance(option, dict) else option or type(None)
            fits = type(value) is kind if kind in (int, float) else isinstance(value, kind)  # True is an int
            words = WORDS.get(kind, kind.__name__)
        if fits:
            break
        needed.append(words)
    else:
        raise SchemaError(f"{where or 'it'} is {reprlib.repr(value)[:60]}, {' or '.join(needed)} is needed")
    if isinstance(option, list):
        for index, item in enumerate(value):
            check(item, option[index % len(option)], f"{where}[{index}]")
    if isinstance(option, dict):
        inside = f"{where}." if where else ""
        missing = [name for name in option if name != "*" and not name.endswith("?") and name not in value]
        if missing:
            raise SchemaError(f"{inside}{missing[0]} is missing")
        for name, item in value.items():
            check(item, option.get(name, option.get(f"{name}?", option.get("*", object))), f"{inside}{name}")


def parse_json(text: str | bytes, schema):
    """Returns what JSON text holds; raises SchemaError if it is none, or does not fit."""
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not JSON: {error}") from error
    check(content, schema)
    return content


def read_json(path: Path, schema):
    """Returns what a JSON file holds; raises FileNotFoundError, or SchemaError if it is unreadable or does not fit."""
    try:
        if path.exists() and not path.is_file():
            raise SchemaError("no regular file")
        if path.stat().st_size > LONGEST:
            raise SchemaError(f"longer than {LONGEST:,} bytes")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SchemaError(error.strerror or str(error)) from error
    return parse_json(content, schema)
