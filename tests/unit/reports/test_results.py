"""The report: published numbers are data, ours stand under them, and retention is paired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers import official, pages
from vlduet.cli.main import app
from vlduet.data.records import Parts
from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.table import BENCHMARKS, known
from vlduet.eval.benchmarks.tasks import difference, sample
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate
from vlduet.reports import results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `base` says yes to everything, `joint` is random."""
    root = tmp_path_factory.mktemp("runs")
    data = official.write(root / "official")
    said = {"base": "Yes", "joint": "No"}

    def embed(items: list[Parts], query: bool) -> np.ndarray:
        return np.random.default_rng(len(items)).normal(size=(len(items), 6)).astype(np.float32)

    for name, text in said.items():
        play = ModelFunctions(
            embed=embed, generate=lambda prompts, longest, text=text: [text] * len(prompts)
        )  # type: ignore[misc]
        for benchmark in ("pope", "mme", "winoground", "builtin_stamps"):
            evaluate(
                known(benchmark),
                play,
                source=Source(data),
                runs=root / name,
                provenance={"model": name},
            )
    return root


def test_published_numbers_are_whole() -> None:
    tables = json.loads(results.PUBLISHED_FILE.read_text())["tables"]
    assert {table["paper"] for table in tables} == {"Sugar", "VladVA"}
    for table in tables:
        assert table["source"]
        for column in table["columns"]:
            assert column["benchmark"] in BENCHMARKS, column
        for row in table["rows"]:
            assert len(row["values"]) == len(table["columns"]), (table["title"], row["model"])
    told = {
        table["title"]: {row["model"]: row["values"] for row in table["rows"]} for table in tables
    }
    assert told["Generation"]["Sugar-7B"][:6] == [76.0, 58.7, 60.4, 69.4, 57.5, 86.6]
    assert told["SugarCrepe"]["VladVA 7B"] == [98.1, 92.1, 86.8, 79.0, 82.9, 95.2, 95.8]
    assert told["Retrieval"]["VladVA LLaVA-1.5-7B"] == [
        85.0,
        98.5,
        59.0,
        88.6,
        72.3,
        96.5,
        94.3,
        99.9,
        72.9,
        94.4,
        85.7,
        99.5,
    ]


def test_ours_stand_under_the_papers(runs: Path) -> None:
    joint = results.read_run_scores(runs / "joint")
    tables = {(t.paper, t.title): t for t in results.paper_tables([joint])}
    assert set(tables) == {
        ("Sugar", "Generation"),
        ("Sugar", "Winoground"),
        ("VladVA", "Winoground"),
    }
    generation = tables["Sugar", "Generation"]
    last = dict(zip(generation.columns, generation.lines[-1].cells, strict=True))
    assert generation.lines[-1].ours and generation.lines[-1].model == "joint"
    assert last["POPE"].text == "0.0" and last["GQA"].text == "" and "n 6" in last["POPE"].told
    assert results.suite_table([joint]) is not None


def test_retention_is_paired_and_generation_comes_first(runs: Path) -> None:
    before, after = (results.read_run_scores(runs / name) for name in ("base", "joint"))
    kept = {one.benchmark: one for one in results.before_and_after(before, after)}
    assert list(kept) == ["pope", "mme", "builtin_stamps", "winoground"]
    assert kept["pope"].before.mean == pytest.approx(200 / 3) and kept["pope"].after.mean == 0.0
    assert kept["pope"].change is not None and kept["pope"].change.mean == pytest.approx(-200 / 3)
    assert kept["winoground"].verdict == "level"  # the same vectors: every draw differs by 0
    assert kept["winoground"].change is not None and kept["winoground"].change.low == 0.0


def test_a_paired_interval_is_narrower_and_other_items_do_not_compare() -> None:
    random = np.random.default_rng(0)
    hard = random.random(300)
    ours, theirs = (sample((hard + shift > 0.5).astype(float)) for shift in (0.05, 0.0))
    found = difference(ours, theirs)
    assert found is not None and found.low > 0
    alone = ours.value()
    assert found.high - found.low < (alone.high - alone.low) / 2
    assert difference(ours, sample([1.0, 0.0])) is None


def test_report_from_the_command_line(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ["report", str(runs / "joint"), "--before", str(runs / "base"), "--out", str(out)]
    told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "pope" in told and "->" in told
    html, markdown = out.read_text(), out.with_suffix(".md").read_text()
    pages.parse_checked_page(html)
    assert "Before and after" in html and "Sugar-7B" in html
    assert "| **joint** |" in markdown and "| pope | F1 | 66.7 | 0.0 |" in markdown
    with pytest.raises(ConfigError, match="no scores here"):
        CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
