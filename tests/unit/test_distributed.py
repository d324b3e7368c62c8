"""Arithmetic of the collectives, with the other ranks simulated; real processes: test_parity.py."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vlduet import distributed
from vlduet.errors import DataError


class SimulatedGroup:
    """Process group of which this process is one rank; tensors of the others are prescribed."""

    def __init__(self, rank: int, others: dict[int, Any]):
        self.rank = rank
        self.others = others
        self.world_size = len(others) + 1

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world_size

    def get_backend(self) -> str:
        return "gloo"

    def all_reduce(self, tensor: Tensor) -> None:
        """Add the tensors of the other ranks in place."""
        for other in self.others.values():
            tensor += other

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        """Fill `parts` with the rows of all ranks, padded to the length of `tensor`."""
        for rank, part in enumerate(parts):
            rows = tensor if rank == self.rank else self.others[rank]
            part.zero_()
            part[: len(rows)] = rows

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        """Fill `values` with the numbers of rows of all ranks."""
        for rank in range(self.world_size):
            values[rank] = value if rank == self.rank else len(self.others[rank])


def join(monkeypatch: pytest.MonkeyPatch, rank: int, others: dict[int, Any]) -> None:
    monkeypatch.setattr(distributed, "dist", SimulatedGroup(rank, others))


def test_gradients_are_averaged_and_a_missing_one_counts_as_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(1))
    first.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    others = {1: torch.tensor([5.0, 6.0, 7.0, 8.0, 3.0]), 2: torch.zeros(5)}
    join(monkeypatch, 0, others)
    distributed.average_gradients([first, second])
    assert second.grad is not None
    assert_close(first.grad, torch.tensor([[6.0, 8.0], [10.0, 12.0]]) / 3)
    assert_close(second.grad, torch.tensor([1.0]))


@pytest.mark.parametrize("rank", [0, 1])
def test_gathered_rows_get_the_gradient_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    rows = {0: torch.tensor([[1.0, 2.0]]), 1: torch.tensor([[3.0, 4.0], [5.0, 6.0]])}
    own = rows[rank].clone().requires_grad_()
    join(monkeypatch, rank, {1 - rank: rows[1 - rank]})
    gathered, first_row = distributed.all_gather_rows(own)
    assert first_row == rank
    assert_close(gathered.detach(), torch.cat([rows[0], rows[1]]))
    weights = torch.arange(6.0).view(3, 2)
    other_gradient = torch.full((3, 2), 10.0)  # of the other rank's loss at all rows
    join(monkeypatch, rank, {1 - rank: other_gradient})
    (gathered * weights).sum().backward()
    assert_close(own.grad, (weights + other_gradient)[first_row : first_row + len(own)])


def test_numbers_are_summed_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    join(monkeypatch, 1, {0: torch.tensor([2.5]), 2: torch.tensor([4.0])})
    assert distributed.all_reduce_sum(1.0) == 7.5


def test_a_process_group_gives_up_after_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "COLLECTIVE_TIMEOUT", timedelta(seconds=1))
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        distributed.init_process_group()  # rank 1 does not come
    assert time.monotonic() - began < 60
    assert not distributed.dist.is_initialized()


def test_a_function_runs_on_the_main_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.call_on_main(lambda: 7) == 7
    error = DataError("no such file", place="x")

    def fail() -> int:
        raise error

    with pytest.raises(DataError, match="x: no such file"):
        distributed.call_on_main(fail)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [(7, None), value])
    assert distributed.call_on_main(fail) == 7
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [(None, error), value])
    with pytest.raises(DataError, match="x: no such file"):
        distributed.call_on_main(lambda: 7)
