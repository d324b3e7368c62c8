"""Errors of pydantic in our words, with the path of the field as `messages[0].content[1].text`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from vlduet.errors import DataError, quote_value


def describe_validation_error(error: ValidationError, value: Any) -> DataError:
    """Return the first mistake that pydantic found in `value` as an error with a remedy."""
    return describe_mistake(error.errors(include_url=False)[0], value)


def describe_mistake(mistake: Any, value: Any) -> DataError:
    """Return one of pydantic's error dictionaries about `value` as an error with a remedy."""
    kind, context = mistake["type"], mistake.get("ctx", {})
    place = format_path(mistake["loc"], value)
    if kind == "missing":
        return DataError("missing", place=place, fix="Send this field")
    if kind == "union_tag_invalid":
        name = context["discriminator"].strip("'")
        message = f"{name} {quote_value(context['tag'])} is not served"
        expected = context["expected_tags"].replace("'", "")
        return DataError(message, place=f"{place}.{name}", fix=f"Use one of {expected}")
    if kind == "union_tag_not_found":
        name = context["discriminator"].strip("'")
        return DataError("missing", place=f"{place}.{name}", fix="Send this field")
    if kind == "extra_forbidden":
        return DataError("unknown field", place=place, fix="Leave it out")
    if kind in ("too_long", "too_short"):
        number = context.get("actual_length")
        limit = context.get("max_length", context.get("min_length"))
        bound = "at most" if kind == "too_long" else "at least"
        message = f"{number if number is not None else 'too many'} values"
        return DataError(message, place=place, fix=f"Send {bound} {limit}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = f"{quote_value(mistake['input'])} is not an object"
        return DataError(message, place=place, fix="Send {...}")
    reason = str(mistake["msg"]).replace("Input should be", "must be")
    return DataError(f"{quote_value(mistake['input'])} {reason}", place=place)


def format_path(location: Sequence[Any], value: Any) -> str:
    """Return the path of a field from pydantic's location, without the names of union branches.

    A name in the location is a key of the object there, the last one also a key that is missing;
    every other name is the tag of a branch.
    """
    path = ""
    for position, name in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(name, int):
            path += f"[{name}]"
            value = value[name] if isinstance(value, list) and name < len(value) else None
        elif isinstance(value, dict) and (name in value or is_last):
            path += f".{name}" if path else str(name)
            value = value.get(name)
    return path
