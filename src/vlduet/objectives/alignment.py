"""Global alignment kernel (GAK), its alignment posterior, soft-DTW and the alignment-weighted mean.

    z_ij   = -|x_i - y_j|^2 / (2 sigma^2)           sigma = delta sqrt((M + N) / 2)
    s_ij   = w_ij exp(z_ij)                         w_ij = 1, or max(0, 1 - |i - j| / T) with a band T
    kappa  = s / (2 - s)
    G[0,0] = 1, G[i,0] = G[0,j] = 0
    G[i,j] = (G[i,j-1] + G[i-1,j-1] + G[i-1,j]) kappa_ij            K(x, y) = G[M,N]

Sugar (arXiv 2411.00304) sec. 3.2; Cuturi et al. 2007 eq. 5, Cuturi 2011 eq. 8 for the band. All that is public returns or
uses log K, swept along anti-diagonals in log space for all pairs at once. Gradients come from a sweep of their own:
d log K / d log kappa is the alignment posterior, the probability that an alignment drawn in proportion to its product of
kappas passes through a cell (soft-DTW's expected alignment, Cuturi and Blondel 2017 alg. 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def gak_pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None = None
) -> Tensor:
    """log K of every pair, raw, from the squared distances of its slices; differentiable in `sqdist`.

    Args:
        sqdist: float[P, M, N]. What lies beyond a pair's lengths is never read.
        lengths_x, lengths_y: int[P], 1..M and 1..N.
        sigma: float[P] or a number.
        band: keeps |i - j| < band, with the triangular weight; None for all.

    Returns:
        float[P]; -inf where the band leaves no alignment.

    Raises:
        ValueError: an empty sequence, a length beyond the matrix, sigma or band not positive, NaN in `sqdist`.
    """
    lengths_x, lengths_y = _lengths(sqdist, lengths_x, lengths_y)
    log_kappa = _log_kappa(_inside(sqdist, lengths_x, lengths_y), sigma, band)
    return log_gak(log_kappa, lengths_x, lengths_y)


def log_gak(log_kappa: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
    """log K from log kappa: float[P, M, N] to float[P]; what lies beyond the lengths is never read. See `gak_pairs`."""
    log_kappa = _inside(log_kappa, lengths_x, lengths_y, outside=-INF)
    found: Tensor = _Align.apply(log_kappa, lengths_x, lengths_y)  # type: ignore[no-untyped-call]
    if bool(found.isnan().any()):
        raise ValueError("NaN among the squared distances of the slices")
    return found


def alignment_posterior_pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None = None
) -> Tensor:
    """Probability of every cell to lie on the alignment, d log K / d log kappa: float[P, M, N], 0 beyond the lengths.

    Arguments as in `gak_pairs`. A target, not a prediction: no gradient flows through it.
    """
    lengths_x, lengths_y = _lengths(sqdist, lengths_x, lengths_y)
    with torch.enable_grad():
        log_kappa = _log_kappa(_inside(sqdist.detach(), lengths_x, lengths_y), sigma, band).requires_grad_()
        total = log_gak(log_kappa, lengths_x, lengths_y)
        (posterior,) = torch.autograd.grad(total.sum(), log_kappa)
    return posterior


def awm_pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None = None
) -> Tensor:
    """Alignment-weighted mean of the cosines of unit slices: sum_ij P_ij cos_ij / sum_ij P_ij, float[P] in [-1, 1].

    P is the alignment posterior and cos = 1 - sqdist / 2. A target: no gradient flows through it.
    """
    weight = alignment_posterior_pairs(sqdist, lengths_x, lengths_y, sigma=sigma, band=band)
    cosine = 1 - _inside(sqdist.detach(), lengths_x, lengths_y) / 2
    # A band may leave no alignment: no weight, no similarity.
    return (weight * cosine).sum((1, 2)) / weight.sum((1, 2)).clamp(min=torch.finfo(weight.dtype).tiny)


def soft_dtw(cost: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Soft-DTW of every pair (Cuturi and Blondel 2017): float[P, M, N] costs to float[P]; differentiable.

    The same sweep with log kappa = -cost / gamma: sdtw = -gamma log K.
    """
    if not gamma > 0:
        raise ValueError(f"gamma = {gamma}: it must be positive")
    lengths_x, lengths_y = _lengths(cost, lengths_x, lengths_y)
    return -gamma * log_gak(_inside(cost, lengths_x, lengths_y) / -gamma, lengths_x, lengths_y)


def rule_sigma(lengths_x: Tensor, lengths_y: Tensor, delta: float = 1.0) -> Tensor:
    """delta sqrt((M + N) / 2), the width that Sugar gives to a pair of lengths (broadcast)."""
    return delta * ((lengths_x + lengths_y) / 2).sqrt()


# ------------------------------------------------------------------ log space, any device


