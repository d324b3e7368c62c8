"""The sweep of GAK along anti-diagonals, forward and back, in log space and on any device; and the way to the compiled one.

`log_gak` takes log kappa as float[P, M, N]. `log_gak_cells` takes squared distances in the order in which one matrix product
leaves them, and is compiled where it can be: in float32, by numba on a CPU (`lanes`; what that cannot hold is swept again in
log space) and by Triton on CUDA (`fused`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlduet.objectives.gak import threads

INF = float("inf")

SMALL = 1 << 17
"""Cells that one thread sweeps before another could have begun."""


def log_gak(log_kappa: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
    """log K of every pair: float[P, M, N] to float64[P], differentiable. What lies beyond the lengths is never read."""
    log_kappa = inside(log_kappa, lengths_x, lengths_y, outside=-INF)
    found: Tensor = _Align.apply(log_kappa, lengths_x, lengths_y)  # type: ignore[no-untyped-call]
    return found


def log_kappas(sqdist: Tensor, scale: Tensor, band: int | None) -> Tensor:
    """log s - log(2 - s) with s = w exp(-scale sqdist): float[P, M, N], scale float[P]."""
    z = sqdist.clamp(min=0) * -scale[:, None, None]
    if band is not None:
        z = z + _log_band(*sqdist.shape[1:], band=band, like=sqdist)
    return z - torch.log1p(-torch.expm1(z))  # log(2 - e^z), exact near z = 0


def inside(cells: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, outside: float = 0.0) -> Tensor:
    """One value beyond the lengths, whatever was there: padding must not make a NaN, here or in a gradient."""
    _, m, n = cells.shape
    x = torch.arange(m, device=cells.device)[None, :, None] < lengths_x[:, None, None]
    y = torch.arange(n, device=cells.device)[None, None, :] < lengths_y[:, None, None]
    return cells.masked_fill(~(x & y), outside)


def _log_band(m: int, n: int, *, band: int, like: Tensor) -> Tensor:
    """log of the triangular weight 1 - |i - j| / band (Cuturi 2011): float[m, n]."""
    away = (
        torch.arange(m, device=like.device)[:, None] - torch.arange(n, device=like.device)
    ).abs()
    return torch.log((1 - away.to(like.dtype) / band).clamp(min=0))


# ------------------------------------------------------------------ log space


class _Align(torch.autograd.Function):
    """log K of a batch of log kappas; the backward sweep gives the alignment posterior."""

    @staticmethod
    def forward(ctx: Any, log_kappa: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
        cells = log_kappa.permute(1, 2, 0).contiguous()  # [M, N, P]: pairs are the lanes
        keep = ctx.needs_input_grad[0]
        total, table, offset = _sweep(cells, lengths_x, lengths_y, keep=keep)
        if keep:
            ctx.save_for_backward(cells, table, offset, lengths_x, lengths_y)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        posterior = _sweep_back(*ctx.saved_tensors)  # [M, N, P]
        return (posterior * grad.to(posterior.dtype)).permute(2, 0, 1), None, None


def _diagonal(cells: Tensor, k: int) -> Tensor:
    """View [count, P] of the cells (i, k - i) of [M, N, P], by rising i."""
    m, n, pairs = cells.shape
    low, high = _rows(m, n, k)
    first = low * n + k - low
    return cells.as_strided(
        (high - low + 1, pairs), ((n - 1) * pairs, 1), cells.storage_offset() + first * pairs
    )


def _rows(m: int, n: int, k: int) -> tuple[int, int]:
    """First and last row of anti-diagonal k."""
    return max(0, k - n + 1), min(k, m - 1)


def _sweep(
    log_kappa: Tensor, ends_x: Tensor, ends_y: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log K float64[P]; with `keep`, log G as table [M, N, P] relative to the offsets float64[K, P] of its diagonals.

    A diagonal is kept relative to its largest cell, and what that adds up to in float64: log G itself grows to hundreds,
    where float32 has lost the digits that matter after normalisation.
    """
    m, n, pairs = log_kappa.shape
    table = torch.empty_like(log_kappa) if keep else log_kappa.new_empty(0)
    ends = ends_x + ends_y - 2  # the diagonal of the last cell
    row = ends_x[None]  # buffers have one row more, before the first
    offset = torch.zeros(pairs, dtype=torch.float64, device=log_kappa.device)
    total = torch.full_like(offset, -INF)
    offsets = []
    before, last, current = (log_kappa.new_full((m + 1, pairs), -INF) for _ in range(3))
    before[0] = 0.0  # log G[0,0]
    floor = torch.finfo(log_kappa.dtype).min
    for k in range(m + n - 1):
        low, high = _rows(m, n, k)
        diagonal, up, left = before[low : high + 1], last[low : high + 1], last[low + 1 : high + 2]
        top = torch.maximum(torch.maximum(diagonal, up), left).clamp_(
            min=floor
        )  # -inf - -inf is NaN
        inner = (diagonal - top).exp_().add_((up - top).exp_()).add_((left - top).exp_()).log_()
        inner.add_(top).add_(_diagonal(log_kappa, k))
        peak = inner.amax(0)
        peak = torch.where(peak > -INF, peak, 0.0)
        current.fill_(-INF)
        torch.sub(inner, peak, out=current[low + 1 : high + 2])
        last.sub_(peak)  # the next diagonal adds cells of this one and of the one before
        offset = offset + peak.double()
        if keep:
            _diagonal(table, k).copy_(current[low + 1 : high + 2])
            offsets.append(offset)
        total = torch.where(ends == k, current.gather(0, row)[0].double() + offset, total)
        before, last, current = last, current, before
    return total, table, torch.stack(offsets) if keep else offset


