"""Meaning of filters, independent of a store."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlduet.errors import RetrievalError
from vlduet.retrieval.filter_text import MAX_TEXT_CHARS, split_conditions
from vlduet.retrieval.filter_values import (
    MAX_FILTER_KEYS,
    DatePeriod,
    extract_filter_values,
    parse_period,
    to_filter_value,
    to_scalar,
)
from vlduet.retrieval.filters import (
    MAX_CONDITIONS,
    MAX_VALUES,
    OPERATORS,
    Condition,
    parse_conditions,
)

FIELDS = {
    "category": ["text"],
    "year": ["number"],
    "new": ["flag"],
    "code": ["text", "number"],
    "tags": ["text list"],
    "sizes": ["number list", "number"],
    "day": ["date"],
    "note": ["date", "text"],
}


def parse_one(text: str) -> Condition:
    (condition,) = parse_conditions([text], FIELDS)
    return condition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("category=animals", ("category", "=", "animals")),
        (" category = big animals ", ("category", "=", "big animals")),
        ("category==animals", ("category", "=", "animals")),
        ("category!=animals", ("category", "!=", "animals")),
        ("category=", ("category", "=", "")),
        ("category=''", ("category", "=", "")),
        ("category=a=b", ("category", "=", "a=b")),
        ('category="salt and pepper"', ("category", "=", "salt and pepper")),
        ("category='O''Neil, and co.'", ("category", "=", "O'Neil, and co.")),
        ("category=O'Neil's", ("category", "=", "O'Neil's")),
        ("category=sand", ("category", "=", "sand")),
        ("category=trick or treat", ("category", "=", "trick or treat")),
        ("'category' = x", ("category", "=", "x")),
        ("year<=1990", ("year", "<=", 1990.0)),
        ("year>1e3", ("year", ">", 1000.0)),
        ("year in 1990, 1991", ("year", "in", (1990.0, 1991.0))),
        ("category in animals,plants", ("category", "in", ("animals", "plants"))),
        ("category in 'a,b', c ,\"d and e\"", ("category", "in", ("a,b", "c", "d and e"))),
        ("category\tin\na", ("category", "in", ("a",))),
        ("new=true", ("new", "=", True)),
        ("code=7", ("code", "=", 7.0)),
        ("code='7'", ("code", "=", 7.0)),
        ("code=007", ("code", "=", 7.0)),
        ("code='007'", ("code", "=", "007")),
        ("code=x7", ("code", "=", "x7")),
        ("tags contains red", ("tags", "contains", "red")),
        ("sizes contains 3", ("sizes", "contains", 3.0)),
    ],
)
def test_a_condition_is_parsed_by_the_kind_of_its_key(
    text: str, expected: tuple[str, str, Any]
) -> None:
    condition = parse_one(text)
    assert condition == Condition(*expected)
    assert type(condition.value) is type(expected[2])


def test_and_separates_conditions_outside_of_quotes() -> None:
    text = 'year>=2024 and tags contains card AND category in a,"b and c" and new=true'
    expected = [
        Condition("year", ">=", 2024),
        Condition("tags", "contains", "card"),
        Condition("category", "in", ["a", "b and c"]),
        Condition("new", "=", True),
    ]
    empty = [Condition("category", "=", ""), Condition("year", ">", 0)]
    assert list(parse_conditions("category= and year>0", FIELDS)) == empty
    assert list(parse_conditions(text, FIELDS)) == expected
    assert list(parse_conditions([text], FIELDS)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("animals", "Write key=value"),
        ("", "Write key=value"),
        ("  \t\n ", "Write key=value"),
        ("=animals", "Write key=value"),
        ("in a", "Write key=value"),
        ("categroy=animals", "Did you mean 'category'"),
        ("year=old", "'old': year holds numbers"),
        ("year<cheap", "'cheap': year holds numbers"),
        ("year=nan", "year holds numbers"),
        ("year=", "'': year holds numbers"),
        ("year='1990'", "'1990': year holds numbers"),
        ("year in 1,x", "'x': year holds numbers"),
        ("new=1", "new holds flags"),
        ("category<5", "'5': category holds texts"),
        ("new<true", "Compare with"),
        ("category in", "a value is missing"),
        ("tags contains ", "a value is missing"),
        ("tags=red", "tags holds lists of texts. Write 'tags contains red'"),
        ("tags!=red", "tags holds lists"),
        ("tags in red,blue", "tags holds lists"),
        ("sizes<3", "sizes holds numbers and lists of numbers. Write 'sizes contains 3'"),
        ("sizes contains x", "sizes holds numbers and lists of numbers"),
        ("category contains an", "category holds texts. Use ="),
        ("day=yesterday", "'yesterday': day holds dates such as 2024-05-01"),
        ("day>05/01/2024", "day holds dates"),
        ("category=salt and pepper", "'pepper' behind 'and' is no condition. Put a value"),
        ("category=salt and", "behind 'and' is no condition"),
        ("and=1 and", "behind 'and' is no condition"),
        ("category= and  and year>0", "no document has metadata 'and year'"),
        ("category='salt' pepper", "text behind a closing quote"),
        ("category='salt", "a quote that is not closed"),
        ("'category=salt", "a quote that is not closed"),
        ("category=a or category=b", "'or' between conditions. Use 'key in a,b'"),
    ],
)
def test_malformed_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(RetrievalError) as caught:
        parse_one(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("condition", "matching"),
    [
        (Condition("x", "=", 1), ["1", 1, 1.0]),
        (Condition("x", "=", True), [True]),
        (Condition("x", "=", "1"), ["1"]),
        (Condition("x", "!=", 1), [None, "", "01", "2", True, False, 2, "é", [1]]),
        (Condition("x", "<", 2), ["1", 1, 1.0]),
        (Condition("x", ">=", "2"), ["2", "é"]),
        (Condition("x", "in", [1, "2", True]), ["1", "2", True, 1, 1.0]),
        (Condition("x", "contains", 1), ["1", 1, 1.0, [1]]),
    ],
)
def test_values_are_compared_with_their_own_kind(condition: Condition, matching: list[Any]) -> None:
    values = [None, "", "1", "01", "2", True, False, 1, 1.0, 2, "é", [1]]
    selected = []
    for value in values:
        converted = to_filter_value(value)
        if condition.matches({} if converted is None else {"x": converted}):
            selected.append(value)
    assert [(type(v), v) for v in selected] == [(type(v), v) for v in matching]


def test_a_list_contains_its_items_and_a_single_value_is_a_list_of_one() -> None:
    contains_red = Condition("tags", "contains", "red")
    for stored, expected in (
        (["red", "card"], True),
        ([3, None, {"deep": 1}, "red"], True),
        ("red", True),
        (["redder"], False),
        ([], False),
        ([["red"]], False),
    ):
        value = to_filter_value(stored)
        assert value is not None and contains_red.matches({"tags": value}) is expected


DAYS = ["2024-04-30", "2024-05-01", "2024-05-01T23:59:59Z", "2024-05-02T01:00:00+02:00"]
LATER_DAYS = ["2024-05-02", "2024-06-01 10:30", "2025-01-01"]


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("day=2024-05-01", DAYS[1:]),
        ("day>=2024-05-01", DAYS[1:] + LATER_DAYS),
        ("day>2024-05-01", LATER_DAYS),
        ("day<2024-05-01", DAYS[:1]),
        ("day<=2024-05-01", DAYS),
        ("day=2024-05", DAYS[1:] + LATER_DAYS[:1]),
        ("day>2024", LATER_DAYS[2:]),
        ("day in 2024-04,2025", [DAYS[0], LATER_DAYS[2]]),
        ("day!=2024", LATER_DAYS[2:]),
        ("day=2024-06-01T10:30", LATER_DAYS[1:2]),
        ("day=2024-05-01T23:59:59Z", DAYS[2:3]),
        ("day<=2024-05-01T23", None),
    ],
)
def test_a_date_is_compared_as_the_period_that_it_names(
    text: str, matching: list[str] | None
) -> None:
    if matching is None:
        with pytest.raises(RetrievalError, match="day holds dates"):
            parse_one(text)
        return
    condition = parse_one(text)
    assert [day for day in DAYS + LATER_DAYS if condition.matches({"day": day})] == matching


def test_only_dates_in_iso_form_are_dates() -> None:
    fields: dict[str, list[str]] = {}
    texts = ("2024-05-01", "2024-13-01", "20240501", "2024", "1.5.2024", "2024-05-01 x")
    for i, text in enumerate(texts):
        extract_filter_values({f"key{i}": text}, fields)
    assert [kinds for (kinds,) in fields.values()] == ["date", *["text"] * 5]
    first = datetime(2024, 12, 1, tzinfo=UTC).timestamp()
    assert parse_period("2024-12") == DatePeriod(first, first + 31 * 86400)
    assert parse_period("9999") is None and parse_period("0000-01") is None


def test_other_texts_under_a_key_with_dates_are_compared_as_texts() -> None:
    assert parse_one("note=unknown").matches({"note": "unknown"})
    assert not parse_one("note>=2024-05-01").matches({"note": "unknown"})


@pytest.mark.parametrize("value", [None, {}, math.nan, math.inf, 10**400])
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
    day = parse_conditions("day=2024-05-01", FIELDS)
    assert parse_conditions({"day": "2024-05-01"}, FIELDS) == day
    assert parse_conditions([Condition("day", "==", "2024-05-01")], FIELDS) == day


@pytest.mark.parametrize(
    "where", [{"categroy": "a"}, [Condition("categroy", "=", "a")], ["categroy=a"]]
)
def test_misspelt_key_is_an_error_and_not_an_empty_result(where: Any) -> None:
    with pytest.raises(RetrievalError, match="Did you mean 'category'"):
        parse_conditions(where, FIELDS)
    with pytest.raises(RetrievalError, match=r"no document has metadata 'categroy'\. Known: none"):
        parse_conditions(where, {})


def test_unknown_operator_empty_list_and_text_for_in_are_refused() -> None:
    with pytest.raises(RetrievalError, match="Use ="):
        Condition("x", "like", "a")
    with pytest.raises(RetrievalError, match="not a list"):
        Condition("x", "in", "abc")
    with pytest.raises(RetrievalError, match="an empty list"):
        parse_conditions({"category": []}, FIELDS)
    for wrong in (7, [7]):
        where: Any = wrong
        with pytest.raises(RetrievalError, match="7 is no condition"):
            parse_conditions(where, FIELDS)


@pytest.mark.parametrize("where", [["price<100"], [Condition("price", "<", "100")]])
def test_numeric_texts_cannot_be_ordered(where: Any) -> None:
    fields = {"price": ["text"], "day": ["text"]}
    message = "'100': price holds texts. Write every value of it as a plain number"
    with pytest.raises(RetrievalError, match=message):
        parse_conditions(where, fields)
    (day,) = parse_conditions(["day<2026-05-01"], fields)
    assert day.value == "2026-05-01" and parse_conditions(["price=100"], fields)[0].value == "100"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"year": "1990"}, "'1990': year holds numbers"),
        ({"year": [1990, "1991"]}, "'1991': year holds numbers"),
        ([Condition("year", ">", "1990")], "'1990': year holds numbers"),
        ([Condition("year", "!=", True)], "'true': year holds numbers"),
        ({"new": 1}, r"'1': new holds flags \(true or false\)"),
        ({"new": "true"}, "'true': new holds flags"),
        ({"category": 7}, "'7': category holds texts"),
        ({"tags": "red"}, "tags holds lists of texts. Write 'tags contains red'"),
        ({"tags": ["red"]}, "tags holds lists of texts"),
        ([Condition("tags", "contains", 7)], "'7': tags holds lists of texts"),
        ({"day": 2024}, "'2024': day holds dates"),
    ],
)
def test_a_value_of_another_kind_than_the_key_is_an_error(where: Any, message: str) -> None:
    with pytest.raises(RetrievalError, match=message):
        parse_conditions(where, FIELDS)


def test_a_number_finds_the_same_number_that_is_stored_as_a_text() -> None:
    conditions: list[Any] = ["code=2023", {"code": 2023}, {"code": "2023"}, {"code": [2023]}]
    for where in conditions:
        (condition,) = parse_conditions(where, FIELDS)
        for stored in ("2023", 2023.0, "2023.0"):
            assert condition.matches({"code": stored})
        assert not condition.matches({"code": "02023"})
    (condition,) = parse_conditions("code>=2000", FIELDS)
    assert condition.matches({"code": "2023"}) and not condition.matches({"code": "x"})


def test_a_filter_has_limits() -> None:
    long = "x" * (MAX_TEXT_CHARS + 1)
    forms: list[Any] = [long, {"category": long}, {"category": [long]}]
    for where in forms:
        with pytest.raises(RetrievalError, match=f"{len(long)} characters"):
            parse_conditions(where, FIELDS)
    too_many = ["year>0"] * (MAX_CONDITIONS + 1)
    assert len(parse_conditions(too_many[1:], FIELDS)) == MAX_CONDITIONS
    for where in (too_many, " and ".join(too_many)):
        with pytest.raises(RetrievalError, match=f"more than {MAX_CONDITIONS} conditions"):
            parse_conditions(where, FIELDS)
    values = list(range(MAX_VALUES + 1))
    assert parse_conditions({"year": values[1:]}, FIELDS)
    half = values[: MAX_VALUES // 2 + 1]
    forms = [
        {"year": values},
        {"year": half, "code": half},
        ["year in " + ",".join(map(str, values))],
        {"year": set(values)},
    ]
    for where in forms:
        with pytest.raises(RetrievalError, match=f"more than {MAX_VALUES} values"):
            parse_conditions(where, FIELDS)
    with pytest.raises(RetrievalError, match=f"more than {MAX_VALUES} values"):
        Condition("year", "in", itertools.count())


PIECES = ["a", "=", " ", "\t", "'", '"', ",", " and ", " in ", " or ", "<", "!", " contains", "''"]


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_text_is_conditions_or_an_error(pieces: list[str]) -> None:
    try:
        conditions = split_conditions("".join(pieces))
    except RetrievalError as error:
        assert "where" in str(error) and len(str(error)) < 600
    else:
        for condition in conditions:
            assert condition.operator in OPERATORS and condition.values


@given(key=st.text(), value=st.text())
def test_quoted_keys_and_values_are_read_back(key: str, value: str) -> None:
    quoted_key, quoted_value = (text.replace('"', '""') for text in (key, value))
    (condition, second) = split_conditions(f'"{quoted_key}"="{quoted_value}" and x=1')
    assert (condition.key, condition.values) == (key, (value,)) and second.key == "x"


def test_keys_beyond_the_limit_are_not_filtered_by() -> None:
    fields: dict[str, list[str]] = {}
    metadata = {f"key{i}": i for i in range(MAX_FILTER_KEYS + 5)}
    assert len(extract_filter_values(metadata, fields)) == len(fields) == MAX_FILTER_KEYS
    assert extract_filter_values({"key0": "x", "other": 1, "none": None}, fields) == {"key0": "x"}
    assert fields["key0"] == ["number", "text"]
