"""The sweeps of `alignment` as fused CUDA kernels, in Triton: exp, kappa and G in one pass over the distances.

A program takes some sequences y, one a lane, against one sequence x, and walks the cells row by row; besides the distances
it reads and writes one row of log G. Sums are taken in log space: what is added up lies in float64, its exponentials and
logarithms are of differences and in float32, so no length and no width leaves the range. Needs triton, which comes with
CUDA builds of torch.

Arguments are those of `lanes`; here any number of lanes will do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 32
"""Pairs of one program: a warp."""

NOTHING = tl.constexpr(-1e30)
"""log 0: unlike -inf, it taken from itself is 0, and float32 holds it."""


@triton.jit
def _log_kappa(distance, scale):
    """log s - log(2 - s) of s = exp(-scale distance), float32."""
    z = -tl.maximum(distance, 0.0) * scale
    return z - tl.log(2.0 - tl.exp(z))


@triton.jit
def _log_sum(a, b, c):
    """log(e^a + e^b + e^c) of three float64."""
    top = tl.maximum(tl.maximum(a, b), c)
    inner = (
        tl.exp((a - top).to(tl.float32))
        + tl.exp((b - top).to(tl.float32))
        + tl.exp((c - top).to(tl.float32))
    )
    return top + tl.log(inner).to(tl.float64)


@triton.jit
def _forward(
    cells,
    first,
    scale,
    ends_x,
    ends_y,
    log_k,
    table,
    columns,
    lanes,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """log K; `table` holds log G of every cell with KEEP, else of one row a program."""
    a = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = lane < lanes
    facts = a * lanes + lane
    scales = tl.load(scale + facts, mask=real, other=1.0)
    last_x, last_y = (
        tl.load(ends_x + facts, mask=real, other=1),
        tl.load(ends_y + facts, mask=real, other=1),
    )
    start = tl.load(first + a)
    found = tl.zeros([WIDE], tl.float64) + NOTHING
    width = columns * lanes  # numbers of a row
    for i in range(tl.max(last_x, 0)):
        left = tl.zeros([WIDE], tl.float64) + NOTHING
        corner = left
        if i == 0:
            corner = tl.zeros([WIDE], tl.float64)  # log G[0,0]
        for j in range(tl.max(last_y, 0)):
            here = j * lanes + lane
            kappa = _log_kappa(
                tl.load(cells + (start + i) * width + here, mask=real, other=0.0), scales
            )
            row = (start + i) * width if KEEP else a * width
            before = (start + i - 1) * width if KEEP else a * width
            up = tl.load(table + before + here, mask=real & (i > 0), other=NOTHING)
            new = _log_sum(left, corner, up) + kappa.to(tl.float64)
            tl.store(table + row + here, new, mask=real)
            found = tl.where((last_x == i + 1) & (last_y == j + 1), new, found)
            corner = up
            left = new
    tl.store(log_k + facts, found, mask=real)


@triton.jit
def _backward(
    cells, first, scale, ends_x, ends_y, log_k, table, rest, weights, columns, lanes,
    POSTERIOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Shares of the cells, G H / K with H the sum over the ways from a cell to the end; `rest` is a row of log(kappa H)."""
    a = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = lane < lanes
    facts = a * lanes + lane
    scales = tl.load(scale + facts, mask=real, other=1.0)
    last_x, last_y = (
        tl.load(ends_x + facts, mask=real, other=1),
        tl.load(ends_y + facts, mask=real, other=1),
    )
    total = tl.load(log_k + facts, mask=real, other=0.0)
    start = tl.load(first + a)
    width = columns * lanes
    rows, most = tl.max(last_x, 0), tl.max(last_y, 0)
    for r in range(rows):
        i = rows - 1 - r
        right = tl.zeros([WIDE], tl.float64) + NOTHING
        corner = right
        for c in range(most):
            j = most - 1 - c
            here = j * lanes + lane
            cell = (start + i) * width + here
            down = tl.load(rest + a * width + here, mask=real & (r > 0), other=NOTHING)
            ways = _log_sum(right, corner, down)
            ways = tl.where((last_x == i + 1) & (last_y == j + 1), 0.0, ways)
            ways = tl.where((i < last_x) & (j < last_y), ways, NOTHING)
            kappa = _log_kappa(tl.load(cells + cell, mask=real, other=0.0), scales)
            share = tl.exp(
                (tl.load(table + cell, mask=real, other=NOTHING) + ways - total).to(tl.float32)
            )
            if not POSTERIOR:  # d log kappa / d distance = -scale (1 + kappa)
                share = -share * (1.0 + tl.exp(kappa)) * scales
            tl.store(weights + cell, share, mask=real)
            right = ways + kappa.to(tl.float64)
            tl.store(rest + a * width + here, right, mask=real)
            corner = down


def run(
    cells: Tensor,
    first: Tensor,
    scale: Tensor,
    *,
    lengths: tuple[Tensor, Tensor],
    weigh: str | None,
) -> tuple[Tensor, Tensor]:
    """(log K float64[A, B], weights float32[R, N, B]): "posterior", "gradient" (d log K / d cells), or None for none.

    Args:
        cells: float32[R, N, B], squared distances; sequence a of x has the rows from first[a] on, and no other has them.
        first: int64[A].
        scale: float32[A, B], 1 / (2 sigma^2).
        lengths: int[A, B] of x and of y.
    """
    cells, scale = cells.detach().contiguous(), scale.contiguous()
    ends_x, ends_y = (each.to(torch.int32).contiguous() for each in lengths)
    count, lanes = scale.shape
    columns = cells.shape[1]
    log_k = torch.empty(scale.shape, dtype=torch.float64, device=cells.device)
    table = cells.new_empty(cells.shape if weigh else (count, columns, lanes), dtype=torch.float64)
    weights = torch.zeros_like(cells) if weigh else cells.new_empty(0)
    grid = (count, triton.cdiv(lanes, LANES))
    facts = (cells, first.contiguous(), scale, ends_x, ends_y, log_k, table)
    with torch.cuda.device_of(cells):
        _forward[grid](*facts, columns, lanes, KEEP=weigh is not None, WIDE=LANES, num_warps=1)
        if weigh:
            rest = cells.new_empty(count, columns, lanes, dtype=torch.float64)
            _backward[grid](
                *facts,
                rest,
                weights,
                columns,
                lanes,
                POSTERIOR=weigh == "posterior",
                WIDE=LANES,
                num_warps=1,
            )
    return log_k, weights
