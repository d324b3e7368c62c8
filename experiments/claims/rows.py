"""Train and measure one row with one seed, and write its results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from corpora import build_corpora
from measures import measure_groups
from protocol import CANONICAL_PATHS, Protocol, Row, StudyPaths
from results import (
    RowResult,
    read_result,
    result_path,
    sample_to_json,
    write_result,
)
from ridge_row import fit_ridge
from subjects import Subject

from vlduet.config import RunConfig, load_run_config
from vlduet.encoders.dual import DualEncoder, open_dual_as_encoder
from vlduet.errors import ConfigError
from vlduet.harness.builtin import as_embedder
from vlduet.logs import logger
from vlduet.model.checkpoint import MANIFEST_NAME
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.limits import log_first_truncation
from vlduet.recipes.registry import load_recipe
from vlduet.train.loop import train
from vlduet.train.setup import load_model

UNIMPORTANT_SETTINGS = {
    "data": ("cache", "cache_limit", "validation"),
    "train": ("log_every", "eval_every", "save_every"),
}
"""Settings of a config that do not decide the numbers, by section."""
CROSS_OVERRIDES = ("data.validation=null", "seed=0")
"""Overrides of clip-nano for the dual encoder that compares images with texts."""
IDENTITY_KEYS = ("adapter", "base_fingerprint", "head", "limits", "prompts", "trained")
"""Keys of the manifest of a model folder that identify the model, whatever wrote it."""


@dataclass(frozen=True)
class RowRun:
    """A row with a seed."""

    name: str
    row: Row
    seed: int
    paths: StudyPaths

    @property
    def label(self) -> str:
        """Name and seed for messages."""
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the training run."""
        return self.paths.work / self.name.replace(" ", "-") / f"seed-{self.seed}"


def build_config(protocol: Protocol, run: RowRun, substitutions: Mapping[str, Any]) -> RunConfig:
    """Return the config of a row: the track's preset with the overrides of track and row.

    Args:
        substitutions: value of every placeholder, such as ``data``.

    Raises:
        ConfigError: an unknown placeholder, or an invalid override.
    """
    track = protocol.tracks[run.row.track]
    overrides = [
        *track.overrides,
        *run.row.overrides,
        f"train.steps={protocol.get_steps(run.row)}",
        "train.log_every=1",
    ]
    try:
        texts = [Template(text).substitute(substitutions) for text in overrides]
    except (KeyError, ValueError) as error:
        fix = f"Use some of {', '.join(CANONICAL_PATHS)}"
        raise ConfigError(f"unknown placeholder {error}", place=run.name, fix=fix) from None
    config = load_run_config(track.preset, texts)
    data = config.data.model_copy(update={"cache": run.paths.work / "features"})
    return config.model_copy(update={"out": run.folder, "seed": run.seed, "data": data})


def describe_settings(protocol: Protocol, run: RowRun) -> dict[str, Any]:
    """Return what decides the numbers of a row: config, kind, base model and corpora.

    Folders of this machine do not occur in it, and neither do default values, so that a new option
    of a later version makes no difference. A base model or corpus that does not exist yet is
    described as missing.
    """
    config = build_config(protocol, run, CANONICAL_PATHS).model_dump(
        mode="json", exclude={"out", "preset"}, exclude_defaults=True
    )
    config["seed"] = run.seed
    for section, names in UNIMPORTANT_SETTINGS.items():
        config[section] = {k: v for k, v in config[section].items() if k not in names}
    return {
        "config": config,
        "kind": run.row.kind,
        "base": hash_model(run.paths.model),
        "corpora": hash_corpora(run.paths.data),
    }


@cache
def hash_model(folder: Path) -> str:
    """Return a hash of what identifies the model of a folder, or of its config.json.

    ``missing`` is returned for a folder with neither.
    """
    if (folder / MANIFEST_NAME).is_file():
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        identity = {key: manifest.get(key) for key in IDENTITY_KEYS}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    if (folder / "config.json").is_file():
        return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16]
    return "missing"


@cache
def hash_corpora(data: Path) -> dict[str, str]:
    """Return a hash of the training and test splits of every corpus that the study reads."""
    hashes = {}
    for corpus in ("stamps", "emoji", "gimp-help", "campaigns"):
        digest = hashlib.sha256()
        for split in ("train", "test"):
            path = data / corpus / f"{split}.jsonl"
            digest.update(path.read_bytes() if path.is_file() else b"missing")
        hashes[corpus] = digest.hexdigest()[:16]
    return hashes


