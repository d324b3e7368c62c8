"""Filters on metadata, with the same meaning in every store.

A value is a text, a date, a number or a flag (true or false), and is compared only with values of
its own kind; a document without the key, or with a value of another kind, satisfies no condition
except ``!=``, which is the exact opposite of ``=``. Lists satisfy only ``contains``. Objects and
null in metadata are stored and returned, but match no condition. A condition on a key that no
document has, or with a value of a kind that its key does not have, is an error.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlduet.errors import RetrievalError, quote_value, suggest_name
from vlduet.retrieval.filter_text import MAX_TEXT_CHARS, TextCondition, split_conditions
from vlduet.retrieval.filter_values import (
    KIND_PLURALS,
    LIST_SUFFIX,
    DatePeriod,
    FilterValue,
    Scalar,
    column_values,
    parse_period,
    parse_plain_number,
    scalar_kind,
    to_scalar,
)

MAX_CONDITIONS = 64
"""Number of conditions of one filter."""
MAX_VALUES = 1000
"""Number of values of all conditions of one filter."""

ORDER_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATORS = ("=", "!=", *ORDER_OPERATORS, "in", "contains")
ConditionValue = Scalar | DatePeriod


@dataclass(frozen=True, slots=True)
class Condition:
    """Condition ``key operator value`` on a document's metadata; ``==`` is ``=``.

    Construction converts `value` with `to_scalar`; the value of ``in`` becomes a tuple.
    `parse_conditions` replaces dates by `DatePeriod`.

    Raises:
        RetrievalError: an unknown operator, a value that cannot be compared, or for ``in`` no value
            or more than `MAX_VALUES`.
    """

    key: str
    operator: str
    value: Any

    def __post_init__(self) -> None:
        """Check the operator; replace `value` by its scalar, or for ``in`` by a tuple of them.

        Raises RetrievalError as the class says.
        """
        if self.operator == "==":
            object.__setattr__(self, "operator", "=")
        if self.operator not in OPERATORS:
            fix = f"Use {' '.join(OPERATORS)}"
            message = f"unknown operator {quote_value(self.operator)}"
            raise RetrievalError(message, place=f"where: {quote_value(self.key)}", fix=fix)
        if self.operator != "in":
            object.__setattr__(self, "value", self._convert(self.value))
            return
        if isinstance(self.value, str) or not isinstance(self.value, Iterable):
            message = f"{quote_value(self.value)} is not a list"
            raise RetrievalError(message, place=self.place, fix="Give several values")
        values = tuple(self._convert(v) for v in itertools.islice(self.value, MAX_VALUES + 1))
        if not values:
            fix = "Give at least one value, or leave the condition out"
            raise RetrievalError("an empty list", place=self.place, fix=fix)
        if len(values) > MAX_VALUES:
            raise _too_many_values_error(self.place)
        object.__setattr__(self, "value", values)

    def _convert(self, value: Any) -> ConditionValue:
        """Return `value` as a scalar, or a period as it is.

        Raises RetrievalError for a value that is neither a text, a finite number nor a flag, for a
        text that is too long, and for a flag with ``<``, ``<=``, ``>`` or ``>=``.
        """
        if isinstance(value, DatePeriod):
            return value
        is_order = self.operator in ORDER_OPERATORS
        converted = to_scalar(value)
        if converted is None or (is_order and isinstance(converted, bool)):
            kinds = "a text or a number" if is_order else "a text, a number or a flag"
            message = f"{quote_value(value)} cannot be compared"
            raise RetrievalError(message, place=self.place, fix=f"Compare with {kinds}")
        if isinstance(converted, str) and len(converted) > MAX_TEXT_CHARS:
            message = f"a text of {len(converted)} characters"
            fix = f"Compare with at most {MAX_TEXT_CHARS}"
            raise RetrievalError(message, place=self.place, fix=fix)
        return converted

    @property
    def place(self) -> str:
        """Place of the condition in an error message."""
        return f"where: {quote_value(self.key)} {self.operator}"

    @property
    def values(self) -> tuple[ConditionValue, ...]:
        """The values of ``in``, or the value of any other operator as a tuple of one."""
        is_list = self.operator == "in"
        values: tuple[ConditionValue, ...] = self.value if is_list else (self.value,)
        return values

    def matches(self, filter_values: Mapping[str, FilterValue]) -> bool:
        """Return whether a document with these filter values satisfies the condition.

        A missing key, or a value of another kind than the condition's, satisfies only ``!=``.
        """
        stored = filter_values.get(self.key)
        forms = {} if stored is None else column_values(stored)
        is_match = any(self._matches_form(value, forms) for value in self.values)
        return is_match is not (self.operator == "!=")

    def _matches_form(self, value: ConditionValue, forms: Mapping[str, Any]) -> bool:
        """Return whether one of the stored `forms` of a value is equal, in order, or contains."""
        kind = value_kind(value)
        if self.operator == "contains" and value in forms.get(kind + LIST_SUFFIX, ()):
            return True
        form = forms.get(kind)
        if form is None:
            return False
        if isinstance(value, DatePeriod):
            first, end = order_bounds(value, self.operator)
            return bool(first <= form < end)
        if self.operator in ORDER_OPERATORS:
            return bool(ORDER_OPERATORS[self.operator](form, value))
        return bool(form == value)


Where = Mapping[str, Any] | Iterable[Condition | str] | None
"""Filter in any accepted form: ``{"category": "animals"}`` (equal), ``{"category": ["animals",
"plants"]}`` (one of these), or a list of Conditions and of texts as on the command line:
``["category=animals", "year>=1990 and tags contains card"]``. All conditions must hold; None
filters nothing."""

FilterFields = Mapping[str, Iterable[str]]
"""Metadata keys that an index can be filtered by, with the kinds of their values."""


def value_kind(value: ConditionValue) -> str:
    """Return the kind of a condition's value: that of a scalar, or "date" for a period."""
    return "date" if isinstance(value, DatePeriod) else scalar_kind(value)