def _sweep_back(
    log_kappa: Tensor, table: Tensor, offset: Tensor, ends_x: Tensor, ends_y: Tensor
) -> Tensor:
    """The alignment posterior [M, N, P]: a cell passes its weight on to what it was summed from.

    E[i,j] = sum over its three successors t of E[t] G[i,j] kappa[t] / G[t]          (Cuturi and Blondel 2017, alg. 2)
    """
    m, n, pairs = log_kappa.shape
    posterior = torch.zeros_like(log_kappa)
    ends, row = ends_x + ends_y - 2, (ends_x - 1)[None]
    # Of the two diagonals after this one, by row: their weights and log(kappa / G), a row more at the end.
    weight1, weight2 = (log_kappa.new_zeros(m + 1, pairs) for _ in range(2))
    ratio1, ratio2 = (
        torch.full_like(weight1, -INF) for _ in range(2)
    )  # 0 * exp(-inf), never 0 * inf
    for k in range(m + n - 2, -1, -1):
        low, high = _rows(m, n, k)
        here = _diagonal(table, k)
        step1 = (offset[k] - offset[min(k + 1, m + n - 2)]).to(here.dtype)
        step2 = (offset[k] - offset[min(k + 2, m + n - 2)]).to(here.dtype)
        right, down = slice(low, high + 1), slice(low + 1, high + 2)
        found = weight1[right] * (here + ratio1[right] + step1).exp_()
        found.add_(weight1[down] * (here + ratio1[down] + step1).exp_())
        found.add_(weight2[down] * (here + ratio2[down] + step2).exp_())
        weight0, ratio0 = torch.zeros_like(weight1), torch.full_like(ratio1, -INF)
        weight0[low : high + 1] = found
        weight0.scatter_(
            0, row, torch.where((ends == k)[None], 1.0, weight0.gather(0, row)).to(weight0.dtype)
        )
        reached = here > -INF  # where G = 0 nothing passes
        ratio0[low : high + 1] = torch.where(reached, _diagonal(log_kappa, k) - here, -INF)
        weight0[low : high + 1] = torch.where(reached, weight0[low : high + 1], 0.0)
        _diagonal(posterior, k).copy_(weight0[low : high + 1])
        weight1, weight2, ratio1, ratio2 = weight0, weight1, ratio0, ratio1
    return posterior


# ------------------------------------------------------------------ compiled, or not


@cache
def compiled() -> ModuleType | None:
    """`lanes`, where numba is installed and has a place for its cache."""
    try:
        from vlduet.objectives.gak import cpu_numba
    except (ImportError, RuntimeError):
        return None
    return cpu_numba


@cache
def fused() -> ModuleType | None:
    """`fused`, where triton is installed."""
    try:
        from vlduet.objectives import fused
    except ImportError:
        return None
    return fused


