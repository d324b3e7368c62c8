"""Conditions as SQL predicates on the filter columns of a table.

Expressions nest at most `log2` of the number of values deep: the parser of the store uses the stack
for each level, and thousands of levels end the process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from vlduet.retrieval.filter_values import LIST_SUFFIX, DatePeriod
from vlduet.retrieval.filters import (
    ORDER_OPERATORS,
    Condition,
    ConditionValue,
    order_bounds,
    value_kind,
)


def filter_column(key: str, kind: str) -> str:
    """Return the column of a metadata key and a kind; distinct for distinct keys, of [a-z0-9_]."""
    encoded = re.sub(r"[^a-z0-9]", lambda match: f"_{ord(match[0]):x}_", key)
    return f"{kind.replace(' ', '_')}__{encoded}"


def conditions_to_sql(conditions: Sequence[Condition], columns: Collection[str]) -> str:
    """Return the predicate that all conditions hold; "" without conditions.

    See `condition_to_sql`.
    """
    return _join([condition_to_sql(condition, columns) for condition in conditions], "AND")


def condition_to_sql(condition: Condition, columns: Collection[str]) -> str:
    """Return a condition as an SQL predicate on the filter columns among `columns`.

    A value whose column is not in `columns` equals no row; without any column the predicate is
    ``false``, and ``NOT (false)`` for ``!=``. A row without the key satisfies only ``!=``. Keys and
    values are encoded, so that no SQL can be injected through them.
    """
    by_kind: dict[str, list[ConditionValue]] = {}
    for value in condition.values:
        by_kind.setdefault(value_kind(value), []).append(value)
    alternatives = []
    for kind, values in by_kind.items():
        column = filter_column(condition.key, kind)
        if column in columns:
            test = _compare(column, condition.operator, values)
            alternatives.append(f"({column} IS NOT NULL AND {test})")
        list_column = filter_column(condition.key, kind + LIST_SUFFIX)
        if condition.operator == "contains" and list_column in columns:
            test = f"array_has({list_column}, {sql_literal(values[0])})"
            alternatives.append(f"({list_column} IS NOT NULL AND {test})")
    predicate = _join(alternatives, "OR") or "false"
    return f"NOT ({predicate})" if condition.operator == "!=" else predicate


def _compare(column: str, operator: str, values: Sequence[ConditionValue]) -> str:
    """Return the predicate that a column which is not null satisfies an operator with a value."""
    periods = [value for value in values if isinstance(value, DatePeriod)]
    if periods:
        return _join([_date_to_sql(column, operator, period) for period in periods], "OR")
    literals = [sql_literal(value) for value in values]
    if operator in ORDER_OPERATORS:
        return f"{column} {operator} {literals[0]}"
    return f"{column} IN ({', '.join(literals)})"


def _date_to_sql(column: str, operator: str, period: DatePeriod) -> str:
    """Return the predicate that an instant in a column satisfies an operator with a period."""
    start, end = order_bounds(period, operator)
    tests = [f"{column} >= {sql_literal(start)}"] if start > -math.inf else []
    tests += [f"{column} < {sql_literal(end)}"] if end < math.inf else []
    return f"({' AND '.join(tests)})"


def sql_literal(value: ConditionValue) -> str:
    """Return a value as an SQL literal: ``true``, ``CAST('1.5' AS DOUBLE)`` or a quoted text.

    A quote in a text, the only special character, is doubled. Raises AssertionError for a period,
    which is no single value.
    """
    assert not isinstance(value, DatePeriod)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"CAST('{value!r}' AS DOUBLE)"
    return "'" + value.replace("'", "''") + "'"


def ids_to_sql(ids: Sequence[str]) -> str:
    """Return the predicate that a row has one of these ids."""
    return f"id IN ({', '.join(map(sql_literal, ids))})"


def _join(predicates: Sequence[str], operator: str) -> str:
    """Return predicates joined by AND or OR as a balanced tree; "" for none."""
    if len(predicates) < 2:
        return "".join(predicates)
    middle = len(predicates) // 2
    first, second = _join(predicates[:middle], operator), _join(predicates[middle:], operator)
    return f"({first} {operator} {second})"
