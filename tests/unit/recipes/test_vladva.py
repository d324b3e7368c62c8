"""VladVA: which captions carry which loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers import tiny
from vlduet.data.records import Record
from vlduet.data.sequences import IGNORE_INDEX
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.recipes.contrast import find_positive_pairs
from vlduet.recipes.vladva import VladvaOptions, layout, select_encoder_roles

SHORT, MIDDLE, LONG, ENDLESS = "x" * 29, "y" * 30, "z" * 500, "w" * 501  # a token is a byte


def told(
    model: DuetModel, *, short: tuple[str, ...] = (), long: str | None = None, **options: Any
) -> tuple[str, str]:
    """(what is contrasted, what is learned to write)"""
    record = Record("1", image=tiny.random_image(0), short=short, long=long)
    sequences = layout(Sample(record, 0, 0), model.renderer, VladvaOptions(**options))
    decode = model.backbone.tokenizer.decode
    contrasted = [decode(s.token_ids) for s in sequences for a in s.anchors if a.role == "text"]
    written = [decode([i for i in s.labels if i != IGNORE_INDEX]) for s in sequences]
    return "".join(contrasted).removeprefix("<s>").removesuffix("</s>"), "".join(
        written
    ).removesuffix("</s>")


@pytest.mark.parametrize(
    ("short", "long", "contrasted", "written"),
    [
        ((SHORT,), LONG, SHORT, LONG),
        ((MIDDLE,), None, "", MIDDLE),
        ((LONG,), SHORT, SHORT, LONG),
        ((SHORT, ENDLESS), None, SHORT, ""),
    ],
)
def test_captions_are_told_apart_by_their_tokens(
    model: DuetModel, short: tuple[str, ...], long: str | None, contrasted: str, written: str
) -> None:
    assert told(model, short=short, long=long, split="length") == (contrasted, written)
    assert told(model, short=short[:1], long=long) == (short[0], long or ""), (
        "the fields say it, unless told otherwise"
    )


def test_a_record_without_a_caption_of_either_length_is_named(model: DuetModel) -> None:
    with pytest.raises(DataError, match=r"501 tokens and more, recipe.long_up_to is 500"):
        told(model, long=ENDLESS, split="length")


def test_records_of_two_files_with_equal_ids_are_no_pairs(model: DuetModel) -> None:
    records = [Record("0", image=tiny.random_image(i), short=(f"caption {i}",)) for i in range(2)]
    anchors = [
        anchor
        for position, record in enumerate(records)
        for sequence in layout(
            Sample(record, position, 0, f"{position}.0"), model.renderer, VladvaOptions()
        )
        for anchor in sequence.anchors
    ]
    images, texts = ([a for a in anchors if a.role == role] for role in ("image", "text"))
    assert find_positive_pairs(images, texts).tolist() == [[True, False], [False, True]]


def test_a_record_drawn_twice_keeps_both_of_its_captions(model: DuetModel) -> None:
    record = Record("0", image=tiny.random_image(0), short=tuple(f"caption {i}" for i in range(9)))
    anchors = [
        anchor
        for position in range(4)
        for sequence in layout(Sample(record, position, 0), model.renderer, VladvaOptions())
        for anchor in sequence.anchors
    ]
    images, texts = ([a for a in anchors if a.role == role] for role in ("image", "text"))
    assert len({text.content_key for text in texts}) > 1, "another caption each time"
    assert find_positive_pairs(images, texts).all(), "an image's captions are never its negatives"


def test_a_record_with_a_long_caption_alone_takes_part_in_one_loss(model: DuetModel) -> None:
    records = [
        Record("p", image=tiny.random_image(0), short=("a",)),
        Record("l", image=tiny.random_image(1), long=LONG),
    ]
    by_record = [
        layout(Sample(record, 0, 0), model.renderer, VladvaOptions()) for record in records
    ]
    assert [len(s.anchors) for s in by_record[0]] == [1, 1]
    assert [len(s.anchors) for s in by_record[1]] == [0]
    assert any(label != IGNORE_INDEX for label in by_record[1][0].labels)


def test_a_guide_is_shown_what_every_embedding_stands_for(model: DuetModel) -> None:
    picture = tiny.random_image(0)
    pair = Record("1", image=picture, short=("a cat",), long="a cat that sleeps")
    asked = Record(
        "2",
        query=(picture, "where?"),
        positive=(("here",),),
        negative=((tiny.random_image(1),), ("there",)),
    )
    options = VladvaOptions(guide="triple")
    found = {
        anchor.role + anchor.content_key[-6:]: tuple(one.part for one in anchor.slices)
        for record in (pair, asked)
        for sequence in layout(Sample(record, 0, 0), model.renderer, options)
        for anchor in sequence.anchors
    }
    shown = [(picture,), ("a cat",), (picture, "where?"), ("here",)]
    assert list(found.values()) == [*shown, (tiny.random_image(1),), ("there",)]
    assert all(
        not a.slices
        for s in layout(Sample(pair, 0, 0), model.renderer, VladvaOptions())
        for a in s.anchors
    )
    assert select_encoder_roles(options, {"contrastive": 1.0}) == ("vision", "text", "cross")
    assert select_encoder_roles(VladvaOptions(guide="cross"), {"contrastive": 0.5}) == ("cross",)
    assert (
        select_encoder_roles(options, {"contrastive": 0.0, "language": 1.0})
        == select_encoder_roles(VladvaOptions(), {"contrastive": 1.0})
        == ()
    )


def test_hard_negatives_of_a_pair_stand_beside_both_of_its_losses(model: DuetModel) -> None:
    wrong = (("a dog",), (tiny.random_image(3), "a cat"))
    pair = Record(
        "1", image=tiny.random_image(0), short=("a cat",), long="a cat that sleeps", negative=wrong
    )
    image, text, *negatives = layout(Sample(pair, 0, 0), model.renderer, VladvaOptions())
    assert any(label != IGNORE_INDEX for label in image.labels)
    assert [a.role for s in (image, text, *negatives) for a in s.anchors] == [
        "image",
        "text",
        "negative",
        "negative",
    ]
    assert {a.record_name for s in (image, text, *negatives) for a in s.anchors} == {
        Sample(pair, 0, 0).record_name
    }
    alone = replace(pair, short=())
    assert len(layout(Sample(alone, 0, 0), model.renderer, VladvaOptions())) == 1, (
        "nothing asks, so nothing is wrong"
    )