def engine(like: Tensor, band: int | None) -> ModuleType | None:
    """What sweeps tensors such as this in one go: `lanes`, `fused`, or None, which is log space."""
    if like.dtype != torch.float32 or band is not None:
        return None
    return {"cpu": compiled, "cuda": fused}.get(like.device.type, lambda: None)()


def log_gak_cells(
    cells: Tensor,
    first: Tensor,
    scale: Tensor,
    *,
    lengths_x: Tensor,
    lengths_y: Tensor,
    band: int | None = None,
) -> Tensor:
    """log K of A x B pairs: float64[A, B], differentiable in `cells`.

    Args:
        cells: float[R, N, B], squared distances of a slice of x to the slices of each of B sequences y.
        first: int64[A], the row of the first slice of every x.
        scale: float[A, B], 1 / (2 sigma^2).
        lengths_x, lengths_y: int64[A, B].
    """
    if engine(cells, band) is not None:
        found: Tensor = _Cells.apply(cells, first, scale, lengths_x, lengths_y)  # type: ignore[no-untyped-call]
        return found
    rows = first[:, None] + torch.arange(int(lengths_x.max()), device=cells.device)  # [A, M]
    pairs = cells[rows.clamp(max=len(cells) - 1)].permute(0, 3, 1, 2).flatten(0, 1)  # [A * B, M, N]
    x, y = lengths_x.reshape(-1), lengths_y.reshape(-1)
    log_kappa = log_kappas(inside(pairs, x, y), scale.reshape(-1), band)
    return log_gak(log_kappa, x, y).view(scale.shape)


def log_gak_alone(
    cells: Tensor, first: Tensor, scale: Tensor, *, lengths_x: Tensor, lengths_y: Tensor
) -> Tensor:
    """`log_gak_cells` by `lanes` on this thread alone, without gradients; several of `first` may be the same.

    Nearly without torch: each of its calls hands the interpreter on, and waits until it comes back.
    """
    cpu_numba = compiled()
    assert cpu_numba is not None
    arrays = _arrays(scale, lengths_x, lengths_y)
    cpu_numba.sweep(cells.numpy(), first.numpy(), **arrays)
    log_k = torch.from_numpy(arrays["log_k"])
    if np.isnan(arrays["log_k"]).any():
        _mend(cells, (first, scale, lengths_x, lengths_y), log_k=log_k)
    return log_k


def weigh_alone(
    cells: Callable[[], Tensor],
    first: Tensor,
    scale: Tensor,
    *,
    lengths_x: Tensor,
    lengths_y: Tensor,
) -> tuple[Tensor, Tensor]:
    """`log_gak_alone`, and d log K / d cells, float[R, N, B], which is made in the cells' own place.

    Args:
        cells: makes them; asked again where the range of the compiled sweep was not enough.
    """
    cpu_numba = compiled()
    assert cpu_numba is not None
    arrays, weights = _arrays(scale, lengths_x, lengths_y), cells()
    plain = weights.numpy()  # every row and column is of some pair, so every one is written
    cpu_numba.sweep_back(plain, first.numpy(), **arrays, weights=plain, posterior=False)
    log_k = torch.from_numpy(arrays["log_k"])
    if np.isnan(arrays["log_k"]).any():
        facts = first, scale, lengths_x, lengths_y
        _mend(cells(), facts, log_k=log_k, weights=weights, weigh="gradient")
    return log_k, weights


