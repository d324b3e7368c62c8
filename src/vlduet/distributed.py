"""Ranks and the few collectives that the losses need; in one process every function is a no-op.

The rule that keeps W processes equal to one (tests/distributed): every loss is *this rank's sum, divided by the global
count, times W*; parameter gradients are averaged over ranks; what a loss needs of other ranks is gathered **with** its
gradient. Then the average over ranks of the W-fold local shares is the gradient of the global mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def init_process_group() -> None:
    """Join the process group that torchrun describes; nothing to do without torchrun."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """True in the one process that writes files and prints."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(value: float) -> float:
    """Sum of a number over all ranks."""
    if get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(box)
    return float(box.item())


def all_gather_objects(value: Any) -> list[Any]:
    """One picklable value from every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * get_world_size()
    dist.all_gather_object(found, value)
    return found


def all_gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all ranks, with gradient; ranks may have different numbers of rows.

    Args:
        rows: float[n, D], this rank's.

    Returns:
        float[N, D] in rank order, and the index where this rank's rows begin.
    """
    if get_world_size() == 1:
        return rows, 0
    counts = all_gather_objects(len(rows))
    gathered: Tensor = _GatherRows.apply(rows, counts)  # type: ignore[no-untyped-call]
    return gathered, sum(counts[: get_rank()])


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums what every rank's loss wants of these rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        padded = rows.new_zeros(longest, rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        begin = sum(ctx.counts[: get_rank()])
        return grad[begin : begin + ctx.counts[get_rank()]], None


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average .grad over ranks in one flat buffer a dtype; a parameter that this rank did not use counts as zero."""
    if get_world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= get_world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
