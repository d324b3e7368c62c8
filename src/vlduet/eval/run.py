"""Evaluate a model on one benchmark, or score the predictions of others.

1. load     the official files of the data folder, hashed
2. claim    the folder of the run: an interrupted run continues, another run is refused
3. predict  with the model's functions, as the benchmark's protocol asks; outputs are stored at once
4. score    scores.json: numbers with intervals, and everything that says what made them

Scoring again needs no model: with ``ModelFunctions()`` the same steps read stored predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError, quote_value
from vlduet.eval.benchmarks.control_runners import CONTROL_RUNNERS
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.runners import PROTOCOL_RUNNERS
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample
from vlduet.eval.benchmarks.tasks import Benchmark, Question
from vlduet.eval.predictions import ModelFunctions, PredictionStore, json_line, no_progress
from vlduet.files import read_json_lines, write_atomically, write_text_atomically
from vlduet.locks import lock_folder
from vlduet.structured_files import (
    FieldTypes,
    check_fields,
    parse_json,
    read_json_object,
    require_regular_file,
)

SCORES_FILE = "scores.json"
SAMPLES_FILE = "samples.npz"


def run_folder(runs: Path, benchmark: Benchmark) -> Path:
    """Return the folder of a benchmark's run inside the folder of all runs."""
    return runs / benchmark.name.replace("/", "-")


def evaluate(
    benchmark: Benchmark,
    functions: ModelFunctions,
    *,
    source: OfficialFiles,
    runs: Path,
    provenance: Mapping[str, Any],
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = no_progress,
) -> dict[str, Any]:
    """Run a benchmark, resume it, or score it again, and write its scores.json and samples.npz.

    Args:
        benchmark: an entry of the registry.
        functions: the model's functions; ``ModelFunctions()`` scores stored predictions.
        source: the official files of the data folder.
        runs: folder that gets a folder with the benchmark's name.
        provenance: what makes the predictions (model, fingerprint, prompts, versions), written to
            run.json; another value is another run. Empty where nothing is predicted, as when
            scoring again; scores.json then says what run.json says, or that they were imported.
        progress: (iterable, label) -> iterable, wraps long loops to show a progress bar.

    Returns:
        The content of scores.json. An answer that cannot be made, or is not stored when scoring
        again, counts in ``missing``.

    Raises:
        DataError: an official file is missing or broken, or vectors are missing and there is no
            model.
        ConfigError: the folder belongs to another run, or its predictions are of other official
            files, another seed or another k.
        LockError: another process evaluates into the same folder.
    """
    task = benchmark.load(source)
    folder = run_folder(runs, benchmark)
    with lock_folder(folder):
        store = PredictionStore(folder, functions, seed=source.seed, progress=progress)
        identity = {
            "benchmark": benchmark.name,
            "files": source.hashes,
            "seed": source.seed,
            "k": source.k,
        }
        # Only a run that makes predictions claims the folder; scoring trusts what run.json says.
        if provenance:
            store.claim_folder({**identity, "made_by": dict(provenance)})
        else:
            _check_same_files(folder, identity)
        score = (PROTOCOL_RUNNERS | CONTROL_RUNNERS)[benchmark.protocol](task, store)
        result = score_to_json(benchmark, score, seed=source.seed)
        result["files"] = source.hashes
        result["made_by"] = provenance or _read_provenance(folder)
        write_atomically(folder / SAMPLES_FILE, lambda out: write_samples(out, score))
        write_text_atomically(folder / SCORES_FILE, json.dumps(result, indent=1) + "\n")
    return result


def score_to_json(benchmark: Benchmark, score: BenchmarkScore, *, seed: int) -> dict[str, Any]:
    """Return a score as in scores.json: numbers in the papers' units, each with interval and n."""
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "split": benchmark.split,
        "metric": benchmark.metric,
        "protocol": benchmark.protocol,
        "values": {name: asdict(item.estimate(seed)) for name, item in score.samples.items()},
        "missing": score.num_missing,
        "unparsed": score.num_unparsed,
        "facts": dict(score.details),
        "seed": seed,
    }


def write_samples(out: IO[bytes], score: BenchmarkScore) -> None:
    """Write every number item by item as a compressed npz archive into the open file `out`.

    The arrays of a number are ``NUMBER|GROUP|v`` (values) and ``NUMBER|GROUP|w`` (weights) for
    every group, counted from 0, and ``NUMBER|how`` (its scale, and 1 where groups are summed).
    """
    arrays: dict[str, Any] = {}
    for name, sample in score.samples.items():
        arrays[f"{name}|how"] = np.array([sample.scale, float(sample.sum_groups)])
        for i, (values, weights) in enumerate(sample.groups):
            arrays[f"{name}|{i}|v"] = values
            arrays[f"{name}|{i}|w"] = weights
    np.savez_compressed(out, **arrays)


