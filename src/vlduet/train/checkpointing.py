"""State of an interrupted run: trained tensors, optimizer and step.

Random numbers need no state: those of a step are a function of (seed, step, rank), see
`step.seed_step`.
"""

from __future__ import annotations

import json
import pickle
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlduet import __version__
from vlduet.config import RunConfig
from vlduet.errors import TrainingError
from vlduet.files import recover_folder, replace_folder_atomically
from vlduet.logs import logger
from vlduet.train.run import TrainingRun

STATE_FOLDER = "state"
"""Folder of the state within the folder of a run."""
STATE_FILE = "state.json"
"""File with the step and the decisive settings."""
CHANGEABLE_SETTINGS = ("log_every", "eval_every", "save_every", "max_dropped")
"""Names of settings that may change when a run is resumed: nothing that is learned depends on
them."""


def save_state(run: TrainingRun, step: int) -> None:
    """Write the state of a run before `step` to ``out/state``, atomically replacing the last one.

    Files: state.json (step, number of steps, fingerprints of the records, decisive settings),
    trained.safetensors and optimizer.pt. `out` is created if it is missing.

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
        (folder / STATE_FILE).write_text(json.dumps(facts))


def load_state(run: TrainingRun) -> int:
    """Load ``out/state`` into a run's model and optimizer in place, and return the next step.

    The run gets the state's number of steps, which `train.epochs` may have computed from other
    records. Records that are not those of the state are a warning: their order is another one.

    Raises:
        TrainingError: there is no state, it is broken (tensors may then be loaded in part), or it
            belongs to a run with other decisive settings (then nothing is loaded).
    """
    folder = recover_folder(run.config.out / STATE_FOLDER)
    if not (folder / STATE_FILE).is_file():
        raise TrainingError("nothing to resume", place=folder, fix="Start without --resume")
    try:
        return _load_folder(run, folder)
    except (
        OSError, ValueError, KeyError, RuntimeError, EOFError,
        SafetensorError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise TrainingError(
            f"broken state ({reason})",
            place=folder,
            fix="Copy the whole run again, or start anew",
        ) from None


def _load_folder(run: TrainingRun, folder: Path) -> int:
    """Load a state folder into a run, in place, as `load_state` does; return the next step.

    Raises:
        TrainingError: a decisive setting differs; raised before anything is loaded.
        OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError: a
            file is missing or broken.
    """
    facts = json.loads((folder / STATE_FILE).read_text())
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


def _trained_tensors(run: TrainingRun) -> dict[str, Tensor]:
    """Return everything that training may change, by name."""
    return {**run.model.own_tensors(), **run.model.adapter_tensors()}


def build_provenance(run: TrainingRun) -> dict[str, Any]:
    """Return the facts about a model's origin for its manifest: config, sizes and versions."""
    return {
        "config": run.config.model_dump(mode="json"),
        "steps": run.num_steps,
        "records": [len(source.records) for source in run.sources],
        "vlduet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a sentence about the alphabetically first setting that differs; None if all are equal.

    Both arguments are results of `decisive_settings`, or such results read from JSON. A missing
    setting equals one that is None.
    """
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            return f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
    return None


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the learned weights depend on, flat, such as `train.lr` -> 1e-4.

    Values are those of JSON; lists stay lists. The output folder, the feature cache and
    CHANGEABLE_SETTINGS are left out, and in training sources what is not set.
    """
    settings: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        """Add the leaves of nested dicts to `settings` under their dotted names."""
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, child)
        elif prefix.rpartition(".")[2] not in CHANGEABLE_SETTINGS:
            settings[prefix] = value

    tree = config.model_dump(mode="json", exclude={"out": True, "data": {"cache"}})
    for source in tree["data"]["train"]:
        for key in [key for key, value in source.items() if not value or key == "strict"]:
            del source[key]
    flatten("", tree)
    return settings
