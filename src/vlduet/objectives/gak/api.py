"""Global alignment kernel (GAK), its alignment posterior, soft-DTW and the alignment-weighted mean.

    z_ij   = -|x_i - y_j|^2 / (2 sigma^2)           sigma = delta sqrt((M + N) / 2)
    s_ij   = w_ij exp(z_ij)                         w_ij = 1, or max(0, 1 - |i - j| / T) with a band T
    kappa  = s / (2 - s)
    G[0,0] = 1, G[i,0] = G[0,j] = 0
    G[i,j] = (G[i,j-1] + G[i-1,j-1] + G[i-1,j]) kappa_ij            K(x, y) = G[M,N]

Sugar (arXiv 2411.00304) sec. 3.2; Cuturi et al. 2007 eq. 5, Cuturi 2011 eq. 8 for the band. All pairs of ragged sequences
are in `slices`; the sweeps over G are in `sweeps` (log space, any device), `lanes` (compiled for the CPU) and `fused` (for
CUDA). Gradients have a sweep of their own: d log K / d log kappa is the alignment posterior, the probability that an
alignment drawn in proportion to its product of kappas passes through a cell (soft-DTW's expected alignment, Cuturi and
Blondel 2017 alg. 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.objectives.gak import log_space
from vlduet.objectives.gak.all_pairs import Kernel, Slices, all_pairs, self_terms


def gak_matrix(
    x: Sequence[Tensor],
    y: Sequence[Tensor] | None = None,
    *,
    sigma: float | None = None,
    delta: float = 1.0,
    normalize: bool = True,
    band: int | None = None,
    log: bool = False,
) -> Tensor:
    """K of every sequence of x with every one of y; differentiable.

    Args:
        x: float[n_i, d] each, n_i >= 1; the dtype of the first decides (half precision is swept in float32).
        y: the same; None for x itself, whose matrix is symmetric and half the work.
        sigma: one width for all pairs. None: delta sqrt((M + N) / 2), the paper's; without the length in it the
            normalised kernel of long sequences of unit vectors degenerates to the identity.
        normalize: K(x, y) / sqrt(K(x, x) K(y, y)), in (0, 1], all three with the sigma of the pair, so that the self terms
            depend on the other's length, too. Raw K grows like Delannoy's numbers and leaves float32 at some 50 slices,
            float16 at 9: ask for its logarithm.
        band: keeps |i - j| < band with a triangular weight. It cuts prefixes off from what they are prefixes of.
        log: the logarithm of what would be returned.

    Returns:
        float[len(x), len(y)].

    Raises:
        ValueError: an empty sequence, widths that differ, features that are not finite, a width or band not positive.
    """
    width = float(delta if sigma is None else sigma)
    _check_width(torch.tensor(width), band)
    left = Slices.of(x, "x")
    right = left if y is None else Slices.of(y, "y")
    if left.features.shape[1] != right.features.shape[1]:
        raise ValueError(
            f"slices of {left.features.shape[1]} numbers in x and {right.features.shape[1]} in y"
        )
    # Around a common point: the distances are the same, and lose fewer digits in the product.
    for each in (left,) if y is None else (left, right):
        each.around(left.middle)
    kernel = Kernel(width, sigma is None, band)
    log_k = all_pairs(left, right, kernel)
    if normalize:
        own = self_terms(left, right, kernel)
        log_k = log_k - (own + (own if y is None else self_terms(right, left, kernel)).T) / 2
        if y is None:
            log_k = log_k - torch.diag(log_k.diagonal())  # K(x, x) is 1, not 1 to rounding
    return (log_k if log else log_k.exp()).to(x[0].dtype)


def gak_pairs(
    sqdist: Tensor,
    lengths_x: Tensor,
    lengths_y: Tensor,
    *,
    sigma: Tensor | float,
    band: int | None = None,
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
    found = compute_log_gak(sqdist, lengths_x, lengths_y, sigma=sigma, band=band)
    return found if sqdist.dtype == torch.float64 else found.float()


def compute_log_gak(
    squared_distances: Tensor,
    lengths_x: Tensor,
    lengths_y: Tensor,
    *,
    sigma: Tensor | float,
    band: int | None = None,
) -> Tensor:
    """`gak_pairs` with all digits that the sweep has, float64[P]: for logarithms that are subtracted from each other."""
    cells, scale, x, y = _pairs(squared_distances, lengths_x, lengths_y, sigma=sigma, band=band)
    if not len(cells):
        return cells.sum((1, 2)).double()
    engine = log_space.engine(cells, band)
    if engine is None:
        return log_space.log_gak(log_space.log_kappas(cells, scale, band), x, y)
    lanes, first, scale, (x, y) = _as_lanes(cells, scale, (x, y), wide=engine.LANES)
    return log_space.log_gak_cells(lanes, first, scale, lengths_x=x, lengths_y=y).flatten()[
        : len(cells)
    ]


def compute_alignment_posterior(
    squared_distances: Tensor,
    lengths_x: Tensor,
    lengths_y: Tensor,
    *,
    sigma: Tensor | float,
    band: int | None = None,
) -> Tensor:
    """Probability of every cell to lie on the alignment, d log K / d log kappa: float[P, M, N], 0 beyond the lengths.

    Arguments and errors as in `gak_pairs`. It is a target or a picture: no gradient flows through it.
    """
    cells, scale, x, y = _pairs(
        squared_distances.detach(), lengths_x, lengths_y, sigma=sigma, band=band
    )
    if not len(cells):
        return cells
    if (engine := log_space.engine(cells, band)) is not None:
        lanes, first, scale, (x, y) = _as_lanes(cells, scale, (x, y), wide=engine.LANES)
        _, weights = log_space.run(lanes, first, scale, lengths=(x, y), weigh="posterior")
        apart = weights.view(len(first), -1, *weights.shape[1:]).permute(0, 3, 1, 2)  # [A, B, M, N]
        return apart.flatten(0, 1)[: len(cells)]
    with torch.enable_grad():
        log_kappa = log_space.log_kappas(cells, scale, band).requires_grad_()
        (posterior,) = torch.autograd.grad(log_space.log_gak(log_kappa, x, y).sum(), log_kappa)
    return posterior


def alignment_posterior(
    x: Tensor, y: Tensor, *, sigma: float | None = None, delta: float = 1.0, band: int | None = None
) -> Tensor:
    """The alignment posterior of one pair of sequences, float[m, d] and float[n, d]: float[m, n]. No gradient.

    Widths, band and errors as in `gak_matrix`; many pairs at a time are `alignment_posterior_pairs`.
    """
    left, right = Slices.of([x.detach()], "x"), Slices.of([y.detach()], "y")
    sqdist = (
        torch.cdist(left.features, right.features, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    )
    width = compute_sigma(left.lengths, right.lengths, delta) if sigma is None else sigma
    return compute_alignment_posterior(
        sqdist[None], left.lengths, right.lengths, sigma=width, band=band
    )[0]


def compute_alignment_weighted_mean(
    squared_distances: Tensor,
    lengths_x: Tensor,
    lengths_y: Tensor,
    *,
    sigma: Tensor | float,
    band: int | None = None,
) -> Tensor:
    """Alignment-weighted mean of the cosines of unit slices: sum_ij P_ij cos_ij / sum_ij P_ij, float[P] in [-1, 1].

    P is the alignment posterior and cos = 1 - sqdist / 2. It stays on the cosine's scale, does not fall with length, and
    sees order. A target: no gradient flows through it. 0 where a band leaves no alignment.
    """
    weight = compute_alignment_posterior(
        squared_distances, lengths_x, lengths_y, sigma=sigma, band=band
    )
    cells, *_ = _pairs(squared_distances.detach(), lengths_x, lengths_y, sigma=sigma, band=band)
    return (weight * (1 - cells / 2)).sum((1, 2)) / weight.sum((1, 2)).clamp(
        min=torch.finfo(weight.dtype).tiny
    )


def soft_dtw(cost: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Soft-DTW of every pair (Cuturi and Blondel 2017): float[P, M, N] costs to float[P]; differentiable.

    The same sweep with log kappa = -cost / gamma: sdtw = -gamma log K.
    """
    cells, _, x, y = _pairs(cost, lengths_x, lengths_y, sigma=gamma, band=None)
    return -gamma * log_space.log_gak(cells / -gamma, x, y).to(cells.dtype)


