"""Two and four real processes compute the loss and the gradients of one.

For every loss alone and for both of a recipe; also where a process has nothing to embed or no
record at all, and where all divide their share into chunks.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
import worker
from torch.testing import assert_close

from helpers.processes import MAX_SECONDS, start_process

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def start_ranks(folder: Path, world_size: int) -> Iterator[list[Popen[Any]]]:
    """Start one worker for each rank; they save their results into the folder."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    port = str(find_free_port())
    script = str(FOLDER / "worker.py")
    with ExitStack() as stack:
        ranks = []
        for rank in range(world_size):
            command = [sys.executable, script, str(rank), str(world_size), port, str(folder)]
            ranks.append(stack.enter_context(start_process(command, env=environment)))
        yield ranks


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_equal_one(tmp_path: Path, subtests: pytest.Subtests, world_size: int) -> None:
    # Starting processes costs more than any case, so the same ones compute all cases.
    with start_ranks(tmp_path, world_size) as ranks:
        model = worker.build_double_model(tmp_path / "single")
        names = worker.case_names(world_size)
        expected_results = {name: worker.compute_share(model, name, 0, 1) for name in names}
        assert [rank.wait(timeout=MAX_SECONDS) for rank in ranks] == [0] * world_size
    for name, expected in expected_results.items():
        with subtests.test(name):
            lora = [value for key, value in expected.items() if "lora_A" in key]
            assert expected["loss"] != 0 and any(value.abs().max() > 1e-6 for value in lora)
            for rank in range(world_size):
                results = torch.load(tmp_path / f"{name} {rank}.pt", weights_only=True)
                for key, value in expected.items():
                    assert_close(
                        results[key],
                        value,
                        atol=1e-10,
                        rtol=1e-8,
                        msg=lambda message, key=key: f"{key}: {message}",
                    )
