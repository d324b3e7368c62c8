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
from vlduet.files import recovered, whole_folder
from vlduet.train.setup import Run

FOLDER, FACTS = "state", "state.json"
MAY_CHANGE = ("log_every", "eval_every", "save_every")
"""Settings that a resumed run may have otherwise: they decide nothing that is learned."""


def save(run: Run, step: int) -> None:
    """Write the state before `step`, whole or not at all; the previous one stays until the new one is complete."""
    with whole_folder(run.config.out / FOLDER, mark=FACTS) as folder:
        tensors = {**run.model.own_tensors(), **run.model.adapter_tensors()}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / "trained.safetensors")
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / FACTS).write_text(json.dumps({"step": step, "decisive": decisive(run.config)}))


def load(run: Run) -> int:
    """Put the saved state into `run`; returns the step to go on with.

    Raises:
        TrainingError: there is no state, it is broken, or it belongs to a run with another config.
    """
    folder = recovered(run.config.out / FOLDER)
    if not (folder / FACTS).is_file():
        raise TrainingError("nothing to resume", place=folder, fix="Start without --resume")
    try:
        return _load(run, folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        what = f"broken state ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise TrainingError(what, place=folder, fix="Copy the whole run again, or start anew") from None


def _load(run: Run, folder: Path) -> int:
    facts = json.loads((folder / FACTS).read_text())
    if differs := difference(facts["decisive"], decisive(run.config)):
        raise TrainingError(differs, place=folder, fix="Resume with the same config, or start anew")
    saved = load_file(folder / "trained.safetensors")
    with torch.no_grad():
        for name, tensor in {**run.model.own_tensors(), **run.model.adapter_tensors()}.items():
            tensor.copy_(saved[name])
    run.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    return int(facts["step"])


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting, by name, that two runs do not share, in words; both are of `decisive`."""
    for key in sorted(now.keys() | was.keys()):
        if now.get(key) != was.get(key):
            return f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
    return None


def decisive(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is learned, flat: `train.lr` -> 1e-4."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix.rpartition(".")[2] not in MAY_CHANGE:
            flat[prefix] = value

    walk("", config.model_dump(mode="json", exclude={"out": True, "data": {"cache"}}))
    return flat
