"""Equal keys mean equal content, for losses, mining and metrics alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from vlduet.data.content_keys import content_key, text_key


@pytest.mark.parametrize(
    ("first", "second", "is_equal"),
    [
        ("A  red\napple ", "a red apple", True),
        ("STRASSE", "straße", True),  # lower() does not make them equal
        ("ΟΔΟΣ", "οδος", True),  # a final sigma
        ("A red apple", "A red apple.", False),
        ("a red apple", "a red pear", False),
    ],
)
def test_texts_are_equal_up_to_case_and_white_space(
    first: str, second: str, is_equal: bool
) -> None:
    assert (text_key(first) == text_key(second)) == is_equal
    assert (content_key((first,)) == content_key((second,))) == is_equal


def test_images_are_compared_by_bytes_and_the_order_of_parts_counts() -> None:
    image, other = tiny.random_image(1), tiny.random_image(2)
    assert content_key((image, "x")) == content_key((image, "X"))
    assert content_key((image, "x")) != content_key((other, "x"))
    assert content_key((image, "x")) != content_key(("x", image))


@given(st.text())
def test_the_key_of_a_key_is_itself(text: str) -> None:
    assert text_key(text_key(text)) == text_key(text)