def compute_sigma(lengths_x: Tensor, lengths_y: Tensor, delta: float = 1.0) -> Tensor:
    """delta sqrt((M + N) / 2), the width that Sugar gives to a pair of lengths (broadcast, float64)."""
    return delta * ((lengths_x + lengths_y).double() / 2).sqrt()


# ------------------------------------------------------------------ pairs


def _pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked: cells, 0 beyond the lengths; 1 / (2 sigma^2), one a pair; both lengths. Half precision becomes float32."""
    if sqdist.dim() != 3:
        raise ValueError(
            f"distances of shape {tuple(sqdist.shape)}: [pairs, slices of x, slices of y] is needed"
        )
    sqdist = sqdist if sqdist.dtype == torch.float64 else sqdist.float()
    found = []
    for name, lengths, most in (
        ("x", lengths_x, sqdist.shape[1]),
        ("y", lengths_y, sqdist.shape[2]),
    ):
        lengths = lengths.to(sqdist.device, torch.long)
        if lengths.shape != sqdist.shape[:1]:
            raise ValueError(f"{tuple(lengths.shape)} lengths of {name} for {len(sqdist)} pairs")
        wrong = ((lengths < 1) | (lengths > most)).nonzero()
        if len(wrong):
            pair = int(wrong[0])
            raise ValueError(
                f"pair {pair}: {int(lengths[pair])} slices in {name}; 1 to {most} are possible"
            )
        found.append(lengths)
    width = torch.as_tensor(sigma, dtype=sqdist.dtype, device=sqdist.device).expand(len(sqdist))
    _check_width(width, band)
    cells = log_space.inside(sqdist, *found)
    if bool(cells.isnan().any()):
        raise ValueError(
            f"pair {int(cells.isnan().flatten(1).any(1).nonzero()[0])}: NaN among the distances"
        )
    return cells, 0.5 / width**2, found[0], found[1]


def _check_width(width: Tensor, band: int | None) -> None:
    if not bool((width > 0).all()):
        raise ValueError(f"a width of {float(width.min())}: sigma, delta and gamma are positive")
    if band is not None and band < 1:
        raise ValueError(f"band = {band}: at least 1, which keeps the diagonal")


def _as_lanes(
    cells: Tensor, scale: Tensor, lengths: tuple[Tensor, Tensor], *, wide: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Pairs [P, M, N] as a compiled sweep takes them: [A * M, N, wide], the last ones filled up."""
    pairs, m, n = cells.shape
    more = -pairs % wide
    rows = (pairs + more) // wide
    apart = (
        F.pad(cells, (0, 0, 0, 0, 0, more)).view(rows, wide, m, n).permute(0, 2, 3, 1).contiguous()
    )
    x, y = (F.pad(each, (0, more), value=1).view(rows, wide) for each in lengths)
    first = torch.arange(rows, device=cells.device) * m
    return (
        apart.view(rows * m, n, wide),
        first,
        F.pad(scale, (0, more), value=1.0).view(rows, wide),
        (x, y),
    )
