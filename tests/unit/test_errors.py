"""Errors: one line with the place, the problem and the remedy, also across processes."""

from __future__ import annotations

import pickle

import pytest

from vlduet.errors import (
    MAX_MESSAGE_CHARS,
    MAX_VALUE_CHARS,
    ImageError,
    PackageError,
    VLDuetError,
    quote_value,
    suggest_name,
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (VLDuetError("it is wrong"), "it is wrong"),
        (VLDuetError("it is wrong", place="a.yaml:3"), "a.yaml:3: it is wrong"),
        (VLDuetError("it is wrong", fix="Change it"), "it is wrong. Change it"),
        (ImageError("too large", place="x.png", fix="Scale it"), "x.png: too large. Scale it"),
    ],
)
def test_the_message_states_place_problem_and_remedy(error: VLDuetError, text: str) -> None:
    assert str(error) == text


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PackageError("wrong hash", place="a.whl", fix="Try again")))
    assert type(error) is PackageError
    assert (error.message, error.place, error.fix) == ("wrong hash", "a.whl", "Try again")
    assert str(error) == "a.whl: wrong hash. Try again"


def test_an_unknown_name_gets_the_closest_known_one_or_all() -> None:
    known = ["stamps", "emoji", "maps"]
    assert suggest_name("stamp", known) == "Did you mean 'stamps'?"
    assert suggest_name("xyz", known) == "Known: emoji, maps, stamps"
    assert suggest_name("xyz", []) == "Known: none"


@pytest.mark.parametrize(
    ("value", "text"),
    [("red", "'red'"), (5, "5"), ([1, "a"], "[1, 'a']"), ({"a": None}, "{'a': None}")],
)
def test_a_short_value_is_quoted_as_it_is(value: object, text: str) -> None:
    assert quote_value(value) == text


def test_a_value_that_unfolds_to_a_billion_is_quoted_at_once() -> None:
    value: list[object] = ["x"] * 10
    for _ in range(9):
        value = [value] * 10
    assert len(quote_value(value)) <= MAX_VALUE_CHARS


@pytest.mark.parametrize(
    "value",
    ["x" * 5000, [*range(5000)], 10**5000, {"k" * 500: "v" * 500}, b"x" * 5000],
    ids=["text", "list", "integer", "dict", "bytes"],
)
def test_a_long_value_is_shortened(value: object) -> None:
    assert len(quote_value(value)) <= MAX_VALUE_CHARS


def test_every_part_of_an_error_is_bounded() -> None:
    error = VLDuetError("m" * 5000, place="p" * 5000, fix="f" * 5000)
    assert len(str(error)) <= 3 * MAX_MESSAGE_CHARS + 4
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
