"""The page of the suite ``abilities``: one table of numbers with chance and text-only control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlduet.eval.benchmarks.control_runners import TEXT_ONLY
from vlduet.eval.benchmarks.registry import get_benchmark

COLUMNS = ("ability", "number", "value", "95 % interval", "chance", "text-only", "items", "above")
MAX_TITLE = 50
"""Width of the column of abilities in a terminal."""
HOW_TO_READ = (
    "Values are x 100, on held-out records, with 95 % bootstrap intervals over items. *Chance* is"
    " that of random scores. *Text-only* is the same model on the same items without their images."
    " *Above* says whether the interval lies above both, and above a part of the query alone where"
    " it has parts. A tie counts as a miss."
)


@dataclass(frozen=True, slots=True)
class AbilityRow:
    """One number of an ability."""

    title: str
    question: str
    """Question that the items ask."""
    number: str
    value: Mapping[str, float]
    """``mean``, ``low``, ``high`` and ``n``, as in scores.json."""
    chance: float
    text_only: float
    gains: tuple[Mapping[str, float], ...] = ()
    """Gains over parts of the query alone, with the keys of `value`."""

    @property
    def is_above_controls(self) -> bool:
        """Whether the intervals lie above chance, the text-only control, and parts of the query."""
        is_above_levels = self.value["low"] > max(self.chance, self.text_only)
        return is_above_levels and all(gain["low"] > 0 for gain in self.gains)

    def cells(self) -> tuple[str, ...]:
        """Return the texts of the columns `COLUMNS`, numbers with one decimal."""
        interval = f"{self.value['low']:.1f} to {self.value['high']:.1f}"
        return (
            self.title,
            self.number,
            f"{self.value['mean']:.1f}",
            interval,
            f"{self.chance:.1f}",
            f"{self.text_only:.1f}",
            str(int(self.value["n"])),
            "yes" if self.is_above_controls else "no",
        )


def list_ability_rows(scores: Sequence[Mapping[str, Any]]) -> list[AbilityRow]:
    """Return the rows of scores of the suite ``abilities``, in their order.

    A benchmark has one row for every number with a chance level. Scores of benchmarks that are not
    made for the page (without a `question`) are left out.

    Args:
        scores: contents of scores.json. A number that a chance level names must be there, or
            KeyError is raised; ConfigError for an unknown benchmark.
    """
    rows = []
    for score in scores:
        benchmark = get_benchmark(score["benchmark"])
        if not benchmark.question:
            continue
        forms = score["facts"].get("partial_forms", ())
        gains = tuple(score["values"][f"gain over {form}"] for form in forms)
        for number, chance in _chance_levels(score).items():
            row = AbilityRow(
                benchmark.title,
                benchmark.question,
                number,
                score["values"][number],
                chance,
                score["values"][_text_only_name(number)]["mean"],
                gains,
            )
            rows.append(row)
    return rows


def _chance_levels(score: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the chance level of every number of the page; questions with options have one."""
    chance = score["facts"]["chance"]
    return chance if isinstance(chance, Mapping) else {"accuracy": chance}


def _text_only_name(number: str) -> str:
    """Return the name of the number without images."""
    return "accuracy_blind" if number == "accuracy" else f"{TEXT_ONLY}{number}"


def format_abilities_page(scores: Sequence[Mapping[str, Any]], *, model: str) -> str:
    """Return the page as Markdown: the table, what every ability asks, and the numbers by part.

    Args:
        scores: contents of scores.json, in the order of the page; see `list_ability_rows`.
        model: name of the model, shown in the heading.
    """
    rows = list_ability_rows(scores)
    lines = [f"# Abilities of {model}", "", HOW_TO_READ, ""]
    lines += [_table_row(COLUMNS), "|---" * len(COLUMNS) + "|"]
    lines += [_table_row(row.cells()) for row in rows]
    lines += ["", "## What is asked", ""]
    questions = {row.title: row.question for row in rows}
    lines += [f"- **{title}.** {question}" for title, question in questions.items()]
    lines += ["", "## By part", ""]
    for score in scores:
        if get_benchmark(score["benchmark"]).question:
            lines.append(f"- **{score['title']}.** {_format_parts(score)}")
    made_by = scores[0]["made_by"] if scores else {}
    facts = [f"{key} {made_by[key]}" for key in ("fingerprint", "vlduet") if key in made_by]
    lines += ["", f"Model: {', '.join([model, *facts])}."]
    return "\n".join(lines) + "\n"


def _format_parts(score: Mapping[str, Any]) -> str:
    """Return the numbers of a benchmark that have no row, each with its interval."""
    levels = _chance_levels(score)
    controls = {_text_only_name(number) for number in levels}
    parts = []
    for name, value in score["values"].items():
        if name not in levels and name not in controls:
            interval = f"{value['low']:.1f} to {value['high']:.1f}"
            parts.append(f"{name} {value['mean']:.1f} ({interval})")
    omitted = ("chance", "partial_forms")
    facts = {key: fact for key, fact in score["facts"].items() if key not in omitted}
    facts |= {key: score[key] for key in ("missing", "unparsed") if score[key]}
    texts = [f"{key.replace('_', ' ')} {_format_fact(fact)}" for key, fact in facts.items()]
    return "; ".join([*parts, *texts]) + "."


def _format_fact(fact: Any) -> str:
    """Return a fact as text, a float with one decimal."""
    return f"{fact:.1f}" if isinstance(fact, float) else str(fact)


def _table_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def format_abilities_table(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of the page as aligned lines for a terminal, with its header."""
    cells = [COLUMNS, *(row.cells() for row in list_ability_rows(scores))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = min(widths[0], MAX_TITLE)
    lines = []
    for row in cells:
        title = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
        padded = [f"{title:<{widths[0]}}", f"{row[1]:<{widths[1]}}"]
        padded += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(padded))
    return lines
