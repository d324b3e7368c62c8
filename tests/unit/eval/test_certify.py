"""Certification: made-up predictions in the layout of LLaVA's release, and what is missing is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers import official
from vlduet.cli.main import app
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.table import known
from vlduet.eval.certify import CertificationOutcome, CertificationTarget, certify, load_targets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.write(tmp_path_factory.mktemp("official"))


def release(root: Path, data: Path, targets: list[CertificationTarget]) -> None:
    """Right answers to everything, under the names that the targets' patterns ask for."""

    def put(pattern: str, rows: list[dict[str, Any]]) -> None:
        path = root / pattern.replace("*", "x-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for target in targets:
        items: Any = known(target.benchmark).load(Source(data)).items  # type: ignore[union-attr]
        put(
            target.predictions,
            [{"question_id": item.id, "text": said(target.benchmark, item)} for item in items],
        )
        if target.questions:
            put(target.questions, [])
        if target.reviews:
            grade = "0.5" if target.benchmark == "mmvet" else "8 4\nfine"
            put(target.reviews, [{"question_id": item.id, "content": grade} for item in items])


def said(benchmark: str, item: Any) -> str:
    return "an answer" if benchmark in ("mmvet", "llava_bench") else str(item.answer)


FOUND = {
    "pope": 100.0,
    "perception": 2000.0,
    "cognition": 800.0,
    "accuracy": 100.0,
    "total": 50.0,
    "relative/all": 50.0,
}


def test_targets_are_known_numbers_of_known_benchmarks(data: Path, tmp_path: Path) -> None:
    wanted = load_targets()
    assert {(t.benchmark, t.value, t.target) for t in wanted} == {
        ("pope", "F1", 85.95), ("mme", "perception", 1531.32), ("mme", "cognition", 295.36),
        ("scienceqa_img", "accuracy", 71.64), ("mmvet", "total", 31.10), ("llava_bench", "relative/all", 65.4),
        ("llava_bench", "relative/all", 72.5),
    }  # fmt: skip
    release(tmp_path / "eval", data, wanted)
    found = certify(tmp_path / "eval", data=data, runs=tmp_path / "runs", targets=wanted)
    assert [one.why for one in found] == [""] * len(wanted), (
        "every number has a name in scores.json"
    )
    told = {
        one.target.value if one.target.benchmark != "pope" else "pope": one.found for one in found
    }
    assert told == pytest.approx(FOUND)
    assert {one.verdict for one in found} == {"differs"}


def test_agreement_and_what_is_missing(data: Path, tmp_path: Path) -> None:
    wanted = [
        replace(target, target=FOUND["pope" if target.benchmark == "pope" else target.value])
        for target in load_targets()
    ]
    release(tmp_path / "eval", data, wanted)
    found = certify(tmp_path / "eval", data=data, runs=tmp_path / "runs", targets=wanted)
    assert [one.verdict for one in found] == ["agrees"] * len(wanted)
    near = CertificationOutcome(replace(wanted[0], target=99.995, tolerance=0.006), 100.0)
    assert (near.verdict, replace(near, found=100.01).verdict) == ("agrees", "differs")
    (tmp_path / "eval/scienceqa/answers/x-v1.5-13bx-.jsonl").unlink()
    (tmp_path / "eval/MME/answers/y-v1.5-13b.jsonl").write_text("")
    pope = tmp_path / "eval/pope/answers/x-v1.5-13bx-.jsonl"
    pope.write_text("".join(pope.read_text().splitlines(keepends=True)[:-1]))
    again = certify(tmp_path / "eval", data=data, runs=tmp_path / "other", targets=wanted)
    why = {one.target.benchmark: one.why for one in again if one.verdict == "left out"}
    assert set(why) == {"scienceqa_img", "mme", "pope"}
    assert (
        "names nothing" in why["scienceqa_img"]
        and "x-v1.5-13bx-.jsonl, y-v1.5-13b.jsonl" in why["mme"]
    )
    assert "1 of 6 items have no prediction" in why["pope"]


def test_the_command(data: Path, tmp_path: Path) -> None:
    release(tmp_path / "eval", data, load_targets())
    words = ["certify", str(tmp_path / "eval"), "--data", str(data), "--to", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and done.stdout.count("differs") == len(load_targets())
    rows = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["targets"]
    assert (
        rows[0]["found"] == 100.0
        and rows[0]["verdict"] == "differs"
        and rows[0]["target"]["target"] == 85.95
    )
    empty = CliRunner().invoke(
        app, ["certify", str(tmp_path), "--data", str(data), "--to", str(tmp_path / "r")]
    )
    assert empty.exit_code == 1 and "should name one file, it names nothing" in empty.stdout
