"""VladVA: captions of each loss, names of records, and slices for a guide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers import tiny
from vlduet.data.records import Record
from vlduet.data.sequences import IGNORE_INDEX, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.recipes.contrast import find_positive_pairs
from vlduet.recipes.vladva import VladvaOptions, layout, select_encoder_roles

# A token of the tiny tokenizers is a byte.
SHORT = "x" * 29
MIDDLE = "y" * 30
LONG = "z" * 500
TOO_LONG = "w" * 501


def layout_at(
    model: DuetModel, record: Record, *, position: int = 0, origin: str = "", **options: Any
) -> list[Sequence]:
    """Return the sequences of a record at a position of the data stream."""
    sample = Sample(record, position, 0, origin)
    return layout(sample, model.renderer, VladvaOptions(**options))


def list_anchors(sequences: list[Sequence]) -> list[Anchor]:
    return [anchor for sequence in sequences for anchor in sequence.anchors]


def read_captions(
    model: DuetModel, *, short: tuple[str, ...] = (), long: str | None = None, **options: Any
) -> tuple[str, str]:
    """Return the contrasted and the supervised caption of a pair; empty without one."""
    record = Record("1", image=tiny.random_image(0), short=short, long=long)
    decode = model.backbone.tokenizer.decode
    contrasted = ""
    supervised = ""
    for sequence in layout_at(model, record, **options):
        if any(anchor.role == "text" for anchor in sequence.anchors):
            contrasted += decode(sequence.token_ids)
        supervised += decode([label for label in sequence.labels if label != IGNORE_INDEX])
    return contrasted.removeprefix("<s>").removesuffix("</s>"), supervised.removesuffix("</s>")


# ------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("short", "long", "contrasted", "supervised"),
    [
        ((SHORT,), LONG, SHORT, LONG),
        ((MIDDLE,), None, "", MIDDLE),
        ((LONG,), SHORT, SHORT, LONG),
        ((SHORT, TOO_LONG), None, SHORT, ""),
    ],
)
def test_split_by_length_counts_tokens_and_split_by_fields_does_not(
    model: DuetModel, short: tuple[str, ...], long: str | None, contrasted: str, supervised: str
) -> None:
    captions = read_captions(model, short=short, long=long, split="length")
    assert captions == (contrasted, supervised)
    assert read_captions(model, short=short[:1], long=long) == (short[0], long or "")


def test_language_on_any_supervises_the_short_caption_without_a_long_one(
    model: DuetModel,
) -> None:
    assert read_captions(model, short=(SHORT,), language_on="any") == (SHORT, SHORT)
    assert read_captions(model, short=(SHORT,), long=LONG, language_on="any") == (SHORT, LONG)


def test_language_on_short_supervises_the_short_caption_that_is_contrasted(
    model: DuetModel,
) -> None:
    captions = ("one caption", "two captions", "three captions")
    drawn = read_captions(model, short=captions, long=LONG, language_on="short")
    assert drawn[0] == drawn[1] and drawn[0] in captions
    assert read_captions(model, long=LONG, language_on="short") == ("", "")


def test_contrastive_on_long_contrasts_the_long_caption_alone(model: DuetModel) -> None:
    options = {"contrastive_on": "long"}
    assert read_captions(model, short=(SHORT,), long=LONG, **options) == (LONG, LONG)
    assert read_captions(model, short=(SHORT,), **options) == ("", "")
    options["language_on"] = "short"
    assert read_captions(model, short=(SHORT,), long=LONG, **options) == (LONG, SHORT)
    # The image of a record without a long caption is no query; its text is learned all the same.
    assert read_captions(model, short=(SHORT,), **options) == ("", SHORT)
    pair = Record("1", image=tiny.random_image(0), short=(SHORT,), negative=(("a dog",),))
    (sequence,) = layout_at(model, pair, **options)
    assert sequence.anchors == ()


def test_a_pair_without_a_caption_for_any_loss_has_no_sequences(model: DuetModel) -> None:
    pair = Record("1", image=tiny.random_image(0), short=(SHORT,))
    assert layout_at(model, pair, contrastive_on="long") == []


def test_a_record_whose_captions_are_all_too_long_is_refused(model: DuetModel) -> None:
    with pytest.raises(DataError, match=r"501 tokens and more, recipe.long_up_to is 500"):
        read_captions(model, long=TOO_LONG, split="length")


def test_a_pair_without_a_caption_is_refused(model: DuetModel) -> None:
    with pytest.raises(DataError, match="an image without a caption"):
        read_captions(model)


def test_a_pair_with_only_a_long_caption_has_no_anchor(model: DuetModel) -> None:
    pair = Record("p", image=tiny.random_image(0), short=("a",))
    assert [len(sequence.anchors) for sequence in layout_at(model, pair)] == [1, 1]
    long_pair = Record("l", image=tiny.random_image(1), long=LONG)
    (sequence,) = layout_at(model, long_pair)
    assert sequence.anchors == ()
    assert any(label != IGNORE_INDEX for label in sequence.labels)


# ------------------------------------------------------------------ positives and negatives


def find_positives(anchors: list[Anchor]) -> list[list[bool]]:
    images = [anchor for anchor in anchors if anchor.role == "image"]
    texts = [anchor for anchor in anchors if anchor.role == "text"]
    positives: list[list[bool]] = find_positive_pairs(images, texts).tolist()
    return positives


def test_equal_ids_in_two_files_are_two_records(model: DuetModel) -> None:
    anchors = []
    for i in range(2):
        record = Record("0", image=tiny.random_image(i), short=(f"caption {i}",))
        anchors += list_anchors(layout_at(model, record, position=i, origin=f"{i}.0"))
    assert find_positives(anchors) == [[True, False], [False, True]]


def test_captions_of_a_record_that_is_drawn_again_are_positives(model: DuetModel) -> None:
    captions = tuple(f"caption {i}" for i in range(9))
    record = Record("0", image=tiny.random_image(0), short=captions)
    anchors = []
    for position in range(4):
        anchors += list_anchors(layout_at(model, record, position=position))
    texts = {anchor.content_key for anchor in anchors if anchor.role == "text"}
    assert len(texts) > 1, "each draw takes one of the captions"
    assert find_positives(anchors) == [[True] * 4] * 4


def test_hard_negatives_of_a_pair_follow_its_two_sequences(model: DuetModel) -> None:
    negatives = (("a dog",), (tiny.random_image(3), "a cat"))
    pair = Record(
        "1",
        image=tiny.random_image(0),
        short=("a cat",),
        long="a cat that sleeps",
        negative=negatives,
    )
    sequences = layout_at(model, pair)
    assert any(label != IGNORE_INDEX for label in sequences[0].labels)
    anchors = list_anchors(sequences)
    assert [anchor.role for anchor in anchors] == ["image", "text", "negative", "negative"]
    assert {anchor.record_name for anchor in anchors} == {Sample(pair, 0, 0).record_name}


def test_hard_negatives_need_a_short_caption(model: DuetModel) -> None:
    pair = Record("1", image=tiny.random_image(0), long="a cat", negative=(("a dog",),))
    assert len(layout_at(model, pair)) == 1
    assert len(layout_at(model, replace(pair, short=("a cat",)))) == 3


# ------------------------------------------------------------------ guide


def test_anchors_get_the_slices_that_a_guide_compares(model: DuetModel) -> None:
    image, other_image = tiny.random_image(0), tiny.random_image(1)
    pair = Record("1", image=image, short=("a cat",), long="a cat that sleeps")
    question = Record(
        "2", query=(image, "where?"), positive=(("here",),), negative=((other_image,), ("there",))
    )
    contents = []
    for record in (pair, question):
        for anchor in list_anchors(layout_at(model, record, guide="triple")):
            contents.append(tuple(part.part for part in anchor.slices))
    of_pair = [(image,), ("a cat",)]
    of_question = [(image, "where?"), ("here",), (other_image,), ("there",)]
    assert contents == of_pair + of_question
    assert all(not anchor.slices for anchor in list_anchors(layout_at(model, pair)))


@pytest.mark.parametrize(
    ("guide", "weights", "roles"),
    [
        ("triple", {"contrastive": 1.0}, ("vision", "text", "cross")),
        ("cross", {"contrastive": 0.5}, ("cross",)),
        ("triple", {"contrastive": 0.0, "language": 1.0}, ()),
        ("none", {"contrastive": 1.0}, ()),
    ],
)
def test_encoders_are_needed_by_a_guide_of_a_loss_with_weight(
    guide: Any, weights: dict[str, float], roles: tuple[str, ...]
) -> None:
    assert select_encoder_roles(VladvaOptions(guide=guide), weights) == roles
