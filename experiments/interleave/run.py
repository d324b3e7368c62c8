"""Measure interleaved retrieval by one model: one JSON file with the values of all items.

    python experiments/interleave/run.py --model runs/demo/model --dual runs/demo/dual/model \
        --data data --name demo

`report.py` writes docs/results/interleave.md from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from items import (
    QuestionSet,
    SearchSet,
    load_dialog_set,
    load_document_set,
    load_question_set,
)
from language import measure_continuations, measure_plain_answers, measure_questions
from searches import (
    OPERATION,
    Answer,
    EmbedContents,
    answer_document,
    answer_documents,
    build_gallery_index,
    measure_costs,
    measure_searches,
    measure_writing,
    read_gallery_vectors,
)

from vlduet import __version__
from vlduet.cli.main import keep_freed_memory
from vlduet.data.records import Parts
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.examples import evenly_spaced
from vlduet.files import write_text_atomically
from vlduet.harness.builtin import open_two_tower_embedder
from vlduet.logs import install_log_handler, logger
from vlduet.model.duet import DuetModel

RESULTS_FOLDER = Path(__file__).parents[2] / "docs" / "results" / "interleave"
NUM_COST_DOCUMENTS = 6
"""Largest number of documents whose seconds and forward passes are measured."""
NUM_WRITTEN_DOCUMENTS = 2
"""Largest number of these for which the model also writes an answer itself."""
NUM_DIGITS = 4
PARTS = ("documents", "dialogs", "questions")
"""Parts that are measured one after the other: the first one also has continuations, the last one
plain answers."""

Results = dict[str, Any]
"""Results as they are in the file."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Largest numbers of items, which are evenly spaced."""

    documents: int
    dialogs: int
    requests: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure part by part, and write the file after each."""
    command = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse_options(command)
    install_log_handler()
    keep_freed_memory()
    torch.set_num_threads(1)
    # Its encoders are beside it, which a symbolic link is not.
    embed_items = open_two_tower_embedder(options.dual.resolve())

    def embed_by_dual(contents: list[Parts]) -> np.ndarray:
        return embed_items(contents, True)

    embed_by_dual([("a dual encoder that cannot be opened fails here",)])
    model = DuetModel.from_pretrained(options.model)
    facts = {"name": options.name, "fingerprint": model.fingerprint}
    path = options.to / f"{options.name}.json"
    sizes = Sizes(options.documents, options.dialogs, options.requests)
    for part in options.parts:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "corpora").symlink_to(options.data.resolve())
            files = OfficialFiles(Path(folder))
            results = measure_part(part, model, files, embed_by_dual=embed_by_dual, sizes=sizes)
        run = {
            "command": shlex.join(["python", "experiments/interleave/run.py", *command]),
            "minutes": round((time.process_time() - start) / 60, 1),
            **describe_machine(),
        }
        add_part(path, facts, part, results={"run": run, **results})


def add_part(path: Path, model: Results, part: str, *, results: Results) -> None:
    """Add the results of a part to a file, or replace them; other models' files are replaced."""
    content: Results = {"model": model}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        content = stored if stored["model"] == model else content
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, format_results(content | {part: results}))


