"""Runs beside the papers: one table a paper with our rows under the published ones, and what generation paid for retrieval.

Published numbers are data with their sources (``published.json``); ours are read from the folders that `vlduet eval` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.table import BENCHMARKS, SUITES
from vlduet.eval.benchmarks.tasks import Sample, Value, difference
from vlduet.eval.run import SCORES_FILE, read_samples
from vlduet.files import write_text_atomically
from vlduet.reports import charts, pages

PUBLISHED_FILE = Path(__file__).parent / "published.json"


@dataclass(frozen=True, slots=True)
class RunScores:
    """Everything that one model scored."""

    name: str
    scores: dict[str, dict[str, Any]]
    """Content of scores.json by benchmark."""
    samples: dict[str, dict[str, Sample]]
    """The same item by item, where it was kept."""

    def find_value(self, benchmark: str, name: str) -> Value | None:
        """One number; None where it was not measured."""
        found = self.scores.get(benchmark, {}).get("values", {}).get(name)
        return None if found is None else Value(**found)


def read_run_scores(folder: Path, *, name: str | None = None) -> RunScores:
    """The scores in a folder that `vlduet eval --to` wrote. Raises ConfigError where there are none."""
    scores, samples = {}, {}
    for path in sorted(folder.glob(f"*/{SCORES_FILE}")):
        score = json.loads(path.read_text(encoding="utf-8"))
        scores[score["benchmark"]] = score
        samples[score["benchmark"]] = read_samples(path.parent)
    if not scores:
        raise ConfigError(
            "no scores here", place=folder, fix="Name a folder that 'vlduet eval --to' wrote"
        )
    return RunScores(name or folder.name, scores, samples)


# ------------------------------------------------------------------ tables of papers


@dataclass(frozen=True, slots=True)
class Cell:
    """One number as it is printed; empty where there is none."""

    text: str = ""
    told: str = ""
    """Interval and n, for hovering."""


@dataclass(frozen=True, slots=True)
class Line:
    """One model."""

    model: str
    cells: tuple[Cell, ...]
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a paper, or one of our own suite."""

    paper: str
    title: str
    source: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def paper_tables(runs: Sequence[RunScores]) -> list[Table]:
    """The tables of the papers to which these runs have anything to add, published rows first."""
    found = []
    for table in json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))["tables"]:
        columns = table["columns"]
        ours = [
            Line(
                run.name,
                tuple(_cell(run.find_value(c["benchmark"], c["value"])) for c in columns),
                ours=True,
            )
            for run in runs
        ]
        ours = [line for line in ours if any(cell.text for cell in line.cells)]
        if ours:
            theirs = [
                Line(r["model"], tuple(Cell(_plain(v)) for v in r["values"])) for r in table["rows"]
            ]
            notes = [
                table["note"],
                *(f"{c['name']}: {c['note']}." for c in columns if c.get("note")),
            ]
            told = tuple(note for note in notes if note)
            names = tuple(c["name"] for c in columns)
            found.append(
                Table(
                    table["paper"], table["title"], table["source"], told, names, (*theirs, *ours)
                )
            )
    return found


def suite_table(runs: Sequence[RunScores], suite: str = "builtin") -> Table | None:
    """Our own suite, a row a number and a column a run; None where no run has it."""
    rows = []
    for benchmark in SUITES[suite]:
        names = dict.fromkeys(
            name for run in runs for name in run.scores.get(benchmark.name, {}).get("values", {})
        )
        for name in names:
            if "/" not in name or name.split("/")[0] in ("t2i", "i2t"):
                cells = tuple(_cell(run.find_value(benchmark.name, name)) for run in runs)
                rows.append(Line(f"{benchmark.title}: {name}", cells))
    if not rows:
        return None
    source = "Our test splits, strict comparisons; 95 % bootstrap intervals in the files."
    return Table(
        "VLDuet", "Built-in suite", source, (), tuple(run.name for run in runs), tuple(rows)
    )


def _cell(value: Value | None) -> Cell:
    if value is None:
        return Cell()
    return Cell(
        _plain(value.mean),
        f"95 % interval {_plain(value.low)} to {_plain(value.high)}, n {value.n}",
    )


def _plain(value: float | None) -> str:
    """One decimal, as papers print; nothing for nothing."""
    return "" if value is None else f"{value:.1f}"


# ------------------------------------------------------------------ retention


