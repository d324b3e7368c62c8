"""Hard negatives are near the query, not near enough to be right, and never known to be right."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from helpers import tiny
from vlduet.cli.main import app
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Part, Parts, Record, as_parts
from vlduet.data.stream import Sample
from vlduet.errors import DataError, LockError, VLDuetError
from vlduet.recipes import vladva
from vlduet.workflows import mining
from vlduet.workflows.mining import mine_hard_negatives, select_hardest


class AngleEmbedder:
    """Embedder on the unit circle: ``12 any words`` is at 12 degrees, an image at its mean red.

    Queries and documents are embedded alike.

    Args:
        max_calls: number of calls after which the next one raises KeyboardInterrupt.
    """

    dim = 2
    image_backend = "pil"

    def __init__(self, fingerprint: str = "fake", max_calls: int | None = None) -> None:
        self.fingerprint = fingerprint
        self.max_calls = max_calls
        self.batch_sizes: list[int] = []

    def encode_document(self, items: Sequence[Part | Parts], **options: object) -> np.ndarray:
        if self.max_calls is not None and len(self.batch_sizes) >= self.max_calls:
            raise KeyboardInterrupt
        angles = np.deg2rad([self._angle(as_parts(item)[0]) for item in items])
        self.batch_sizes.append(len(items))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_query = encode_document

    def _angle(self, part: Part) -> float:
        if isinstance(part, str):
            return float(part.split()[0])
        return float(images.to_pixels(images.load_image(part))[..., 0].mean())


def write_image(folder: Path, angle: int) -> str:
    """Write an image whose red is `angle`, and return its name."""
    pixels = np.full((2, 2, 3), (angle, 0, 0), dtype=np.uint8)
    (folder / f"{angle}.png").write_bytes(images.encode_png(images.from_pixels(pixels)))
    return f"{angle}.png"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def first_texts(candidates: Sequence[Parts]) -> list[str]:
    return [str(parts[0]) for parts in candidates]


def mine_records(
    model: AngleEmbedder, source: Path, output: Path, **options: Any
) -> dict[str, Record]:
    """Mine, and return the written records by id."""
    mine_hard_negatives(model, source, output=output, **options)
    return {record.id: record for record in read_records(output)}


# --- selection


def select_hardest_by_sorting(
    scores: np.ndarray, allowed: np.ndarray, limits: np.ndarray, k: int
) -> list[list[int]]:
    selected = []
    for row in range(len(scores)):
        columns = np.flatnonzero(allowed[row] & (scores[row] < limits[row])).tolist()
        columns.sort(key=lambda column: (-scores[row, column], column))
        selected.append(columns[:k])
    return selected


@pytest.mark.parametrize("k", [1, 3, 50])
def test_select_hardest_equals_sorting(k: int) -> None:
    rng = np.random.default_rng(k)
    scores = np.round(rng.uniform(-1, 1, (40, 23)), 1)  # many ties
    allowed = rng.uniform(size=scores.shape) < 0.7
    limits = rng.uniform(-1.2, 1.2, 40)
    expected = select_hardest_by_sorting(scores, allowed, limits, k)
    assert select_hardest(scores, allowed=allowed, limits=limits, k=k) == expected


# --- mining


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images at 0, 10, 40 and 80 degrees, each with its caption a few degrees away."""
    rows = [
        {
            "id": "a",
            "image": write_image(tmp_path, 0),
            "short": "5 a",
            "long": "A long one.",
            "metadata": {"from": "here"},
        },
        {"id": "b", "image": write_image(tmp_path, 10), "short": ["12 b", "6 also b"]},
        {"id": "c", "image": write_image(tmp_path, 40), "short": "45 c"},
        {"id": "d", "image": write_image(tmp_path, 80), "short": "88 d"},
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def test_the_nearest_candidates_below_the_positive_become_negatives(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    report = mine_hard_negatives(
        AngleEmbedder(), source, output=output, num_negatives=2, margin=0.0
    )
    a, b, c, d = read_records(output)
    assert [record.kind for record in (a, b, c, d)] == ["pair"] * 4
    assert a.short == ("5 a",) and a.long == "A long one."
    assert first_texts(a.negative) == ["6 also b", "12 b"]
    # The text at 5 degrees is further from the image at 10 than both of its own captions.
    assert b.short == ("12 b", "6 also b") and first_texts(b.negative) == ["5 a", "45 c"]
    assert first_texts(d.negative) == ["45 c", "12 b"]
    assert report.records == 4 and report.negatives == 8
    assert report.without == 0 and report.too_near == 0
    origin = a.metadata["mined"]
    assert a.metadata["from"] == "here"
    assert origin["model"] == "fake" and origin["margin"] == 0.0
    expected = [round(float(np.cos(np.deg2rad(angle))), 6) for angle in (6, 12)]
    assert origin["negative_scores"] == expected
    assert report.positive_score is not None and report.negative_score is not None
    assert report.negative_score < report.positive_score


def test_the_margin_leaves_out_candidates_that_may_be_right(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    # cos 5 = .9962, cos 6 = .9945, cos 12 = .9781, cos 45 = .7071
    report = mine_hard_negatives(
        AngleEmbedder(), source, output=output, num_negatives=1, margin=0.02
    )
    first = next(read_records(output))
    assert first_texts(first.negative) == ["45 c"] and report.too_near >= 2
    strict = mine_hard_negatives(
        AngleEmbedder(), source, output=output, num_negatives=1, margin=2.0
    )
    assert strict.negatives == 0 and strict.without == 4 and strict.negative_score is None


def test_negatives_are_below_the_lowest_of_several_positives(tmp_path: Path) -> None:
    texts = {"near": "40 near", "far": "75 far"}
    rows: list[dict[str, Any]] = [
        {"id": name, "query": [{"text": text}], "positive": [[{"text": f"{text} away"}]]}
        for name, text in texts.items()
    ]
    positive = [[{"text": "20 first"}], [{"text": "60 second"}]]
    rows.append({"id": "x", "query": [{"text": "0 query"}], "positive": positive})
    source = write_rows(tmp_path / "x.jsonl", rows)
    record = mine_records(AngleEmbedder(), source, tmp_path / "out.jsonl", margin=0.0)["x"]
    assert first_texts(record.negative) == ["75 far away"]
    assert record.metadata["mined"]["positive_score"] == pytest.approx(0.5, abs=1e-5)


def test_equal_content_is_never_a_negative(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": write_image(tmp_path, 0), "short": "20 dog"},
        # The caption of a in other spelling, and the image of a once more.
        {"id": "b", "image": write_image(tmp_path, 30), "short": "20  DOG"},
        {"id": "c", "image": write_image(tmp_path, 0), "short": "21 hound"},
        {"id": "d", "image": write_image(tmp_path, 90), "short": "89 far"},
    ]
    source = write_rows(tmp_path / "p.jsonl", rows)
    output = tmp_path / "o.jsonl"
    records = mine_records(AngleEmbedder(), source, output, num_negatives=9, margin=0.0)
    assert first_texts(records["a"].negative) == first_texts(records["c"].negative) == ["89 far"]
    assert first_texts(records["b"].negative) == ["89 far"], (
        "21 degrees is nearer to b than its own caption"
    )


def test_captions_can_be_the_queries(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    records = mine_records(
        AngleEmbedder(), source, output, query_side="text", num_negatives=1, margin=0.0
    )
    assert list(records) == ["a", "b#0", "b#1", "c", "d"]
    assert records["a"].query == ("5 a",) and records["b#0"].query == ("12 b",)
    names = []
    for record in records.values():
        ((image,),) = record.negative
        assert isinstance(image, ImageRef) and image.path is not None
        names.append(image.path.name)
    # The text at 5 degrees is as near to the image at 10 as to its own at 0, which is too near.
    assert names == ["40.png", "0.png", "0.png", "10.png", "40.png"]


def test_retrieval_records_keep_their_negatives(tmp_path: Path) -> None:
    image_and_text = [{"image": write_image(tmp_path, 3)}, {"text": "x"}]
    rows = [
        {
            "id": "r",
            "query": [{"text": "0 q"}],
            "positive": [[{"text": "1 p"}]],
            "negative": [[{"text": "30 n"}]],
        },
        {"id": "s", "query": [{"text": "40 q"}], "positive": [[{"text": "41 p"}]]},
        # Only candidates of the same modalities are negatives: a text is none of an image.
        {"id": "t", "query": [{"text": "2 q"}], "positive": [image_and_text]},
    ]
    source = write_rows(tmp_path / "r.jsonl", rows)
    records = mine_records(
        AngleEmbedder(), source, tmp_path / "o.jsonl", num_negatives=5, margin=0.0
    )
    assert first_texts(records["r"].negative) == ["30 n", "41 p"]
    assert first_texts(records["s"].negative) == ["30 n", "1 p"]
    assert records["t"].negative == ()


def test_unusable_records_are_listed_and_the_others_mined(source: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    unusable = [
        {"id": "gone", "image": "gone.png", "short": "1 x"},
        {"id": "broken", "image": "broken.png", "short": "2 y"},
        {"id": "long", "image": "0.png", "long": "3 z"},
        {"id": "story", "parts": [{"text": "4"}]},
    ]
    with source.open("a") as file:
        file.write("{\n" + "".join(json.dumps(row) + "\n" for row in unusable))
    report = mine_hard_negatives(
        AngleEmbedder(), source, output=tmp_path / "out.jsonl", num_negatives=1, margin=0.0
    )
    assert report.records == 4 and report.dropped == 5
    listing = (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    drops = {drop["id"]: drop for drop in map(json.loads, listing)}
    assert set(drops) == {None, "gone", "broken", "long", "story"}
    assert "vlduet caption" in drops["long"]["fix"]


def test_an_interrupted_run_continues_with_the_same_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "DOCUMENTS_PER_CHUNK", 2)
    complete, output = tmp_path / "complete.jsonl", tmp_path / "out.jsonl"
    uninterrupted = AngleEmbedder()
    mine_hard_negatives(uninterrupted, source, output=complete, num_negatives=2)
    interrupted = AngleEmbedder(max_calls=3)
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(interrupted, source, output=output, num_negatives=2)
    assert not output.exists()
    resumed = AngleEmbedder()
    report = mine_hard_negatives(resumed, source, output=output, num_negatives=2)
    assert interrupted.batch_sizes + resumed.batch_sizes == uninterrupted.batch_sizes
    assert report.embedded == sum(resumed.batch_sizes)
    assert output.read_bytes() == complete.read_bytes()


def test_vectors_are_reused_by_the_same_model_only(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = mine_hard_negatives(AngleEmbedder(), source, output=output, num_negatives=2)
    again = mine_hard_negatives(AngleEmbedder(), source, output=output, num_negatives=1)
    assert first.embedded == 9 and again.embedded == 0 and again.negatives == 4
    other_model = AngleEmbedder(fingerprint="another")
    other = mine_hard_negatives(other_model, source, output=output, num_negatives=1)
    assert other.embedded == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "-k"),
        ({"margin": -0.1}, "--margin"),
        ({"margin": float("nan")}, "--margin"),
        ({"query_side": "texts"}, "Did you mean 'text'"),
        ({"output": Path("out.json")}, "no .jsonl"),
    ],
)
def test_wrong_options_name_the_option(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = {"output": tmp_path / "out.jsonl", **options}
    with pytest.raises(VLDuetError, match=message):
        mine_hard_negatives(AngleEmbedder(), source, **options)


def test_sources_without_usable_records_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(VLDuetError, match="the source itself"):
        mine_hard_negatives(AngleEmbedder(), source, output=source)
    rows = [{"id": "s", "parts": [{"text": "4"}]}]
    unusable = write_rows(tmp_path / "n.jsonl", rows)
    with pytest.raises(DataError, match="no usable record"):
        mine_hard_negatives(AngleEmbedder(), unusable, output=tmp_path / "o.jsonl")


def test_one_process_at_a_time_writes_an_output(source: Path, tmp_path: Path) -> None:
    listing = tmp_path / "o.quarantine.jsonl"
    listing.write_text("{}\n")  # of the other process
    with (
        FileLock(tmp_path / ".o.jsonl.lock"),
        pytest.raises(LockError, match=r"o\.jsonl: another process is writing here"),
    ):
        mine_hard_negatives(AngleEmbedder(), source, output=tmp_path / "o.jsonl")
    assert listing.exists() and not (tmp_path / "o.jsonl").exists()


# --- the command, with a model


def test_the_command_writes_records_that_training_reads_negatives_from(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    rows = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(images.read_bytes(tiny.random_image(i)))
        caption = f"number {zlib.crc32(bytes([i]))}"
        rows.append({"id": str(i), "image": f"{i}.png", "short": caption})
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    output = tmp_path / "mined" / "out.jsonl"
    arguments = ["mine", str(tmp_path / "model"), str(source), "--to", str(output)]
    result = CliRunner().invoke(app, [*arguments, "-k", "1", "--margin", "0", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["file"] == str(output) and report["records"] == 4 and report["embedded"] == 8
    records = list(read_records(output))
    assert sum(len(record.negative) for record in records) == report["negatives"]
    roles = []
    for record in records:
        sequences = vladva.layout(Sample(record, 0, 0), model.renderer, vladva.VladvaOptions())
        roles += [anchor.role for sequence in sequences for anchor in sequence.anchors]
    assert roles.count("image") == roles.count("text") == 4
    assert roles.count("negative") == report["negatives"]