def order_bounds(period: DatePeriod, operator_name: str) -> tuple[float, float]:
    """Return the first instant that satisfies a condition on a date, and the first one behind.

    ``<=`` includes the whole period and ``>`` begins behind it; ``!=`` has the bounds of ``=``.
    """
    start = {">": period.end, "<": -math.inf, "<=": -math.inf}.get(operator_name, period.start)
    end = {">": math.inf, ">=": math.inf, "<": period.start}.get(operator_name, period.end)
    return start, end


def parse_conditions(where: Where, fields: FilterFields) -> tuple[Condition, ...]:
    """Return a filter in any accepted form as conditions that must all hold; () for an empty one.

    In a mapping, a list, tuple or set means ``in``, and any other value ``=``. Values get the kind
    of their key: a text becomes a `DatePeriod` if the key holds dates, and a text that spells a
    number becomes one if the key holds numbers and texts.

    Raises:
        RetrievalError: a text that is no condition, more than `MAX_CONDITIONS` conditions or
            `MAX_VALUES` values, a value that cannot be compared, a key that is not in `fields`, a
            value of a kind that `fields` does not list for its key, or an operator that lists, or
            numbers that are stored as texts, do not have. A mistake in a filter must not look like
            an empty result.
    """
    conditions: list[Condition] = []
    for item in _iter_conditions(where):
        if len(conditions) == MAX_CONDITIONS:
            fix = "Combine values of one key by 'in'"
            raise RetrievalError(f"more than {MAX_CONDITIONS} conditions", place="where", fix=fix)
        if isinstance(item, TextCondition):
            condition, place = _parse_values(item, fields), f"where {quote_value(item.text)}"
        else:
            condition, place = item, item.place
        conditions.append(_resolve(condition, fields, place))
    if sum(len(condition.values) for condition in conditions) > MAX_VALUES:
        raise _too_many_values_error("where")
    return tuple(conditions)


def _iter_conditions(where: Where) -> Iterable[Condition | TextCondition]:
    """Yield the conditions of a filter; those of a text have values without kinds."""
    if isinstance(where, Mapping):
        for key, value in where.items():
            is_collection = isinstance(value, list | tuple | set | frozenset)
            yield Condition(key, "in" if is_collection else "=", value)
        return
    if where is not None and not isinstance(where, Iterable):
        raise _no_condition_error(where)
    for item in [where] if isinstance(where, str) else where or ():
        if isinstance(item, str):
            yield from split_conditions(item)
        elif isinstance(item, Condition):
            yield item
        else:
            raise _no_condition_error(item)