@dataclass(frozen=True, slots=True)
class BenchmarkChange:
    """One ability before and after joint training."""

    benchmark: str
    number: str
    before: Value
    after: Value
    change: Value | None
    """after - before, paired over items; None where the runs did not see the same items."""

    @property
    def verdict(self) -> str:
        """better, level or worse: what the paired interval resolves."""
        if self.change is None:
            return "not comparable"
        return "better" if self.change.low > 0 else "worse" if self.change.high < 0 else "level"


def before_and_after(before: RunScores, after: RunScores) -> list[BenchmarkChange]:
    """The papers' number of every benchmark that both runs have: the speaking side first, then the searching side."""
    spoken = [
        name for name, row in BENCHMARKS.items() if row.protocol not in ("retrieval", "pairs")
    ]
    order = [*spoken, *(name for name in BENCHMARKS if name not in spoken)]
    found = []
    for name in order:
        ours, theirs = after.scores.get(name), before.scores.get(name)
        number = next(iter(ours["values"]), None) if ours and theirs else None
        old = None if number is None else before.find_value(name, number)
        if ours is None or theirs is None or number is None or old is None:
            continue
        new = after.find_value(name, number)
        assert new is not None
        same = ours["files"] == theirs["files"] and ours["seed"] == theirs["seed"]
        pair = [run.samples[name].get(number) for run in (after, before)]
        change = (
            difference(pair[0], pair[1], seed=ours["seed"])
            if same and pair[0] and pair[1]
            else None
        )
        found.append(BenchmarkChange(name, number, old, new, change))
    return found


# ------------------------------------------------------------------ pages


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that is told."""

    tables: tuple[Table, ...]
    kept: tuple[BenchmarkChange, ...]
    runs: tuple[RunScores, ...]
    before: RunScores | None


def page(runs: Sequence[RunScores], *, before: RunScores | None = None) -> Page:
    """Tables of all runs, and the retention of the last one against `before`."""
    every = [*([before] if before else []), *runs]
    tables = paper_tables(every)
    own = suite_table(every)
    kept = before_and_after(before, runs[-1]) if before else []
    return Page((*tables, *([own] if own else [])), tuple(kept), tuple(every), before)


def write_page(path: Path, made: Page) -> list[Path]:
    """Write the page as HTML, and beside it as Markdown. Returns both paths."""
    pages.write_page(path, "results.html", {"page": made, "bar": kept_bar})
    markdown = path.with_suffix(".md")
    write_text_atomically(markdown, as_markdown(made))
    return [path, markdown]


def kept_bar(kept: BenchmarkChange, which: str) -> str:
    """A bar of one side of a retention row, both sides on one scale."""
    value = kept.before if which == "before" else kept.after
    scale = max(kept.before.high, kept.after.high, 1e-9)
    label = f"{kept.benchmark} {which}: {value.mean:.1f}, 95 % interval {value.low:.1f} to {value.high:.1f}"
    colour = "--muted" if which == "before" else "--a"
    return charts.bar(
        value.mean, low=value.low, high=value.high, scale=scale, label=label, colour=colour
    )


def as_markdown(made: Page) -> str:
    """The same tables for a README or a pull request."""
    lines = ["# Results", ""]
    if made.kept:
        lines += [
            "## Before and after",
            "",
            "| benchmark | number | before | after | change | |",
            "|---|---|---|---|---|---|",
        ]
        for kept in made.kept:
            change = kept.change
            told = (
                ""
                if change is None
                else f"{change.mean:+.1f} ({change.low:+.1f} to {change.high:+.1f})"
            )
            cells = (
                kept.benchmark,
                kept.number,
                _plain(kept.before.mean),
                _plain(kept.after.mean),
                told,
                kept.verdict,
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for table in made.tables:
        lines += [f"## {table.paper}: {table.title}", "", table.source, *table.notes, ""]
        lines += [f"| | {' | '.join(table.columns)} |", "|---" * (len(table.columns) + 1) + "|"]
        for line in table.lines:
            name = f"**{line.model}**" if line.ours else line.model
            lines.append(f"| {' | '.join([name, *(cell.text for cell in line.cells)])} |")
        lines.append("")
    lines += ["## Runs", ""]
    for run in made.runs:
        for name, score in run.scores.items():
            facts = {key: score[key] for key in ("missing", "unparsed") if score[key]} | score[
                "facts"
            ]
            told = ", ".join(f"{key} {value}" for key, value in facts.items())
            lines.append(f"- {run.name}, {name}: {told}; seed {score['seed']}")
    return "\n".join(lines) + "\n"
