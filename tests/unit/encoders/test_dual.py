"""Dual encoder: items that it embeds, and those that it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from vlduet.data.records import Message, Part, Parts
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.encoders.loading import open_encoder
from vlduet.errors import DataError
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.limits import accept_truncation


@pytest.fixture(scope="module")
def dual(encoder_folders: dict[str, Path]) -> DualEncoder:
    """Return an untrained dual encoder over the tiny frozen encoders, in training mode."""
    frozen = {role: open_encoder(encoder_folders[role]) for role in ("vision", "text")}
    return DualEncoder(FrozenEncoders(frozen, cache=FeatureCache(None)), dim=8)


@pytest.mark.parametrize(
    "item",
    [(), ("a", "b"), (Message("user", ("a",)),)],
    ids=["empty", "two parts", "conversation"],
)
def test_an_item_must_be_one_image_or_one_text(dual: DualEncoder, item: Part | Parts) -> None:
    with pytest.raises(DataError, match="one image or one text"):
        dual.encode(["a", item])


def test_encoding_is_without_dropout_and_keeps_the_mode(dual: DualEncoder) -> None:
    items: list[Part | Parts] = ["a", tiny.random_image(), ("a",)]
    embeddings = dual.encode(items)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    np.testing.assert_array_equal(dual.encode(items), embeddings)
    assert dual.training


def test_a_text_beyond_the_limit_is_refused_or_cut(dual: DualEncoder) -> None:
    limit = dual.max_text_tokens
    long = "word " * 2 * limit
    image = tiny.random_image()
    items = [long, image, "a", (image, "a", long), image]
    (num_tokens, no_text, short, both, also_no_text) = dual.count_tokens(items)
    assert num_tokens > limit > short > no_text == also_no_text == 0
    assert both == short + num_tokens and dual.count_tokens([image]) == [0]
    with pytest.raises(DataError, match=f"model .{num_tokens} tokens, the limit is {limit}"):
        dual.encode(["a", long])
    cut: list[tuple[int, int]] = []
    vectors = dual.encode(["a", long], on_truncate=lambda *values: cut.append(values))
    assert cut == [(1, num_tokens)]
    longer = dual.encode([long + "more"], on_truncate=accept_truncation)
    np.testing.assert_allclose(vectors[1:], longer, atol=1e-5)


def test_images_alone_need_no_tokenizer(encoder_folders: dict[str, Path]) -> None:
    frozen = {role: open_encoder(encoder_folders[role]) for role in ("vision", "text")}
    model = DualEncoder(FrozenEncoders(frozen, cache=FeatureCache(None)), dim=8)
    assert model.encode([tiny.random_image()]).shape == (1, 8)
    assert "token_counter" not in vars(frozen["text"])
    model.encode(["a"])
    assert "token_counter" in vars(frozen["text"])


def test_no_items_give_no_rows(dual: DualEncoder) -> None:
    assert dual.encode([]).shape == (0, 8)
