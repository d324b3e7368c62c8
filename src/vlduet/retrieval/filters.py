"""Filters on metadata, with one meaning in every store.

A value is a text, a number or a flag, and is compared only with values of its own kind. A document without
the key, or with a value of another kind, satisfies no condition but ``!=``, which is the exact opposite of
``=``. Lists, objects and null in metadata are kept and shown, but never match.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlduet.errors import RetrievalError, suggest_name
from vlduet.retrieval.documents import replace_lone_surrogates

Scalar = str | float | bool

SCALAR_KINDS: dict[str, type] = {"text": str, "number": float, "flag": bool}
ORDER_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATORS = ("=", "!=", *ORDER_OPERATORS, "in")


@dataclass(frozen=True, slots=True)
class Condition:
    """``key operator value``; the value of ``in`` is a tuple.

    Raises:
        RetrievalError: an unknown operator, or a value that cannot be compared.
    """

    key: str
    operator: str
    value: Any

    def __post_init__(self) -> None:
        where = f"where: {self.key!r} {self.operator}"
        if self.operator not in OPERATORS:
            raise RetrievalError(
                f"unknown operator '{self.operator}'", place=where, fix=f"Use {' '.join(OPERATORS)}"
            )
        many = self.operator == "in"
        if many and (isinstance(self.value, str) or not isinstance(self.value, Iterable)):
            raise RetrievalError(
                f"{self.value!r} is not a list", place=where, fix="Give several values"
            )
        given = list(self.value) if many else [self.value]
        values = [to_scalar(value) for value in given]
        for raw, value in zip(given, values, strict=True):
            if value is None or (self.operator in ORDER_OPERATORS and isinstance(value, bool)):
                fix = (
                    "Compare with a text or a number"
                    if self.operator in ORDER_OPERATORS
                    else "Use a text, a number or a flag"
                )
                raise RetrievalError(f"{raw!r} cannot be compared", place=where, fix=fix)
        object.__setattr__(self, "value", tuple(values) if many else values[0])

    @property
    def values(self) -> tuple[Scalar, ...]:
        """The value, or those of ``in``."""
        found: tuple[Scalar, ...] = self.value if self.operator == "in" else (self.value,)
        return found

    def matches(self, filters: Mapping[str, Scalar]) -> bool:
        """Whether a document with these filter values satisfies the condition."""
        own = filters.get(self.key)
        if self.operator in ORDER_OPERATORS:
            return (
                own is not None
                and scalar_kind(own) == scalar_kind(self.value)
                and bool(ORDER_OPERATORS[self.operator](own, self.value))
            )
        found = any(
            own is not None and scalar_kind(own) == scalar_kind(value) and own == value
            for value in self.values
        )
        return found is not (self.operator == "!=")


Where = Mapping[str, Any] | Iterable[Condition | str] | None
"""``{"category": "animals"}`` (equal), ``{"category": ["animals", "plants"]}`` (one of), or a list of
Conditions and of texts as on the command line: ``["category=animals", "year>=1990"]``. All must hold."""

FilterFields = Mapping[str, Iterable[str]]
"""The metadata keys that an index can be filtered by, and the kinds of their values."""


def parse_conditions(where: Where, fields: FilterFields) -> tuple[Condition, ...]:
    """Any form of filter -> conditions that must all hold.

    Raises:
        RetrievalError: a condition that cannot be read, or a key that no document has: a misspelt filter must
            not look like no hits.
    """
    if isinstance(where, Mapping):
        found = [
            Condition(key, "in" if _is_many(value) else "=", value) for key, value in where.items()
        ]
    else:
        given = [where] if isinstance(where, str) else where or ()
        found = [parse_condition(one, fields) if isinstance(one, str) else one for one in given]
    for condition in found:
        _check_key(condition.key, fields)
    return tuple(found)


def _is_many(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def to_scalar(value: Any) -> Scalar | None:
    """A metadata value as it is compared; None for what cannot be: lists, objects, null, infinities, NaN."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number + 0.0 if math.isfinite(number) else None  # -0.0 and 0.0 are one value
    return None


def scalar_kind(value: Scalar) -> str:
    """text, number or flag."""
    return next(name for name, form in SCALAR_KINDS.items() if type(value) is form)


_CONDITION = re.compile(
    r"\s*(?P<key>.+?)\s*(?P<operator>!=|<=|>=|=|<|>|(?<=\s)in(?=\s))\s*(?P<value>.*?)\s*", re.DOTALL
)


def parse_condition(text: str, fields: FilterFields) -> Condition:
    """A condition as typed: ``category=animals``, ``year>=1990``, ``category in animals,plants``.

    Args:
        text: the condition; a value is read as the kind that the index holds for its key.
        fields: the kinds that the index holds for each key.

    Raises:
        RetrievalError: not a condition, an unknown key, a value of no fitting kind.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise RetrievalError(
            f"'{text}'", place="--where", fix="Write key=value; operators: " + " ".join(OPERATORS)
        )
    key, sign, value = match["key"], match["operator"], match["value"]
    _check_key(key, fields)
    kinds = set(fields[key])
    if sign == "in":
        return Condition(
            key, sign, [_typed(item.strip(), kinds, text) for item in value.split(",")]
        )
    typed = _typed(value, kinds, text)
    if (
        sign in ORDER_OPERATORS and isinstance(typed, str) and _number(typed) is not None
    ):  # '1000' comes before '9'
        fix = "Write numbers as numbers, as JSON lines can and CSV cannot"
        raise RetrievalError(f"'{value}': this key holds texts", place=f"--where '{text}'", fix=fix)
    return Condition(key, sign, typed)


def _check_key(key: str, fields: FilterFields) -> None:
    if key not in fields:
        raise RetrievalError(
            f"no document has metadata '{key}'", place="where", fix=suggest_name(key, fields)
        )


def _number(value: str) -> Scalar | None:
    try:
        return to_scalar(float(value))
    except ValueError:
        return None


def _typed(value: str, kinds: set[str], text: str) -> Scalar:
    if "number" in kinds and (number := _number(value)) is not None:
        return number
    if "flag" in kinds and value in ("true", "false"):
        return value == "true"
    if "text" in kinds:
        return value
    held = " and ".join(f"{name}s" for name in sorted(kinds))
    raise RetrievalError(
        f"'{value}': this key holds {held}",
        place=f"--where '{text}'",
        fix=f"Compare with one of the {held}",
    )