def read_samples(folder: Path) -> dict[str, MetricSample]:
    """Return number -> sample, as `write_samples` wrote them to samples.npz in a run's folder.

    The result is empty without this file. A broken one raises ValueError or zipfile.BadZipFile.
    """
    if not (folder / SAMPLES_FILE).exists():
        return {}
    with np.load(folder / SAMPLES_FILE, allow_pickle=False) as file:
        arrays = dict(file)
    samples = {}
    for key, how in arrays.items():
        if not key.endswith("|how"):
            continue
        name = key.removesuffix("|how")
        groups: list[tuple[Any, Any]] = []
        while f"{name}|{len(groups)}|v" in arrays:
            prefix = f"{name}|{len(groups)}"
            groups.append((arrays[f"{prefix}|v"], arrays[f"{prefix}|w"]))
        scale, sum_groups = how
        samples[name] = MetricSample(tuple(groups), scale=float(scale), sum_groups=bool(sum_groups))
    return samples


def _read_provenance(folder: Path) -> Any:
    """Return what made the stored predictions; without a run.json they were imported."""
    path = folder / "run.json"
    if not path.exists():
        return {"predictions": "imported"}
    return _read_identity(path)["made_by"]


def _check_same_files(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise ConfigError where run.json has other official files, seed or k than `identity`.

    Without a run.json (imported predictions), nothing is checked.
    """
    path = folder / "run.json"
    if not path.exists():
        return
    stored = _read_identity(path)
    for key in ("files", "seed", "k"):
        if stored[key] != identity[key]:
            values = f"{quote_value(stored[key])}, now {quote_value(identity[key])}"
            raise ConfigError(
                f"the predictions are of other {key}: {values}",
                place=folder,
                fix="Give the same --data, --seed and --k",
            )


def _read_identity(path: Path) -> dict[str, Any]:
    """Return the content of a run.json; raise ConfigError if it is broken or lacks a key."""
    fields: FieldTypes = {"made_by": dict, "files": (dict, list), "seed": int}
    fix = "Give another --to, or remove that folder"
    return read_json_object(
        path, {**fields, "k": (int, type(None))}, error_class=ConfigError, fix=fix
    )


# ------------------------------------------------------------------ predictions of others


def import_predictions(
    benchmark: Benchmark,
    file: Path,
    *,
    source: OfficialFiles,
    runs: Path,
    questions: Path | None = None,
) -> dict[str, int]:
    """Import predictions of another toolkit into predictions.jsonl, replacing what it contains.

    Accepted are JSON lines with "key", "question_id" or "id", with "text" or "answer", and
    optionally "prompt", as in LLaVA's answer files; or one object id -> text, as in MM-Vet's
    results file. A foreign id is matched by the image that it names and the first line of the
    prompt (MME, TextVQA), or through LLaVA's question file (POPE). Of several predictions for an
    item the last one counts.

    Args:
        source: official files of the benchmark.
        runs: folder of all runs; the benchmark's run folder is created if missing.
        questions: LLaVA's question file: JSON lines with "question_id", "image", "text" and
            "category".

    Returns:
        ``taken``, the number of items with a prediction, and ``unknown``, that of predictions that
        fit no item.

    Raises:
        ConfigError: the benchmark has no questions, a file cannot be read, or no prediction fits an
            item; then an older predictions.jsonl stays.
        LockError: another process evaluates into the same folder.
        DataError: an official file is missing or broken.
    """
    task = benchmark.load(source)
    items = getattr(task, "items", ())
    if not items or not isinstance(items[0], Question):
        raise ConfigError(
            f"'{benchmark.name}' takes no answers", place="--predictions", fix="Name another one"
        )
    folder = run_folder(runs, benchmark)
    item_ids = _index_items(items)
    question_rows = _read_answers(questions) if questions else []
    foreign_questions = {str(row.get("question_id", "")): row for row in question_rows}
    texts: dict[str, str] = {}
    num_unknown = 0
    for row in _read_answers(file):
        item_id = _match_item(row, item_ids, foreign_questions)
        if item_id is None:
            num_unknown += 1
        else:
            texts[item_id] = str(row.get("text", row.get("answer", "")))
    if not texts:
        raise ConfigError(
            f"none of {num_unknown} predictions fits an item",
            place=file,
            fix="Check the ids in the file",
        )
    lines = [json_line({"key": key, "text": text}) for key, text in texts.items()]
    with lock_folder(folder):
        write_text_atomically(folder / "predictions.jsonl", "".join(lines))
    return {"taken": len(texts), "unknown": num_unknown}


def _match_item(
    row: Mapping[str, Any],
    item_ids: Mapping[tuple[str, str], str],
    foreign_questions: Mapping[str, Mapping[str, Any]],
) -> str | None:
    """Return the id of the item that a prediction answers, or None where none fits.

    The row's id is looked up in `foreign_questions`, else among the ids of the items, else it is
    taken as the name of an image. An image, of a foreign question or so named, is matched together
    with the first line of the prompt: as ``CATEGORY/IMAGE``, ``IMAGE`` or its file name alone.

    Args:
        row: one row of the predictions file, with "key", "question_id" or "id".
        item_ids: index of the items, see `_index_items`.
        foreign_questions: rows of LLaVA's question file by their id.
    """
    identity = str(row.get("key", row.get("question_id", row.get("id", ""))))
    if identity in foreign_questions:
        question = foreign_questions[identity]
    else:
        if (identity, "") in item_ids:
            return item_ids[identity, ""]
        question = {"image": identity, "text": row.get("prompt", "")}
    image = str(question.get("image", ""))
    prompt = _first_line(str(question.get("text", "")))
    for name in (f"{question.get('category', '')}/{image}", image, Path(image).name):
        if (name, prompt) in item_ids:
            return item_ids[name, prompt]
    return None


def _first_line(text: str) -> str:
    """Return the first line of a prompt without image marks, in lower case."""
    return text.replace("<image>", "").strip().split("\n", maxsplit=1)[0].strip().casefold()


def _index_items(items: Iterable[Question]) -> dict[tuple[str, str], str]:
    """Return the ids of items by (id, "") and by (name of an image, first line of the prompt).

    Names of an image are its file name with and without suffix, each also after every tag of the
    item, as in ``existence/0001.jpg`` (LLaVA's MME) and ``random/COCO_val2014_....jpg``. Where
    several items fit, the first one counts.
    """
    item_ids: dict[tuple[str, str], str] = {}
    for item in items:
        item_ids[item.id, ""] = item.id
        prompt = _first_line("".join(part for part in item.prompt if isinstance(part, str)))
        paths = [part.path for part in item.prompt if isinstance(part, ImageRef) and part.path]
        for path in paths:
            for name in (path.name, path.stem):
                item_ids.setdefault((name, prompt), item.id)
                for tag in item.tags.values():
                    item_ids.setdefault((f"{tag}/{name}", prompt), item.id)
    return item_ids


def _read_answers(file: Path) -> list[dict[str, Any]]:
    """Return the rows of JSON lines, of a JSON list, or of one object id -> text.

    An entry of such an object becomes ``{"key": id, "text": text}``; an object with the key "text"
    is a single row. Lines that are not JSON are skipped, so a file without JSON gives [].

    Raises:
        ConfigError: the file is missing or cannot be opened.
            It is no regular file or not UTF-8, or a row is no object.
    """
    require_regular_file(file, error_class=ConfigError)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8", place=file, fix="Save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", place=file, fix="Check the path"
        ) from None
    try:
        content = parse_json(text, place=file, error_class=ConfigError, fix="Write JSON lines")
    except ConfigError:
        content = read_json_lines(file)
    if isinstance(content, dict) and "text" not in content:
        return [{"key": key, "text": value} for key, value in content.items()]
    rows: list[Any] = content if isinstance(content, list) else [content]
    for row in rows:
        check_fields(row, place=file, error_class=ConfigError, fix="Write one object per answer")
    return rows


def import_reviews(benchmark: Benchmark, file: Path, *, runs: Path) -> int:
    """Import reviews of an LLM grader into reviews.jsonl, replacing what it contains.

    Accepted are JSON lines with "key" or "question_id" and "text", "content" or "review", or
    MM-Vet's grade file {id: {"content": [...], ...}}, of whose list the first review is taken. Ids
    are not compared with the benchmark's items. The run folder is created if missing.

    Returns:
        Number of reviews, 0 for a file without rows.

    Raises:
        ConfigError: the file cannot be read.
        LockError: another process evaluates into the same folder.
    """
    folder = run_folder(runs, benchmark)
    rows = []
    for row in _read_answers(file):
        review = row.get("text", row.get("content", row.get("review", "")))
        if isinstance(review, Mapping):
            review = review["content"]
        if isinstance(review, list):
            review = review[0]
        rows.append({"key": str(row.get("key", row.get("question_id", ""))), "text": str(review)})
    with lock_folder(folder):
        write_text_atomically(folder / "reviews.jsonl", "".join(json_line(row) for row in rows))
    return len(rows)
