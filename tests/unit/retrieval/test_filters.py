"""Meaning of filters, independent of a store."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vlduet.errors import RetrievalError
from vlduet.retrieval.filters import Condition, parse_condition, parse_conditions, to_scalar

FIELDS = {"category": ["text"], "year": ["number"], "new": ["flag"], "code": ["text", "number"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("category=animals", ("category", "=", "animals")),
        (" category = big animals ", ("category", "=", "big animals")),
        ("category!=animals", ("category", "!=", "animals")),
        ("category=", ("category", "=", "")),
        ("category=a=b", ("category", "=", "a=b")),
        ("year<=1990", ("year", "<=", 1990.0)),
        ("year>1e3", ("year", ">", 1000.0)),
        ("year in 1990, 1991", ("year", "in", (1990.0, 1991.0))),
        ("category in animals,plants", ("category", "in", ("animals", "plants"))),
        ("new=true", ("new", "=", True)),
        ("code=7", ("code", "=", 7.0)),
        ("code=x7", ("code", "=", "x7")),
    ],
)
def test_typed_condition_is_parsed(text: str, expected: tuple[str, str, Any]) -> None:
    assert parse_condition(text, FIELDS) == Condition(*expected)
    assert type(parse_condition(text, FIELDS).value) is type(expected[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("animals", "Write key=value"),
        ("=animals", "Write key=value"),
        ("categroy=animals", "Did you mean 'category'"),
        ("year=old", "'old': year holds numbers"),
        ("year<cheap", "'cheap': year holds numbers"),
        ("year=nan", "year holds numbers"),
        ("year in 1,x", "'1,x': year holds numbers"),
        ("new=1", "new holds flags"),
        ("category<5", "'5': category holds texts"),
        ("new<true", "Compare with"),
    ],
)
def test_malformed_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(RetrievalError, match=message):
        parse_condition(text, FIELDS)


@pytest.mark.parametrize(
    ("condition", "matching"),
    [
        (Condition("x", "=", 1), [1, 1.0]),
        (Condition("x", "=", True), [True]),
        (Condition("x", "=", "1"), ["1"]),
        (Condition("x", "!=", 1), [None, "", "1", "2", True, False, 2, "é"]),
        (Condition("x", "<", 2), [1, 1.0]),
        (Condition("x", ">=", "2"), ["2", "é"]),
        (Condition("x", "in", [1, "2", True]), ["2", True, 1, 1.0]),
        (Condition("x", "in", []), []),
    ],
)
def test_values_are_compared_with_their_own_kind(condition: Condition, matching: list[Any]) -> None:
    values = [None, "", "1", "2", True, False, 1, 1.0, 2, "é"]
    selected = []
    for value in values:
        scalar = to_scalar(value)
        if condition.matches({} if scalar is None else {"x": scalar}):
            selected.append(value)
    assert [(type(v), v) for v in selected] == [(type(v), v) for v in matching]


@pytest.mark.parametrize("value", [None, [], {}, math.nan, math.inf, 10**400])
def test_value_that_cannot_be_compared_is_refused(value: Any) -> None:
    assert to_scalar(value) is None
    with pytest.raises(RetrievalError, match="cannot be compared"):
        Condition("x", "=", value)


def test_every_form_of_filter_gives_the_same_conditions() -> None:
    expected = (Condition("category", "=", "a"), Condition("year", "in", [1, 2]))
    assert parse_conditions({"category": "a", "year": [1, 2]}, FIELDS) == expected
    assert parse_conditions(expected, FIELDS) == expected
    assert parse_conditions(["category=a", "year in 1,2"], FIELDS) == expected
    assert parse_conditions("category=a", FIELDS) == expected[:1]
    assert parse_conditions(None, FIELDS) == ()


@pytest.mark.parametrize(
    "where", [{"categroy": "a"}, [Condition("categroy", "=", "a")], ["categroy=a"]]
)
def test_misspelt_key_is_an_error_and_not_an_empty_result(where: Any) -> None:
    with pytest.raises(RetrievalError, match="Did you mean 'category'"):
        parse_conditions(where, FIELDS)
    with pytest.raises(RetrievalError, match=r"no document has metadata 'categroy'\. Known: none"):
        parse_conditions(where, {})


def test_unknown_operator_and_text_for_in_are_refused() -> None:
    with pytest.raises(RetrievalError, match="Use ="):
        Condition("x", "like", "a")
    with pytest.raises(RetrievalError, match="not a list"):
        Condition("x", "in", "abc")


def test_numeric_texts_cannot_be_ordered() -> None:
    fields = {"price": ["text"], "day": ["text"]}
    with pytest.raises(
        RetrievalError, match=r"'100': price holds texts. Write every value of it as a plain number"
    ):
        parse_conditions(["price<100"], fields)
    (day,) = parse_conditions(["day<2026-05-01"], fields)
    assert day.value == "2026-05-01" and parse_conditions(["price=100"], fields)[0].value == "100"


@pytest.mark.parametrize(
    "where",
    [
        {"year": "1990"},
        {"year": [1990, "1991"]},
        [Condition("year", ">", "1990")],
        [Condition("year", "!=", True)],
    ],
)
def test_a_value_of_another_kind_than_the_key_is_an_error(where: Any) -> None:
    with pytest.raises(RetrievalError, match="year holds numbers"):
        parse_conditions(where, FIELDS)
    (condition,) = parse_conditions({"code": "7"}, FIELDS)
    assert condition.value == "7", "a key with texts and numbers takes both"
