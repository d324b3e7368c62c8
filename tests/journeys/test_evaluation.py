"""vlduet eval -> killed twice -> resumed -> score -> report: as a user does it, and nothing of it is lost or changed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers import official, tiny
from vlduet.cli.main import app
from vlduet.corpora import catalog
from vlduet.eval import predictions
from vlduet.harness import builtin
from vlduet.model.duet import DuetModel

CHOSEN = (
    "coco",
    "pope",
    "seedbench_likelihood",
    "webqa",
    "mmvet",
    "builtin_stamps",
    "builtin_maps",
)
OPEN = {"br", "hr", "img", "input", "link", "meta", "path", "rect", "line", "circle", "col"}


def run(words: list[str], calls: int | None = None) -> None:
    """One process's work: the verb, killed by SIGKILL when the model is asked for the `calls`-th time."""
    torch.set_num_threads(1)  # a forked process has no pool of threads
    catalog.fetch_corpus = lambda *_, **__: None  # type: ignore[assignment]  # the mini corpora are there
    predictions.EMBED_CHUNK = predictions.ANSWER_CHUNK = 2
    asked = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    made = builtin.model_functions

    def functions(
        model: DuetModel, settings: builtin.EvaluationSettings
    ) -> predictions.ModelFunctions:
        whole = made(model, settings)
        assert whole.embed and whole.generate and whole.continuation_nll
        answer = whole.generate
        return replace(
            whole,
            embed=counted(whole.embed),
            generate=counted(lambda prompts, longest: answer(prompts, 3)),
            continuation_nll=counted(whole.continuation_nll),
        )

    builtin.model_functions = functions
    CliRunner().invoke(app, words, catch_exceptions=False)


def apart(words: list[str], calls: int | None = None) -> int | None:
    """The same in a process of its own; its exit status."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(words, calls))
    process.start()
    process.join(300)
    return process.exitcode


def told(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout
    )
    return found


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in OPEN:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN:
            assert self.stack.pop() == tag, tag


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_resumed_scored_and_reported(tmp_path: Path) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    data, whole, killed = official.write(tmp_path / "data"), tmp_path / "whole", tmp_path / "killed"

    def words(to: Path) -> list[str]:
        return [
            "eval",
            str(tmp_path / "model"),
            *CHOSEN,
            "--data",
            str(data),
            "--to",
            str(to),
            "--set",
            "seed=3",
        ]

    assert apart(words(whole)) == 0
    assert apart(words(killed), calls=5) == -signal.SIGKILL
    assert (
        not (killed / "coco/scores.json").exists()
        and (killed / "coco/vectors/queries.f32").stat().st_size > 0
    )
    assert apart(words(killed), calls=10) == -signal.SIGKILL
    assert (killed / "coco/scores.json").exists() and not (killed / "pope/scores.json").exists()
    half = ["score", "pope", "--data", str(data), "--to", str(killed), "--set", "seed=3"]
    assert told(half)["scores"][0]["missing"] == 4, "two of six answers were on disk"
    assert apart(words(killed)) == 0

    for name in CHOSEN:
        one, other = (
            json.loads((folder / name / "scores.json").read_text()) for folder in (whole, killed)
        )
        assert one == other, name
        with (
            np.load(whole / name / "samples.npz") as ours,
            np.load(killed / name / "samples.npz") as theirs,
        ):
            assert set(ours) == set(theirs)
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
        whole_result(one, data, seed=3)
    scores = {name: json.loads((killed / name / "scores.json").read_text()) for name in CHOSEN}
    assert (
        scores["coco"]["facts"]["t2i/gallery"] == 4 and scores["coco"]["facts"]["i2t/gallery"] == 20
    )
    assert {"t2i/ties", "i2t/ties"} <= set(scores["coco"]["facts"])
    assert scores["mmvet"]["values"] == {} and scores["mmvet"]["facts"]["needs"] == "judge"
    assert {"accuracy", "accuracy_blind"} <= set(scores["builtin_maps"]["values"])
    again = told(["score", *CHOSEN, "--data", str(data), "--to", str(killed), "--set", "seed=3"])
    assert again["scores"] == [scores[name] for name in CHOSEN]

    page = tmp_path / "page.html"
    report = told(["report", str(killed), "--before", str(whole), "--out", str(page)])
    assert {kept["benchmark"] for kept in report["kept"]} == {
        name for name in CHOSEN if scores[name]["values"]
    }
    assert {kept["verdict"] for kept in report["kept"]} == {"level"}
    assert all(
        kept["change"] == kept["change"] | {"mean": 0.0, "low": 0.0, "high": 0.0}
        for kept in report["kept"]
    )
    html = Balanced()
    html.feed(page.read_text())
    assert html.stack == [] and "http://" not in page.read_text().replace("http://www.w3.org", "")
    assert "| **killed** |" in page.with_suffix(".md").read_text()


def whole_result(score: dict[str, Any], data: Path, *, seed: int) -> None:
    """Everything that a result must tell of itself."""
    assert score["seed"] == seed and (score["missing"], score["unparsed"]) >= (0, 0)
    for value in score["values"].values():
        assert value["low"] <= value["mean"] <= value["high"] and value["n"] > 0
    assert score["files"]
    for name, found in score["files"].items():
        assert found == hashlib.sha256((data / name).read_bytes()).hexdigest(), name
    made_by = score["made_by"]
    assert made_by["model"] == "model" and len(made_by["fingerprint"]) >= 16 and made_by["prompts"]
    assert {
        "python",
        "vlduet",
        "torch",
        "transformers",
        "numpy",
        "image_backend",
        "system",
        "dtype",
    } <= set(made_by)
