"""The verbs of `vlduet data`, on tiny files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import pages
from helpers.tiny import random_image
from vlduet.cli.data import app
from vlduet.corpora import catalog
from vlduet.corpora.build import CorpusSummary
from vlduet.data.formats import FORMATS, read_records
from vlduet.errors import DataError, PackageError

runner = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two good records, one broken line between them."""
    data = random_image().data
    assert data is not None
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "x.jsonl").write_text(
        '{"id": "a", "image": "a.png", "short": "A <red> cat."}\n{"id": \n{"id": "b", "image": "a.png", "long": "Two."}\n'
    )
    return tmp_path / "x.jsonl"


def test_check_prints_problems_and_exits_with_1(source: Path) -> None:
    result = runner.invoke(app, ["check", str(source)])
    assert result.exit_code == 1 and f"{source}:2: broken JSON" in result.stdout
    result = runner.invoke(app, ["check", str(source), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["ok"] and report["files"][0]["records"] == 2
    assert report["problems"][0]["line"] == 2 and report["problems"][0]["fix"]


def test_check_of_a_good_folder_exits_with_0(source: Path) -> None:
    source.unlink()
    result = runner.invoke(app, ["check", str(source.parent)])
    assert result.exit_code == 0 and "1 records" in result.stdout


def test_convert_leaves_the_broken_out_and_lists_them(source: Path) -> None:
    target = source.parent / "out" / "y.jsonl"
    result = runner.invoke(app, ["convert", str(source), "--to", str(target), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["records"] == 2 and json.loads(result.stdout)["dropped"] == 1
    assert [r.id for r in read_records(target)] == ["a", "b"]
    assert "broken JSON" in (target.parent / "y.quarantine.jsonl").read_text()
    strict = runner.invoke(app, ["convert", str(source), "--to", str(target), "--strict"])
    assert isinstance(strict.exception, DataError)
    assert [r.id for r in read_records(target)] == ["a", "b"], "a failed run leaves the old file"


def test_show(source: Path) -> None:
    result = runner.invoke(app, ["show", str(source), "--index", "1"])
    assert result.exit_code == 0 and "Two." in result.stdout and "24 x 24" in result.stdout
    shown = json.loads(runner.invoke(app, ["show", str(source), "--json"]).stdout)
    assert shown["kind"] == "pair" and shown["record"]["short"] == "A <red> cat."
    page = source.parent / "page.html"
    assert runner.invoke(app, ["show", str(source), "--html", str(page)]).exit_code == 0
    found = pages.parse_checked_page(page.read_text())
    assert "A <red> cat." in found.text and [a["alt"] for t, a in found.tags if t == "img"] == [
        f"{source.parent / 'a.png'}, 24 x 24"
    ]
    beyond = runner.invoke(app, ["show", str(source), "--index", "2"])
    assert isinstance(beyond.exception, DataError) and "Use 0 to 1" in str(beyond.exception)


def test_fetch_goes_on_without_what_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(name: str, to: Path, *, progress: object = None) -> CorpusSummary:
        if name != "emoji":
            raise PackageError(f"{name} needs apt")
        return CorpusSummary(
            name, to / name, {"train": 2, "val": 1, "test": 1}, 4, "CC BY-SA 4.0", False
        )

    monkeypatch.setattr(catalog, "fetch_corpus", fetch)
    some = runner.invoke(app, ["fetch", "stamps", "emoji", "--to", str(tmp_path), "--json"])
    answer = json.loads(some.stdout)
    assert some.exit_code == 0 and answer["fetched"][0]["counts"]["train"] == 2
    assert answer["failed"] == {"stamps": "stamps needs apt"}
    assert runner.invoke(app, ["fetch", "stamps", "--to", str(tmp_path)]).exit_code == 1
    wrong = runner.invoke(app, ["fetch", "emoji", "stamp", "--to", str(tmp_path)])
    assert isinstance(wrong.exception, DataError) and "Did you mean 'stamps'?" in str(
        wrong.exception
    )


def test_lists() -> None:
    assert all(name in runner.invoke(app, ["formats"]).stdout for name in FORMATS)
    listed = json.loads(runner.invoke(app, ["corpora", "--json"]).stdout)
    assert {"emoji", "stamps"} <= listed.keys() and all(
        corpus["licence"] for corpus in listed.values()
    )
