"""Queries of an image and another one's words: who is joined, and what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers import tiny
from vlduet.cli.data import app
from vlduet.data.content_keys import content_key
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Record
from vlduet.data.tools.composed_queries import collect_content_keys, compose_queries
from vlduet.errors import DataError


def pair(number: int, *short: str, picture: int | None = None) -> Record:
    return Record(
        f"p{number}", image=tiny.random_image(number if picture is None else picture), short=short
    )


PAIRS = [pair(0, "a dog"), pair(1, "a hat", "a cap"), pair(2, "a tree"), pair(3, "A  dog")]


@given(st.integers(0, 50), st.integers(1, 4))
def test_both_things_are_right_and_they_are_two(seed: int, times: int) -> None:
    of = {record.id: record for record in PAIRS}
    found = compose_queries(PAIRS, queries_per_image=times, seed=seed)
    assert len({record.id for record in found}) == len(found) <= times * len(PAIRS)
    for record in found:
        one, other = (of[name] for name in record.metadata["mixed"])
        image, text = record.query
        assert image == one.image and text in other.short
        assert not collect_content_keys(one) & collect_content_keys(other), "a query of two things"
        seen, shown, said, pictured = record.positive
        assert (
            seen[0] in one.short
            and shown == (one.image,)
            and said == (text,)
            and pictured == (other.image,)
        )
    assert found == compose_queries(PAIRS, queries_per_image=times, seed=seed)


def test_every_image_asks_and_every_pair_lends_its_words() -> None:
    distinct = PAIRS[:3]
    found = compose_queries(distinct, queries_per_image=40, seed=1)
    assert {tuple(record.metadata["mixed"]) for record in found} == {
        (one.id, other.id) for one in distinct for other in distinct if one is not other
    }, "each pair with each other once, however often they are asked for"
    assert {record.query[1] for record in found} == {"a dog", "a hat", "a cap", "a tree"} or len(
        found
    ) == 6


def test_what_shows_or_says_the_same_is_not_joined() -> None:
    assert compose_queries([pair(0, "a dog"), pair(1, "A Dog")], queries_per_image=3) == []
    assert (
        compose_queries([pair(0, "a dog"), pair(1, "a hat", picture=0)], queries_per_image=3) == []
    )
    assert compose_queries([]) == compose_queries([pair(0, "a dog")], queries_per_image=3) == []


def test_what_is_no_pair_is_named(tmp_path: Path) -> None:
    for record in (
        Record("1", image=tiny.random_image(1), long="long"),
        Record("2", parts=("a", tiny.random_image(1))),
    ):
        with pytest.raises(DataError, match="no image with a short caption"):
            compose_queries([PAIRS[0], record])
    with pytest.raises(DataError, match=r"gone\.png"):
        compose_queries([Record("1", image=ImageRef(path=tmp_path / "gone.png"), short=("a",))])


def test_the_command_writes_records_and_names_what_it_drops(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
    rows = [{"id": f"{i}", "image": f"{i}.png", "short": f"thing {i}"} for i in range(3)]
    rows += [
        {"id": "x", "image": "gone.png", "short": "a"},
        {"id": "y", "image": "0.png", "long": "A long one."},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    arguments = [
        "mix",
        str(tmp_path / "x.jsonl"),
        "--to",
        str(tmp_path / "y.jsonl"),
        "--times",
        "2",
        "--seed",
        "5",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    told, found = json.loads(done.stdout), list(read_records(tmp_path / "y.jsonl"))
    assert told["pairs"] == 3 and told["dropped"] == 3 and told["records"] == len(found) > 0
    assert all(record.kind == "retrieval" and content_key(record.query) for record in found)
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    nothing = CliRunner().invoke(
        app, ["mix", str(tmp_path / "one.jsonl"), "--to", str(tmp_path / "z.jsonl")]
    )
    assert nothing.exit_code == 1 and "0 records of 1 pairs" in nothing.output
