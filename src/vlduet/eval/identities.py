"""Identities of questions and items, by which stored predictions are found again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlduet.data.records import ImageRef, Parts
from vlduet.errors import quote_value
from vlduet.eval.benchmarks.tasks import Question


def prompt_text(parts: Parts) -> str:
    """Return a prompt as one text; an image is ``<image>`` and a line end, as in LLaVA's files."""
    return "".join("<image>\n" if isinstance(part, ImageRef) else part for part in parts)


def prompt_identity(question: Question) -> str:
    """Return a text that differs for prompts with other text, options or image file names."""
    images = [Path(part.name).name for part in question.prompt if isinstance(part, ImageRef)]
    options = "".join(f"\n[{option}]" for option in question.options)
    return prompt_text(question.prompt) + options + "".join(f"\n({name})" for name in images)


def item_identity(parts: Parts) -> str:
    """Return a text that differs for items with other texts or image file names.

    The folder of an image does not count, so that data folders can be moved.
    """
    return "|".join(Path(part.name).name if isinstance(part, ImageRef) else part for part in parts)


def hash_items(items: Sequence[Parts]) -> str:
    """Return the SHA-256 of the identities of items, in hexadecimal."""
    identities = "\0".join(item_identity(parts) for parts in items)
    return hashlib.sha256(identities.encode("utf-8", "replace")).hexdigest()


def question_key(name: str, question: Question) -> str:
    """Return the key of a question in files: its id, after ``name|`` where there is a name."""
    return f"{name}|{question.id}" if name else question.id


def describe_difference(key: str, stored: Any, current: Any) -> str:
    """Return ``KEY was STORED, is CURRENT`` for two values that differ.

    Of two mappings, the first inner value that differs is named, as ``KEY.INNER``; None stands for
    a missing one.
    """
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        for inner in (*current, *stored):
            if stored.get(inner) != current.get(inner):
                return describe_difference(f"{key}.{inner}", stored.get(inner), current.get(inner))
    return f"{key} was {quote_value(stored)}, is {quote_value(current)}"
