"""Queries of an image and another pair's caption: which pairs are composed, and what is right."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers import tiny
from vlduet.cli.data import app
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Record
from vlduet.data.tools.composed_queries import collect_content_keys, compose_queries
from vlduet.errors import DataError


def make_pair(number: int, *short: str, image_seed: int | None = None) -> Record:
    """Return a pair whose image is drawn by its number, unless another seed is given."""
    seed = number if image_seed is None else image_seed
    return Record(f"p{number}", image=tiny.random_image(seed), short=short)


PAIRS = [
    make_pair(0, "a dog"),
    make_pair(1, "a hat", "a cap"),
    make_pair(2, "a tree"),
    make_pair(3, "A  dog"),
]


@given(st.integers(0, 50), st.integers(1, 4))
def test_a_query_joins_two_pairs_and_both_are_right(seed: int, queries_per_image: int) -> None:
    pairs = {pair.id: pair for pair in PAIRS}
    queries = compose_queries(PAIRS, queries_per_image=queries_per_image, seed=seed)
    assert len(queries) <= queries_per_image * len(PAIRS)
    assert len({query.id for query in queries}) == len(queries)
    for query in queries:
        image_pair, text_pair = (pairs[name] for name in query.metadata["mixed"])
        image, text = query.query
        assert image == image_pair.image and text in text_pair.short
        assert not collect_content_keys(image_pair) & collect_content_keys(text_pair)
        (image_caption,), *other_positives = query.positive
        assert image_caption in image_pair.short
        assert other_positives == [(image_pair.image,), (text,), (text_pair.image,)]
    assert queries == compose_queries(PAIRS, queries_per_image=queries_per_image, seed=seed)


def test_every_two_distinct_pairs_are_composed_once() -> None:
    pairs = PAIRS[:3]
    queries = compose_queries(pairs, queries_per_image=40, seed=1)
    composed = [tuple(query.metadata["mixed"]) for query in queries]
    assert sorted(composed) == sorted(permutations(["p0", "p1", "p2"], 2))


def test_pairs_with_equal_contents_are_not_composed() -> None:
    equal_captions = [make_pair(0, "a dog"), make_pair(1, "A Dog")]
    equal_images = [make_pair(0, "a dog"), make_pair(1, "a hat", image_seed=0)]
    for pairs in (equal_captions, equal_images, equal_images[:1], []):
        assert compose_queries(pairs, queries_per_image=3) == []


def test_records_other_than_captioned_pairs_are_refused(tmp_path: Path) -> None:
    image = tiny.random_image(1)
    for record in (Record("1", image=image, long="long"), Record("2", parts=("a", image))):
        with pytest.raises(DataError, match="no image with a short caption"):
            compose_queries([PAIRS[0], record])
    missing = Record("1", image=ImageRef(path=tmp_path / "gone.png"), short=("a",))
    with pytest.raises(DataError, match=r"gone\.png"):
        compose_queries([missing])


def test_the_command_writes_queries_and_lists_what_it_drops(tmp_path: Path) -> None:
    rows = []
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(images.read_bytes(tiny.random_image(i)))
        rows.append({"id": f"{i}", "image": f"{i}.png", "short": f"thing {i}"})
    rows.append({"id": "x", "image": "gone.png", "short": "a"})
    rows.append({"id": "y", "image": "0.png", "long": "A long one."})
    source, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    arguments = ["mix", str(source), "--to", str(output), "--times", "2", "--seed", "5", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report, queries = json.loads(result.stdout), list(read_records(output))
    assert report["pairs"] == 3 and report["dropped"] == 3
    assert report["records"] == len(queries) > 0
    assert all(query.kind == "retrieval" and len(query.query) == 2 for query in queries)


def test_the_command_fails_without_any_query(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(images.read_bytes(tiny.random_image()))
    source = tmp_path / "x.jsonl"
    source.write_text('{"id": "0", "image": "0.png", "short": "a thing"}\n')
    result = CliRunner().invoke(app, ["mix", str(source), "--to", str(tmp_path / "y.jsonl")])
    assert result.exit_code == 1 and "0 records of 1 pairs" in result.output
