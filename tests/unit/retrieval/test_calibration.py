"""Scores of unrelated records, and the share of them that reaches the score of a hit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.fake_embedder import FakeModel, paint, write_pairs
from vlduet.data.records import ImageRef, Message, Record
from vlduet.model.score_statistics import ContentKind, ScoreDistribution, ScoreStatistics
from vlduet.retrieval.build import build_index
from vlduet.retrieval.calibration import (
    find_content_kind,
    judge_hits,
    measure_score_statistics,
    sample_records,
)
from vlduet.retrieval.documents import Side
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit, search

KINDS: tuple[ContentKind, ...] = ("text", "image", "both")


def write_images(folder: Path, count: int) -> list[ImageRef]:
    return [
        ImageRef(path=paint(folder / f"{i}.png", (40 * i, 255 - 40 * i, 90))) for i in range(count)
    ]


def test_records_that_share_a_text_or_an_image_are_not_compared(
    tmp_path: Path, model: FakeModel
) -> None:
    images = write_images(tmp_path, 3)
    records = [
        Record("0", image=images[0], short=("a cat",)),
        Record("1", image=images[1], short=("another", "A  CAT")),  # the text of 0
        Record("2", image=images[1], short=("a dog",)),  # the image of 1
        Record("3", image=images[2], short=("a cow",), long="A cow on a meadow."),
    ]
    statistics = measure_score_statistics(model, records)
    assert statistics is not None and statistics.num_records == 4
    # Unrelated are 0-2, 0-3, 1-3 and 2-3, in both directions.
    pairs = {key: entry.num_pairs for key, entry in statistics.distributions.items()}
    assert pairs == {(query, document): 8 for query in KINDS for document in KINDS}
    vectors = model.encode_document(["a cat", "another", "a dog", "a cow"])
    scores = vectors @ vectors.T
    unrelated = [scores[i, j] for i, j in [(0, 2), (0, 3), (1, 3), (2, 3)]]
    expected = ScoreDistribution.from_scores(np.array(unrelated * 2))
    assert statistics.distributions["text", "text"].quantiles == pytest.approx(
        expected.quantiles, abs=2e-6
    )


def test_types_that_the_records_lack_are_left_out(model: FakeModel) -> None:
    records = [Record(str(i), parts=(f"text {i}",)) for i in range(3)]
    statistics = measure_score_statistics(model, records)
    assert statistics is not None and set(statistics.distributions) == {("text", "text")}
    assert statistics.share_at_least(1.0, query="text", document="text") == 1 / 7
    assert measure_score_statistics(model, records[:1]) is None
    assert measure_score_statistics(model, []) is None


def test_queries_are_embedded_as_queries(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = model.encode_document
    records = [Record(str(i), parts=(f"text {i}",)) for i in range(4)]
    plain = measure_score_statistics(model, records)
    monkeypatch.setattr(model, "encode_query", lambda items, on_truncate: -encode(items))
    turned = measure_score_statistics(model, records)
    assert plain is not None and turned is not None
    key: Any = ("text", "text")
    lowest, highest = plain.distributions[key].quantiles[0], plain.distributions[key].quantiles[-1]
    assert turned.distributions[key].quantiles[0] == pytest.approx(-highest, abs=2e-6)
    assert turned.distributions[key].quantiles[-1] == pytest.approx(-lowest, abs=2e-6)


def test_what_cannot_be_embedded_is_left_out_and_what_is_cut_is_logged(
    tmp_path: Path, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    model.max_words = 3
    images = write_images(tmp_path, 3)
    captions = ["one", "two", "a b c d e"]
    records = [Record(str(i), image=image, short=(captions[i],)) for i, image in enumerate(images)]
    images[0].path.write_bytes(b"?")  # type: ignore[union-attr]
    statistics = measure_score_statistics(model, records)
    assert statistics is not None
    assert statistics.distributions["image", "image"].num_pairs == 2
    assert statistics.distributions["text", "text"].num_pairs == 6
    assert statistics.distributions["text", "both"].num_pairs == 4
    assert "1 dropped (1 x the image is an unknown kind of file" in caplog.text
    assert "texts were cut at the model's limit, up to 5" in caplog.text


def test_a_sample_is_random_and_always_the_same() -> None:
    records = [Record(str(i), parts=(f"text {i}",)) for i in range(3000)]
    sample = sample_records(iter(records))
    assert sample == sample_records(records) and len({record.id for record in sample}) == 512
    positions = np.array([int(record.id) for record in sample])
    assert 1300 < positions.mean() < 1700 and positions.max() > 2900
    assert sample_records(records[:5]) == records[:5]


@pytest.mark.parametrize(
    ("side", "text", "has_image", "document"),
    [
        ("image", "quoted", True, "image"),
        ("text", "embedded", True, "text"),
        ("record", "embedded", True, "both"),
        ("record", "embedded", False, "text"),
        ("record", "", True, "image"),
    ],
)
def test_a_hit_is_judged_by_the_type_of_its_document(
    side: Side, text: str, has_image: bool, document: ContentKind
) -> None:
    hit = Hit("a", 0.5, text, ImageRef(path=Path("a.png")) if has_image else None, {}, 1)
    distributions: Any = {
        ("text", kind): ScoreDistribution.from_scores(np.full(10 + i, 0.1))
        for i, kind in enumerate(KINDS)
    }
    statistics = ScoreStatistics(5, distributions)
    (judged,) = judge_hits([hit], statistics, query="text", side=side)
    assert judged.p == 1 / (11 + KINDS.index(document)) and hit.p is None
    (judged,) = judge_hits([hit], statistics, query="both", side=side)
    assert judged.p is None
    assert judge_hits([hit], None, query="text", side=side) == [hit]
    assert judge_hits([hit], statistics, query=None, side=side) == [hit]


def paint_query(folder: Path) -> ImageRef:
    return ImageRef(path=paint(folder / "query.png", (250, 0, 0)))


def test_hits_of_a_search_have_their_share(tmp_path: Path, model: FakeModel) -> None:
    build_index(model, write_pairs(tmp_path), to=tmp_path / "index")
    with Index.open(tmp_path / "index") as index:
        assert [hit.p for hit in search(index, model, "red")] == [None] * 4
        distribution = ScoreDistribution.from_scores(np.linspace(-1, 1, 101))
        model.score_statistics = ScoreStatistics(9, {("text", "image"): distribution})
        hits = search(index, model, "red")
        assert hits[0].id == "red" and hits[0].p is not None and hits[-1].p is not None
        assert 0 < hits[0].p < hits[-1].p <= 1
        assert hits[0].p == distribution.share_at_least(hits[0].score)
        assert search(index, model, paint_query(tmp_path))[0].p is None
    assert find_content_kind(["a", ImageRef(path=Path("a.png"))]) == "both"
    assert find_content_kind([Message("user", ("a",))]) is None
