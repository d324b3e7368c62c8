"""Texts in metadata that are probably meant as numbers, which filters compare as texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlduet.data.records import Place

MIN_NUMBER_SHARE = 0.5
"""Share of the values of a key above which they are probably numbers."""

_UNIT = r"\s*(?P<{}>[€$£¥%]|EUR|USD|GBP|CHF|[cmk]?m|[mk]?g|[mc]?l)?\s*"
_NUMBER = re.compile(
    _UNIT.format("before")
    + r"-?(?!0\d)\d{1,3}([.,' ]?\d{3})*(?P<decimals>[.,]\d{1,2})?"
    + _UNIT.format("after")
)
_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(slots=True)
class _KeyValues:
    """Values of one key of metadata."""

    count: int = 0
    num_numbers: int = 0
    """Texts that look like numbers."""
    is_measure: bool = False
    """One of these has decimals or a unit, and so is no code."""
    exception: tuple[str, Place] | None = None
    """First text that is no plain number, and its place."""


class MetadataTexts:
    """Counts of the texts of every key of metadata, by whether they look like numbers."""

    def __init__(self) -> None:
        """Start without keys."""
        self._keys: dict[str, _KeyValues] = {}

    def add(self, metadata: Mapping[str, Any], place: Place) -> None:
        """Count the values of a record at `place`."""
        for key, value in metadata.items():
            values = self._keys.setdefault(str(key), _KeyValues())
            values.count += 1
            if not isinstance(value, str):
                continue
            if match := _NUMBER.fullmatch(value):
                values.num_numbers += 1
                values.is_measure |= any(match.group("before", "decimals", "after"))
            if values.exception is None and not _PLAIN_NUMBER.fullmatch(value.strip()):
                values.exception = value, place

    def describe_numbers(self) -> list[str]:
        """Return a sentence per key whose values are mostly texts that look like numbers.

        A key whose texts are all plain integers, or plain integers and others, may hold codes, and
        is left out.
        """
        sentences = []
        for key, values in self._keys.items():
            is_number = values.num_numbers > MIN_NUMBER_SHARE * values.count and values.is_measure
            if is_number and values.exception is not None:
                text, place = values.exception
                line = "" if place.line is None else f" (line {place.line})"
                sentences.append(
                    f"`{key}` is kept as text, which filters do not compare as a number, because "
                    f"of '{text[:40]}'{line}; write plain numbers such as 12.5, or nothing"
                )
        return sentences
