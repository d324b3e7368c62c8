"""What a run must keep to go on as if nothing had happened: trained tensors, optimiser, step.

Random numbers need no state: those of a step are a function of (seed, step, rank), see `vlduet.train.step.seeded`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlduet.config import RunConfig
from vlduet.errors import TrainingError
from vlduet.files import recover_folder, replace_folder_atomically
from vlduet.train.setup import TrainingRun

STATE_FOLDER, STATE_FILE = "state", "state.json"
CHANGEABLE_SETTINGS = ("log_every", "eval_every", "save_every")
"""Settings that a resumed run may have otherwise: they decide nothing that is learned."""


def save_state(run: TrainingRun, step: int) -> None:
    """Write the state before `step`, whole or not at all; the previous one stays until the new one is complete."""
    with replace_folder_atomically(run.config.out / STATE_FOLDER, marker=STATE_FILE) as folder:
        tensors = {**run.model.own_tensors(), **run.model.adapter_tensors()}
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()},
            folder / "trained.safetensors",
        )
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / STATE_FILE).write_text(
            json.dumps({"step": step, "decisive": decisive_settings(run.config)})
        )


def load_state(run: TrainingRun) -> int:
    """Put the saved state into `run`; returns the step to go on with.

    Raises:
        TrainingError: there is no state, it is broken, or it belongs to a run with another config.
    """
    folder = recover_folder(run.config.out / STATE_FOLDER)
    if not (folder / STATE_FILE).is_file():
        raise TrainingError("nothing to resume", place=folder, fix="Start without --resume")
    try:
        return _load(run, folder)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        what = f"broken state ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise TrainingError(
            what, place=folder, fix="Copy the whole run again, or start anew"
        ) from None


def _load(run: TrainingRun, folder: Path) -> int:
    facts = json.loads((folder / STATE_FILE).read_text())
    if differs := describe_difference(facts["decisive"], decisive_settings(run.config)):
        raise TrainingError(differs, place=folder, fix="Resume with the same config, or start anew")
    saved = load_file(folder / "trained.safetensors")
    with torch.no_grad():
        for name, tensor in {**run.model.own_tensors(), **run.model.adapter_tensors()}.items():
            tensor.copy_(saved[name])
    run.optimizer.load_state_dict(
        torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    )
    return int(facts["step"])


def describe_difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting, by name, that two runs do not share, in words; both are of `decisive`."""
    for key in sorted(now.keys() | was.keys()):
        if now.get(key) != was.get(key):
            return f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
    return None


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is learned, flat: `train.lr` -> 1e-4."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix.rpartition(".")[2] not in CHANGEABLE_SETTINGS:
            flat[prefix] = value

    walk("", config.model_dump(mode="json", exclude={"out": True, "data": {"cache"}}))
    return flat
