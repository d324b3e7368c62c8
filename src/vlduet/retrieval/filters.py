"""Filters on metadata, with the same meaning in every store.

A value is a text, a number or a flag (true or false), and is compared only with values of its own
kind. A document without the key, or with a value of another kind, satisfies no condition except
``!=``, which is the exact opposite of ``=``. Lists, objects and null in metadata are stored and
returned, but match no condition. A condition on a key that no document has, or of a kind that no
document has under its key, is an error.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlduet.errors import RetrievalError, quote_value, suggest_name
from vlduet.retrieval.documents import replace_lone_surrogates

Scalar = str | float | bool

SCALAR_KINDS: dict[str, type] = {"text": str, "number": float, "flag": bool}
ORDER_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATORS = ("=", "!=", *ORDER_OPERATORS, "in")


@dataclass(frozen=True, slots=True)
class Condition:
    """Condition ``key operator value`` on a document's metadata.

    Construction converts `value` with `to_scalar`; the value of ``in`` becomes a tuple.

    Raises:
        RetrievalError: an unknown operator, or a value that cannot be compared.
    """

    key: str
    operator: str
    value: Any

    def __post_init__(self) -> None:
        """Check the operator; replace `value` by its scalar, or for ``in`` by a tuple of them.

        Raises RetrievalError for an unknown operator, for a value that `_convert` refuses, and for
        ``in`` with a value that is a text or no iterable.
        """
        place = f"where: {quote_value(self.key)} {self.operator}"
        if self.operator not in OPERATORS:
            fix = f"Use {' '.join(OPERATORS)}"
            raise RetrievalError(f"unknown operator '{self.operator}'", place=place, fix=fix)
        if self.operator != "in":
            object.__setattr__(self, "value", self._convert(self.value, place))
            return
        if isinstance(self.value, str) or not isinstance(self.value, Iterable):
            message = f"{quote_value(self.value)} is not a list"
            raise RetrievalError(message, place=place, fix="Give several values")
        values = tuple(self._convert(value, place) for value in self.value)
        object.__setattr__(self, "value", values)

    def _convert(self, value: Any, place: str) -> Scalar:
        """Return `value` as a scalar; `place` is the place in an error message.

        Raises RetrievalError for a value that is neither a text, a finite number nor a flag, and
        for a flag with ``<``, ``<=``, ``>`` or ``>=``.
        """
        is_order = self.operator in ORDER_OPERATORS
        converted = to_scalar(value)
        if converted is None or (is_order and isinstance(converted, bool)):
            kinds = "a text or a number" if is_order else "a text, a number or a flag"
            message = f"{quote_value(value)} cannot be compared"
            raise RetrievalError(message, place=place, fix=f"Compare with {kinds}")
        return converted

    @property
    def values(self) -> tuple[Scalar, ...]:
        """The values of ``in``, or the value of any other operator as a tuple of one."""
        values: tuple[Scalar, ...] = self.value if self.operator == "in" else (self.value,)
        return values

    def matches(self, filter_values: Mapping[str, Scalar]) -> bool:
        """Return whether a document with these filter values satisfies the condition.

        A missing key, or a value of another kind than the condition's, satisfies only ``!=``.
        """
        value = filter_values.get(self.key)
        if self.operator in ORDER_OPERATORS:
            if value is None or scalar_kind(value) != scalar_kind(self.value):
                return False
            return bool(ORDER_OPERATORS[self.operator](value, self.value))
        is_equal = value is not None and any(
            scalar_kind(value) == scalar_kind(other) and value == other for other in self.values
        )
        return is_equal is not (self.operator == "!=")


Where = Mapping[str, Any] | Iterable[Condition | str] | None
"""Filter in any accepted form: ``{"category": "animals"}`` (equal), ``{"category": ["animals",
"plants"]}`` (one of these), or a list of Conditions and of texts as on the command line:
``["category=animals", "year>=1990"]``. All conditions must hold; None filters nothing."""

FilterFields = Mapping[str, Iterable[str]]
"""Metadata keys that an index can be filtered by, with the kinds of their values."""


def parse_conditions(where: Where, fields: FilterFields) -> tuple[Condition, ...]:
    """Return a filter in any accepted form as conditions that must all hold; () for an empty one.

    In a mapping, a list, tuple or set means ``in``, and any other value ``=``. A text alone is one
    condition. Raises RetrievalError for a text that cannot be parsed, for a value that cannot be
    compared, for a key that is not in `fields`, and for a value of a kind that `fields` does not
    list for its key: a mistake in a filter must not look like an empty result.
    """
    conditions: list[Condition] = []
    if isinstance(where, Mapping):
        for key, value in where.items():
            is_collection = isinstance(value, list | tuple | set | frozenset)
            conditions.append(Condition(key, "in" if is_collection else "=", value))
    else:
        for item in [where] if isinstance(where, str) else where or ():
            conditions.append(parse_condition(item, fields) if isinstance(item, str) else item)
    for condition in conditions:
        _check_key(condition.key, fields)
        for value in condition.values:
            if scalar_kind(value) not in fields[condition.key]:
                place = f"where: {quote_value(condition.key)} {condition.operator}"
                raise _wrong_kind_error(repr(value), condition.key, fields, place=place)
    return tuple(conditions)


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


def scalar_kind(value: Scalar) -> str:
    """Return the kind of a scalar: "text", "number" or "flag"."""
    return next(name for name, cls in SCALAR_KINDS.items() if type(value) is cls)


_CONDITION = re.compile(
    r"\s*(?P<key>.+?)\s*(?P<operator>!=|<=|>=|=|<|>|(?<=\s)in(?=\s))\s*(?P<value>.*?)\s*",
    re.DOTALL,
)


def parse_condition(text: str, fields: FilterFields) -> Condition:
    """Parse a typed condition such as ``year>=1990`` or ``category in animals,plants``.

    White space around key and values is ignored; commas separate the values of ``in``.

    Args:
        text: the condition.
        fields: kinds of the values that the index holds for each key; the value is parsed as one of
            the kinds of its key.

    Raises:
        RetrievalError: not a condition, an unknown key, a value that fits no kind of its key or
            cannot be compared by the operator, or an order comparison (``<`` and so on) of a number
            with a key that holds it as a text.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        fix = "Write key=value; operators: " + " ".join(OPERATORS)
        raise RetrievalError(quote_value(text), place="--where", fix=fix)
    key, operator_name, value = match["key"], match["operator"], match["value"]
    _check_key(key, fields)
    kinds, place = set(fields[key]), f"--where {quote_value(text)}"
    if operator_name == "in":
        values = [_parse_value(item.strip(), kinds) for item in value.split(",")]
        if None in values:
            raise _wrong_kind_error(quote_value(value), key, fields, place=place)
        return Condition(key, operator_name, values)
    scalar = _parse_value(value, kinds)
    if scalar is None:
        raise _wrong_kind_error(quote_value(value), key, fields, place=place)
    is_numeric_text = isinstance(scalar, str) and _parse_number(scalar) is not None
    if operator_name in ORDER_OPERATORS and is_numeric_text:
        # As texts, '1000' comes before '9'.
        fix = "Write every value of it as a plain number, such as 12.5, and index the source again"
        raise RetrievalError(f"{quote_value(value)}: {key} holds texts", place=place, fix=fix)
    return Condition(key, operator_name, scalar)


