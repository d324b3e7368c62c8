"""Files with the results of rows: one JSON per row and seed.

A file contains the settings that decide its numbers, the values of all items, and facts about the
run. It is compact: values are rounded to four digits, and every number stands on one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from inference import RowValues

from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.scores import MetricSample
from vlduet.files import write_text_atomically
from vlduet.structured_files import read_json_object

NUM_DIGITS = 4


@dataclass(frozen=True)
class RowResult:
    """The content of one file."""

    settings: dict[str, Any]
    """Settings that decide the numbers: config, base model and corpora."""
    measures: list[str]
    """Groups of measures whose numbers the file has."""
    facts: dict[str, Any]
    """Seconds, machine and commit of the run."""
    numbers: dict[str, dict[str, Any]]
    """Number -> ``scale``, ``values`` and, unless all are 1, ``weights``."""


def result_path(folder: Path, row: str, seed: int) -> Path:
    """Return the file of a row and seed."""
    return folder / f"{row.replace(',', '').replace(' ', '-')}.{seed}.json"


def sample_to_json(sample: MetricSample) -> dict[str, Any]:
    """Return a sample of one group for a file; a sample of several groups raises ValueError."""
    if len(sample.groups) != 1:
        raise ValueError(f"{len(sample.groups)} groups of items; a file stores one")
    values, weights = sample.groups[0]
    content: dict[str, Any] = {"scale": sample.scale, "values": _round_values(values)}
    if not np.all(weights == 1):
        content["weights"] = _round_values(weights)
    return content


def _round_values(values: Any) -> list[float]:
    """Return numbers rounded to four digits, whole ones as int."""
    rounded = [round(float(value), NUM_DIGITS) for value in values]
    return [int(value) if value.is_integer() else value for value in rounded]


def write_result(path: Path, result: RowResult) -> None:
    """Write a file, with one line per number."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(number, separators=(',', ':'))}"
        for name, number in result.numbers.items()
    ]
    text = (
        '{\n "settings": '
        + json.dumps(result.settings, sort_keys=True)
        + ',\n "measures": '
        + json.dumps(result.measures)
        + ',\n "facts": '
        + json.dumps(result.facts)
        + ',\n "numbers": {\n'
        + ",\n".join(lines)
        + "\n }\n}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text)


def read_result(path: Path) -> RowResult | None:
    """Return the content of a file, None without one; ConfigError for a broken one."""
    if not path.exists():
        return None
    content = read_json_object(
        path,
        {"settings": dict, "measures": list, "facts": dict, "numbers": dict},
        error_class=ConfigError,
        fix="Remove it, and run the row again",
    )
    return RowResult(**{key: content[key] for key in ("settings", "measures", "facts", "numbers")})


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first setting that differs, with both values; empty for equal settings."""
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        if key not in old or key not in new:
            return f"{name} is in one of them alone"
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            difference = describe_difference(old[key], new[key], f"{name}.")
            if difference:
                return difference
        elif old[key] != new[key]:
            return f"{name} is {old[key]!r} in the file, and {new[key]!r} now"
    return ""


def list_missing_measures(
    path: Path, settings: Mapping[str, Any], measures: Sequence[str]
) -> list[str]:
    """Return the groups of measures that a file lacks: all without a file, none if it is complete.

    Raises:
        ConfigError: the file is broken, or its settings differ.
    """
    result = read_result(path)
    if result is None:
        return list(measures)
    difference = describe_difference(result.settings, json.loads(json.dumps(settings)))
    if difference:
        raise ConfigError(
            f"results of other settings: {difference}",
            place=path,
            fix="Remove the file to run this row again, or give another --results",
        )
    return [name for name in measures if name not in result.measures]


def stack_seeds(results: Sequence[RowResult], number: str) -> RowValues | None:
    """Return the values of a number for all seeds; None where a result lacks it.

    Raises ValueError if the seeds have different numbers of items.
    """
    values, weights = [], []
    for result in results:
        content = result.numbers.get(number)
        if content is None:
            return None
        row = np.array(content["values"], dtype=np.float64)
        values.append(row * content["scale"])
        weights.append(np.array(content.get("weights", np.ones(len(row))), dtype=np.float64))
    if not values:
        return None
    return RowValues(np.stack(values), np.stack(weights))