def _arrays(scale: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> dict[str, np.ndarray]:
    """What `lanes` takes beside the cells, and room for log K."""
    x, y = (np.ascontiguousarray(each.numpy(), dtype=np.int32) for each in (lengths_x, lengths_y))
    return {"scale": scale.numpy(), "ends_x": x, "ends_y": y, "log_k": np.empty(scale.shape)}


class _Cells(torch.autograd.Function):
    """`log_gak_cells` by the compiled sweep. Where a gradient will be asked for, it is made at once: one weight a cell."""

    @staticmethod
    def forward(
        ctx: Any, cells: Tensor, first: Tensor, scale: Tensor, lengths_x: Tensor, lengths_y: Tensor
    ) -> Tensor:
        keep = ctx.needs_input_grad[0]
        log_k, weights = run(
            cells, first, scale, lengths=(lengths_x, lengths_y), weigh="gradient" if keep else None
        )
        if keep:
            ctx.save_for_backward(weights, first)
        return log_k

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, first = ctx.saved_tensors
        row = torch.arange(len(weights), device=first.device)
        owner = torch.searchsorted(first, row, right=True) - 1  # the sequence of a row
        return weights * grad.float()[owner, None, :], None, None, None, None


def run(
    cells: Tensor,
    first: Tensor,
    scale: Tensor,
    *,
    lengths: tuple[Tensor, Tensor],
    weigh: str | None,
) -> tuple[Tensor, Tensor]:
    """(log K float64[A, B], weights as `lanes.sweep_back` leaves them: "posterior", "gradient" or None for none)."""
    found = engine(cells, None)
    assert found is not None
    if found is fused():
        done: tuple[Tensor, Tensor] = found.run(cells, first, scale, lengths=lengths, weigh=weigh)
        return done
    return _on_cpu(found, cells, (first, scale, *lengths), weigh=weigh)


def _on_cpu(
    cpu_numba: ModuleType,
    cells: Tensor,
    facts: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    weigh: str | None,
) -> tuple[Tensor, Tensor]:
    """`run` by `lanes`, over threads; facts are first, scale and both lengths."""
    first, scale, *lengths = facts
    scale = scale.contiguous()
    ends = [each.to(torch.int32).contiguous() for each in lengths]
    log_k = torch.empty(scale.shape, dtype=torch.float64)
    weights = torch.zeros_like(cells) if weigh else cells.new_empty(0)
    plain = cells.detach().contiguous().numpy()

    def sweep(part: slice) -> None:
        given = {"scale": scale, "ends_x": ends[0], "ends_y": ends[1], "log_k": log_k}
        arrays = {name: each[part].numpy() for name, each in given.items()}
        if weigh:
            cpu_numba.sweep_back(
                plain,
                first[part].numpy(),
                **arrays,
                weights=weights.numpy(),
                posterior=weigh == "posterior",
            )
        else:
            cpu_numba.sweep(plain, first[part].numpy(), **arrays)

    shares = min(torch.get_num_threads(), 1 + cells.numel() // SMALL, len(first))
    at = torch.tensor([len(cells) * i // shares for i in range(1, shares)])
    edges = [
        0,
        *torch.searchsorted(first, at).tolist(),
        len(first),
    ]  # by rows: the last sequences are the longest
    threads.map_in_threads(sweep, [slice(begin, end) for begin, end in pairwise(edges)])
    _mend(
        cells.detach(),
        (first, scale, *lengths),
        log_k=log_k,
        weights=weights if weigh else None,
        weigh=weigh,
    )
    return log_k, weights


def _mend(
    cells: Tensor,
    facts: tuple[Tensor, ...],
    *,
    log_k: Tensor,
    weights: Tensor | None = None,
    weigh: str | None = None,
) -> None:
    """In log space what came out NaN, where the compiled sweep ran out of range."""
    lost = log_k.isnan().nonzero()
    for some in lost.split(max(1, SMALL // cells[0].numel())) if len(lost) else ():
        _again(cells, some, facts, log_k=log_k, weights=weights, weigh=weigh)


def _again(
    cells: Tensor,
    lost: Tensor,
    facts: tuple[Tensor, ...],
    *,
    log_k: Tensor,
    weights: Tensor | None,
    weigh: str | None,
) -> None:
    """The pairs int64[F, 2] in log space."""
    a, b = lost.unbind(1)
    first, scale, x, y = (each[a] if each.dim() == 1 else each[a, b] for each in facts)
    inner = torch.arange(int(x.max()))
    rows = (first[:, None] + inner).clamp(max=len(cells) - 1)  # [F, M]
    sqdist = inside(cells[rows, :, b[:, None]].double(), x, y)  # [F, M, N]
    with torch.enable_grad():
        sqdist.requires_grad_()
        log_kappa = log_kappas(sqdist, scale.double(), None)
        total = log_gak(log_kappa, x, y)
        log_k[a, b] = total.detach()
        if weights is not None:
            (share,) = torch.autograd.grad(
                total.sum(), log_kappa if weigh == "posterior" else sqdist
            )
            pair, row = (inner < x[:, None]).nonzero(as_tuple=True)
            weights[rows[pair, row], :, b[pair]] = share[pair, row].float()