class _Align(torch.autograd.Function):
    """log K of a batch of log kappas; the backward sweep gives the alignment posterior."""

    @staticmethod
    def forward(ctx: Any, log_kappa: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
        cells = log_kappa.permute(1, 2, 0).contiguous()  # [M, N, P]: pairs are the lanes
        keep = ctx.needs_input_grad[0]
        total, table, offset = _sweep(cells, lengths_x, lengths_y, keep=keep)
        if keep:
            ctx.save_for_backward(cells, table, offset, lengths_x, lengths_y)
        return total.to(log_kappa.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        posterior = _sweep_back(*ctx.saved_tensors)  # [M, N, P]
        return (posterior * grad).permute(2, 0, 1), None, None


def _diagonal(cells: Tensor, k: int) -> Tensor:
    """View [count, P] of the cells (i, k - i) of [M, N, P], by rising i."""
    m, n, pairs = cells.shape
    low, high = _rows(m, n, k)
    first = low * n + k - low
    return cells.as_strided((high - low + 1, pairs), ((n - 1) * pairs, 1), cells.storage_offset() + first * pairs)


def _rows(m: int, n: int, k: int) -> tuple[int, int]:
    """First and last row of anti-diagonal k."""
    return max(0, k - n + 1), min(k, m - 1)


def _sweep(log_kappa: Tensor, ends_x: Tensor, ends_y: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
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
        top = torch.maximum(torch.maximum(diagonal, up), left).clamp_(min=floor)  # -inf - -inf is NaN
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


def _sweep_back(log_kappa: Tensor, table: Tensor, offset: Tensor, ends_x: Tensor, ends_y: Tensor) -> Tensor:
    """The alignment posterior [M, N, P]: a cell passes its weight on to what it was summed from.

    E[i,j] = sum over its three successors t of E[t] G[i,j] kappa[t] / G[t]          (Cuturi and Blondel 2017, alg. 2)
    """
    m, n, pairs = log_kappa.shape
    posterior = torch.zeros_like(log_kappa)
    ends, row = ends_x + ends_y - 2, (ends_x - 1)[None]
    # Of the two diagonals after this one, by row: their weights and log(kappa / G), a row more at the end.
    weight1, weight2, ratio1, ratio2 = (log_kappa.new_zeros(m + 1, pairs) for _ in range(4))
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
        is_end = (ends == k)[None]
        weight0.scatter_(0, row, torch.where(is_end, 1.0, weight0.gather(0, row)).to(weight0.dtype))
        # G = 0: nothing passes here, and 0 * exp(inf) must not say otherwise.
        reached = here > -INF
        ratio0[low : high + 1] = torch.where(reached, _diagonal(log_kappa, k) - here, -INF)
        weight0[low : high + 1] = torch.where(reached, weight0[low : high + 1], 0.0)
        _diagonal(posterior, k).copy_(weight0[low : high + 1])
        weight1, weight2, ratio1, ratio2 = weight0, weight1, ratio0, ratio1
    return posterior


def _log_kappa(sqdist: Tensor, sigma: Tensor | float, band: int | None) -> Tensor:
    """log s - log(2 - s): float[P, M, N]."""
    width = torch.as_tensor(sigma, dtype=sqdist.dtype, device=sqdist.device).expand(len(sqdist))
    if not bool((width > 0).all()):
        raise ValueError(f"sigma = {sigma}: it must be positive")
    z = sqdist.clamp(min=0) * (-0.5 / width**2)[:, None, None]
    if band is not None:
        z = z + _log_band(*sqdist.shape[1:], band=band, like=sqdist)
    return z - torch.log1p(-torch.expm1(z))  # log(2 - e^z), exact near z = 0


def _log_band(m: int, n: int, *, band: int, like: Tensor) -> Tensor:
    """log of the triangular weight 1 - |i - j| / band (Cuturi 2011): float[m, n]."""
    if band < 1:
        raise ValueError(f"band = {band}: at least 1, which keeps the diagonal")
    away = (torch.arange(m, device=like.device)[:, None] - torch.arange(n, device=like.device)).abs()
    return torch.log((1 - away.to(like.dtype) / band).clamp(min=0))


def _inside(cells: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, outside: float = 0.0) -> Tensor:
    """One value beyond the lengths, whatever was there: padding must not make a NaN, here or in a gradient."""
    _, m, n = cells.shape
    x = torch.arange(m, device=cells.device)[None, :, None] < lengths_x[:, None, None]
    y = torch.arange(n, device=cells.device)[None, None, :] < lengths_y[:, None, None]
    return cells.masked_fill(~(x & y), outside)


def _lengths(sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> tuple[Tensor, Tensor]:
    """On the device of the distances, and within them."""
    if sqdist.dim() != 3:
        raise ValueError(
            f"squared distances of shape {tuple(sqdist.shape)}: [pairs, slices of x, slices of y] is needed"
        )
    found = []
    for name, lengths, most in (("x", lengths_x, sqdist.shape[1]), ("y", lengths_y, sqdist.shape[2])):
        lengths = lengths.to(sqdist.device, torch.long)
        if lengths.shape != sqdist.shape[:1]:
            raise ValueError(f"{tuple(lengths.shape)} lengths of {name} for {len(sqdist)} pairs")
        if len(lengths) and (int(lengths.min()) < 1 or int(lengths.max()) > most):
            wrong = int(((lengths < 1) | (lengths > most)).nonzero()[0])
            raise ValueError(f"pair {wrong}: {int(lengths[wrong])} slices in {name}; 1 to {most} are possible")
        found.append(lengths)
    return found[0], found[1]
