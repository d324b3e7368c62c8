"""Texts that are probably meant as numbers are named, and codes are not."""

from __future__ import annotations

import pytest

from vlduet.data.records import Place
from vlduet.data.tools.metadata_texts import MetadataTexts


def describe(*values: object) -> list[str]:
    texts = MetadataTexts()
    for line, value in enumerate(values, 2):
        texts.add({"price": value, "name": "red"}, Place("shop.csv", line))
    return texts.describe_numbers()


@pytest.mark.parametrize(
    ("values", "exception"),
    [
        (["12,50", "3,99"], "'12,50' (line 2)"),
        (["12.50", "n/a", "3.99"], "'n/a' (line 3)"),
        (["12 €", "3 €"], "'12 €' (line 2)"),
        (["7.5", "$1,299.00", "8"], "'$1,299.00' (line 3)"),
        (["1'200.50", "3"], "'1'200.50' (line 2)"),
        (["5 kg", "7 kg", "unknown"], "'5 kg' (line 2)"),
        (["-3,5", ""], None),
    ],
)
def test_numbers_that_are_kept_as_text_are_named(values: list[str], exception: str | None) -> None:
    sentences = describe(*values)
    assert len(sentences) == (exception is not None)
    assert all("`price`" in text and str(exception) in text for text in sentences)


@pytest.mark.parametrize(
    "values",
    [
        [12.5, 3],
        ["12.50", "3.99"],  # from JSON, where quotes were written on purpose
        ["red", "12,50", "blue"],
        ["007", "008", "A-9"],
        ["12345", "12346", "A-77"],
        ["2026-05-01", "2026-06-02"],
        ["1.2.3", "1.2.4"],
        [],
        [None, ["12,5"], True],
    ],
)
def test_numbers_texts_and_codes_are_not_named(values: list[object]) -> None:
    assert describe(*values) == []
