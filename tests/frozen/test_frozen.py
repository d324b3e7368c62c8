"""Compare what vlduet computes with what it computed when the data of this folder was written.

The models are tiny checkpoints of every family, whose weights and inputs no random generator
decides, in float64 wherever the code allows it. A failure says that behaviour changed; write.py
writes new data where that is meant. Only calls.py knows vlduet's names.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from frozen import calls, fixed, folders, measures, predictions, tables

STORED = fixed.DATA / "values"
CLOSE = 1e-5
"""Relative, and of vectors of unit length absolute: no CPU's order of additions matters as much."""
SINGLE = 1e-4
"""The same for models in float32, and after a step of the optimiser, which divides by gradients."""


@functools.cache
def stored(name: str) -> dict[str, Any]:
    """Read the stored values of one kind."""
    read: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text())
    return read


def same(now: Any, then: Any, *, rel: float, least: float, place: str) -> None:
    """Compare nested values: numbers with a fraction to within a tolerance, all others exactly.

    Args:
        rel: relative tolerance; least: absolute tolerance, for numbers near 0.
        place: name of the values, for the message.
    """
    if isinstance(then, dict):
        assert now.keys() == then.keys(), f"{place}: {sorted(now.keys() ^ then.keys())}"
        for key, value in then.items():
            same(now[key], value, rel=rel, least=least, place=f"{place}/{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), f"{place}: {len(now)} values, {len(then)} then"
        for n, value in enumerate(then):
            same(now[n], value, rel=rel, least=least, place=f"{place}/{n}")
    elif isinstance(then, float):
        equal = math.isclose(now, then, rel_tol=rel, abs_tol=least)
        assert equal, f"{place}: {now!r} now, {then!r} then"
    else:
        assert now == then, f"{place}: {now!r} now, {then!r} then"


@pytest.mark.parametrize("case", stored("steps"))
def test_a_training_step_has_the_losses_and_gradients(case: str) -> None:
    now = measures.training_step(*measures.step_cases()[case])
    then = stored("steps")[case]
    for name, value in then["values"].items():
        close = SINGLE if name.endswith("of step 2") else CLOSE
        same(now["values"][name], value, rel=close, least=0, place=f"{case}/{name}")
    assert now["values"].keys() == then["values"].keys()
    assert now["gradients"].keys() == then["gradients"].keys()
    for name, pair in then["gradients"].items():
        same(now["gradients"][name], pair, rel=CLOSE, least=CLOSE * pair[0], place=f"{case}/{name}")


def test_every_config_has_a_step() -> None:
    assert measures.step_cases().keys() == stored("steps").keys()


@pytest.mark.parametrize("family", stored("embeddings"))
def test_embeddings_are_the_stored_ones(family: str) -> None:
    now, then = measures.embeddings(family), stored("embeddings")[family]
    same(now, then, rel=0, least=CLOSE, place=family)


@pytest.mark.parametrize("family", stored("generation"))
def test_greedy_answers_are_the_stored_ones(family: str) -> None:
    then = dict(stored("generation")[family])
    assert min(then.pop("margins")) > measures.MARGIN
    same(measures.generation(family), then, rel=CLOSE, least=0, place=family)


@pytest.mark.parametrize("kind", ["kernels", "targets", "losses"])
def test_objectives_of_fixed_tensors_are_the_stored_ones(kind: str) -> None:
    now = getattr(tables, kind)()
    same(now, stored(kind), rel=CLOSE, least=1e-7, place=kind)


@pytest.mark.parametrize("kind", ["protocols", "metrics"])
def test_measurements_of_fixed_predictions_are_the_stored_ones(kind: str) -> None:
    same(getattr(predictions, kind)(), stored(kind), rel=1e-9, least=1e-12, place=kind)


@pytest.mark.parametrize("name", stored("benchmarks"))
def test_the_builtin_suite_scores_fixed_predictions_as_it_did(name: str, tmp_path: Path) -> None:
    then = stored("benchmarks")[name]
    same(predictions.benchmark(name, tmp_path), then, rel=1e-9, least=1e-12, place=name)


def test_the_builtin_suite_is_complete() -> None:
    assert sorted(calls.benchmark_names()) == sorted(stored("benchmarks"))


def test_a_model_folder_and_an_index_of_an_earlier_version_open(tmp_path: Path) -> None:
    now, then = folders.opened(folders.placed(tmp_path)), dict(stored("folders"))
    assert min(then.pop("margins")) > measures.MARGIN and now.pop("margins")
    assert all(hit["image exists"] for hits in now["hits"].values() for hit in hits)
    same(now, then, rel=0, least=SINGLE, place="folders")
