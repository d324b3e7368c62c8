"""Tiny training runs on disk: checkpoint, records and config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from helpers import tiny
from vlduet import config

FROMAGE_OVERRIDES = [
    "recipe={name: fromage}",
    "model.head=null",
    "train.lora=null",
    "train.soft_prompts=true",
]
"""Overrides that turn the run of `write_run_config` into one of FROMAGe."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_image(path: Path, seed: int) -> None:
    """Write the random image of a seed as PNG."""
    path.write_bytes(tiny.random_image(seed).data or b"")


def write_run_config(
    folder: Path, *, count: int = 12, steps: int = 12, family: str = "fast_vlm", **train: object
) -> Path:
    """Write a VladVA run with its data and checkpoint, and return the path of its config.

    Args:
        folder: gets base/, train.jsonl, val.jsonl, images and config.yaml; the run is to be
            folder/run.
        count: number of records, each an image with a short and a long caption.
        steps: number of training steps.
        family: family of the tiny checkpoint.
        train: further keys of the config's section `train`.
    """
    tiny.FAMILY_BUILDERS[family](folder / "base")
    rows = []
    for i in range(count):
        write_image(folder / f"{i}.png", i)
        row = {"id": str(i), "image": f"{i}.png", "short": f"number {i % 9}"}
        row["long"] = "a longer text " * (1 + i % 3) if i % 4 else f"only this {i}"
        rows.append(row)
    prompts = {"image": "<s>{image}", "text": "<s>{text}", "parts": "<s>{parts}", "chat": False}
    tree = {
        "out": str(folder / "run"),
        "recipe": {"name": "vladva"},
        "objectives": {"contrastive": 1.0, "language": 1.0},
        "model": {"path": str(folder / "base"), "head": "mlp", "dim": 8, "prompts": prompts},
        "data": {
            "train": [{"path": str(write_rows(folder / "train.jsonl", rows))}],
            "validation": str(write_rows(folder / "val.jsonl", rows[:6])),
        },
        "train": {
            "steps": steps,
            "batch_size": 4,
            "lr": 1e-2,
            "projector": True,
            "lora": {"rank": 2, "alpha": 2, "dropout": 0.2},
            "log_every": 1,
            "save_every": 3,
            "eval_every": 100,
            **train,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_documents(folder: Path) -> Path:
    """Write two interleaved documents, a pair and a chat to train.jsonl; return its path."""
    for i in range(4):
        write_image(folder / f"{i}.png", i)
    first = [
        {"image": "0.png"},
        {"text": "A cat. It sleeps."},
        {"image": "1.png"},
        {"text": "A dog."},
    ]
    second = [{"text": "Rain."}, {"image": "2.png"}, {"text": "And sun."}]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows: list[dict[str, Any]] = [
        {"id": "one", "parts": first},
        {"id": "two", "parts": second},
        {"id": "three", "image": "3.png", "short": "a flower"},
        {"id": "four", "messages": chat},
    ]
    return write_rows(folder / "train.jsonl", rows)


def make_sugar_config(
    folder: Path, encoders: Mapping[str, str | None], *overrides: str, family: str = "fast_vlm"
) -> config.RunConfig:
    """Write a Sugar run on `write_documents` and return its config; the run is to be folder/run."""
    tiny.FAMILY_BUILDERS[family](folder / "base")
    prompts = tiny.PLAIN_PROMPTS.to_dict()
    tree = {
        "out": str(folder / "run"),
        "recipe": {"name": "sugar"},
        "objectives": {"structure": 1.0, "language": 1.0},
        "model": {"path": str(folder / "base"), "head": "mlp", "dim": 8, "prompts": prompts},
        "encoders": dict(encoders),
        "data": {"train": [{"path": str(write_documents(folder))}]},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "lr": 1e-2,
            "lora": {"rank": 2, "alpha": 2},
            "log_every": 1,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return config.load_run_config(path, overrides)
