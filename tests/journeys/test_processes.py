"""`vlduet train` on two processes: what one would train, for every kind of recipe; and a kill of both loses nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers import runs, tiny
from vlduet.logs import read_metrics

COMMAND = (
    "from vlduet.encoders import dual; dual.DROPOUT = 0.0; from vlduet.cli.main import main; main()"
)
"""`vlduet`; a dual encoder draws other random numbers on every rank, and cannot be compared."""
CLIP = {"recipe": {"name": "clip"}, "objectives": {"contrastive": 1.0}, "model": {"dim": 8}}


def start(config: Path, *arguments: str, world_size: int = 2) -> list[subprocess.Popen[bytes]]:
    """The ranks, with what torchrun sets for them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    words = [sys.executable, "-c", COMMAND, "train", str(config), *arguments]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    of_rank = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world_size)}
        for r in range(world_size)
    ]
    return [
        subprocess.Popen(words, env=shared | own) for own in (of_rank if world_size > 1 else [{}])
    ]


def trained(config: Path, *arguments: str, world_size: int = 2) -> None:
    ranks = start(config, *arguments, world_size=world_size)
    assert [rank.wait(timeout=300) for rank in ranks] == [0] * world_size


def losses(folder: Path) -> dict[int, dict[str, float]]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return {
        int(row["step"]): {k: v for k, v in row.items() if k not in ("seconds", "tokens")}
        for row in rows
    }


@pytest.mark.parametrize("recipe", ["vladva", "fromage", "clip"])
def test_two_processes_train_what_one_would(tmp_path: Path, recipe: str) -> None:
    config = runs.write_run_config(
        tmp_path,
        steps=5,
        lora=None if recipe == "clip" else {"rank": 2, "alpha": 2, "dropout": 0.0},
    )
    if recipe == "clip":
        folders = tiny.build_frozen_encoders(tmp_path / "encoders")
        encoders = {"encoders": {role: str(folders[role]) for role in ("vision", "text")}}
        tree = yaml.safe_load(config.read_text()) | CLIP | encoders
        tree["train"] |= {"projector": False}
        config.write_text(yaml.safe_dump(tree))
    changed = runs.FROMAGE_OVERRIDES if recipe == "fromage" else []
    found = []
    for world_size in (1, 2):
        out = tmp_path / f"on-{world_size}"
        trained(config, *changed, f"out={out}", world_size=world_size)
        found.append(losses(out))
    one, two = found
    assert list(one) == list(two) == list(range(5)) and one[4]["loss"] != one[0]["loss"]
    for step, values in one.items():
        assert two[step] == pytest.approx(values, rel=2e-3, abs=1e-5), step


def test_both_are_killed_and_resumed(tmp_path: Path) -> None:
    """With dropout, whose random numbers differ between ranks."""
    config = runs.write_run_config(tmp_path, steps=30)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trained(config, f"out={whole}")
    ranks = start(config, f"out={killed}")
    deadline = time.monotonic() + 200
    while (
        time.monotonic() < deadline and len(losses(killed)) < 8
    ):  # wait for the state of step 6, then some
        time.sleep(0.005)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.wait()
    assert 7 < len(losses(killed)) < 30, "the run was to be killed in its middle"
    trained(config, f"out={killed}", "--resume")
    assert losses(killed) == losses(whole)
