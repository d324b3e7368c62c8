"""Values of metadata as filters compare them: their kinds, and the columns that store them.

A metadata value has one kind: a text, a date (a text in ISO form), a number or a flag (true or
false); a list has the kind of each of its items. `column_values` returns the forms in which a value
can be compared: a date is also a text, and a text that spells a plain number is also a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

from vlduet.retrieval.documents import replace_lone_surrogates

Scalar = str | float | bool
FilterValue = Scalar | tuple[Scalar, ...]
"""Metadata value that can be filtered by; a tuple is a list."""

FILTER_VERSION = 2
"""Version of the forms in which values are stored. Version 1 had no dates and no lists, and no
numbers of texts that spell them."""
MAX_FILTER_KEYS = 64
"""Number of metadata keys that can be filtered by; further keys are only stored and returned."""

SCALAR_KINDS: dict[str, type] = {"text": str, "number": float, "flag": bool}
LIST_SUFFIX = " list"
"""End of the kind of a list: ``text list`` is the kind of a list of texts."""
KIND_PLURALS = {
    "text": "texts",
    "date": "dates such as 2024-05-01",
    "number": "numbers",
    "flag": "flags (true or false)",
    "text list": "lists of texts",
    "number list": "lists of numbers",
    "flag list": "lists of flags",
}
"""Name of each kind in messages."""

_PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,20})?")
"""Texts that spell a number. Leading zeros or more than 15 digits are those of a code."""
_ISO_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?"
)
_SECONDS_BY_PRECISION = {len("10:00"): 60.0, len("10:00:00"): 1.0}
"""Length of the period of a time by the number of its characters; else it is a microsecond."""
_ISO_YEAR_OR_MONTH = re.compile(r"[0-9]{4}(-[0-9]{2})?")


class DatePeriod(NamedTuple):
    """Period that a date in a filter stands for: a year, a month, a day, a minute and so on."""

    start: float
    """First instant, in seconds since 1970 in UTC."""
    end: float
    """First instant after the period, in the same unit."""


def to_scalar(value: Any) -> Scalar | None:
    """Return a metadata value as filters compare it: a text, a finite float or a bool.

    Integers become floats, and lone surrogates in texts become "?". Lists, objects, null,
    infinities, NaN, and integers too large for a float cannot be compared and give None.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number + 0.0 if math.isfinite(number) else None  # adding 0.0 turns -0.0 into 0.0
    return None


def to_filter_value(value: Any) -> FilterValue | None:
    """Return a metadata value as filters compare it: a scalar, or a tuple for a list.

    Items of a list that are no scalars are left out. Other values give None.
    """
    if isinstance(value, list | tuple):
        scalars = (to_scalar(item) for item in value)
        return tuple(scalar for scalar in scalars if scalar is not None)
    return to_scalar(value)


def scalar_kind(value: Scalar) -> str:
    """Return the kind of a scalar: "text", "number" or "flag"."""
    return next(name for name, cls in SCALAR_KINDS.items() if type(value) is cls)


def field_kinds(value: FilterValue) -> list[str]:
    """Return the kinds of a metadata value: one for a scalar, one for each kind of list item."""
    if isinstance(value, tuple):
        return list(dict.fromkeys(scalar_kind(item) + LIST_SUFFIX for item in value))
    if isinstance(value, str) and parse_instant(value) is not None:
        return ["date"]
    return [scalar_kind(value)]


def column_values(value: FilterValue) -> dict[str, Any]:
    """Return the forms in which a metadata value is stored and compared, by kind.

    A date gives its text, and seconds since 1970 as "date"; a text that spells a plain number gives
    the text and the number. A list gives a list for each kind of its items.
    """
    if isinstance(value, tuple):
        lists: dict[str, list[Scalar]] = {}
        for item in value:
            for kind, form in column_values(item).items():
                if kind != "date":
                    lists.setdefault(kind + LIST_SUFFIX, []).append(form)
        return lists
    forms: dict[str, Any] = {scalar_kind(value): value}
    if isinstance(value, str):
        if (instant := parse_instant(value)) is not None:
            forms["date"] = instant
        elif (number := parse_plain_number(value)) is not None:
            forms["number"] = number
    return forms


def extract_filter_values(
    metadata: Mapping[str, Any], fields: dict[str, list[str]]
) -> dict[str, FilterValue]:
    """Return the metadata values that can be filtered by, and add their keys to `fields`.

    Args:
        metadata: JSON values of one document.
        fields: kinds of the values of each key; extended in place. New keys beyond the first
            `MAX_FILTER_KEYS` are not added, and their values are left out.
    """
    values: dict[str, FilterValue] = {}
    for key, raw_value in metadata.items():
        value = to_filter_value(raw_value)
        if value is None or value == ():
            continue
        if key not in fields and len(fields) >= MAX_FILTER_KEYS:
            continue
        kinds = fields.setdefault(key, [])
        kinds += [kind for kind in field_kinds(value) if kind not in kinds]
        values[key] = value
    return values


def parse_plain_number(text: str) -> float | None:
    """Return the number that a text spells as a spreadsheet would; None for codes such as 007."""
    return float(text) + 0.0 if _PLAIN_NUMBER.fullmatch(text) else None


def parse_instant(text: str) -> float | None:
    """Return an ISO date, perhaps with a time, in seconds since 1970; None for other texts.

    A time without a zone is taken as UTC, and a day as its beginning.
    """
    if len(text) > 32 or _ISO_DATE.fullmatch(text) is None:
        return None
    try:
        return _to_seconds(datetime.fromisoformat(text))
    except (ValueError, OverflowError):  # a 13th month
        return None


def parse_period(text: str) -> DatePeriod | None:
    """Return the period of a year, a month, a day or a time in ISO form; None for other texts."""
    if _ISO_YEAR_OR_MONTH.fullmatch(text):
        year, month = int(text[:4]), int(text[5:] or 1)
        if not (1 <= year <= 9998 and 1 <= month <= 12):
            return None
        is_year = len(text) == 4
        end = date(year + 1, 1, 1) if is_year or month == 12 else date(year, month + 1, 1)
        return DatePeriod(_day_start(date(year, month, 1)), _day_start(end))
    start = parse_instant(text)
    if start is None:
        return None
    time = re.search(r"[T ]([0-9:.]+)", text)
    length = 86_400.0 if time is None else _SECONDS_BY_PRECISION.get(len(time[1]), 1e-6)
    return DatePeriod(start, start + length)


def _day_start(day: date) -> float:
    """Return the beginning of a day in UTC, in seconds since 1970."""
    return _to_seconds(datetime(day.year, day.month, day.day))


def _to_seconds(moment: datetime) -> float:
    """Return seconds since 1970; a moment without a zone is in UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
