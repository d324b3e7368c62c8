"""Write the data of the frozen tests from what vlduet computes now.

    OMP_NUM_THREADS=1 python tests/frozen/write.py [--overwrite] [NAME ...]

Stored data is behaviour that users rely on: overwrite it only where a change is meant, and say so
in the change log. `folders` also writes the model folder and the index; `opened` measures the
stored folders again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parents[1]))

from frozen import calls, fixed, folders, measures, predictions, tables

STORED = fixed.DATA / "values"


def steps() -> dict[str, Any]:
    """Compute every training step."""
    return {name: measures.training_step(*case) for name, case in measures.step_cases().items()}


def generation() -> dict[str, Any]:
    """Answer with every family; an answer that single precision changes is too close to freeze."""
    values = {family: measures.generation(family, margins=True) for family in fixed.FAMILIES}
    for family, answers in values.items():
        rough = measures.generation(family, double=False)
        assert rough["answers"] == answers["answers"], f"{family}: answers depend on the precision"
        assert rough["captions"] == answers["captions"], (
            f"{family}: captions depend on the precision"
        )
    return values


def benchmarks() -> dict[str, Any]:
    """Play the built-in suite."""
    with tempfile.TemporaryDirectory() as runs:
        return {name: predictions.benchmark(name, Path(runs)) for name in calls.benchmark_names()}


def opened() -> dict[str, Any]:
    """Open the stored folders."""
    with tempfile.TemporaryDirectory() as folder:
        values = folders.opened(folders.placed(Path(folder)))
    assert min(values["margins"]) > measures.MARGIN
    return values


def rewrite_and_open() -> dict[str, Any]:
    """Write the folders anew, and open them."""
    folders.write()
    return opened()


WRITERS: dict[str, Callable[[], dict[str, Any]]] = {
    "steps": steps,
    "embeddings": lambda: {family: measures.embeddings(family) for family in fixed.FAMILIES},
    "generation": generation,
    "kernels": tables.kernels,
    "targets": tables.targets,
    "losses": tables.losses,
    "protocols": predictions.protocols,
    "metrics": predictions.metrics,
    "benchmarks": benchmarks,
    "folders": rewrite_and_open,
    "opened": opened,
}


def main() -> None:
    """Write what is named, or everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--overwrite", action="store_true", help="replace stored data")
    parser.add_argument("names", nargs="*", help=", ".join(WRITERS))
    arguments = parser.parse_args()
    names = arguments.names or [name for name in WRITERS if name != "opened"]
    paths = {name: STORED / f"{'folders' if name == 'opened' else name}.json" for name in names}
    present = [str(path) for path in paths.values() if path.exists()]
    if present and not arguments.overwrite:
        parser.error(f"already stored: {', '.join(present)}; --overwrite replaces it")
    STORED.mkdir(exist_ok=True)
    for name, path in paths.items():
        value = WRITERS[name]()
        lines = [f"{json.dumps(key)}: {json.dumps(part)}" for key, part in value.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
