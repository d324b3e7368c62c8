"""Embedding of many items: order, repeated images and the limit of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.quarantine import bisect_failures
from vlduet.data.sequences import PreparedImage
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.model.embedding import Embeddable


def test_embeddings_keep_the_order_of_items_of_any_length(model: DuetModel) -> None:
    items = [
        "a",
        "a much longer text than the others",
        tiny.random_image(3),
        "bb",
        (tiny.random_image(4), "cc"),
    ]
    embeddings = torch.from_numpy(model.encode(items, batch_tokens=16))
    single = torch.cat([torch.from_numpy(model.encode([item])) for item in items])
    assert_close(embeddings, single, atol=2e-6, rtol=1e-5)
    assert_close(embeddings.norm(dim=1), torch.ones(5))


def test_queries_have_a_prompt_of_their_own(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    items = ["a red apple", (tiny.random_image(4), "an apple")]
    documents = model.encode_document(items)
    assert np.array_equal(model.encode_query(items), documents)
    model.set_prompts(replace(model.prompts, query="Find this: "))
    assert np.array_equal(model.encode_document(items), documents)
    queries = model.encode_query(items)
    assert np.array_equal(model.encode(items, is_query=True), queries)
    assert (np.abs(queries - documents).max(1) > 1e-4).all()


def test_each_distinct_image_goes_through_the_vision_tower_once(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[PreparedImage] = []
    compute_vision_features = model.backbone.compute_vision_features

    def record(images: list[PreparedImage]) -> Tensor:
        encoded.extend(images)
        return compute_vision_features(images)

    monkeypatch.setattr(model.backbone, "compute_vision_features", record)
    model.encode([tiny.random_image(71), tiny.random_image(72), tiny.random_image(71)])
    model.encode([tiny.random_image(71)])
    assert len(encoded) == 2


def test_a_limit_cuts_texts_of_one_call_only(model: DuetModel) -> None:
    text = "one two three"
    full = model.encode([text])
    limit = len(model.renderer.render_embedding((text,)).token_ids) - 4
    cut: list[tuple[int, int]] = []

    def on_truncate(position: int, num_tokens: int) -> None:
        cut.append((position, num_tokens))

    embeddings = model.encode(["a", text], max_tokens=limit, on_truncate=on_truncate)
    np.testing.assert_allclose(embeddings, model.encode(["a", text[:-4]]), atol=1e-5)
    assert cut == [(1, limit + 4)]
    assert np.array_equal(model.encode([text]), full)
    with pytest.raises(DataError, match=rf"\({limit + 4} tokens, the limit is {limit}\)\. Shorten"):
        model.encode(["a", text], max_tokens=limit)
    with pytest.raises(DataError, match=r"the limit is 2\W"):
        model.encode([tiny.random_image(1)], max_tokens=2)


def test_long_items_are_refused_one_by_one(model: DuetModel) -> None:
    limit = model.renderer.max_tokens
    items = ["a", "b" * 2 * limit, "c", "d " * limit]
    refused: list[tuple[Embeddable, str]] = []

    def on_error(item: Embeddable, error: DataError) -> None:
        refused.append((item, error.message))

    vectors = bisect_failures(model.encode_query, items, on_error=on_error)
    assert [vector is None for vector in vectors] == [False, True, False, True]
    assert [item for item, _ in refused] == items[1::2]
    assert all(message.endswith(f"tokens, the limit is {limit})") for _, message in refused)
    cut: list[int] = []
    allowed = model.encode_document(items, on_truncate=lambda position, _: cut.append(position))
    assert cut == [1, 3] and np.isfinite(allowed).all()


@pytest.mark.parametrize("num_blanks", [0, 100_000])
def test_the_least_number_of_tokens_counts_no_blanks(model: DuetModel, num_blanks: int) -> None:
    limit = model.renderer.max_tokens
    num_chars = limit * model.renderer.layouts.tokenizer.max_token_chars
    message = rf"at least {limit + 1} tokens, the limit is {limit}\)"
    with pytest.raises(DataError, match=message):
        model.encode(["a" * (num_chars + 1) + " " * num_blanks + "a"])


def test_progress_counts_every_item(model: DuetModel) -> None:
    counts: list[int] = []
    model.encode(["a", "b", tiny.random_image(1)], progress=counts.append)
    assert sum(counts) == 3
    assert model.encode([]).shape == (0, model.dim)