def _parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line; wrong options end the process with a message."""
    parser = argparse.ArgumentParser(description="Measure interleaved retrieval by one model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--dual", type=Path, required=True, help="independent dual encoder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="fetched corpora")
    parser.add_argument("--name", required=True, help="name of the model, and of the file")
    parser.add_argument("--to", type=Path, default=RESULTS_FOLDER, help="folder of the JSON")
    parser.add_argument("--documents", type=int, default=1000, help="largest number of documents")
    parser.add_argument("--dialogs", type=int, default=1000, help="largest number of dialogs")
    parser.add_argument("--requests", type=int, default=1000, help="largest number of requests")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    return parser.parse_args(arguments)


# ------------------------------------------------------------------ measures


def measure_part(
    part: str,
    model: DuetModel,
    files: OfficialFiles,
    *,
    embed_by_dual: EmbedContents,
    sizes: Sizes,
) -> Results:
    """Return the results of one of the `PARTS`.

    Raises:
        DataError: a corpus is missing.
    """
    if part == "questions":
        questions = load_question_set(files)
        requests = evenly_spaced(questions.documents, sizes.requests)
        return measure_text_after_images(model, replace(questions, documents=tuple(requests)))
    if part == "dialogs":
        dialogs = select_documents(load_dialog_set(files), sizes.dialogs)
        results, _ = measure_retrieval(model, dialogs, embed_by_dual=embed_by_dual)
        return results
    documents = select_documents(load_document_set(files), sizes.documents)
    results, answers = measure_retrieval(model, documents, embed_by_dual=embed_by_dual)
    logger.info("continuations")
    continuations = measure_continuations(
        model, documents.documents, gallery=documents.gallery, answers=answers[OPERATION]
    )
    return results | {"continuations": asdict(continuations)}


def select_documents(search_set: SearchSet, count: int) -> SearchSet:
    """Return a set with at most `count` of its documents, evenly spaced."""
    return replace(search_set, documents=tuple(evenly_spaced(search_set.documents, count)))


def measure_retrieval(
    model: DuetModel, search_set: SearchSet, *, embed_by_dual: EmbedContents
) -> tuple[Results, dict[str, list[Answer]]]:
    """Return ranks and costs at the places of documents, and what the operation has retrieved."""
    with tempfile.TemporaryDirectory() as folder:
        index = build_gallery_index(model, search_set.gallery, Path(folder))
        logger.info(f"{len(search_set.documents)} documents: costs")
        chosen = evenly_spaced(search_set.documents, NUM_COST_DOCUMENTS)
        costs = measure_costs(model, index, chosen)
        is_dialog = len(chosen[0].requests) > 1
        written = [] if is_dialog else evenly_spaced(chosen, NUM_WRITTEN_DOCUMENTS)
        writing = measure_writing(model, index, written)
        logger.info(f"{len(search_set.documents)} documents: operation")
        answers = answer_documents(model, index, search_set)
        gallery_vectors = read_gallery_vectors(index, len(search_set.gallery))
        index.close()
    logger.info(f"{len(search_set.documents)} documents: ranks")
    searches = measure_searches(
        model,
        search_set,
        answers,
        gallery_vectors=gallery_vectors,
        embed_by_dual=embed_by_dual,
    )
    results = {
        **asdict(searches),
        "gallery": len(search_set.gallery),
        "left_out": search_set.num_left_out,
        "costs": costs,
        "writing": writing,
    }
    return results, answers


def measure_text_after_images(model: DuetModel, questions: QuestionSet) -> Results:
    """Return the answers to questions, and ``plain``, the likelihoods of plain answers."""
    with tempfile.TemporaryDirectory() as folder:
        index = build_gallery_index(model, questions.gallery, Path(folder))
        logger.info(f"{len(questions.documents)} requests")
        answers = [
            answer_document(model, index, document, feed_back=False)
            for document in questions.documents
        ]
        index.close()
    logger.info("questions")
    results = asdict(measure_questions(model, questions, answers))
    return results | {"plain": asdict(measure_plain_answers(model, questions, answers))}


# ------------------------------------------------------------------ the file


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, system and versions."""
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vlduet": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def format_results(content: Results) -> str:
    """Return a file's text: lists of numbers stand on one line each, rounded to four digits."""
    text = json.dumps(_round(content), indent=1, ensure_ascii=False)
    lines: list[str] = []
    is_list = False
    for line in text.splitlines():
        if is_list:
            lines[-1] += line.strip()
        else:
            lines.append(line)
        is_list = (is_list or line.endswith("[")) and not line.strip().startswith("]")
    return "\n".join(lines) + "\n"


def _round(content: Any) -> Any:
    """Return JSON content with every number rounded, in dicts and lists."""
    if isinstance(content, dict):
        return {name: _round(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_round(value) for value in content]
    return round(content, NUM_DIGITS) if isinstance(content, float) else content


if __name__ == "__main__":
    main()
