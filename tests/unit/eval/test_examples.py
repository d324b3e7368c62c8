"""Examples are spaced evenly and mark what is relevant."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlduet.data.records import ImageRef, Record
from vlduet.eval import examples, protocols

NUM_RECORDS = 12
RECORDS = [
    Record(f"r{i}", image=ImageRef(path=Path(f"{i}.png")), short=(f"Thing {i // 2}.",))
    for i in range(NUM_RECORDS)
]


def embed_images(refs: list[ImageRef]) -> np.ndarray:
    numbers = [int(ref.path.stem) for ref in refs if ref.path]
    return np.random.default_rng(0).normal(size=(NUM_RECORDS, 4)).astype(np.float32)[numbers]


def embed_texts(texts: list[str]) -> np.ndarray:
    numbers = [int(text.removesuffix(".").split()[1]) for text in texts]
    return np.random.default_rng(1).normal(size=(NUM_RECORDS, 4)).astype(np.float32)[numbers]


RESULT = protocols.measure_retrieval(embed_images, embed_texts, records=RECORDS)


def test_indices_are_spaced_evenly() -> None:
    assert examples.evenly_spaced_indices(100, 4) == [12, 37, 62, 87]
    assert examples.evenly_spaced_indices(3, 10) == [0, 1, 2]
    assert examples.evenly_spaced_indices(0, 5) == []
    assert examples.evenly_spaced("abcdef", 2) == ["b", "e"]


def test_three_times_as_many_indices_include_the_first_ones() -> None:
    for count in range(200):
        sample = set(examples.evenly_spaced_indices(count, 18))
        assert sample <= set(examples.evenly_spaced_indices(count, 54))


def test_image_queries_mark_relevant_captions_at_their_rank() -> None:
    gallery = examples.image_to_text_examples(RESULT, num=NUM_RECORDS)
    assert len(gallery.searches) == NUM_RECORDS
    ranks = []
    for search in gallery.searches:
        relevant = [hit.is_relevant for hit in search.hits]
        scores = [hit.score for hit in search.hits]
        assert scores == sorted(scores, reverse=True) and len(scores) == examples.HITS_PER_EXAMPLE
        rank = search.first_hit_rank
        assert rank is not None
        if rank <= examples.HITS_PER_EXAMPLE:
            assert relevant.index(True) + 1 == rank
        else:
            assert not any(relevant)
        ranks.append(rank)
    assert ranks == RESULT.image_to_text.ranks.tolist() and len(set(ranks)) > 2


def test_caption_queries_mark_all_images_with_the_caption() -> None:
    hits = [(record.id, 0.5) for record in RECORDS]
    gallery = examples.text_to_image_examples(RESULT, search=lambda _: hits, num=1)
    (search,) = gallery.searches
    assert search.text == "Thing 3." and search.image is None
    assert [hit.is_relevant for hit in search.hits] == [False] * 5
    (search,) = examples.text_to_image_examples(RESULT, search=lambda _: hits[5:], num=1).searches
    assert [hit.is_relevant for hit in search.hits] == [False, True, True, False, False]
    assert search.hits[1].image == RECORDS[6].image and search.hits[1].text == "Thing 3."


def test_composed_query_leaves_out_its_own_image() -> None:
    queries = []

    def search(image: ImageRef, text: str) -> list[tuple[str, float]]:
        queries.append((image, text))
        return [(record.id, 1.0) for record in RECORDS]

    gallery = examples.composed_query_examples(RESULT, search=search, num=4)
    assert queries[0] == (RECORDS[1].image, "Thing 3."), "half the corpus away"
    first = gallery.searches[0]
    assert [hit.text for hit in first.hits] == [f"Thing {n}." for n in (0, 1, 1, 2, 2)]
    assert [hit.is_relevant for hit in first.hits] == [True, False, False, False, False]
    for example in gallery.searches:
        assert len(example.hits) == examples.HITS_PER_EXAMPLE and example.first_hit_rank is None
        assert example.image not in [hit.image for hit in example.hits]
