"""Every benchmark of the registry: its files are read, and it runs through a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlduet.data.records import Parts
from vlduet.errors import ConfigError, DataError
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import BENCHMARKS, SUITES, get_benchmark
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate, run_folder

ONE_PER_FAMILY = [name for name in BENCHMARKS if "/" not in name] + ["demon/VIST"]
EMBEDDING_BENCHMARKS = [
    name
    for name, entry in BENCHMARKS.items()
    if entry.protocol in ("retrieval", "pairs", "search", "controlled")
]


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_benchmark_runs_with_a_model_and_is_scored_again_without_one(
    name: str, data: Path, tiny_functions: ModelFunctions, tmp_path: Path
) -> None:
    def run(functions: ModelFunctions, provenance: dict[str, Any]) -> dict[str, Any]:
        files = OfficialFiles(data)
        benchmark = BENCHMARKS[name]
        return evaluate(benchmark, functions, source=files, runs=tmp_path, provenance=provenance)

    scores = run(tiny_functions, {"model": "tiny"})
    assert scores["files"] or "val/WNID" in BENCHMARKS[name].files[0]
    assert scores["missing"] == 0
    for value in scores["values"].values():
        assert value["low"] <= value["mean"] <= value["high"] and value["n"] > 0, value
    assert bool(scores["values"]) == ("export for the server" not in BENCHMARKS[name].metric)
    scores_again = run(ModelFunctions(), {})
    assert scores_again["values"] == scores["values"]
    scores_file = run_folder(tmp_path, BENCHMARKS[name]) / "scores.json"
    assert json.loads(scores_file.read_text()) == scores_again


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("demon/")])
def test_task_of_demon_is_a_benchmark_with_its_own_items(name: str, data: Path) -> None:
    task: Any = BENCHMARKS[name].load(OfficialFiles(data))
    assert [item.tags["task"] for item in task.items] == [name.removeprefix("demon/")]


@pytest.mark.parametrize("name", EMBEDDING_BENCHMARKS)
def test_encoder_with_one_vector_for_everything_scores_zero(
    name: str, data: Path, tmp_path: Path
) -> None:
    def embed(items: Sequence[Parts], query: bool) -> np.ndarray:
        return np.full((len(items), 7), 0.3, dtype=np.float32)

    scores = evaluate(
        BENCHMARKS[name],
        ModelFunctions(embed=embed),
        source=OfficialFiles(data),
        runs=tmp_path,
        provenance={"model": "constant"},
    )
    details = scores["facts"]
    for key, value in scores["values"].items():
        # The first k of a gallery with fewer than k items contain every correct one.
        gallery = details.get(f"{key.rpartition('/')[0]}/gallery", details.get("gallery", 10**9))
        if "R@" not in key or int(key.rpartition("@")[2]) < min(gallery, 3):
            assert value["mean"] == 0.0, key
    if BENCHMARKS[name].protocol == "retrieval":
        assert sum(value for key, value in details.items() if key.endswith("ties")) > 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = BENCHMARKS[name].files[0].split("/")[0]
    with pytest.raises(DataError, match=folder):
        BENCHMARKS[name].load(OfficialFiles(tmp_path))


def test_missing_image_and_field_are_named(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "copy"
    shutil.copytree(data, broken)
    (broken / "gqa/images/n161313.jpg").unlink()
    with pytest.raises(DataError, match=r"image 'gqa/images/n161313\.jpg' is not there"):
        get_benchmark("gqa").load(OfficialFiles(broken))
    annotations = broken / "gqa/testdev_balanced_questions.json"
    annotations.write_text('{"1": {"question": "?", "isBalanced": true}}')
    with pytest.raises(DataError, match=r"questions\.json:1\.imageId: no 'imageId' here"):
        get_benchmark("gqa").load(OfficialFiles(broken))


def test_unknown_benchmark_suggests_the_closest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pope'"):
        get_benchmark("popee")


def test_every_benchmark_is_in_one_suite_under_its_own_name() -> None:
    names = [benchmark.name for suite in SUITES.values() for benchmark in suite]
    assert names == list(BENCHMARKS)
    assert list(SUITES) == ["builtin", "abilities", "discriminative", "generative", "knowledge"]
    assert all(benchmark.name == name for name, benchmark in BENCHMARKS.items())
    assert BENCHMARKS["builtin_long"].corpora == ("wesnoth", "endless-sky")
