"""Find benchmarks by name: ``benchmarks.yaml`` describes them, their loaders read the files."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vlduet.config_files import read_yaml_mapping
from vlduet.errors import ConfigError, suggest_name
from vlduet.eval.benchmarks.interleaved import list_demon_benchmarks
from vlduet.eval.benchmarks.tasks import Benchmark

BENCHMARKS_FILE = Path(__file__).parent / "benchmarks.yaml"


def _read_suites() -> dict[str, tuple[Benchmark, ...]]:
    """Return the benchmarks of every suite of ``benchmarks.yaml``, in file order.

    The 29 tasks of DEMON, which differ in their folder only, are appended to the suite
    ``generative``. The modules of all loaders are imported.
    """
    suites = {}
    for suite, entries in read_yaml_mapping(BENCHMARKS_FILE).items():
        suites[suite] = tuple(_parse_entry(name, entry) for name, entry in entries.items())
    suites["generative"] += tuple(list_demon_benchmarks())
    return suites


def _parse_entry(name: str, entry: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of one YAML entry, with the arguments bound to its loader."""
    load = pkgutil.resolve_name(f"vlduet.eval.benchmarks.{entry['loader']}")
    return Benchmark(
        name=name,
        title=entry["title"],
        papers=tuple(entry.get("papers", ())),
        split=entry["split"],
        metric=entry["metric"],
        files=tuple(entry["files"]),
        protocol=entry["protocol"],
        load=partial(load, **entry.get("arguments", {})),
        question=entry.get("question", ""),
    )


SUITES = _read_suites()
"""Suite -> its benchmarks."""

BENCHMARKS = {benchmark.name: benchmark for suite in SUITES.values() for benchmark in suite}
"""Every benchmark by name."""


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        ConfigError: no benchmark has this name; the error suggests the closest one, or lists all.
    """
    if name not in BENCHMARKS:
        fix = suggest_name(name, BENCHMARKS)
        raise ConfigError(f"no benchmark '{name}'", place="eval", fix=fix)
    return BENCHMARKS[name]
