"""A run that is killed and resumed has the losses, bit for bit, of an uninterrupted one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from helpers import runs
from helpers.processes import run_process, start_process
from vlduet.cli.main import app
from vlduet.errors import VLDuetError
from vlduet.logs import read_metrics


def train_command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vlduet.cli.main", "train", str(config), *arguments]


def read_losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """Return losses and gradient norm of every logged step."""
    losses = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        if "loss" in row:
            names = ("loss", "contrastive", "language", "grad_norm")
            losses[int(row["step"])] = tuple(row[name] for name in names)
    return losses


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = runs.write_run_config(tmp_path, steps=40)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    run_process(train_command(config, f"out={complete}"), check=True, env=environment)
    with start_process(train_command(config, f"out={killed}"), env=environment):
        deadline = time.monotonic() + 200
        # Wait for the state of step 9 and one more step; the end of the block is the kill.
        while time.monotonic() < deadline and len(read_losses(killed)) < 11:
            time.sleep(0.005)
    losses_before = read_losses(killed)
    assert 10 < len(losses_before) < 40, "the run had to be killed in its middle"

    resume = train_command(config, f"out={killed}", "--resume")
    run_process(resume, check=True, env=environment)
    expected = read_losses(complete)
    assert read_losses(killed) == expected
    assert all(expected[step] == values for step, values in losses_before.items())
    tensors = [folder / "model" / "duet.safetensors" for folder in (complete, killed)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    assert len({loss for loss, *_ in expected.values()}) > 30, "the loss must change"


def test_resuming_with_another_config_is_refused(tmp_path: Path) -> None:
    command = ["train", str(runs.write_run_config(tmp_path, steps=2))]
    runner = CliRunner()
    assert runner.invoke(app, command).exit_code == 0
    changed = runner.invoke(app, [*command, "train.lr=0.5", "--resume"])
    assert isinstance(changed.exception, VLDuetError)
    assert "train.lr was 0.01, is 0.5" in str(changed.exception)
    restarted = runner.invoke(app, command)
    assert isinstance(restarted.exception, VLDuetError)
    assert "--resume" in str(restarted.exception)
