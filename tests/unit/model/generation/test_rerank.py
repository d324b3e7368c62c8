"""Which of several texts becomes the caption: the nearest by the model's own embedding."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import tiny
from vlduet.model.generation.rerank import select_nearest_drafts

IMAGES = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)


def embed(texts):
    """A text is as near to the first image as its first digit says, and to the second as its second one."""
    assert all(texts) and len(set(texts)) == len(texts), (
        "a text is embedded once, an empty one not at all"
    )
    return np.array([[int(text[0]), int(text[1])] for text in texts], np.float32) / 10


@pytest.mark.parametrize(
    ("written", "known", "found"),
    [
        ([["11", "55"], ["55", "19"]], [], ["55", "19"]),
        ([["50", "51"], ["05", "15"]], [], ["50", "05"]),  # of equals the likeliest draft
        ([["", "01"], ["", ""]], [], ["01", ""]),
        ([["50"], ["04", "05"]], [], ["50", "05"]),
        ([["50"], ["05"]], ["60", "06"], ["60", "06"]),
        ([["50"], ["05"]], ["44", "54"], ["50", "05"]),  # a draft that is as near stays
        ([[""], [""]], ["31", "22"], ["31", "22"]),  # nothing was written
        ([["50"], ["06"]], ["50", "05"], ["50", "06"]),
    ],
)
def test_the_nearest_is_taken(written, known, found):
    vectors = dict(zip(known, embed(known), strict=True)) if known else {}
    assert (
        select_nearest_drafts(
            written, embed_images=lambda: IMAGES, embed_texts=embed, known=vectors
        )
        == found
    )


def test_where_there_is_nothing_to_choose_nothing_is_embedded():
    def never(*_):
        raise AssertionError

    for written in ([["only"], [""]], [["", ""]], []):
        assert select_nearest_drafts(written, embed_images=never, embed_texts=never, known={}) == [
            some[0] for some in written
        ]


def test_a_model_chooses_between_what_it_writes_and_what_is_known(model):
    pictures = [tiny.random_image(i) for i in range(3)]
    texts = ["red", "a blue car", "the dog", "green"]
    known = dict(zip(texts, model.encode_query(texts), strict=True))
    for drafts in (0, 1, 3):
        written = model.caption(pictures, max_new_tokens=6, drafts=drafts)
        chosen = model.caption(pictures, max_new_tokens=6, drafts=drafts, known=known)
        for picture, own, text in zip(pictures, written, chosen, strict=True):
            image = model.encode_document([picture])[0]
            scores = {
                one: float(model.encode_query([one])[0] @ image) for one in [own, *texts] if one
            }
            assert scores[text] == pytest.approx(max(scores.values()), abs=1e-5)
    assert model.caption(pictures, max_new_tokens=6, known={}) == model.caption(
        pictures, max_new_tokens=6
    )
    assert model.caption([], known=known) == []
