"""One benchmark, start to end: read the official files, play the protocol, write the score.

1. load    the official files of the data folder, hashed
2. claim   the run's folder: a run goes on where it stopped, and another run is refused
3. play    the protocol with the model's functions; every output is on disk at once
4. score   scores.json: numbers with intervals, and everything that says what made them

Scoring again needs no model: with `Functions()` the same steps read what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.protocols import PROTOCOLS
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.tasks import Benchmark, Question, Sample, Score
from vlduet.eval.predictions import ModelFunctions, PredictionStore, json_line
from vlduet.files import read_json_lines, write_atomically, write_text_atomically

SCORES_FILE, SAMPLES_FILE = "scores.json", "samples.npz"


def run_folder(runs: Path, benchmark: Benchmark) -> Path:
    """Where the run of a benchmark stands."""
    return runs / benchmark.name.replace("/", "-")


def evaluate(
    benchmark: Benchmark,
    functions: ModelFunctions,
    *,
    source: Source,
    runs: Path,
    provenance: Mapping[str, Any],
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> dict[str, Any]:
    """Run or resume a benchmark, or score it again.

    Args:
        benchmark: a row of the table.
        functions: the model's; an empty `Functions()` scores what is kept.
        source: the data folder.
        runs: gets a folder of the benchmark's name.
        made_by: what made the predictions (model, fingerprint, prompts, versions); another value is another run.
            Empty where nothing is made, as when scoring again.
        watch: wraps long loops, for a progress bar.

    Returns:
        The content of scores.json.

    Raises:
        DataError: a missing or broken official file, named; or predictions that are not there.
        ConfigError: the folder holds another run.
    """
    task = benchmark.load(source)
    folder = run_folder(runs, benchmark)
    store = PredictionStore(folder, functions, seed=source.seed, progress=progress)
    # Only a run that makes predictions claims the folder; scoring trusts what run.json says.
    identity = {
        "benchmark": benchmark.name,
        "files": source.hashes,
        "seed": source.seed,
        "k": source.k,
    }
    if provenance:
        store.claim_folder({**identity, "made_by": dict(provenance)})
    else:
        _same_files(folder, identity)
    score = PROTOCOLS[benchmark.protocol](task, store)
    result = score_to_json(benchmark, score, seed=source.seed) | {
        "files": source.hashes,
        "made_by": provenance or _maker(folder),
    }
    write_atomically(folder / SAMPLES_FILE, lambda out: write_samples(out, score))
    write_text_atomically(folder / SCORES_FILE, json.dumps(result, indent=1) + "\n")
    return result


def write_samples(out: IO[bytes], score: Score) -> None:
    """Every number item by item: `NUMBER|GROUP|v` and `|w`, and `NUMBER|how` with its scale and whether it is a sum."""
    arrays: dict[str, Any] = {}
    for name, found in score.samples.items():
        arrays[f"{name}|how"] = np.array([found.scale, float(found.total)])
        for i, (values, weights) in enumerate(found.groups):
            arrays |= {f"{name}|{i}|v": values, f"{name}|{i}|w": weights}
    np.savez_compressed(out, **arrays)


def read_samples(folder: Path) -> dict[str, Sample]:
    """What `write_samples` wrote; empty where there is nothing."""
    if not (folder / SAMPLES_FILE).exists():
        return {}
    with np.load(folder / SAMPLES_FILE, allow_pickle=False) as file:
        kept = dict(file)
    found = {}
    for key in [key for key in kept if key.endswith("|how")]:
        name = key.removesuffix("|how")
        count = sum(other.startswith(f"{name}|") and other.endswith("|v") for other in kept)
        groups = tuple((kept[f"{name}|{i}|v"], kept[f"{name}|{i}|w"]) for i in range(count))
        found[name] = Sample(groups, scale=float(kept[key][0]), total=bool(kept[key][1]))
    return found


def score_to_json(benchmark: Benchmark, score: Score, *, seed: int) -> dict[str, Any]:
    """A score as it stands in scores.json: values in the unit of the papers, each with its interval and n."""
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "split": benchmark.split,
        "metric": benchmark.metric,
        "protocol": benchmark.protocol,
        "values": {name: asdict(found.value(seed)) for name, found in score.samples.items()},
        "missing": score.missing,
        "unparsed": score.unparsed,
        "facts": dict(score.facts),
        "seed": seed,
    }


def _maker(folder: Path) -> Any:
    path = folder / "run.json"
    return (
        json.loads(path.read_text(encoding="utf-8"))["made_by"]
        if path.exists()
        else {"predictions": "imported"}
    )


def _same_files(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises ConfigError where predictions were made of other files."""
    path = folder / "run.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        for key in ("files", "seed", "k"):
            if kept[key] != identity[key]:
                what = f"the predictions are of other {key}: {kept[key]!r}, now {identity[key]!r}"
                raise ConfigError(what, place=folder, fix="Give the same --data, --seed and --k")


