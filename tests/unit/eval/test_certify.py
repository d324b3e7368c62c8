"""Certification with made-up predictions in the layout of LLaVA's release."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers import official
from vlduet.cli.main import app
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.certify import CertificationOutcome, CertificationTarget, certify, load_targets

VALUES = {
    ("pope", "F1"): 100.0,
    ("mme", "perception"): 2000.0,
    ("mme", "cognition"): 800.0,
    ("scienceqa_img", "accuracy"): 100.0,
    ("mmvet", "total"): 50.0,
    ("llava_bench", "relative/all"): 50.0,
}
"""Numbers of the predictions that `write_release` writes."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.write_official_files(tmp_path_factory.mktemp("official"))


def write_release(root: Path, data: Path, targets: Sequence[CertificationTarget]) -> None:
    """Write right answers to everything, in files that the patterns of the targets match."""

    def write(pattern: str, rows: list[dict[str, Any]]) -> None:
        path = root / pattern.replace("*", "x-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for target in targets:
        task: Any = get_benchmark(target.benchmark).load(OfficialFiles(data))
        is_graded = target.benchmark in ("mmvet", "llava_bench")
        answers = []
        for item in task.items:
            text = "an answer" if is_graded else str(item.reference)
            answers.append({"question_id": item.id, "text": text})
        write(target.predictions, answers)
        if target.questions:
            write(target.questions, [])
        if target.reviews:
            grade = "0.5" if target.benchmark == "mmvet" else "8 4\nfine"
            write(target.reviews, [{"question_id": i.id, "content": grade} for i in task.items])


def test_targets_are_known_numbers_of_known_benchmarks(data: Path, tmp_path: Path) -> None:
    targets = load_targets()
    assert {(target.benchmark, target.value, target.target) for target in targets} == {
        ("pope", "F1", 85.95),
        ("mme", "perception", 1531.32),
        ("mme", "cognition", 295.36),
        ("scienceqa_img", "accuracy", 71.64),
        ("mmvet", "total", 31.10),
        ("llava_bench", "relative/all", 65.4),
        ("llava_bench", "relative/all", 72.5),
    }
    write_release(tmp_path / "eval", data, targets)
    outcomes = certify(tmp_path / "eval", data=data, runs=tmp_path / "runs", targets=targets)
    assert [outcome.problem for outcome in outcomes] == [""] * len(targets)
    for outcome in outcomes:
        expected = VALUES[outcome.target.benchmark, outcome.target.value]
        assert outcome.value == pytest.approx(expected)
        assert outcome.verdict == "differs"


@pytest.fixture
def reachable_targets() -> list[CertificationTarget]:
    """Return the targets with the numbers that `write_release` reaches."""
    return [replace(t, target=VALUES[t.benchmark, t.value]) for t in load_targets()]


def test_equal_numbers_agree(
    data: Path, tmp_path: Path, reachable_targets: list[CertificationTarget]
) -> None:
    write_release(tmp_path / "eval", data, reachable_targets)
    outcomes = certify(
        tmp_path / "eval", data=data, runs=tmp_path / "runs", targets=reachable_targets
    )
    assert [outcome.verdict for outcome in outcomes] == ["agrees"] * len(reachable_targets)


def test_tolerance_decides_between_agrees_and_differs() -> None:
    target = replace(load_targets()[0], target=99.995, tolerance=0.006)
    assert CertificationOutcome(target, 100.0).verdict == "agrees"
    assert CertificationOutcome(target, 100.01).verdict == "differs"


def test_missing_ambiguous_and_incomplete_files_are_named(
    data: Path, tmp_path: Path, reachable_targets: list[CertificationTarget]
) -> None:
    release = tmp_path / "eval"
    write_release(release, data, reachable_targets)
    (release / "scienceqa/answers/x-v1.5-13bx-.jsonl").unlink()
    (release / "MME/answers/y-v1.5-13b.jsonl").write_text("")
    pope = release / "pope/answers/x-v1.5-13bx-.jsonl"
    pope.write_text("".join(pope.read_text().splitlines(keepends=True)[:-1]))
    outcomes = certify(release, data=data, runs=tmp_path / "runs", targets=reachable_targets)
    left_out = [outcome for outcome in outcomes if outcome.verdict == "left out"]
    problems = {outcome.target.benchmark: outcome.problem for outcome in left_out}
    assert set(problems) == {"scienceqa_img", "mme", "pope"}
    assert "names nothing" in problems["scienceqa_img"]
    assert "x-v1.5-13bx-.jsonl, y-v1.5-13b.jsonl" in problems["mme"]
    assert "1 of 6 items have no prediction" in problems["pope"]


def test_command_prints_a_line_per_target_and_fails_unless_all_agree(
    data: Path, tmp_path: Path
) -> None:
    targets = load_targets()
    write_release(tmp_path / "eval", data, targets)
    to = ["--data", str(data), "--to", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, ["certify", str(tmp_path / "eval"), *to])
    assert done.exit_code == 1 and done.stdout.count("differs") == len(targets)
    done = CliRunner().invoke(app, ["certify", str(tmp_path / "eval"), *to, "--json"])
    rows = json.loads(done.stdout)["targets"]
    assert set(rows[0]) == {"target", "found", "why", "verdict"}
    assert rows[0]["found"] == 100.0 and rows[0]["verdict"] == "differs"
    assert rows[0]["target"]["target"] == 85.95
    empty = CliRunner().invoke(app, ["certify", str(tmp_path), *to])
    assert empty.exit_code == 1 and "should name one file, it names nothing" in empty.stdout
