"""State of an interrupted run: trained tensors, optimizer and step; records of a failed step.

Random numbers need no state: those of a step are a function of (seed, step, rank), see
`step.seed_step`.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlduet import __version__, distributed
from vlduet.config import RunConfig, SourceSection, parse_options
from vlduet.data.record_json import record_to_json
from vlduet.data.stream import Sample
from vlduet.errors import TrainingError, quote_value
from vlduet.files import recover_folder, replace_folder_atomically, write_text_atomically
from vlduet.hub import Kind, list_commits
from vlduet.integrity import describe_damage, seal_manifest, verify_manifest
from vlduet.library_errors import translate_library_errors
from vlduet.logs import logger
from vlduet.model.card import POSITIONS_KEY, SLICE_POSITIONS
from vlduet.recipes.registry import find_recipe
from vlduet.structured_files import read_json_object
from vlduet.train.run import TrainingRun
from vlduet.train.step import all_finite

ResumeMode = bool | Literal["auto"]
"""Whether a run continues from its saved state; "auto": if there is one."""
STATE_FOLDER = "state"
"""Folder of the state within the folder of a run."""
STATE_FILE = "state.json"
"""File with the step, the decisive settings, and size and hash of the other files."""
DAMAGE_REMEDY = "Copy the whole run again, or start anew"
CHANGEABLE_SETTINGS = ("log_every", "eval_every", "save_every", "max_dropped")
"""Names of settings that may change when a run is resumed: nothing that is learned depends on
them."""


def select_resumption(out: Path, resume: ResumeMode) -> bool:
    """Return whether the run in the folder `out` continues from its state.

    A state that a killed process left under its backup name is restored first (`recover_folder`).

    Raises:
        TrainingError: `resume` is False and there is a state.
    """
    folder = recover_folder(out / STATE_FOLDER)
    if folder.exists() and not resume:
        fix = "Use --resume, or another out="
        raise TrainingError("this folder holds a run already", place=out, fix=fix)
    return resume is True or folder.exists()


def save_state(run: TrainingRun, step: int) -> None:
    """Write the state of a run before `step` to ``out/state``, atomically replacing the last one.

    Files: trained.safetensors, optimizer.pt and, at last, state.json (step, number of steps,
    fingerprints of the records, decisive settings, size and hash of the files). `out` is created if
    it is missing.

    Raises:
        ConfigError: ``out/state`` exists and is not empty, but has no state.json.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in _trained_tensors(run).items()}
    facts = {
        "step": step,
        "num_steps": run.num_steps,
        "records": [source.fingerprint for source in run.sources],
        "decisive": decisive_settings(run.config),
    }
    with replace_folder_atomically(run.config.out / STATE_FOLDER, marker=STATE_FILE) as folder:
        save_file(tensors, folder / "trained.safetensors")
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / STATE_FILE).write_text(json.dumps(seal_manifest(facts, folder)))


def load_state(run: TrainingRun) -> int:
    """Load ``out/state`` into a run's model and optimizer in place, and return the next step.

    The run gets the state's number of steps, which `train.epochs` may have computed from other
    records. Records that are not those of the state are a warning: their order is another one.

    Raises:
        TrainingError: there is no state, a file of it is damaged, or it belongs to a run with other
            decisive settings (then nothing is loaded); or one of an earlier version is broken
            (tensors may then be loaded in part).
    """
    folder = recover_folder(run.config.out / STATE_FOLDER)
    if not (folder / STATE_FILE).is_file():
        raise TrainingError("nothing to resume", place=folder, fix="Start without --resume")
    with translate_library_errors(
        folder, error_class=TrainingError, subject="state", fix=DAMAGE_REMEDY
    ):
        return _load_folder(run, folder)


def _load_folder(run: TrainingRun, folder: Path) -> int:
    """Load a state folder into a run, in place, as `load_state` does; return the next step.

    Raises:
        TrainingError: a file is damaged or a decisive setting differs; raised before anything is
            loaded.
        READ_ERRORS: a file is missing or broken.
    """
    facts = read_json_object(
        folder / STATE_FILE,
        {"decisive": dict, "step": int},
        error_class=TrainingError,
        fix=DAMAGE_REMEDY,
        optional={"num_steps": int, "records": list},
    )
    verify_manifest(folder, facts, name=STATE_FILE, error_class=TrainingError, fix=DAMAGE_REMEDY)
    difference = describe_difference(facts["decisive"], decisive_settings(run.config))
    if difference:
        raise TrainingError(
            difference, place=folder, fix="Resume with the same config, or start anew"
        )
    run.num_steps = int(facts.get("num_steps", run.num_steps))  # states of old versions lack it
    fingerprints = [source.fingerprint for source in run.sources]
    if facts.get("records", fingerprints) != fingerprints:
        logger.warning(
            "warning: the training records have changed since the run began, so that the order of "
            "those that follow is another one"
        )
    saved = load_file(folder / "trained.safetensors")
    with torch.no_grad():
        for name, tensor in _trained_tensors(run).items():
            tensor.copy_(saved[name])
    optimizer_state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    run.optimizer.load_state_dict(optimizer_state)
    return int(facts["step"])


