"""Published numbers are data, and the numbers of runs stand below them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers import official, pages
from vlduet.cli.main import app
from vlduet.data.records import Parts
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import BENCHMARKS, get_benchmark
from vlduet.eval.comparison import before_and_after, read_run_scores
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate
from vlduet.reports import papers


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs: `base` answers Yes and `joint` No to everything."""
    root = tmp_path_factory.mktemp("runs")
    data = official.write_official_files(root / "official")

    def embed(items: list[Parts], query: bool) -> np.ndarray:
        return np.random.default_rng(len(items)).normal(size=(len(items), 6)).astype(np.float32)

    def run_benchmarks(name: str, answer: str) -> None:
        functions = ModelFunctions(
            embed=embed, generate=lambda prompts, max_new_tokens: [answer] * len(prompts)
        )
        for benchmark in ("pope", "mme", "winoground", "builtin_stamps"):
            evaluate(
                get_benchmark(benchmark),
                functions,
                source=OfficialFiles(data),
                runs=root / name,
                provenance={"model": name},
            )

    run_benchmarks("base", "Yes")
    run_benchmarks("joint", "No")
    return root


def test_published_tables_are_complete() -> None:
    tables = json.loads(papers.PUBLISHED_FILE.read_text())["tables"]
    assert {table["paper"] for table in tables} == {"Sugar", "VladVA"}
    numbers = {}
    for table in tables:
        assert table["source"]
        for column in table["columns"]:
            assert column["benchmark"] in BENCHMARKS, column
        for row in table["rows"]:
            assert len(row["values"]) == len(table["columns"]), (table["title"], row["model"])
            numbers[table["title"], row["model"]] = row["values"]
    sugar = numbers["Generation", "Sugar-7B"]
    assert sugar[:6] == [76.0, 58.7, 60.4, 69.4, 57.5, 86.6]
    sugarcrepe = numbers["SugarCrepe", "VladVA 7B"]
    assert sugarcrepe == [98.1, 92.1, 86.8, 79.0, 82.9, 95.2, 95.8]
    retrieval = numbers["Retrieval", "VladVA LLaVA-1.5-7B"]
    assert retrieval[:6] == [85.0, 98.5, 59.0, 88.6, 72.3, 96.5]
    assert retrieval[6:] == [94.3, 99.9, 72.9, 94.4, 85.7, 99.5]


def test_runs_stand_below_the_published_rows(runs: Path) -> None:
    joint = read_run_scores(runs / "joint")
    tables = {(table.paper, table.title): table for table in papers.paper_tables([joint])}
    assert set(tables) == {
        ("Sugar", "Generation"),
        ("Sugar", "Winoground"),
        ("VladVA", "Winoground"),
    }
    generation = tables["Sugar", "Generation"]
    last_row = generation.rows[-1]
    values = dict(zip(generation.columns, last_row.values, strict=True))
    assert last_row.is_ours and last_row.model == "joint"
    assert not any(row.is_ours for row in generation.rows[:-1])
    assert papers.cell_text(values["POPE"]) == "0.0"
    assert papers.cell_tooltip(values["POPE"]).endswith("n 6")
    assert values["GQA"] is None and papers.cell_text(None) == papers.cell_tooltip(None) == ""
    assert papers.cell_tooltip(76.0) == "" and papers.cell_text(76.0) == "76.0"


def test_suite_has_a_row_per_number_and_a_column_per_run(runs: Path) -> None:
    all_runs = [read_run_scores(runs / name) for name in ("base", "joint")]
    table = papers.suite_table(all_runs)
    assert table is not None and table.columns == ("base", "joint")
    names = [row.model.split(": ")[1] for row in table.rows]
    assert "t2i/R@1" in names and "i2t/R@10" in names
    groups = {name.split("/")[0] for name in names if "/" in name}
    assert groups == {"t2i", "i2t"}
    for run in all_runs:
        del run.scores["builtin_stamps"]
    assert papers.suite_table(all_runs) is None


def test_changes_of_real_runs_are_paired(runs: Path) -> None:
    before = read_run_scores(runs / "base")
    after = read_run_scores(runs / "joint")
    changes = {change.benchmark: change for change in before_and_after(before, after)}
    assert list(changes) == ["pope", "mme", "builtin_stamps", "winoground"]
    pope = changes["pope"]
    assert pope.before.mean == pytest.approx(200 / 3) and pope.after.mean == 0.0
    assert pope.change is not None and pope.change.mean == pytest.approx(-200 / 3)
    # Both runs have the same vectors, so every resample differs by 0.
    winoground = changes["winoground"]
    assert winoground.verdict == "level"
    assert winoground.change is not None and winoground.change.low == 0.0


def test_command_writes_the_page_and_markdown(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(runs / "joint"), "--before", str(runs / "base"), "--out", str(out)]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "pope" in printed and "    66.7 ->      0.0" in printed
    page = pages.parse_checked_page(out.read_text())
    markdown = out.with_suffix(".md").read_text()
    assert "Before and after" in page.text and "Sugar-7B" in page.text
    bars = [a["aria-label"] or "" for _, a in page.tags if a.get("class") == "bar"]
    assert len([bar for bar in bars if bar.startswith("pope before: 66.7, 95 % interval")]) == 1
    assert len(bars) == 2 * 4
    assert "| **joint** |" in markdown and "| pope | F1 | 66.7 | 0.0 |" in markdown
    assert "| benchmark | number | before | after | change | |" in markdown


def test_command_prints_json_with_the_documented_keys(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(runs / "joint"), "--before", str(runs / "base"), "--out", str(out)]
    printed = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    content = json.loads(printed)
    assert content["written"] == [str(out), str(out.with_suffix(".md"))]
    assert set(content["kept"][0]) == {
        "benchmark",
        "number",
        "before",
        "after",
        "change",
        "verdict",
    }
    table = content["tables"][0]
    assert set(table) == {"paper", "title", "source", "notes", "columns", "lines"}
    line = table["lines"][-1]
    assert line["model"] == "joint" and line["ours"] is True
    assert set(line["cells"][0]) == {"text", "told"}
