"""The page of abilities: one row per number with a chance level, and the parts below."""

from __future__ import annotations

from typing import Any

from vlduet.reports.abilities import (
    format_abilities_page,
    format_abilities_table,
    list_ability_rows,
)


def value(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 4, "high": mean + 4, "n": 50}


def make_scores() -> list[dict[str, Any]]:
    dialog = {
        "benchmark": "ability_dialog",
        "title": "Retrieval and dialog",
        "values": {"R@10": value(30.0), "text_only/R@10": value(0.0), "turn 1/R@10": value(8.0)},
        "facts": {"queries": 50, "chance": {"R@10": 3.58}},
        "missing": 0,
        "unparsed": 0,
        "made_by": {"fingerprint": "abc"},
    }
    odd_one = {
        **dialog,
        "benchmark": "ability_odd_one",
        "title": "The odd one out",
        "values": {"accuracy": value(27.0), "accuracy_blind": value(24.0)},
        "facts": {"chance": 25.0, "prior": 20.0},
        "missing": 2,
    }
    other = {**dialog, "benchmark": "builtin_stamps", "facts": {}}
    return [dialog, odd_one, other]


def test_a_row_has_chance_control_and_whether_it_is_above_them() -> None:
    dialog, odd_one = list_ability_rows(make_scores())
    assert dialog.cells()[1:] == ("R@10", "30.0", "26.0 to 34.0", "3.6", "0.0", "50", "yes")
    assert dialog.question.startswith("Which picture is meant")
    assert odd_one.cells()[1:] == ("accuracy", "27.0", "23.0 to 31.0", "25.0", "24.0", "50", "no")


def test_a_query_must_exceed_its_parts() -> None:
    dialog = make_scores()[0]
    dialog["facts"]["partial_forms"] = ["turn 1"]
    dialog["values"] |= {"gain over turn 1": value(5.0)}
    assert list_ability_rows([dialog])[0].is_above_controls
    dialog["values"] |= {"gain over turn 1": value(3.0)}
    assert not list_ability_rows([dialog])[0].is_above_controls


def test_the_page_has_the_table_the_questions_and_the_parts() -> None:
    page = format_abilities_page(make_scores(), model="runs/x")
    lines = page.splitlines()
    assert lines[0] == "# Abilities of runs/x"
    assert sum(line.startswith("| ") for line in lines) == 3
    assert "- **Retrieval and dialog.** turn 1/R@10 8.0 (4.0 to 12.0); queries 50." in lines
    assert "- **The odd one out.** prior 20.0; missing 2." in lines
    assert "builtin" not in page and lines[-1] == "Model: runs/x, fingerprint abc."


def test_lines_of_the_table_are_aligned() -> None:
    lines = format_abilities_table(make_scores())
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].startswith("ability") and lines[2].endswith("no")
