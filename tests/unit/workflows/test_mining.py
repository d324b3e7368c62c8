"""Hard negatives: near the query, not near enough to be right, and never what is known to be right."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Part, Parts, Record
from vlduet.data.tools.queries import get_query_and_positives, split_into_queries
from vlduet.errors import ConfigError, DataError, VLDuetError
from vlduet.workflows import mining
from vlduet.workflows.mining import mine_hard_negatives, select_hardest


class FakeModel:
    """A text `12 any words` lies at 12 degrees, an image at its red; queries and documents alike."""

    dim, image_backend, fingerprint = 2, "pil", "fake"

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.stop_after: int | None = None

    def encode_document(self, items: Sequence[Part | Parts]) -> np.ndarray:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        angles = np.deg2rad([self._angle(item) for item in items])
        self.calls.append(len(items))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_query = encode_document

    def _angle(self, item: Part | Parts) -> float:
        (part, *_) = (item,) if isinstance(item, str | ImageRef) else item
        if isinstance(part, str):
            return float(part.split()[0])
        from vlduet.data import images

        return float(images.to_pixels(images.load_image(part))[..., 0].mean())


def image(folder: Path, angle: int, *, blue: int = 0) -> str:
    from vlduet.data import images

    pixels = np.full((2, 2, 3), (angle, 0, blue), dtype=np.uint8)
    images.save_png(images.from_pixels(pixels), folder / f"{angle}-{blue}.png")
    return f"{angle}-{blue}.png"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(found: Sequence[Parts]) -> list[str]:
    return [str(parts[0]) for parts in found]


# ------------------------------------------------------------------ picking


def slow_hardest(
    scores: np.ndarray, allowed: np.ndarray, limits: np.ndarray, k: int
) -> list[list[int]]:
    found = []
    for q in range(len(scores)):
        good = [c for c in range(scores.shape[1]) if allowed[q, c] and scores[q, c] < limits[q]]
        found.append(sorted(good, key=lambda c: (-scores[q, c], c))[:k])
    return found


@pytest.mark.parametrize("k", [1, 3, 50])
def test_hardest_equals_its_slow_twin(k: int) -> None:
    random = np.random.default_rng(k)
    scores = np.round(random.uniform(-1, 1, (40, 23)), 1)  # many ties
    allowed = random.uniform(size=scores.shape) < 0.7
    limits = random.uniform(-1.2, 1.2, 40)
    assert select_hardest(scores, allowed=allowed, limits=limits, k=k) == slow_hardest(
        scores, allowed, limits, k
    )


# ------------------------------------------------------------------ mining


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images at 0, 10, 40 and 80 degrees, each with its caption a little beside it."""
    rows = [
        {
            "id": "a",
            "image": image(tmp_path, 0),
            "short": "5 a",
            "long": "A long one.",
            "metadata": {"from": "here"},
        },
        {"id": "b", "image": image(tmp_path, 10), "short": ["12 b", "6 also b"]},
        {"id": "c", "image": image(tmp_path, 40), "short": "45 c"},
        {"id": "d", "image": image(tmp_path, 80), "short": "88 d"},
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def test_the_nearest_that_is_not_too_near(source: Path, tmp_path: Path) -> None:
    report = mine_hard_negatives(
        FakeModel(), source, output=tmp_path / "out.jsonl", num_negatives=2, margin=0.0
    )
    a, b, c, d = read_records(tmp_path / "out.jsonl")
    assert [r.kind for r in (a, b, c, d)] == ["pair"] * 4
    assert (
        a.short == ("5 a",)
        and a.long == "A long one."
        and texts(a.negative) == ["6 also b", "12 b"]
    )
    # 5 degrees are further from the picture at 10 than both of its own captions.
    assert b.short == ("12 b", "6 also b") and texts(b.negative) == ["5 a", "45 c"]
    assert texts(d.negative) == ["45 c", "12 b"]
    assert (
        report.records == 4
        and report.negatives == 8
        and report.without == 0
        and report.too_near == 0
    )
    told = a.metadata["mined"]
    assert a.metadata["from"] == "here" and told["model"] == "fake" and told["margin"] == 0.0
    assert told["negative_scores"] == [round(float(np.cos(np.deg2rad(x))), 6) for x in (6, 12)]
    assert report.positive_score is not None and report.negative_score is not None
    assert report.negative_score < report.positive_score


def test_the_margin_leaves_out_what_may_be_right(source: Path, tmp_path: Path) -> None:
    # cos 5 = .9962, cos 6 = .9945, cos 12 = .9781, cos 45 = .7071
    report = mine_hard_negatives(
        FakeModel(), source, output=tmp_path / "out.jsonl", num_negatives=1, margin=0.02
    )
    a = next(read_records(tmp_path / "out.jsonl"))
    assert texts(a.negative) == ["45 c"] and report.too_near >= 2
    strict = mine_hard_negatives(
        FakeModel(), source, output=tmp_path / "out.jsonl", num_negatives=1, margin=2.0
    )
    assert strict.negatives == 0 and strict.without == 4 and strict.negative_score is None


def test_equal_content_is_never_a_negative(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": image(tmp_path, 0), "short": "20 dog"},
        {
            "id": "b",
            "image": image(tmp_path, 30),
            "short": "20  DOG",
        },  # the caption of a, written otherwise
        {"id": "c", "image": image(tmp_path, 0), "short": "21 hound"},  # the picture of a again
        {"id": "d", "image": image(tmp_path, 90), "short": "89 far"},
    ]
    mine_hard_negatives(
        FakeModel(),
        write(tmp_path / "p.jsonl", rows),
        output=tmp_path / "o.jsonl",
        num_negatives=9,
        margin=0.0,
    )
    found = {r.id: texts(r.negative) for r in read_records(tmp_path / "o.jsonl")}
    assert found["a"] == ["89 far"] and found["c"] == ["89 far"]
    assert found["b"] == ["89 far"], "21 degrees is nearer to b than its own caption"


def test_captions_ask_for_images(source: Path, tmp_path: Path) -> None:
    mine_hard_negatives(
        FakeModel(),
        source,
        output=tmp_path / "out.jsonl",
        query_side="text",
        num_negatives=1,
        margin=0.0,
    )
    records = list(read_records(tmp_path / "out.jsonl"))
    assert [r.id for r in records] == ["a", "b#0", "b#1", "c", "d"]
    assert [r.query for r in records[:2]] == [("5 a",), ("12 b",)]
    named = [
        [ref.path.name for (ref,) in r.negative if isinstance(ref, ImageRef) and ref.path]
        for r in records
    ]
    # 5 degrees lie as near to the picture at 10 as to their own at 0, which is too near.
    assert named == [["40-0.png"], ["0-0.png"], ["0-0.png"], ["10-0.png"], ["40-0.png"]]


def test_retrieval_records_keep_what_they_have(tmp_path: Path) -> None:
    rows = [
        {
            "id": "r",
            "query": [{"text": "0 q"}],
            "positive": [[{"text": "1 p"}]],
            "negative": [[{"text": "30 n"}]],
        },
        {"id": "s", "query": [{"text": "40 q"}], "positive": [[{"text": "41 p"}]]},
        # Only what is made of the same things competes: an image is no negative of a text.
        {
            "id": "t",
            "query": [{"text": "2 q"}],
            "positive": [[{"image": image(tmp_path, 3)}, {"text": "x"}]],
        },
    ]
    mine_hard_negatives(
        FakeModel(),
        write(tmp_path / "r.jsonl", rows),
        output=tmp_path / "o.jsonl",
        num_negatives=5,
        margin=0.0,
    )
    found = {r.id: r for r in read_records(tmp_path / "o.jsonl")}
    assert texts(found["r"].negative) == ["30 n", "41 p"]
    assert texts(found["s"].negative) == ["30 n", "1 p"]
    assert found["t"].negative == ()


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(source: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((tmp_path / "0-0.png").read_bytes()[:40])
    more = [
        {"id": "gone", "image": "gone.png", "short": "1 x"},
        {"id": "broken", "image": "broken.png", "short": "2 y"},
        {"id": "long", "image": "0-0.png", "long": "3 z"},
        {"id": "story", "parts": [{"text": "4"}]},
    ]
    with source.open("a") as file:
        file.write("{\n" + "".join(json.dumps(row) + "\n" for row in more))
    report = mine_hard_negatives(
        FakeModel(), source, output=tmp_path / "out.jsonl", num_negatives=1, margin=0.0
    )
    assert report.records == 4 and report.dropped == 5
    listed = [
        json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    ]
    assert {row["id"] for row in listed} == {None, "gone", "broken", "long", "story"}
    assert "vlduet caption" in next(row["fix"] for row in listed if row["id"] == "long")


def test_an_interrupted_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "CHUNK", 2)
    whole = FakeModel()
    mine_hard_negatives(whole, source, output=tmp_path / "whole.jsonl", num_negatives=2)
    stopped = FakeModel()
    stopped.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(stopped, source, output=tmp_path / "out.jsonl", num_negatives=2)
    assert not (tmp_path / "out.jsonl").exists()
    rest = FakeModel()
    report = mine_hard_negatives(rest, source, output=tmp_path / "out.jsonl", num_negatives=2)
    assert stopped.calls + rest.calls == whole.calls and report.embedded == sum(rest.calls)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = mine_hard_negatives(FakeModel(), source, output=tmp_path / "out.jsonl", num_negatives=1)
    assert again.embedded == 0 and again.negatives == 4
    other = FakeModel()
    other.fingerprint = "another"  # type: ignore[misc]
    assert (
        mine_hard_negatives(other, source, output=tmp_path / "out.jsonl", num_negatives=1).embedded
        == 9
    ), "vectors of another model are not ours"


def test_bad_options(source: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "-k"),
        ({"margin": -0.1}, "--margin"),
        ({"margin": float("nan")}, "--margin"),
        ({"asking": "texts"}, "Did you mean 'text'"),
        ({"to": tmp_path / "out.json"}, "no .jsonl"),
        ({"to": source}, "the source itself"),
    ]
    for options, said in wrong:
        with pytest.raises(VLDuetError, match=said):
            mine_hard_negatives(FakeModel(), source, **{"to": tmp_path / "out.jsonl", **options})
    with pytest.raises(DataError, match="no usable record"):
        mine_hard_negatives(
            FakeModel(),
            write(tmp_path / "n.jsonl", [{"id": "s", "parts": [{"text": "4"}]}]),
            output=tmp_path / "o.jsonl",
        )


