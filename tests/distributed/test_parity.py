"""Two real processes, and four, compute the loss and the gradients of one: for every loss alone, and for both of a recipe;
also where one of them has nothing to embed, or nothing at all, and where all cut their share into chunks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from torch.testing import assert_close

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_equal_one(tmp_path: Path, subtests: pytest.Subtests, world_size: int) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    port = str(free_port())
    # Starting processes costs more than any case, so the same ones run all cases.
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", str(r), str(world_size), port, tmp_path],
            env=environment,
        )
        for r in range(world_size)
    ]
    model = worker.model_in_float64(tmp_path / "one")
    alone = {
        case: worker.share(model, case, 0, 1)
        for case in (worker.CASES if world_size == 2 else worker.FOUR)
    }
    assert [rank.wait(timeout=480) for rank in ranks] == [0] * world_size
    for case, one in alone.items():
        with subtests.test(case):
            found = [
                torch.load(tmp_path / f"{case} {r}.pt", weights_only=True)
                for r in range(world_size)
            ]
            assert one["loss"] != 0 and any(
                g.abs().max() > 1e-6 for n, g in one.items() if "lora_A" in n
            )
            for name, value in one.items():
                for rank in found:
                    assert_close(
                        rank[name],
                        value,
                        atol=1e-10,
                        rtol=1e-8,
                        msg=lambda m, name=name: f"{name}: {m}",
                    )
