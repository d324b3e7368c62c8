"""Protocols with toy functions: what is a query, what is a positive, which image is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError
from vlduet.eval import protocols

CAPTIONS = ["A flower.", "a  FLOWER.", "A red apple.", "A boat.", "A cat."]


def record(number: int, *captions: str) -> Record:
    return Record(id=f"r{number}", image=ImageRef(path=Path(f"{number}.png")), short=captions)


RECORDS = [record(i, caption) for i, caption in enumerate(CAPTIONS)]
MEANING = {text_key(c): i for i, c in enumerate(dict.fromkeys(map(text_key, CAPTIONS)))}


def embed_text(texts: list[str]) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[[MEANING[text_key(t)] for t in texts]]


def embed_image(images: list[ImageRef]) -> np.ndarray:
    return embed_text([CAPTIONS[int(image.path.stem)] for image in images if image.path])


def constant(items: list[object]) -> np.ndarray:
    return np.full((len(items), 3), 0.3, dtype=np.float32)


def test_repeated_captions_are_one_query_and_all_their_images_are_positives() -> None:
    found = protocols.measure_retrieval(embed_image, embed_text, records=RECORDS)
    assert found.captions == ("A flower.", "A red apple.", "A boat.", "A cat.")
    assert found.text_to_image.relevant[0].tolist() == [True, True, False, False, False]
    assert (found.text_to_image.num_queries, found.text_to_image.num_gallery) == (4, 5)
    assert (found.image_to_text.num_queries, found.image_to_text.num_gallery) == (5, 4)
    assert found.text_to_image.ranks.tolist() == [1, 1, 1, 1]
    assert found.image_to_text.hit_rates() == {"hit@1": 1.0, "hit@5": 1.0, "hit@10": 1.0}
    assert found.text_to_image.top_indices(0, 2) == [0, 1]
    assert found.image_to_text.chance_hit_rates()["hit@1"] == pytest.approx(1 / 4)
    assert found.text_to_image.chance_hit_rates()["hit@1"] == pytest.approx((2 / 5 + 3 * 1 / 5) / 4)


def test_a_record_with_several_captions_gives_several_queries() -> None:
    records = [record(0, "A flower.", "A rose."), record(1, "A boat.")]
    found = protocols.measure_retrieval(constant, constant, records=records)
    assert found.captions == ("A flower.", "A rose.", "A boat.")
    assert found.image_to_text.relevant.tolist() == [[True, True, False], [False, False, True]]


def test_a_mixed_query_is_asked_for_both_of_its_things() -> None:
    asked: list[tuple[int, str]] = []

    def embed_mixed(queries: list[tuple[ImageRef, str]]) -> np.ndarray:
        asked.extend((int(image.path.stem), text) for image, text in queries if image.path)
        image, text = zip(*queries, strict=True)
        return embed_image(list(image)) + np.float32(0.5) * embed_text(list(text))

    found = protocols.measure_composed_retrieval(embed_image, embed_mixed, RECORDS, seed=3)
    assert [image for image, _ in asked] == list(range(5))
    assert all(text_key(CAPTIONS[image]) != text_key(text) for image, text in asked)
    assert found.image_ranks.tolist() == [1] * 5
    assert found.text_ranks.tolist() == [3, 3, 2, 2, 2], (
        "behind all images of the query's own thing"
    )
    two, three = found.hit_values(2), found.hit_values(3)
    assert two["both"].tolist() == two["text"].tolist() == [0, 0, 1, 1, 1] and three["both"].all()

    deaf = protocols.measure_composed_retrieval(
        embed_image, lambda queries: embed_image([q[0] for q in queries]), RECORDS, seed=3
    )
    assert deaf.image_ranks.tolist() == [1] * 5 and (deaf.text_ranks > 3).all(), (
        "level with all others: ties are lost"
    )


def test_a_constant_encoder_scores_zero_whatever_the_blocks_of_the_matrix_product() -> None:
    random = np.random.default_rng(0)
    vector = random.normal(size=(1, 384)).astype(np.float32)
    records = [record(i, f"caption {i}") for i in range(150)]
    found = protocols.measure_retrieval(
        lambda items: np.repeat(vector, len(items), 0),
        lambda items: np.repeat(vector, len(items), 0),
        records=records,
    )
    assert (
        found.text_to_image.hit_rates()["hit@10"]
        == found.image_to_text.hit_rates()["hit@10"]
        == 0.0
    )


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_an_encoder_that_gives_zeros_or_nan_scores_zero(value: float) -> None:
    def broken(items: list[ImageRef]) -> np.ndarray:
        return np.full((len(items), 3), value, dtype=np.float32)

    found = protocols.measure_retrieval(broken, constant, records=RECORDS * 4)
    assert found.text_to_image.hit_rates() == {"hit@1": 0.0, "hit@5": 0.0, "hit@10": 0.0}


def test_cosine_ignores_length_and_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(7, 5)), random.normal(size=(4, 5))
    whole = protocols.cosine(a, b)
    monkeypatch.setattr(protocols, "QUERIES_PER_BLOCK", 3)
    np.testing.assert_array_equal(protocols.cosine(a, 9 * b), whole)
    assert whole.dtype == np.float32


@pytest.mark.parametrize("bad", [Record(id="x", short=("A cat.",)), record(1)])
def test_a_record_that_is_no_pair_is_named(bad: Record) -> None:
    with pytest.raises(DataError, match=rf"record '{bad.id}'"):
        protocols.measure_retrieval(constant, constant, records=[bad])


def test_no_records() -> None:
    with pytest.raises(DataError, match="no records"):
        protocols.measure_retrieval(constant, constant, records=[])


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_wrong_images_are_wrong_and_a_derangement_where_one_exists(
    names: list[int], seed: int
) -> None:
    captions = [[f"caption {n}"] for n in names]
    if len(set(names)) == 1:
        with pytest.raises(DataError, match="share a caption"):
            protocols.wrong_image_indices(captions, seed)
        return
    found = protocols.wrong_image_indices(captions, seed)
    assert all(captions[i] != captions[j] for i, j in enumerate(found))
    assert found == protocols.wrong_image_indices(captions, seed)
    if max(names.count(n) for n in names) <= len(names) // 2:
        assert sorted(found) == list(range(len(names)))


def test_a_second_caption_also_makes_an_image_right() -> None:
    captions = [["a flower", "a rose"], ["a rose"], ["a boat"]]
    for seed in range(6):
        assert protocols.wrong_image_indices(captions, seed)[:2] == [2, 2]


def test_cross_entropy_tells_a_model_that_looks_from_one_that_does_not() -> None:
    def looks(pairs: list[tuple[ImageRef, str]]) -> list[tuple[float, int]]:
        same = [text_key(CAPTIONS[int(i.path.stem)]) == text_key(t) for i, t in pairs if i.path]
        return [
            ((1.0 if s else 3.0) * len(t), len(t)) for s, (_, t) in zip(same, pairs, strict=True)
        ]

    def blind(pairs: list[tuple[ImageRef, str]]) -> list[tuple[float, int]]:
        return [(2.0 * len(t), len(t)) for _, t in pairs]

    seen = protocols.measure_caption_cross_entropy(looks, RECORDS)
    assert (
        seen.nats_right_image().mean,
        seen.nats_wrong_image().mean,
        seen.nats_gap().mean,
    ) == pytest.approx((1.0, 3.0, 2.0))
    assert protocols.measure_caption_cross_entropy(blind, RECORDS).nats_gap().mean == pytest.approx(
        0.0
    )


def test_cross_entropy_is_a_mean_over_tokens() -> None:
    found = protocols.measure_caption_cross_entropy(
        lambda pairs: [(10.0, 10) if "apple" in t else (4.0, 2) for _, t in pairs], RECORDS
    )
    assert found.nats_right_image().mean == pytest.approx((10 + 4 * 4) / (10 + 4 * 2))


def test_captions_beside_their_references() -> None:
    found = protocols.measure_captions(lambda images: ["a flower"] * len(images), RECORDS)
    assert [item.exact_match for item in found.items] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert found.exact_match().mean == pytest.approx(0.4)
    assert found.num_distinct == 1


def test_only_the_facts_that_are_looked_at_are_ranked():
    from vlduet.eval.benchmarks import protocols as official

    class Task:
        k = 3
        positives = ((5, 11),)

    row = np.round(np.random.default_rng(0).random(400), 1).astype(np.float32)  # many ties
    row[7] = -np.inf
    found = official._best(row, Task(), 0)
    every = sorted((i for i in range(400) if i != 7), key=lambda i: (-row[i], i in (5, 11), i))
    assert found == every[:10]
    assert official._best(np.array([0.1, -np.inf, 0.3], dtype=np.float32), Task(), 0) == [2, 0]
