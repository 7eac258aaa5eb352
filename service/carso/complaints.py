"""What a field of a pydantic model allows, in words, for the messages about settings and request options."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

SHOWN = 80  # characters of a bad value that a message repeats: it may be megabytes


@cache  # models are few, and their schemas slow to make
def allowed(model: type[BaseModel], field: str) -> str:
    """Return what a field allows, such as: an integer from 1 to 10000."""
    return _in_words(model.model_json_schema(by_alias=False)["properties"][field])


def complaint(model: type[BaseModel], error: ErrorDetails) -> str:
    """Return one sentence on a value that `model` refused: the value, and the allowed range."""
    field = str(error["loc"][0])
    return f"{shown(error['input'])} is not allowed; it must be {allowed(model, field)}"


def first_complaint(errors: ValidationError) -> str:
    """Return the first thing that a model refused, after where it stands, if that is not the whole."""
    first = errors.errors()[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def shown(value: object) -> str:
    """Return a value as a message repeats it: its beginning, on one line."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_in_words(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    noun = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}
    words = "a path" if schema.get("format") == "path" else noun[schema["type"]]
    match schema:
        case {"minimum": low, "maximum": high}:
            return f"{words} from {low} to {high}"
        case {"minimum": low}:
            return f"{words} of at least {low}"
        case {"pattern": pattern}:
            return f"{words} that matches {pattern}"
        case {"minLength": 1}:
            return f"{words} that is not empty"
    return words
