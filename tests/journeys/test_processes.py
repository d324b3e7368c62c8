"""`vlduet train` on two processes trains what one would, and survives the kill of one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import runs, tiny
from helpers.processes import MAX_SECONDS, start_process
from vlduet.logs import read_metrics

VLDUET_WITHOUT_DROPOUT = (
    "from vlduet.encoders import dual; dual.DROPOUT = 0.0; from vlduet.cli.main import main; main()"
)
"""`vlduet`, with dual encoders whose losses do not depend on the random numbers of a rank."""
CLIP = {"recipe": {"name": "clip"}, "objectives": {"contrastive": 1.0}, "model": {"dim": 8}}
"""Sections of a config that trains a dual encoder."""


@contextmanager
def start_ranks(
    config: Path, *arguments: str, world_size: int = 2
) -> Iterator[list[subprocess.Popen[Any]]]:
    """Start `vlduet train` on every rank, with the environment that torchrun would set."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    command = [sys.executable, "-c", VLDUET_WITHOUT_DROPOUT, "train", str(config), *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    with ExitStack() as stack:
        ranks = []
        for rank in range(world_size):
            if world_size > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
                environment |= {name: str(value) for name, value in names.items()}
            ranks.append(stack.enter_context(start_process(command, env=environment)))
        yield ranks


def train(config: Path, *arguments: str, world_size: int = 2) -> None:
    with start_ranks(config, *arguments, world_size=world_size) as ranks:
        assert [rank.wait(timeout=MAX_SECONDS) for rank in ranks] == [0] * world_size


def read_values(folder: Path) -> dict[int, dict[str, float]]:
    """Return the logged values of every step, without time and tokens of a rank."""
    values = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        if "loss" in row:
            step = int(row["step"])
            values[step] = {k: v for k, v in row.items() if k not in ("seconds", "tokens")}
    return values


def write_clip_config(folder: Path) -> Path:
    config = runs.write_run_config(folder, steps=5, lora=None, projector=False)
    folders = tiny.build_frozen_encoders(folder / "encoders")
    encoders = {role: str(folders[role]) for role in ("vision", "text")}
    tree = yaml.safe_load(config.read_text()) | CLIP | {"encoders": encoders}
    config.write_text(yaml.safe_dump(tree))
    return config


@pytest.mark.parametrize("recipe", ["vladva", "fromage", "clip"])
def test_two_processes_train_what_one_would(tmp_path: Path, recipe: str) -> None:
    if recipe == "clip":
        config = write_clip_config(tmp_path)
    else:
        lora = {"rank": 2, "alpha": 2, "dropout": 0.0}
        config = runs.write_run_config(tmp_path, steps=5, lora=lora)
    overrides = runs.FROMAGE_OVERRIDES if recipe == "fromage" else []
    for world_size in (1, 2):
        out = f"out={tmp_path / str(world_size)}"
        train(config, *overrides, out, world_size=world_size)
    expected, values = read_values(tmp_path / "1"), read_values(tmp_path / "2")
    assert list(expected) == list(values) == list(range(5))
    assert expected[4]["loss"] != expected[0]["loss"]
    for step, expected_values in expected.items():
        assert values[step] == pytest.approx(expected_values, rel=2e-3, abs=1e-5), step


def wait_for_steps(folder: Path) -> None:
    """Wait until a run has logged the step after the state of step 6, at most 200 seconds."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(read_values(folder)) < 8:
        time.sleep(0.005)


def find_rank(launcher: int, rank: int) -> int:
    """Return the process id of a rank that torchrun has started; 0 if it is not running."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    return 0


def test_torchrun_restarts_after_a_killed_rank(tmp_path: Path) -> None:
    """With dropout, whose random numbers differ between ranks; rank 0 holds the lock."""
    config = runs.write_run_config(tmp_path, steps=30)
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    train(config, f"out={complete}", "--resume", "auto")  # there is nothing to resume yet
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--max-restarts=2", "-m", "vlduet", "train", str(config)]
    command = [*torchrun, f"out={killed}", "--resume", "auto"]
    with start_process(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as launcher:
        wait_for_steps(killed)
        rank = find_rank(launcher.pid, 0)
        assert rank, "rank 0 had to run"
        os.kill(rank, signal.SIGKILL)
        assert 7 < len(read_values(killed)) < 30, "the run had to be killed in its middle"
        assert launcher.wait(timeout=MAX_SECONDS) == 0
    assert read_values(killed) == read_values(complete)
    assert not (killed / ".lock").exists()
