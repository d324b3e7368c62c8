"""Protocols with toy functions: what is a query, what is relevant, which image is wrong."""

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


def make_record(number: int, *captions: str) -> Record:
    return Record(id=f"r{number}", image=ImageRef(path=Path(f"{number}.png")), short=captions)


RECORDS = [make_record(i, caption) for i, caption in enumerate(CAPTIONS)]
DIMENSION_OF_KEY = {key: i for i, key in enumerate(dict.fromkeys(map(text_key, CAPTIONS)))}


def image_number(image: ImageRef) -> int:
    assert image.path is not None
    return int(image.path.stem)


def embed_text(texts: list[str]) -> np.ndarray:
    """Return one-hot vectors: equal captions get equal ones."""
    return np.eye(4, dtype=np.float32)[[DIMENSION_OF_KEY[text_key(text)] for text in texts]]


def embed_image(images: list[ImageRef]) -> np.ndarray:
    return embed_text([CAPTIONS[image_number(image)] for image in images])


def embed_constant(items: list[object]) -> np.ndarray:
    return np.full((len(items), 3), 0.3, dtype=np.float32)


# ------------------------------------------------------------------ retrieval


def test_repeated_captions_are_one_query_and_all_their_images_are_relevant() -> None:
    result = protocols.measure_retrieval(embed_image, embed_text, records=RECORDS)
    text_to_image = result.text_to_image
    image_to_text = result.image_to_text
    assert result.captions == ("A flower.", "A red apple.", "A boat.", "A cat.")
    assert result.records == tuple(RECORDS)
    assert text_to_image.relevant[0].tolist() == [True, True, False, False, False]
    assert (text_to_image.num_queries, text_to_image.num_gallery) == (4, 5)
    assert (image_to_text.num_queries, image_to_text.num_gallery) == (5, 4)
    assert text_to_image.ranks.tolist() == [1, 1, 1, 1]
    assert image_to_text.hit_rates() == {"hit@1": 1.0, "hit@5": 1.0, "hit@10": 1.0}
    assert text_to_image.top_indices(0, 2) == [0, 1]
    assert image_to_text.chance_hit_rates()["hit@1"] == pytest.approx(1 / 4)
    assert text_to_image.chance_hit_rates()["hit@1"] == pytest.approx((2 / 5 + 3 * 1 / 5) / 4)


def test_record_with_several_captions_gives_several_queries() -> None:
    records = [make_record(0, "A flower.", "A rose."), make_record(1, "A boat.")]
    result = protocols.measure_retrieval(embed_constant, embed_constant, records=records)
    assert result.captions == ("A flower.", "A rose.", "A boat.")
    relevant = [[True, True, False], [False, False, True]]
    assert result.image_to_text.relevant.tolist() == relevant


def test_sample_has_the_rows_and_columns_of_some_images() -> None:
    random = np.random.default_rng(0)
    images = random.normal(size=(5, 4)).astype(np.float32)
    result = protocols.measure_retrieval(
        lambda refs: images[[image_number(ref) for ref in refs]], embed_text, records=RECORDS
    )
    sample = result.sample([4, 1])
    assert sample.captions == ("A cat.", "A flower.")
    assert [record.id for record in sample.records] == ["r4", "r1"]
    expected = result.text_to_image.similarity[np.ix_([3, 0], [4, 1])]
    np.testing.assert_array_equal(sample.text_to_image.similarity, expected)
    np.testing.assert_array_equal(sample.image_to_text.similarity, expected.T)
    assert sample.text_to_image.relevant.tolist() == [[True, False], [False, True]]


def test_difference_of_hit_rates_is_paired_over_queries() -> None:
    good = protocols.measure_retrieval(embed_image, embed_text, records=RECORDS)
    bad = protocols.measure_retrieval(embed_constant, embed_constant, records=RECORDS)
    difference = good.text_to_image.hit_difference(bad.text_to_image, 1)
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_constant_encoder_scores_zero_whatever_the_blocks_of_the_matrix_product() -> None:
    vector = np.random.default_rng(0).normal(size=(1, 384)).astype(np.float32)
    records = [make_record(i, f"caption {i}") for i in range(150)]
    result = protocols.measure_retrieval(
        lambda items: np.repeat(vector, len(items), 0),
        lambda items: np.repeat(vector, len(items), 0),
        records=records,
    )
    assert result.text_to_image.hit_rates()["hit@10"] == 0.0
    assert result.image_to_text.hit_rates()["hit@10"] == 0.0


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_encoder_of_zeros_or_nan_scores_zero(value: float) -> None:
    def embed(items: list[ImageRef]) -> np.ndarray:
        return np.full((len(items), 3), value, dtype=np.float32)

    result = protocols.measure_retrieval(embed, embed_constant, records=RECORDS * 4)
    assert result.text_to_image.hit_rates() == {"hit@1": 0.0, "hit@5": 0.0, "hit@10": 0.0}


def test_cosine_ignores_length_and_is_equal_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(7, 5))
    b = random.normal(size=(4, 5))
    in_one_block = protocols.cosine(a, b)
    monkeypatch.setattr(protocols, "QUERIES_PER_BLOCK", 3)
    np.testing.assert_array_equal(protocols.cosine(a, 9 * b), in_one_block)
    assert in_one_block.dtype == np.float32
    expected = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    np.testing.assert_allclose(in_one_block, expected, atol=1e-6)
    assert protocols.cosine(a[:0], b).shape == (0, 4)
    assert protocols.cosine(a, b[:0]).shape == (7, 0)


