"""Records, their parts and places, and sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.records import (
    ByteRange,
    ImageRef,
    Message,
    Place,
    Record,
    as_parts,
    iter_labelled_parts,
    map_images,
    split_sentences,
)

IMAGE = ImageRef(data=b"x")


def test_a_place_is_printed_with_the_components_it_has() -> None:
    place = Place("x.jsonl", 3)
    assert str(place) == "x.jsonl:3" and str(Place("x.jsonl")) == "x.jsonl"
    nested = place.with_field("messages").with_field("[0]").with_field("role")
    assert str(nested) == "x.jsonl:3:messages[0].role"


def test_an_image_is_named_by_its_path_or_its_content() -> None:
    assert ImageRef(path=Path("a.png")).name == "a.png"
    assert ImageRef(data=b"x").name == "bytes:2d711642b726"
    span = ByteRange(Path("x.tar"), 0, 1, "x.tar:a.png", (1, 1))
    assert ImageRef(byte_range=span).name == "x.tar:a.png"
    with pytest.raises(AssertionError):
        ImageRef()
    with pytest.raises(AssertionError):
        ImageRef(path=Path("a.png"), data=b"x")
    with pytest.raises(AssertionError):
        ImageRef(data=b"x", byte_range=span)


def test_a_single_part_becomes_a_tuple() -> None:
    assert as_parts("x") == ("x",) and as_parts(IMAGE) == (IMAGE,)
    assert as_parts(("x", IMAGE)) == ("x", IMAGE)


LABELLED = [
    (
        Record("p", image=IMAGE, short=("a", "b"), long="c", negative=(("d",),)),
        [("image", IMAGE), ("short", "a"), ("short", "b"), ("long", "c"), ("negative 1", "d")],
    ),
    (Record("i", parts=("a", IMAGE)), [("part 1", "a"), ("part 2", IMAGE)]),
    (
        Record("c", messages=(Message("user", (IMAGE, "a")), Message("assistant", ("b",)))),
        [("user", IMAGE), ("user", "a"), ("assistant", "b")],
    ),
    (
        Record("r", query=("a",), positive=(("b", IMAGE), ("c",)), negative=(("d",),)),
        [
            ("query", "a"),
            ("positive 1", "b"),
            ("positive 1", IMAGE),
            ("positive 2", "c"),
            ("negative 1", "d"),
        ],
    ),
]


@pytest.mark.parametrize(("record", "expected"), LABELLED, ids=lambda x: getattr(x, "kind", ""))
def test_parts_are_listed_with_labels_in_reading_order(
    record: Record, expected: list[tuple[str, str | ImageRef]]
) -> None:
    assert list(iter_labelled_parts(record)) == expected
    assert len(record.images()) == 1


@pytest.mark.parametrize("record", [record for record, _ in LABELLED], ids=lambda x: x.kind)
def test_every_image_is_mapped_and_nothing_else(record: Record) -> None:
    other = ImageRef(data=b"y")
    mapped = map_images(record, lambda ref: other if ref == IMAGE else ref)
    assert mapped != record and mapped.images() == (other,)
    assert map_images(mapped, lambda _: IMAGE) == record


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("It weighs 3.5 kg, e.g. more. Fine.", ["It weighs 3.5 kg, e.g. more.", "Fine."]),
        ("A title\n\nA paragraph\nof two lines.", ["A title", "A paragraph\nof two lines."]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("no end", ["no end"]),
        ("  ", []),
    ],
)
def test_texts_are_split_into_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_sentences_contain_all_but_white_space_and_are_not_split_again(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    for sentence in sentences:
        assert split_sentences(sentence) == [sentence]