def _parse_values(condition: TextCondition, fields: FilterFields) -> Condition:
    """Return a written condition with a number, flag or text for each value.

    Each value becomes the first of number, flag and text that its key holds and that fits it; one
    in quotes, or that fits nothing, is a text. Raises RetrievalError for a key not in `fields`.
    """
    kinds = {kind.removesuffix(LIST_SUFFIX) for kind in _get_kinds(condition.key, fields)}
    values = [_parse_value(v, set() if condition.is_quoted else kinds) for v in condition.values]
    value = values if condition.operator == "in" else values[0]
    return Condition(condition.key, condition.operator, value)


def _parse_value(text: str, kinds: set[str]) -> Scalar:
    """Return a text as a number or a flag if `kinds` has that kind and it fits, else as it is."""
    if "number" in kinds:
        try:
            number = to_scalar(float(text))
        except ValueError:
            number = None
        if number is not None:
            return number
    if "flag" in kinds and text in ("true", "false"):
        return text == "true"
    return text


def _resolve(condition: Condition, fields: FilterFields, place: str) -> Condition:
    """Return a condition whose values have kinds that its key holds.

    Raises RetrievalError as `parse_conditions`; `place` is the place in its message.
    """
    kinds = _get_kinds(condition.key, fields)
    has_lists = any(kind.endswith(LIST_SUFFIX) for kind in kinds)
    held = " and ".join(KIND_PLURALS[kind] for kind in KIND_PLURALS if kind in kinds)
    if has_lists is not (condition.operator == "contains") and (has_lists or kinds):
        value = condition.values[0]
        fix = f"Write '{condition.key} contains {_spell(value)}'" if has_lists else "Use ="
        raise RetrievalError(f"{condition.key} holds {held}", place=place, fix=fix)
    values = []
    for value in condition.values:
        resolved = _resolve_value(value, kinds, is_contained=has_lists)
        if resolved is None:
            message = f"{quote_value(_spell(value))}: {condition.key} holds {held}"
            raise RetrievalError(message, place=place, fix="Compare with one of these")
        is_number_as_text = isinstance(resolved, str) and parse_plain_number(resolved) is not None
        if is_number_as_text and condition.operator in ORDER_OPERATORS:
            # As texts, '1000' comes before '9'.
            fix = "Write every value of it as a plain number, such as 12.5, and index it again"
            message = f"{quote_value(resolved)}: {condition.key} holds {held}"
            raise RetrievalError(message, place=place, fix=fix)
        values.append(resolved)
    is_list = condition.operator == "in"
    return Condition(condition.key, condition.operator, values if is_list else values[0])


def _resolve_value(
    value: ConditionValue, kinds: set[str], *, is_contained: bool
) -> ConditionValue | None:
    """Return a value as one of the kinds that its key holds; None if it has none of them.

    With `is_contained`, the items of lists count as well, and dates are texts.
    """
    if is_contained:
        item_kinds = {kind.removesuffix(LIST_SUFFIX).replace("date", "text") for kind in kinds}
        return value if value_kind(value) in item_kinds else None
    if isinstance(value, str):
        if "date" in kinds and (period := parse_period(value)) is not None:
            return period
        number = parse_plain_number(value)
        if {"number", "text"} <= kinds and number is not None:
            return number
    return value if value_kind(value) in kinds else None


def _spell(value: ConditionValue) -> str:
    """Return a value as it is written in a condition: ``red``, ``2024`` or ``true``."""
    if isinstance(value, float):
        return f"{value:.15g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _get_kinds(key: str, fields: FilterFields) -> set[str]:
    """Return the kinds of a key; raise RetrievalError, with the most similar key, without it."""
    if key not in fields:
        message = f"no document has metadata {quote_value(key)}"
        raise RetrievalError(message, place="where", fix=suggest_name(key[:200], fields))
    return set(fields[key])


def _no_condition_error(value: object) -> RetrievalError:
    fix = "Give texts such as year>=2024, or Conditions"
    return RetrievalError(f"{quote_value(value)} is no condition", place="where", fix=fix)


def _too_many_values_error(place: str) -> RetrievalError:
    fix = "Store what they have in common as one key, and filter by it"
    return RetrievalError(f"more than {MAX_VALUES} values", place=place, fix=fix)
