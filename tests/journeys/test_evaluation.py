"""vlduet eval, killed twice and resumed, then score and report: nothing is lost or changed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers import official, pages, tiny
from vlduet.cli.main import app
from vlduet.corpora import catalog
from vlduet.eval import predictions
from vlduet.harness import builtin
from vlduet.model.duet import DuetModel

BENCHMARKS = (
    "coco",
    "pope",
    "seedbench_likelihood",
    "webqa",
    "mmvet",
    "builtin_stamps",
    "builtin_maps",
)
SEED = 3


class KillAtCall:
    """Wrapper of functions that kills the process, as the system would, at a call.

    Args:
        call: number of the call, counted over all wrapped functions; None never kills.
    """

    def __init__(self, call: int | None):
        self.call = call
        self.num_calls = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted


def run_command(arguments: list[str], kill_at_call: int | None) -> None:
    """Run a command with small chunks and short answers, in a process that nothing else uses."""
    torch.set_num_threads(1)  # a forked process has no thread pool
    catalog.fetch_corpus = lambda *_, **__: None  # type: ignore[assignment]  # they are there
    predictions.EMBED_CHUNK = 2
    predictions.ANSWER_CHUNK = 2
    killer = KillAtCall(kill_at_call)
    original = builtin.model_functions

    def model_functions(
        model: DuetModel, settings: builtin.EvaluationSettings
    ) -> predictions.ModelFunctions:
        functions = original(model, settings)
        generate = functions.generate
        assert functions.embed and generate and functions.continuation_nll
        return replace(
            functions,
            embed=killer.wrap(functions.embed),
            generate=killer.wrap(lambda prompts, max_new_tokens: generate(prompts, 3)),
            continuation_nll=killer.wrap(functions.continuation_nll),
        )

    builtin.model_functions = model_functions
    CliRunner().invoke(app, arguments, catch_exceptions=False)


def run_in_process(arguments: list[str], kill_at_call: int | None = None) -> int | None:
    """Run `run_command` in a process of its own and return its exit status."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_command, args=(arguments, kill_at_call))
    process.start()
    process.join(300)
    return process.exitcode


def read_json_output(arguments: list[str]) -> dict[str, Any]:
    """Run a command with --json here and return what it prints."""
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    output: dict[str, Any] = json.loads(done.stdout)
    return output


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of scores.json of every benchmark."""
    return {name: json.loads((folder / name / "scores.json").read_text()) for name in BENCHMARKS}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_evaluation_is_resumed_scored_and_reported(tmp_path: Path) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    data = official.write_official_files(tmp_path / "data")
    uninterrupted = tmp_path / "uninterrupted"
    killed = tmp_path / "killed"
    options = ["--data", str(data), "--set", f"seed={SEED}"]

    def eval_arguments(to: Path) -> list[str]:
        return ["eval", str(tmp_path / "model"), *BENCHMARKS, "--to", str(to), *options]

    assert run_in_process(eval_arguments(uninterrupted)) == 0
    assert run_in_process(eval_arguments(killed), kill_at_call=5) == -signal.SIGKILL
    assert not (killed / "coco/scores.json").exists()
    assert (killed / "coco/vectors/queries.f32").stat().st_size > 0
    assert run_in_process(eval_arguments(killed), kill_at_call=10) == -signal.SIGKILL
    assert (killed / "coco/scores.json").exists()
    assert not (killed / "pope/scores.json").exists()
    partial = read_json_output(["score", "pope", "--to", str(killed), *options])
    assert partial["scores"][0]["missing"] == 4, "two of six answers were on disk"
    assert run_in_process(eval_arguments(killed)) == 0

    scores = read_scores(killed)
    assert scores == read_scores(uninterrupted)
    for name, score in scores.items():
        assert_equal_archives(uninterrupted / name, killed / name)
        assert_complete_score(score, data)
    assert scores["coco"]["facts"]["t2i/gallery"] == 4
    assert scores["coco"]["facts"]["i2t/gallery"] == 20
    assert {"t2i/ties", "i2t/ties"} <= set(scores["coco"]["facts"])
    assert scores["mmvet"]["values"] == {} and scores["mmvet"]["facts"]["needs"] == "judge"
    assert {"accuracy", "accuracy_blind"} <= set(scores["builtin_maps"]["values"])
    again = read_json_output(["score", *BENCHMARKS, "--to", str(killed), *options])
    assert again["scores"] == list(scores.values())

    path = tmp_path / "page.html"
    report = read_json_output(
        ["report", str(killed), "--before", str(uninterrupted), "--out", str(path)]
    )
    with_numbers = {name for name in BENCHMARKS if scores[name]["values"]}
    assert {change["benchmark"] for change in report["kept"]} == with_numbers
    for change in report["kept"]:
        assert change["verdict"] == "level"
        assert [change["change"][key] for key in ("mean", "low", "high")] == [0.0, 0.0, 0.0]
    pages.parse_checked_page(path.read_text())
    assert "| **killed** |" in path.with_suffix(".md").read_text()


def assert_equal_archives(first: Path, second: Path) -> None:
    """Assert that two runs stored the same numbers item by item."""
    with np.load(first / "samples.npz") as expected, np.load(second / "samples.npz") as actual:
        assert set(actual) == set(expected)
        for key in expected:
            np.testing.assert_array_equal(actual[key], expected[key])


def assert_complete_score(score: dict[str, Any], data: Path) -> None:
    """Assert that a score has intervals and says which files, seed and model made it."""
    assert score["seed"] == SEED
    assert score["missing"] >= 0 and score["unparsed"] >= 0
    for value in score["values"].values():
        assert value["low"] <= value["mean"] <= value["high"] and value["n"] > 0
    assert score["files"]
    for name, digest in score["files"].items():
        assert digest == hashlib.sha256((data / name).read_bytes()).hexdigest(), name
    made_by = score["made_by"]
    assert made_by["model"] == "model"
    assert len(made_by["fingerprint"]) >= 16 and made_by["prompts"]
    versions = {"python", "vlduet", "torch", "transformers", "numpy"}
    assert versions | {"image_backend", "system", "dtype"} <= set(made_by)
