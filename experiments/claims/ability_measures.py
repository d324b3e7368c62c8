"""Measures of the suite ``abilities``: dialog, places in a story, and existence.

The items are those of `vlduet eval --suite abilities`; numbers of one group of items are taken over
with the name of their benchmark.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from subjects import Measurements, Subject

from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.run import evaluate, read_samples, run_folder
from vlduet.harness.builtin import EvaluationSettings, model_functions

ABILITIES = {"dialog": "ability_dialog", "places": "ability_places", "exists": "ability_existence"}
"""Name of a benchmark by the prefix of its numbers."""
LEFT_OUT = ("text_only/", "F1/", "precision/", "recall/")
"""Starts of the names of numbers that are not taken over: of the controls, and ratios of items."""


def measure_abilities(subject: Subject) -> Measurements:
    """Return the numbers of the three benchmarks that are means over items.

    Raises:
        ConfigError: this version has no such benchmark.
        DataError: a corpus is missing.
    """
    functions = model_functions(subject.generator, EvaluationSettings())
    numbers: Measurements = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "corpora").symlink_to(subject.data.resolve())
        for prefix, name in ABILITIES.items():
            benchmark = get_benchmark(name)
            runs = Path(folder) / "runs"
            evaluate(
                benchmark,
                functions,
                source=OfficialFiles(Path(folder)),
                runs=runs,
                provenance={"study": "claims"},
            )
            for number, sample in read_samples(run_folder(runs, benchmark)).items():
                if len(sample.groups) == 1 and not number.startswith(LEFT_OUT):
                    numbers[f"{prefix}, {number}"] = sample
    return numbers
