"""When two contents are the same one, for losses, mining and metrics alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from vlduet.data.content_keys import content_key, text_key


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A  red\napple ", "a red apple", True),
        ("STRASSE", "straße", True),  # lower() alone tells them apart
        ("ΟΔΟΣ", "οδος", True),  # a final sigma
        ("A red apple", "A red apple.", False),
        ("a red apple", "a red pear", False),
    ],
)
def test_texts(one: str, other: str, same: bool) -> None:
    assert (text_key(one) == text_key(other)) == same
    assert (content_key((one,)) == content_key((other,))) == same


def test_images_count_by_their_bytes_and_order_counts() -> None:
    assert content_key((tiny.random_image(1), "x")) == content_key((tiny.random_image(1), "X"))
    assert content_key((tiny.random_image(1), "x")) != content_key((tiny.random_image(2), "x"))
    assert content_key((tiny.random_image(1), "x")) != content_key(("x", tiny.random_image(1)))


@given(st.text())
def test_a_key_is_its_own_key(text: str) -> None:
    assert text_key(text_key(text)) == text_key(text)