# ------------------------------------------------------------------ questions


def test_questions() -> None:
    picture = tiny.random_image()
    pair = Record("p", image=picture, short=("one", "two"), long="A long one.", metadata={"m": 1})
    assert split_into_queries(pair) == [pair] and get_query_and_positives(pair) == (
        (picture,),
        (("one",), ("two",)),
    )
    asked = split_into_queries(pair, query_side="text")
    assert [q.id for q in asked] == ["p#0", "p#1"] and all(q.metadata == {"m": 1} for q in asked)
    assert get_query_and_positives(asked[1]) == (("two",), ((picture,),))
    retrieval = Record("r", query=("q",), positive=(("a",),))
    assert split_into_queries(retrieval, query_side="text") == [retrieval]
    with pytest.raises(ConfigError, match="--query"):
        split_into_queries(pair, query_side="images")  # type: ignore[arg-type]


# ------------------------------------------------------------------ the verb


def test_the_verb_with_a_real_model_and_training_on_what_it_wrote(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vlduet.cli.main import app
    from vlduet.data.stream import Sample
    from vlduet.recipes import vladva

    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
    rows = [
        {"id": str(i), "image": f"{i}.png", "short": f"number {zlib.crc32(bytes([i]))}"}
        for i in range(4)
    ]
    source, out = write(tmp_path / "pairs.jsonl", rows), tmp_path / "mined" / "out.jsonl"
    arguments = [
        "mine",
        str(tmp_path / "model"),
        str(source),
        "--to",
        str(out),
        "-k",
        "1",
        "--margin",
        "0",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["file"] == str(out) and told["records"] == 4 and told["embedded"] == 8
    records = list(read_records(out))
    assert sum(len(r.negative) for r in records) == told["negatives"]
    roles = [
        anchor.role
        for record in records
        for sequence in vladva.layout(Sample(record, 0, 0), model.renderer, vladva.VladvaOptions())
        for anchor in sequence.anchors
    ]
    assert (
        roles.count("image") == roles.count("text") == 4
        and roles.count("negative") == told["negatives"]
    )