def _check_key(key: str, fields: FilterFields) -> None:
    """Raise RetrievalError, with the most similar known key, if no document has `key`."""
    if key not in fields:
        message = f"no document has metadata {quote_value(key)}"
        raise RetrievalError(message, place="where", fix=suggest_name(key, fields))


def _parse_number(text: str) -> Scalar | None:
    """Return `text` as a finite float, or None."""
    try:
        return to_scalar(float(text))
    except ValueError:
        return None


def _parse_value(value: str, kinds: set[str]) -> Scalar | None:
    """Return a typed value as the first of number, flag and text that is in `kinds` and fits it.

    A number becomes a float, and a flag is ``true`` or ``false``; a text always fits. None if none
    fits.
    """
    if "number" in kinds and (number := _parse_number(value)) is not None:
        return number
    if "flag" in kinds and value in ("true", "false"):
        return value == "true"
    return value if "text" in kinds else None


def _wrong_kind_error(value: str, key: str, fields: FilterFields, *, place: str) -> RetrievalError:
    """Return the error of a value, as it is quoted, that is of no kind that `key` holds."""
    plural = " and ".join(f"{name}s" for name in sorted(fields[key]))
    fix = f"Compare with one of the {plural}"
    return RetrievalError(f"{value}: {key} holds {plural}", place=place, fix=fix)