def find_state_damage(folder: Path) -> tuple[list[str], int]:
    """Return a line for each damaged file of a state folder, and the number of listed files.

    All of them are read. Raises TrainingError if state.json is missing or broken.
    """
    facts = read_json_object(folder / STATE_FILE, error_class=TrainingError, fix=DAMAGE_REMEDY)
    return describe_damage(folder, facts, name=STATE_FILE)


def _trained_tensors(run: TrainingRun) -> dict[str, Tensor]:
    """Return everything that training may change, by name."""
    return {**run.model.own_tensors(), **run.model.adapter_tensors()}


def build_provenance(run: TrainingRun) -> dict[str, Any]:
    """Return the facts about a model's origin for its manifest: config, sizes and versions.

    ``options`` are all options of the recipe, those that the config leaves out included.
    """
    values = {name: value for name, value in run.config.recipe.items() if name != "name"}
    options = parse_options(find_recipe(run.recipe.name).options, values, place="recipe")
    return {
        "config": run.config.model_dump(mode="json"),
        "options": asdict(options),
        "steps": run.num_steps,
        "records": [len(source.records) for source in run.sources],
        POSITIONS_KEY: find_trained_positions(run),
        "hub": list_commits(_list_names(run.config)),
        "vlduet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def find_trained_positions(run: TrainingRun) -> list[str]:
    """Return in which of `SLICE_POSITIONS` a run trains embeddings at the ends of slices.

    These have the loss `structure`, if it has a weight and there are records for it.
    """
    if "structure" not in run.loss_weights():
        return []
    kinds = {
        record.kind
        for source in run.sources
        for record in source.records
        if "structure" in run.recipe.find_losses(record)
    }
    return [name for name, kind in SLICE_POSITIONS.items() if kind in kinds]


def _list_names(config: RunConfig) -> list[tuple[Path | None, Kind]]:
    """Return the paths and names of all models and data sets of a config, with their kinds."""
    encoders = config.encoders
    models = [config.model.path, encoders.vision, encoders.text, encoders.cross]
    sources = [source.path for source in config.data.train]
    if isinstance(config.data.validation, SourceSection):
        sources.append(config.data.validation.path)
    return [*((path, "model") for path in models), *((path, "dataset") for path in sources)]


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a sentence about the alphabetically first setting that differs; None if all are equal.

    Both arguments are results of `decisive_settings`, or such results read from JSON. A missing
    setting equals one that is None.
    """
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            return f"{key} was {quote_value(before.get(key))}, is {quote_value(now.get(key))}"
    return None


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the learned weights depend on, flat, such as `train.lr` -> 1e-4.

    Values are those of JSON; lists stay lists. The output folder, the name of the preset, the
    feature cache and CHANGEABLE_SETTINGS are left out, and in training sources what is not set.
    """
    settings: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        """Add the leaves of nested dicts to `settings` under their dotted names."""
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, child)
        elif prefix.rpartition(".")[2] not in CHANGEABLE_SETTINGS:
            settings[prefix] = value

    cache_settings = {"cache", "cache_limit"}
    tree = config.model_dump(
        mode="json", exclude={"out": True, "preset": True, "data": cache_settings}
    )
    for source in tree["data"]["train"]:
        for key in [key for key, value in source.items() if not value or key == "strict"]:
            del source[key]
    flatten("", tree)
    return settings


def stop_not_finite(
    run: TrainingRun, samples: list[Sample], step: int, *, values: dict[str, float]
) -> None:
    """Save the records and values of a step with an infinite or NaN value, and the state before it.

    Every rank writes records.jsonl and measured.json into the folder ``not-finite-STEP-rankRANK``
    of `out`, replacing an earlier one; rank 0 also saves the run's state, to resume at this step.

    Raises:
        TrainingError: always; it names the values and the folder.
    """
    folder = run.config.out / f"not-finite-{step}-rank{distributed.get_rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = [json.dumps(record_to_json(sample.record, root=folder)) for sample in samples]
    write_text_atomically(folder / "records.jsonl", "\n".join(lines) + "\n")
    write_text_atomically(folder / "measured.json", json.dumps(values, indent=1))
    if distributed.is_main_process():
        save_state(run, step)
    names = [name for name, value in values.items() if not all_finite({name: value})]
    raise TrainingError(
        f"step {step}: {', '.join(names)} is not a number",
        place=folder,
        fix="Its records are saved there: correct them and --resume, "
        "or start anew with a lower train.lr",
    )
