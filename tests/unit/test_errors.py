"""Errors: one line with the place, the problem and the remedy, also across processes."""

from __future__ import annotations

import pickle

import pytest

from vlduet.errors import ImageError, PackageError, VLDuetError, suggest_name


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