@pytest.mark.parametrize("record", [Record(id="x", short=("A cat.",)), make_record(1)])
def test_record_that_is_no_pair_is_named(record: Record) -> None:
    with pytest.raises(DataError, match=rf"record '{record.id}'"):
        protocols.measure_retrieval(embed_constant, embed_constant, records=[record])


def test_no_records_are_an_error() -> None:
    with pytest.raises(DataError, match="no records"):
        protocols.measure_retrieval(embed_constant, embed_constant, records=[])


# ------------------------------------------------------------------ composed queries


def test_composed_query_ranks_the_items_of_its_image_and_of_its_text() -> None:
    queries: list[tuple[int, str]] = []

    def embed_composed(pairs: list[tuple[ImageRef, str]]) -> np.ndarray:
        queries.extend((image_number(image), text) for image, text in pairs)
        images = embed_image([image for image, _ in pairs])
        return images + np.float32(0.5) * embed_text([text for _, text in pairs])

    result = protocols.measure_composed_retrieval(embed_image, embed_composed, RECORDS, seed=3)
    assert [image for image, _ in queries] == list(range(5))
    assert all(text_key(CAPTIONS[image]) != text_key(text) for image, text in queries)
    assert result.image_ranks.tolist() == [1] * 5
    # The item of the text is behind all images of the item of the image.
    assert result.text_ranks.tolist() == [3, 3, 2, 2, 2]
    two = result.hit_values(2)
    assert two["both"].tolist() == two["text"].tolist() == [0, 0, 1, 1, 1]
    assert result.hit_values(3)["both"].all()
    assert result.hit_intervals(2)["both"].mean == pytest.approx(0.6)


def test_encoder_that_ignores_the_text_finds_the_image_alone() -> None:
    result = protocols.measure_composed_retrieval(
        embed_image, lambda pairs: embed_image([image for image, _ in pairs]), RECORDS, seed=3
    )
    assert result.image_ranks.tolist() == [1] * 5
    assert (result.text_ranks > 3).all(), "all other items are tied, and ties are lost"


# ------------------------------------------------------------------ captions


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_wrong_images_share_no_caption_and_are_a_derangement_where_one_exists(
    names: list[int], seed: int
) -> None:
    captions = [[f"caption {name}"] for name in names]
    if len(set(names)) == 1:
        with pytest.raises(DataError, match="share a caption"):
            protocols.wrong_image_indices(captions, seed)
        return
    indices = protocols.wrong_image_indices(captions, seed)
    assert all(captions[i] != captions[j] for i, j in enumerate(indices))
    assert indices == protocols.wrong_image_indices(captions, seed)
    if max(names.count(name) for name in names) <= len(names) // 2:
        assert sorted(indices) == list(range(len(names)))


def test_wrong_image_shares_no_second_caption_either() -> None:
    captions = [["a flower", "a rose"], ["a rose"], ["a boat"]]
    for seed in range(6):
        assert protocols.wrong_image_indices(captions, seed)[:2] == [2, 2]


def test_cross_entropy_separates_a_model_that_looks_from_one_that_does_not() -> None:
    def looking_nll(pairs: list[tuple[ImageRef, str]]) -> list[tuple[float, int]]:
        scores = []
        for image, text in pairs:
            is_right = text_key(CAPTIONS[image_number(image)]) == text_key(text)
            scores.append(((1.0 if is_right else 3.0) * len(text), len(text)))
        return scores

    def blind_nll(pairs: list[tuple[ImageRef, str]]) -> list[tuple[float, int]]:
        return [(2.0 * len(text), len(text)) for _, text in pairs]

    looking = protocols.measure_caption_cross_entropy(looking_nll, RECORDS)
    assert looking.nats_right_image().mean == pytest.approx(1.0)
    assert looking.nats_wrong_image().mean == pytest.approx(3.0)
    assert looking.nats_gap().mean == pytest.approx(2.0)
    blind = protocols.measure_caption_cross_entropy(blind_nll, RECORDS)
    assert blind.nats_gap().mean == pytest.approx(0.0)


def test_cross_entropy_is_a_mean_over_tokens() -> None:
    def nll(pairs: list[tuple[ImageRef, str]]) -> list[tuple[float, int]]:
        return [(10.0, 10) if "apple" in text else (4.0, 2) for _, text in pairs]

    result = protocols.measure_caption_cross_entropy(nll, RECORDS)
    assert result.nats_right_image().mean == pytest.approx((10 + 4 * 4) / (10 + 4 * 2))


def test_captions_are_compared_with_their_references() -> None:
    result = protocols.measure_captions(lambda images: ["a flower"] * len(images), RECORDS)
    assert [item.exact_match for item in result.items] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [item.image for item in result.items] == [record.image for record in RECORDS]
    assert result.exact_match().mean == pytest.approx(0.4)
    assert result.token_f1().mean == pytest.approx(0.4)
    assert result.num_distinct == 1