# ------------------------------------------------------------------ others' predictions


def import_predictions(
    benchmark: Benchmark, file: Path, *, source: Source, runs: Path, questions: Path | None = None
) -> dict[str, int]:
    """Take predictions that another toolkit made, to be scored by the official rules.

    Accepted: JSON lines with "key" or "question_id" (or "id"), "text" and maybe "prompt", as LLaVA's answer files have;
    or one object id -> text, as MM-Vet's results file. An id that is not ours is matched as LLaVA's need it: by the image
    that it names and the first line of the prompt (MME, TextVQA), or through LLaVA's question file (POPE).

    Args:
        questions: JSON lines with "question_id", "image", "text" and "category".

    Returns:
        How many were taken and how many fit no item.

    Raises:
        ConfigError: the benchmark asks nothing, or nothing fits.
    """
    task = benchmark.load(source)
    items = getattr(task, "items", ())
    if not items or not isinstance(items[0], Question):
        raise ConfigError(
            f"'{benchmark.name}' takes no answers", place="--predictions", fix="Name another one"
        )
    folder = run_folder(runs, benchmark)
    folder.mkdir(parents=True, exist_ok=True)
    keys = _keys(items)
    asked = {
        str(row.get("question_id", "")): row for row in (_answers(questions) if questions else ())
    }
    taken: dict[str, str] = {}
    unknown = 0
    for row in _answers(file):
        identity = str(row.get("key", row.get("question_id", row.get("id", ""))))
        told = asked.get(identity, {"image": identity, "text": row.get("prompt", "")})
        first, image = _first_line(str(told.get("text", ""))), str(told.get("image", ""))
        tries = (
            (f"{told.get('category', '')}/{image}", first),
            (image, first),
            (Path(image).name, first),
        )
        key = keys.get((identity, "")) if identity not in asked else None
        key = key or next((keys[one] for one in tries if one in keys), None)
        if key is None:
            unknown += 1
        else:
            taken[key] = str(row.get("text", row.get("answer", "")))
    if not taken:
        raise ConfigError(
            f"none of {unknown} predictions fits an item",
            place=file,
            fix="Check the ids in the file",
        )
    rows = "".join(json_line({"key": key, "text": text}) for key, text in taken.items())
    write_text_atomically(folder / "predictions.jsonl", rows)
    return {"taken": len(taken), "unknown": unknown}


def _first_line(text: str) -> str:
    return text.replace("<image>", "").strip().split("\n", maxsplit=1)[0].strip().casefold()


def _keys(items: Iterable[Question]) -> dict[tuple[str, str], str]:
    """(id, "") and (what an image is called, first line of the prompt) -> id of the item.

    An image is called by its file name, with and without its ending, and by those behind a tag of the item, as
    ``existence/0001.jpg`` (LLaVA's MME) and ``random/COCO_val2014_....jpg``.
    """
    found: dict[tuple[str, str], str] = {}
    for item in items:
        found[item.id, ""] = item.id
        first = _first_line("".join(part for part in item.parts if isinstance(part, str)))
        for path in (part.path for part in item.parts if isinstance(part, ImageRef) and part.path):
            for name in (path.name, path.stem):
                for called in (name, *(f"{tag}/{name}" for tag in item.tags.values())):
                    found.setdefault((called, first), item.id)
    return found


def _answers(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", place=file, fix="Check the path"
        ) from None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return read_json_lines(file)
    if isinstance(whole, dict) and "text" not in whole:
        return [{"key": key, "text": value} for key, value in whole.items()]
    return whole if isinstance(whole, list) else [whole]


def import_reviews(benchmark: Benchmark, file: Path, *, runs: Path) -> int:
    """Take stored reviews of a judge: JSON lines with "key" (or "question_id") and "text" (or "content"), or MM-Vet's
    grade file {id: {"content": [...], ...}}. Returns how many."""
    folder = run_folder(runs, benchmark)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in _answers(file):
        value = row.get("text", row.get("content", row.get("review", "")))
        if isinstance(value, Mapping):
            value = value["content"]
        value = value[0] if isinstance(value, list) else value
        rows.append({"key": str(row.get("key", row.get("question_id", ""))), "text": str(value)})
    write_text_atomically(folder / "reviews.jsonl", "".join(json_line(row) for row in rows))
    return len(rows)