def run_row(protocol: Protocol, run: RowRun, *, measures: list[str]) -> None:
    """Train a row unless its model exists, measure it, and add the numbers to its JSON file.

    The corpora by rule, and the dual encoder that the recipe sugar needs, are made before the first
    row that needs them. Raises as `train` and the measures do.

    Args:
        measures: groups of measures that the file lacks.
    """
    settings = describe_settings(protocol, run)
    path = result_path(run.paths.results, run.name, run.seed)
    prepare_corpora(run.paths)
    config = build_config(protocol, run, run.paths.substitutions())
    if "questions" in measures or config.recipe["name"] == "sugar":
        prepare_cross_encoder(run.paths)
    start = time.monotonic()
    if run.row.kind == "trained" and not (config.out / "model").exists():
        train(config, resume="auto")
    train_seconds = time.monotonic() - start
    subject = open_subject(config, run)
    start = time.monotonic()
    numbers = measure_groups(subject, measures)
    measure_seconds = time.monotonic() - start
    content = {name: sample_to_json(sample) for name, sample in numbers.items()}
    facts = {
        "train_seconds": round(train_seconds, 1),
        "measure_seconds": round(measure_seconds, 1),
        **describe_machine(),
    }
    old = read_result(path)
    if old is not None:  # the training is described by the file that it was first measured for
        content = {**old.numbers, **content}
        measures = [*old.measures, *measures]
        seconds = old.facts["measure_seconds"] + facts["measure_seconds"]
        facts = {**old.facts, "measure_seconds": round(seconds, 1)}
    write_result(path, RowResult(settings, measures, facts, content))
    means = ", ".join(f"{name} {sample.mean:.3g}" for name, sample in numbers.items())
    logger.info(f"{run.label}: {means}")


def prepare_corpora(paths: StudyPaths) -> None:
    """Build the corpora by rule, unless they exist."""
    build_corpora(paths.data, paths.work / "corpora")


def prepare_cross_encoder(paths: StudyPaths) -> None:
    """Train the dual encoder of the recipe sugar and of the external retriever, unless it exists.

    It is the preset clip-nano, trained on the training splits of stamps and emoji.
    """
    folder = paths.work / "cross"
    if (folder / "model").exists():
        return
    overrides = [
        f"encoders.vision={paths.model}",
        f"encoders.text={paths.minilm}",
        f"data.train=[{{path: {paths.data}/stamps/train.jsonl, weight: 1}}, "
        f"{{path: {paths.data}/emoji/train.jsonl, weight: 3}}]",
        f"data.cache={paths.work / 'features'}",
        f"out={folder}",
        *CROSS_OVERRIDES,
    ]
    train(load_run_config("clip-nano", overrides), resume="auto")


def open_subject(config: RunConfig, run: RowRun) -> Subject:
    """Return the model of a row, ready to be measured.

    Raises:
        ModelError: it cannot be opened.
    """
    cache = FeatureCache(config.data.cache or None)
    data, batch_size = run.paths.data, config.train.batch_size
    if run.row.kind == "ridge":
        embed_image, embed_text = fit_ridge(config, run.paths)
        return Subject(embed_image, embed_text, None, data)
    if config.recipe["name"] == "clip":
        encoder = DualEncoder.from_pretrained(config.out / "model", cache=cache)
        return Subject(encoder.encode, encoder.encode, None, data, config.out, batch_size)
    if run.row.kind == "start":
        torch.manual_seed(config.seed)
        model = load_model(config, load_recipe(config), cache=config.data.cache or None)
    else:
        model = DuetModel.from_pretrained(config.out / "model")
        model.feature_cache = cache
    retriever = None
    if (run.paths.work / "cross" / "model").exists():
        embed = as_embedder(open_dual_as_encoder(run.paths.work / "cross" / "model", cache=cache))

        def retriever(items: Any) -> np.ndarray:
            """Return the vectors of items of several parts by the external retriever."""
            return embed(list(items), True)

    is_trained = run.row.kind == "trained"
    note = log_first_truncation(run.row.kind)
    return Subject(
        partial(model.encode_document, on_truncate=note),
        partial(model.encode_query, on_truncate=note),
        model,
        data,
        config.out if is_trained else None,
        batch_size,
        retriever,
    )


def describe_machine() -> dict[str, Any]:
    """Return processor, threads, versions and commit of this run."""
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "machine": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": read_commit(),
    }


def read_commit() -> str:
    """Return the commit of this repository, with a plus sign if its source differs from it."""
    folder = Path(__file__).parents[2]

    def run_git(*arguments: str) -> str | None:
        """Return the output of a git command, or None if it fails."""
        command = ["git", "-C", str(folder), *arguments]
        process = subprocess.run(command, check=False, capture_output=True, text=True)
        return process.stdout.strip() if process.returncode == 0 else None

    commit = run_git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "unknown"
    changes = run_git("status", "--porcelain", "--", "src", "experiments/claims")
    return commit + ("+" if changes else "")
