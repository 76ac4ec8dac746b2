"""What a file from outside may hold: checked before anything is built from it, so that nobody else has to doubt it.

A schema is a type; a `Range` of numbers; None; a frozenset of choices; a list of one schema, for a list of any length,
or of several, one for each element; a dict of schemas by key, where a key that ends in ? may be missing and * stands
for all others; or a tuple of alternatives. Keys that a dict does not name may hold anything.
"""

import json
from dataclasses import dataclass
from pathlib import Path

LONGEST, DEEPEST = 1 << 22, 32  # bytes of a file, and lists and objects in each other
WORDS = {
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    int: "a whole number",
    float: "a number",
}


class SchemaError(ValueError):
    """Something in a file is not what it must be; the message says what, where, and what it must be."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; of `kind` float whole ones too. NaN is in no range."""

    kind: type
    low: float
    high: float


def expected(schema) -> str:
    """Returns a schema in words."""
    if isinstance(schema, tuple):
        return " or ".join(map(expected, schema))
    if isinstance(schema, Range):
        return f"{WORDS[schema.kind]} from {schema.low:g} to {schema.high:g}"
    if isinstance(schema, frozenset):
        return (
            "nothing of this name"
            if not schema
            else "one of " + ", ".join(map(json.dumps, sorted(schema, key=str)[:12]))
        )
    if isinstance(schema, list):
        return f"a list of {len(schema) if len(schema) > 1 else expected(schema[0])}"
    return "null" if schema is None else WORDS.get(dict if isinstance(schema, dict) else schema, str(schema))


def fits(value, schema) -> bool:
    """Tells whether a value is of a schema's kind; what is in a list or dict is not looked at."""
    if isinstance(schema, Range):
        is_number = isinstance(value, int | (float if schema.kind is float else int)) and not isinstance(value, bool)
        return is_number and schema.low <= value <= schema.high
    if isinstance(schema, frozenset):
        return any(type(value) is type(choice) and value == choice for choice in schema)
    if isinstance(schema, list):
        return isinstance(value, list | tuple) and len(schema) in (1, len(value))
    kind = dict if isinstance(schema, dict) else type(None) if schema is None else schema
    return type(value) is kind or (kind not in (int, float, bool) and isinstance(value, kind))


def check(value, schema, where: str = ""):
    """Raises SchemaError unless a value fits a schema, which must not be nested deeply."""
    options = schema if isinstance(schema, tuple) else (schema,)
    schema = next((option for option in options if fits(value, option)), options)
    if schema is options:
        raise SchemaError(f"{where or 'it'} is {repr(value)[:60]}, {expected(options)} is needed")
    if isinstance(schema, list):
        for index, item in enumerate(value):
            check(item, schema[index % len(schema)], f"{where}[{index}]")
    if isinstance(schema, dict):
        required = {name.removesuffix("?"): not name.endswith("?") for name in schema if name != "*"}
        missing = [name for name, must in required.items() if must and name not in value]
        if missing:
            raise SchemaError(f"{where + '.' if where else ''}{missing[0]} is missing")
        for name, item in value.items():
            of_name = schema.get(name, schema.get(f"{name}?", schema.get("*", object)))
            check(item, of_name, f"{where}.{name}" if where else str(name))


def parse_json(text: str | bytes, schema):
    """Returns what JSON text holds; raises SchemaError if it is none, is nested too deeply, or does not fit."""
    try:
        content = json.loads(text)
        level, depth = [content], 0
        while level := [item for value in level if isinstance(value, dict | list) for item in items_of(value)]:
            depth += 1
            if depth > DEEPEST:
                raise SchemaError(f"more than {DEEPEST} lists and objects are nested in each other")
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not JSON: {error}") from error
    check(content, schema)
    return content


def items_of(value: dict | list):
    return value.values() if isinstance(value, dict) else value


def read_json(path: Path, schema):
    """Returns what a JSON file holds.

    Raises:
        FileNotFoundError: If it is missing.
        SchemaError: If it cannot be read, is no regular file or a very long one, or does not fit the schema.
    """
    try:
        if path.exists() and not path.is_file():
            raise SchemaError("no regular file")
        with open(path, "rb") as file:
            content = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SchemaError(error.strerror or str(error)) from error
    if len(content) > LONGEST:
        raise SchemaError(f"longer than {LONGEST:,} bytes")
    return parse_json(content, schema)
