"""Tables of runs beside the published numbers of the papers, as a page and as Markdown.

Published numbers are data with their sources (``published.json``); the numbers of runs are read
from the folders that `vlduet eval` wrote. A run that was trained as a row of a paper stands below
this row, the others stand at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.eval.benchmarks.registry import SUITES
from vlduet.eval.benchmarks.scores import MetricValue
from vlduet.eval.comparison import BenchmarkChange, RunScores
from vlduet.eval.paper_rows import Training, find_row, list_other_settings
from vlduet.files import write_text_atomically
from vlduet.locks import lock_output
from vlduet.reports.pages import write_page

PUBLISHED_FILE = Path(__file__).parent / "published.json"

Number = MetricValue | float | None
"""A measured number, a published one, or None for an empty cell."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table: a model and its numbers, one per column."""

    model: str
    values: tuple[Number, ...]
    is_ours: bool = False
    """Whether the row is a run of ours, not a published row."""


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table of a paper, or the table of a benchmark suite."""

    paper: str
    title: str
    source: str
    """Reference of the published numbers."""
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    run_notes: tuple[str, ...] = ()
    """Sentences on the training of our runs, and on that of the rows which they stand below."""

    def to_json(self) -> dict[str, Any]:
        """Return the table for `vlduet report --json`: the fields, with ``lines`` for the rows.

        A line is ``{"model", "cells": [{"text", "told"}], "ours"}``, where ``told`` is the tooltip.
        """
        lines = []
        for row in self.rows:
            cells = [{"text": cell_text(v), "told": cell_tooltip(v)} for v in row.values]
            lines.append({"model": row.model, "cells": cells, "ours": row.is_ours})
        return {
            "paper": self.paper,
            "title": self.title,
            "source": self.source,
            "notes": self.notes,
            "columns": self.columns,
            "lines": lines,
            "run_notes": self.run_notes,
        }


def cell_text(value: Number) -> str:
    """Return a measured number with one decimal, a published one as printed; empty for None."""
    if value is None:
        return ""
    return f"{value.mean:.1f}" if isinstance(value, MetricValue) else str(float(value))


def cell_tooltip(value: Number) -> str:
    """Return interval and n of a measured number; empty for a published number or None."""
    if not isinstance(value, MetricValue):
        return ""
    return f"95 % interval {value.low:.1f} to {value.high:.1f}, n {value.n}"


def build_tables(runs: Sequence[RunScores]) -> list[PaperTable]:
    """Return every table to which the runs have anything to add: papers first, then the suite."""
    suite = suite_table(runs)
    return [*paper_tables(runs), *([suite] if suite else [])]


def paper_tables(runs: Sequence[RunScores]) -> list[PaperTable]:
    """Return the tables of ``published.json``, in its order, to which a run has a number to add.

    There is one row per run that has any number of the table; numbers that it lacks are None. It
    follows the published row whose presets have the run's settings (`find_row`), or else the last
    row. Notes of columns follow the note of the table.
    """
    content = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    tables = []
    for table in content["tables"]:
        columns = table["columns"]
        values_by_run: list[tuple[RunScores, tuple[Number, ...]]] = []
        for run in runs:
            values = tuple(run.find_value(c["benchmark"], c["value"]) for c in columns)
            if any(values):
                values_by_run.append((run, values))
        if not values_by_run:
            continue
        rows, run_notes = _place_runs(values_by_run, table, content["methods"][table["paper"]])
        column_notes = [f"{c['name']}: {c['note']}." for c in columns if c.get("note")]
        tables.append(
            PaperTable(
                table["paper"],
                table["title"],
                table["source"],
                notes=tuple(note for note in (table["note"], *column_notes) if note),
                columns=tuple(column["name"] for column in columns),
                rows=tuple(rows),
                run_notes=tuple(run_notes),
            )
        )
    return tables


def _place_runs(
    values_by_run: Sequence[tuple[RunScores, tuple[Number, ...]]],
    table: Mapping[str, Any],
    method: Mapping[str, Any],
) -> tuple[list[TableRow], list[str]]:
    """Return the published rows with our runs among them, and sentences on the runs' training.

    There are none on a run without a row, unless the table is an ablation (``unpublished``).

    Args:
        values_by_run: runs, each with its numbers of the table.
        table: item of ``tables`` in ``published.json``.
        method: item of ``methods``, of the table's paper.
    """
    published = [*table["rows"], *table.get("unpublished", ())]
    runs_of_row: dict[str, list[TableRow]] = {row["model"]: [] for row in table["rows"]}
    last_rows: list[TableRow] = []
    notes = []
    for run, values in values_by_run:
        row = None
        if run.training is not None and run.training.config.recipe["name"] == method["preset"]:
            row = find_row(run.training, published)
            if row is not None or "unpublished" in table:
                notes.append(_describe_run(run.name, run.training, row, table=table, method=method))
        name = run.name if row is None else f"{run.name}, as '{row['model']}'"
        place = last_rows if row is None else runs_of_row.get(row["model"], last_rows)
        place.append(TableRow(name, values, is_ours=True))
    rows = []
    for row in table["rows"]:
        rows.append(TableRow(row["model"], tuple(row["values"])))
        rows += runs_of_row[row["model"]]
    return rows + last_rows, notes


def _describe_run(
    name: str,
    training: Training,
    row: Mapping[str, Any] | None,
    *,
    table: Mapping[str, Any],
    method: Mapping[str, Any],
) -> str:
    """Return sentences on how a run was trained, and what differs from its row of the paper.

    `row` None says that no row has its settings; a row with a ``remark`` has no published numbers.
    The other arguments are those of `_place_runs`.
    """
    own = f"Ours: {training.describe()}."
    if row is None:
        return f"No row has the settings of {name}. {own}"
    if "remark" in row:
        return f"{name} was trained as '{row['model']}': {row['remark']}. {own}"
    setting = row.get("setting") or table.get("setting") or method["setting"]
    text = f"{name} was trained as the row '{row['model']}'. {own} The paper's: {setting}."
    differences = list_other_settings(training, method["preset"])
    if differences:
        listing = ", ".join(differences)
        text += f" Settings that differ from the preset {method['preset']}: {listing}."
    return text


def suite_table(runs: Sequence[RunScores]) -> PaperTable | None:
    """Return the table of the built-in suite with a row per number and a column per run.

    A row is named ``BENCHMARK TITLE: NUMBER`` and has None for runs without the number. Numbers of
    subgroups (with a ``/`` in the name) are left out, except those of the two retrieval directions,
    ``t2i/...`` and ``i2t/...``. None is returned where no run has a number of the suite.
    """
    rows = []
    for benchmark in SUITES["builtin"]:
        names: dict[str, None] = {}
        for run in runs:
            names |= dict.fromkeys(run.scores.get(benchmark.name, {}).get("values", {}))
        for name in names:
            if "/" in name and name.split("/")[0] not in ("t2i", "i2t"):
                continue
            values = tuple(run.find_value(benchmark.name, name) for run in runs)
            rows.append(TableRow(f"{benchmark.title}: {name}", values))
    if not rows:
        return None
    return PaperTable(
        "VLDuet",
        "Built-in suite",
        "Our test splits, strict comparisons; 95 % bootstrap intervals in the files.",
        notes=(),
        columns=tuple(run.name for run in runs),
        rows=tuple(rows),
    )


def write_results(
    path: Path,
    *,
    runs: Sequence[RunScores],
    tables: Sequence[PaperTable],
    changes: Sequence[BenchmarkChange],
) -> list[Path]:
    """Write the tables as an HTML page, and beside it as Markdown.

    Older files are replaced, and missing folders are created.

    Args:
        path: the HTML file; the Markdown file has the suffix ``.md`` in place of its own.
        runs: all runs; with `changes`, the first one is before and the last one after training.
        tables: tables in the order of the page.
        changes: rows of the table of changes; without any there is no such table.

    Returns:
        [path of the page, path of the Markdown file].
    """
    content = {"runs": runs, "tables": tables, "changes": changes}
    write_page(path, "results.html", {**content, "text": cell_text, "tooltip": cell_tooltip})
    markdown = path.with_suffix(".md")
    text = format_markdown(runs=runs, tables=tables, changes=changes)
    with lock_output(markdown):
        write_text_atomically(markdown, text)
    return [path, markdown]


def format_markdown(
    *,
    runs: Sequence[RunScores],
    tables: Sequence[PaperTable],
    changes: Sequence[BenchmarkChange],
) -> str:
    """Return the results as Markdown, for a README or a pull request.

    Sections in order: the changes before and after training (if any), one per table, with the names
    of our runs in bold, and the facts of every run and benchmark. Texts are not escaped.
    """
    lines = ["# Results", ""]
    if changes:
        header = "| benchmark | number | before | after | change | |"
        lines += ["## Before and after", "", header, "|---" * 6 + "|"]
        lines += [_markdown_row(_change_cells(row)) for row in changes]
        lines.append("")
    for table in tables:
        lines += [f"## {table.paper}: {table.title}", "", table.source, *table.notes, ""]
        lines.append(f"| {_markdown_row(table.columns)}")
        lines.append("|---" * (len(table.columns) + 1) + "|")
        for row in table.rows:
            name = f"**{row.model}**" if row.is_ours else row.model
            lines.append(_markdown_row((name, *map(cell_text, row.values))))
        lines += ["", *(f"- {note}" for note in table.run_notes)]
        lines += [""] * bool(table.run_notes)
    lines += ["## Runs", ""]
    for run in runs:
        for name, score in run.scores.items():
            lines.append(f"- {run.name}, {name}: {_format_facts(score)}; seed {score['seed']}")
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _change_cells(row: BenchmarkChange) -> tuple[str, ...]:
    """Return (benchmark, metric, before, after, change, verdict) of one change as texts.

    Values have one decimal. The change is ``MEAN (LOW to HIGH)`` with signs, or "" without one.
    """
    change = ""
    if row.change is not None:
        change = f"{row.change.mean:+.1f} ({row.change.low:+.1f} to {row.change.high:+.1f})"
    before = cell_text(row.before)
    after = cell_text(row.after)
    return row.benchmark, row.number, before, after, change, row.verdict


def _format_facts(score: Mapping[str, Any]) -> str:
    """Return the facts of a score as text; numbers of missing and unparsed items where not 0."""
    problems = {key: score[key] for key in ("missing", "unparsed") if score[key]}
    return ", ".join(f"{key} {value}" for key, value in (problems | score["facts"]).items())
