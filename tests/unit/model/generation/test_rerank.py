"""Captions: the draft nearest to the image by the model's own embeddings is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import tiny
from vlduet.model.generation.rerank import generate_drafts, select_nearest_drafts

IMAGE_EMBEDDINGS = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)


def embed_digits(texts):
    """Return vectors: the digits of a text are its cosines to the first and the second image."""
    assert all(texts), "an empty text must not be embedded"
    assert len(set(texts)) == len(texts), "a text must be embedded once"
    return np.array([[int(text[0]), int(text[1])] for text in texts], np.float32) / 10


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ([["11", "55"], ["55", "19"]], ["55", "19"]),
        ([["50", "51"], ["05", "15"]], ["50", "05"]),  # of equals the most likely draft
        ([["", "01"], ["", ""]], ["01", ""]),
        ([["50"], ["04", "05"]], ["50", "05"]),
    ],
)
def test_nearest_draft_is_selected(drafts, expected):
    selected = select_nearest_drafts(
        drafts, embed_images=lambda: IMAGE_EMBEDDINGS, embed_texts=embed_digits
    )
    assert selected == expected


@pytest.mark.parametrize("drafts", [[["only"], [""]], [["", ""]], []])
def test_nothing_is_embedded_without_a_choice(drafts):
    def fail(*_):
        raise AssertionError("embedded without need")

    selected = select_nearest_drafts(drafts, embed_images=fail, embed_texts=fail)
    assert selected == [candidates[0] for candidates in drafts]


def test_caption_is_the_draft_with_the_largest_cosine(model):
    images = [tiny.random_image(i) for i in range(3)]
    sequences = [model.renderer.render_caption_request(image, "") for image in images]
    prefill_inputs = model.prefill_inputs(sequences)
    drafts = generate_drafts(model.backbone, prefill_inputs, 6, num_drafts=4)
    captions = []
    for image, candidates in zip(images, drafts, strict=True):
        assert len(candidates) == 4 and len(set(candidates)) > 1
        image_embedding = model.encode_document([image])[0]
        cosines = [
            model.encode_query([text])[0] @ image_embedding if text else -2.0 for text in candidates
        ]
        captions.append(candidates[int(np.argmax(cosines))])
        options = {"max_new_tokens": 6, "num_drafts": 4}
        assert model.caption_images([image], **options) == captions[-1:]
    assert model.caption_images(images, **options, batch_size=2) == captions


def test_captions_of_a_batch_equal_those_of_single_images(model):
    images = [tiny.random_image(i) for i in range(3)]
    captions = model.caption_images(images, max_new_tokens=6)
    assert captions == [model.caption_images([i], max_new_tokens=6)[0] for i in images]
    assert model.caption_images([]) == []
