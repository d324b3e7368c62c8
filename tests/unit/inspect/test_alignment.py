"""`vlduet align`: what it draws is what the structure loss computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from helpers import pages, tiny
from vlduet import config
from vlduet.cli.main import app
from vlduet.data.records import Record
from vlduet.encoders.frozen import FrozenEncoders, make_slice
from vlduet.encoders.loading import open_encoder
from vlduet.errors import ConfigError, DataError
from vlduet.inspect import alignment
from vlduet.model.feature_cache import FeatureCache

STORY = Record("one", parts=(tiny.random_image(0), "A <b>cat</b> sleeps.", "It rains."))
OTHER = Record("two", parts=("A cat sleeps.", tiny.random_image(0)))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        role: str(path)
        for role, path in tiny.build_frozen_encoders(tmp_path_factory.mktemp("encoders")).items()
    }


def sugar(folder: Path, encoders: dict[str, str], **recipe: object) -> Path:
    tree = {
        "out": "runs/x",
        "recipe": {"name": "sugar", **recipe},
        "objectives": {"structure": 1.0},
        "model": {"path": "nowhere"},
        "encoders": encoders,
        "data": {"train": [{"path": "nowhere.jsonl"}]},
        "train": {"steps": 1},
    }
    path = folder / "sugar.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write(folder: Path) -> Path:
    (folder / "0.png").write_bytes(tiny.random_image(0).data or b"")
    rows = [
        {"id": "one", "parts": [{"image": "0.png"}, {"text": "A <b>cat</b> sleeps. It rains."}]},
        {"id": "two", "image": "0.png", "short": "A cat sleeps."},
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("triple", [True, False])
def test_the_encoders_of_a_config_compare(
    triple: bool, encoders: dict[str, str], tmp_path: Path
) -> None:
    parts = (*STORY.parts, *OTHER.parts)
    found = alignment.config_encoder_cosines(
        parts, config.load_run_config(sugar(tmp_path, encoders, triple=triple))
    )
    asked = FrozenEncoders(
        {role: open_encoder(Path(path)) for role, path in encoders.items()},
        cache=FeatureCache(None),
    )
    seen = asked.encode_slices([make_slice(part) for part in parts])
    for i, a in enumerate(seen):
        for j, b in enumerate(seen):
            kinds = {isinstance(one.part, str) for one in (a, b)}
            role = (
                "cross" if len(kinds) == 2 or not triple else "text" if True in kinds else "vision"
            )
            assert float(found[i, j]) == pytest.approx(
                float(a.features[role] @ b.features[role]), abs=1e-5
            )


def test_an_equal_document_aligns_along_the_diagonal() -> None:
    cosines = torch.full((6, 6), 0.1)
    for i in range(6):
        cosines[i, i] = cosines[i, (i + 3) % 6] = 1.0
    found = alignment.align_records(STORY, STORY, cosines=cosines, judge="x", delta=0.4)
    assert found.gak == pytest.approx(1.0) and found.awm > 0.8 > found.mean == pytest.approx(0.4)
    assert all(row[i] > 0.9 for i, row in enumerate(found.posterior))
    text = alignment.as_text(found)
    assert text.count("*") == 4 and "It rains." in text  # three cells and the legend


def test_one_slice_and_none() -> None:
    found = alignment.align_records(
        Record("a", parts=("x",)), OTHER, cosines=torch.eye(3), judge="x", delta=1.0
    )
    assert found.posterior == [pytest.approx([1.0, 1.0])] and 0 < found.gak <= 1
    with pytest.raises(DataError, match="record 'b' is an empty sequence"):
        alignment.align_records(OTHER, Record("b"), cosines=torch.eye(2), judge="x", delta=1.0)


def test_the_verb(encoders: dict[str, str], tmp_path: Path) -> None:
    records, made = write(tmp_path), sugar(tmp_path, encoders, delta=0.5)
    page = tmp_path / "page.html"
    arguments = [
        "align",
        f"{records}:0",
        f"{records}:1",
        "--config",
        str(made),
        "--html",
        str(page),
    ]
    told = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(told.stdout)
    assert (found["first"], found["second"], len(found["rows"]), len(found["columns"])) == (
        "one",
        "two",
        3,
        2,
    )
    assert found["cosines"][0][0] == pytest.approx(1.0, abs=1e-5) and found[
        "sigma"
    ] == pytest.approx(0.5 * 2.5**0.5)
    html = page.read_text()
    pages.parse_checked_page(html)
    assert (
        html.count("data:image/") == 2 and "&lt;b&gt;cat&lt;/b&gt;" in html and "<b>cat" not in html
    )
    assert "A cat sleeps." in CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_the_verb_with_a_model(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    records = write(tmp_path)
    told = CliRunner().invoke(
        app, ["align", str(records), f"{records}:1", "--model", str(tmp_path / "model"), "--json"]
    )
    vectors = model.encode([tiny.random_image(0), "A cat sleeps."])
    assert json.loads(told.stdout)["cosines"][0][1] == pytest.approx(
        float(vectors[0] @ vectors[1]), abs=1e-5
    )


def test_mistakes(encoders: dict[str, str], tmp_path: Path) -> None:
    records, made = str(write(tmp_path)), sugar(tmp_path, encoders)
    for arguments, kind, message in (
        ([], ConfigError, "either --config or --model"),
        (["--config", str(made), "--model", "x"], ConfigError, "either --config or --model"),
    ):
        told = CliRunner().invoke(app, ["align", records, records, *arguments])
        assert isinstance(told.exception, kind) and message in str(told.exception)
    told = CliRunner().invoke(app, ["align", f"{records}:2", records, "--config", str(made)])
    assert isinstance(told.exception, DataError) and "Use 0 to 1" in str(told.exception)
