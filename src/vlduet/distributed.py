"""Process group and the few collectives that the losses need; with one process they do nothing.

One rule makes W processes compute the same step as one process (see tests/distributed): every loss
is *the sum over this rank's terms, divided by the global number of terms, times W*. Parameter
gradients are averaged over the ranks, and what a loss needs from other ranks is gathered *with* its
gradient. The average of these W-fold shares is then the gradient of the global mean.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vlduet.errors import VLDuetError
from vlduet.logs import logger

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Longest time that a rank waits for the others, which then counts as an error.

torchrun notices at once when a process ends; the limit is for processes and connections that hang.
It must exceed the time in which the main process validates or saves while the others wait, for
which torch's 10 minutes with nccl are too short.
"""


def init_process_group() -> None:
    """Join the process group that torchrun describes in the environment.

    Uses nccl and selects GPU ``LOCAL_RANK`` as current device where CUDA is available, else gloo.
    On one node it also works after torchrun has restarted the processes (see `_open_store`).
    All processes but the main one log errors only from then on, because they all do the same work.
    Without ``LOCAL_RANK``, or if a process group exists, nothing happens. Here and in collectives,
    torch raises an error after `COLLECTIVE_TIMEOUT`.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    store, rank, world_size = _open_store()
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    if not is_main_process():
        logger.setLevel(logging.ERROR)


def _open_store() -> tuple[Store, int, int]:
    """Return the store of torchrun in which ranks find each other, this rank, and their number.

    torchrun keeps the store when it restarts the processes, with the addresses of the dead ones,
    which a new process would wait for. On one node the keys therefore have the number of restarts
    in front. With several nodes this number may differ between them, so their keys have no prefix.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is not None and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = PrefixStore(f"restart-{restarts}", store)
    return store, rank, world_size


def get_world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return the number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return True in the one process (rank 0) that writes files and logs."""
    return get_rank() == 0


def barrier() -> None:
    """Block until every rank has called this function."""
    if dist.is_initialized():
        dist.barrier()


def call_on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process only; return its picklable result on all ranks.

    Collective: every rank must call it. A VLDuetError or OSError of the function is raised on all
    ranks, so that none waits for a process that has ended.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main_process():
        try:
            outcome = (function(), None)
        except (VLDuetError, OSError) as error:
            outcome = (None, error)
    result, main_error = all_gather_objects(outcome)[0]
    if main_error is not None:
        raise main_error
    return cast("T", result)


def all_reduce_sum(value: float) -> float:
    """Return the sum, in float64, of a number over all ranks; `value` itself with one process.

    Collective: every rank must call it.
    """
    if get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total.item())


def all_gather_objects(value: Any) -> list[Any]:
    """Return a list of the picklable values that all ranks passed, in rank order.

    Collective: every rank must call it. With one process it returns ``[value]``, without a copy.
    """
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Concatenate the rows of all ranks; gradients flow back to the rank that a row came from.

    Collective: every rank must call it, forward and backward. The numbers of rows may differ.

    Args:
        rows: float[n, D], the rows of this rank.

    Returns:
        float[N, D], the rows of all ranks in rank order, and the index of this rank's first row
        among them. With one process, `rows` itself and 0.
    """
    if get_world_size() == 1:
        return rows, 0
    counts = all_gather_objects(len(rows))
    gathered: Tensor = _GatherRows.apply(rows, counts)  # type: ignore[no-untyped-call]
    return gathered, sum(counts[: get_rank()])


class _GatherRows(torch.autograd.Function):
    """Autograd function of `all_gather_rows`.

    Its backward pass sums the gradients that the losses of all ranks have for this rank's rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        """Gather float[counts[rank], D] from every rank into float[sum(counts), D], in rank order.

        `counts` has the number of rows of each rank, and is stored in `ctx` for the backward pass.
        """
        ctx.counts = counts
        # all_gather needs equal shapes, so every rank pads to the longest.
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return this rank's slice, float[n, D], of the gradient summed over ranks.

        The other value is the gradient of `counts`, None.
        """
        grad = grad.contiguous()
        dist.all_reduce(grad)
        begin = sum(ctx.counts[: get_rank()])
        return grad[begin : begin + ctx.counts[get_rank()]], None


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the ``.grad`` of every parameter, in place, by its average over all ranks.

    Collective: every rank passes the same parameters in the same order. A parameter without a
    gradient on this rank counts as zero and gets one. Gradients of one dtype are reduced in a
    single flat buffer. With one process nothing happens.
    """
    if get_world_size() == 1:
        return
    grads_by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads_by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for grads in grads_by_dtype.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= get_world_size()
        parts = flat.split([grad.numel() for grad in grads])
        for grad, average in zip(grads, parts, strict=True):
            grad.copy_(average.view_as(grad))
