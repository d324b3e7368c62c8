"""A tiny training run on disk: checkpoint, records, config."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from helpers import tiny

FROMAGE_OVERRIDES = [
    "recipe={name: fromage}",
    "model.head=null",
    "train.lora=null",
    "train.soft_prompts=true",
]
"""Overrides that make the run FROMAGe's."""


def write_run_config(
    folder: Path, *, count: int = 12, steps: int = 12, family: str = "fast_vlm", **train: object
) -> Path:
    """Returns the config's path; the run goes to folder/run."""
    tiny.FAMILY_BUILDERS[family](folder / "base")
    rows = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
        row = {
            "id": str(i),
            "image": f"{i}.png",
            "short": f"number {i % 9}",
            "long": "a longer text " * (1 + i % 3),
        }
        rows.append(row | ({} if i % 4 else {"long": f"only this {i}"}))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    config = {
        "out": str(folder / "run"),
        "recipe": {"name": "vladva"},
        "objectives": {"contrastive": 1.0, "language": 1.0},
        "model": {
            "path": str(folder / "base"),
            "head": "mlp",
            "dim": 8,
            "prompts": {
                "image": "<s>{image}",
                "text": "<s>{text}",
                "parts": "<s>{parts}",
                "chat": False,
            },
        },
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "validation": str(folder / "val.jsonl"),
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
    path.write_text(yaml.safe_dump(config))
    return path
