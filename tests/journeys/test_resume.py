"""A run that is killed with SIGKILL and resumed has the losses, bit for bit, of one that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import runs
from vlduet.logs import read_metrics


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vlduet.cli.main", "train", str(config), *arguments]


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return {
        int(r["step"]): (r["loss"], r["contrastive"], r["language"], r["grad_norm"]) for r in rows
    }


def test_kill_and_resume(tmp_path: Path) -> None:
    config = runs.write_run_config(tmp_path, steps=40)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(config, f"out={whole}"), check=True, env=environment, timeout=300)

    process = subprocess.Popen(command(config, f"out={killed}"), env=environment)
    deadline = time.monotonic() + 200
    while (
        time.monotonic() < deadline and len(losses(killed)) < 11
    ):  # wait for the state of step 9, then some
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = losses(killed)
    assert 10 < len(before) < 40, "the run was to be killed in its middle"

    subprocess.run(
        command(config, f"out={killed}", "--resume"), check=True, env=environment, timeout=300
    )
    assert losses(killed) == losses(whole)
    assert all(losses(whole)[step] == values for step, values in before.items())
    one, other = (
        (folder / "model" / "duet.safetensors").read_bytes() for folder in (whole, killed)
    )
    assert one == other
    assert len({value[0] for value in losses(whole).values()}) > 30, "the loss must move"


def test_resume_refuses_another_config(tmp_path: Path) -> None:
    config = runs.write_run_config(tmp_path, steps=2)
    subprocess.run(command(config), check=True, timeout=200)
    found = subprocess.run(
        command(config, "train.lr=0.5", "--resume"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert found.returncode == 1
    assert "train.lr was 0.01, is 0.5" in found.stderr and "Traceback" not in found.stderr
    again = subprocess.run(
        command(config), capture_output=True, text=True, timeout=200, check=False
    )
    assert again.returncode == 1 and "--resume" in again.stderr
