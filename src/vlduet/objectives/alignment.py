"""Global alignment kernel (GAK), its alignment posterior, soft-DTW and the alignment-weighted mean.

    z_ij   = -|x_i - y_j|^2 / (2 sigma^2)           sigma = delta sqrt((M + N) / 2)
    s_ij   = w_ij exp(z_ij)                         w_ij = 1, or max(0, 1 - |i - j| / T) with a band T
    kappa  = s / (2 - s)
    G[0,0] = 1, G[i,0] = G[0,j] = 0
    G[i,j] = (G[i,j-1] + G[i-1,j-1] + G[i-1,j]) kappa_ij            K(x, y) = G[M,N]

Sugar (arXiv 2411.00304) sec. 3.2; Cuturi et al. 2007 eq. 5, Cuturi 2011 eq. 8 for the band. The sweeps over G are in
`sweeps` (log space, any device), `lanes` (compiled for the CPU) and `fused` (for CUDA). Gradients have a sweep of their own:
d log K / d log kappa is the alignment posterior, the probability that an alignment drawn in proportion to its product of
kappas passes through a cell (soft-DTW's expected alignment, Cuturi and Blondel 2017 alg. 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.objectives import sweeps

BLOCK = 1 << 21
"""Cells of one block of pairs on the CPU; what lives beside the result is a few times this."""


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
            depend on the other's length, too. Raw K grows like Delannoy's numbers and leaves float32 at some 50 slices:
            ask for its logarithm.
        band: keeps |i - j| < band with a triangular weight. It cuts prefixes off from what they are prefixes of.
        log: the logarithm of what would be returned.

    Returns:
        float[len(x), len(y)].

    Raises:
        ValueError: an empty sequence, widths that differ, features that are not finite, a width or band not positive.
    """
    width = float(delta if sigma is None else sigma)
    _check_width(torch.tensor(width), band)
    left = _Slices.of(x, "x")
    right = left if y is None else _Slices.of(y, "y")
    if left.features.shape[1] != right.features.shape[1]:
        raise ValueError(f"slices of {left.features.shape[1]} numbers in x and {right.features.shape[1]} in y")
    # Around a common point: the distances are the same, and lose fewer digits in the product.
    middle = left.features.detach().mean(0)
    for each in (left,) if y is None else (left, right):
        each.around(middle)
    kernel = _Kernel(width, sigma is None, band)
    log_k = _all_pairs(left, right, kernel)
    if normalize:
        own = _self_terms(left, right, kernel)
        log_k = log_k - (own + (own if y is None else _self_terms(right, left, kernel)).T) / 2
        if y is None:
            log_k = log_k - torch.diag(log_k.diagonal())  # K(x, x) is 1, not 1 to rounding
    return (log_k if log else log_k.exp()).to(x[0].dtype)


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
    cells, scale, x, y = _pairs(sqdist, lengths_x, lengths_y, sigma=sigma, band=band)
    if not len(cells):
        return cells.sum((1, 2))
    engine = sweeps.engine(cells, band)
    if engine is None:
        return sweeps.log_gak(sweeps.log_kappas(cells, scale, band), x, y).to(cells.dtype)
    lanes, first, scale, (x, y) = _as_lanes(cells, scale, (x, y), wide=engine.LANES)
    log_k = sweeps.log_gak_cells(lanes, first, scale, lengths_x=x, lengths_y=y)
    return log_k.flatten()[: len(cells)].to(cells.dtype)


def alignment_posterior_pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None = None
) -> Tensor:
    """Probability of every cell to lie on the alignment, d log K / d log kappa: float[P, M, N], 0 beyond the lengths.

    Arguments and errors as in `gak_pairs`. It is a target or a picture: no gradient flows through it.
    """
    cells, scale, x, y = _pairs(sqdist.detach(), lengths_x, lengths_y, sigma=sigma, band=band)
    if not len(cells):
        return cells
    if (engine := sweeps.engine(cells, band)) is not None:
        lanes, first, scale, (x, y) = _as_lanes(cells, scale, (x, y), wide=engine.LANES)
        _, weights = sweeps.run(lanes, first, scale, lengths=(x, y), weigh="posterior")
        apart = weights.view(len(first), -1, *weights.shape[1:]).permute(0, 3, 1, 2)  # [A, B, M, N]
        return apart.flatten(0, 1)[: len(cells)]
    with torch.enable_grad():
        log_kappa = sweeps.log_kappas(cells, scale, band).requires_grad_()
        (posterior,) = torch.autograd.grad(sweeps.log_gak(log_kappa, x, y).sum(), log_kappa)
    return posterior


def alignment_posterior(x: Tensor, y: Tensor, *, sigma: float | None = None, delta: float = 1.0) -> Tensor:
    """The alignment posterior of one pair of sequences, float[m, d] and float[n, d]: float[m, n]. No gradient."""
    left, right = _Slices.of([x.detach()], "x"), _Slices.of([y.detach()], "y")
    sqdist = torch.cdist(left.features, right.features, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    width = rule_sigma(left.lengths, right.lengths, delta) if sigma is None else sigma
    return alignment_posterior_pairs(sqdist[None], left.lengths, right.lengths, sigma=width)[0]


def awm_pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None = None
) -> Tensor:
    """Alignment-weighted mean of the cosines of unit slices: sum_ij P_ij cos_ij / sum_ij P_ij, float[P] in [-1, 1].

    P is the alignment posterior and cos = 1 - sqdist / 2. It stays on the cosine's scale, does not fall with length, and
    sees order. A target: no gradient flows through it. 0 where a band leaves no alignment.
    """
    weight = alignment_posterior_pairs(sqdist, lengths_x, lengths_y, sigma=sigma, band=band)
    cells, *_ = _pairs(sqdist.detach(), lengths_x, lengths_y, sigma=sigma, band=band)
    return (weight * (1 - cells / 2)).sum((1, 2)) / weight.sum((1, 2)).clamp(min=torch.finfo(weight.dtype).tiny)


def soft_dtw(cost: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Soft-DTW of every pair (Cuturi and Blondel 2017): float[P, M, N] costs to float[P]; differentiable.

    The same sweep with log kappa = -cost / gamma: sdtw = -gamma log K.
    """
    cells, _, x, y = _pairs(cost, lengths_x, lengths_y, sigma=gamma, band=None)
    return -gamma * sweeps.log_gak(cells / -gamma, x, y).to(cells.dtype)


def rule_sigma(lengths_x: Tensor, lengths_y: Tensor, delta: float = 1.0) -> Tensor:
    """delta sqrt((M + N) / 2), the width that Sugar gives to a pair of lengths (broadcast, float64)."""
    return delta * ((lengths_x + lengths_y).double() / 2).sqrt()


# ------------------------------------------------------------------ pairs


def _pairs(
    sqdist: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float, band: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked: cells, 0 beyond the lengths; 1 / (2 sigma^2), one a pair; both lengths. Half precision becomes float32."""
    if sqdist.dim() != 3:
        raise ValueError(f"distances of shape {tuple(sqdist.shape)}: [pairs, slices of x, slices of y] is needed")
    sqdist = sqdist if sqdist.dtype == torch.float64 else sqdist.float()
    found = []
    for name, lengths, most in (("x", lengths_x, sqdist.shape[1]), ("y", lengths_y, sqdist.shape[2])):
        lengths = lengths.to(sqdist.device, torch.long)
        if lengths.shape != sqdist.shape[:1]:
            raise ValueError(f"{tuple(lengths.shape)} lengths of {name} for {len(sqdist)} pairs")
        wrong = ((lengths < 1) | (lengths > most)).nonzero()
        if len(wrong):
            pair = int(wrong[0])
            raise ValueError(f"pair {pair}: {int(lengths[pair])} slices in {name}; 1 to {most} are possible")
        found.append(lengths)
    width = torch.as_tensor(sigma, dtype=sqdist.dtype, device=sqdist.device).expand(len(sqdist))
    _check_width(width, band)
    cells = sweeps.inside(sqdist, *found)
    if bool(cells.isnan().any()):
        raise ValueError(f"pair {int(cells.isnan().flatten(1).any(1).nonzero()[0])}: NaN among the distances")
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
    apart = F.pad(cells, (0, 0, 0, 0, 0, more)).view(rows, wide, m, n).permute(0, 2, 3, 1).contiguous()
    x, y = (F.pad(each, (0, more), value=1).view(rows, wide) for each in lengths)
    first = torch.arange(rows, device=cells.device) * m
    return apart.view(rows * m, n, wide), first, F.pad(scale, (0, more), value=1.0).view(rows, wide), (x, y)


# ------------------------------------------------------------------ all pairs


@dataclass
class _Kernel:
    """What K is of a pair besides its slices."""

    width: float
    by_length: bool
    band: int | None

    def scale(self, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
        """1 / (2 sigma^2), broadcast."""
        mean = (lengths_x + lengths_y).double() / 2
        return 0.5 / (self.width**2 * (mean if self.by_length else torch.ones_like(mean)))


@dataclass
class _Slices:
    """Sequences, shortest first, as one matrix of slices."""

    features: Tensor
    """float[S, d]; after `around` float[S, d + 2], with 1 and |x|^2 behind each."""
    lengths: Tensor
    """int64[n], rising."""
    first: Tensor
    """int64[n], row of the first slice."""
    order: Tensor
    """int64[n], where each stood in what was given."""

    @classmethod
    def of(cls, sequences: Sequence[Tensor], name: str) -> _Slices:
        if not len(sequences):
            raise ValueError(f"{name} holds no sequences")
        shape = sequences[0].shape
        for i, sequence in enumerate(sequences):
            if sequence.dim() != 2 or not len(sequence) or sequence.shape[1:] != shape[1:]:
                raise ValueError(
                    f"{name}[{i}] has the shape {tuple(sequence.shape)}: [slices, {shape[-1] if len(shape) else 'd'}] "
                    "with one slice or more is needed"
                )
        device = sequences[0].device
        lengths, order = torch.sort(torch.tensor([len(sequence) for sequence in sequences]), stable=True)
        features = torch.cat([sequences[i] for i in order.tolist()])
        features = features if features.dtype == torch.float64 else features.float()
        first = lengths.cumsum(0) - lengths
        if not bool(features.sum().isfinite()) and not bool(features.isfinite().all()):  # the sum is far cheaper
            row = int((~features.isfinite()).any(1).nonzero()[0])
            wrong = int(order[int((first <= row).sum()) - 1])
            raise ValueError(f"{name}[{wrong}] has features that are not finite")
        return cls(features, lengths.to(device), first.to(device), order.to(device))

    def among(self, begin: int, wide: int) -> tuple[Tensor, Tensor]:
        """`wide` sequences from `begin` on, the last one repeated: lengths int64[wide], rows int64[wide, longest].

        Beyond a sequence's end stands any slice: a sweep does not look there.
        """
        which = torch.arange(begin, begin + wide, device=self.first.device).clamp(max=len(self.first) - 1)
        inner = torch.arange(int(self.lengths[which[-1]]), device=self.first.device)
        rows = self.first[which, None] + inner
        return self.lengths[which], rows.clamp(max=len(self.features) - 1)

    def around(self, middle: Tensor) -> None:
        """Takes a point away from every slice, in place, and makes what a product needs to give distances."""
        centred = self.features.sub_(middle)  # of a fresh tensor: see `of`
        squares = torch.linalg.vector_norm(centred, dim=1, keepdim=True) ** 2
        self.features = torch.cat([centred, torch.ones_like(squares), squares], 1)

    def facing(self, index: Tensor) -> Tensor:
        """float[..., d + 2] of some rows: -2 times an inner product of these with `features` is a squared distance.

        -2 (<x, y> - |x|^2 / 2 - |y|^2 / 2). Made where it is needed: a few rows fit into the cache, all of them do not.
        """
        found = self.features[index]
        found[..., -2] = found[..., -1] / -2
        found[..., -1] = -0.5
        return found


def _block(like: Tensor, band: int | None, count: int) -> tuple[int, int]:
    """Of `count` sequences y, how many side by side, and how many cells at a time."""
    if like.device.type != "cpu":
        return min(512, count), 16 * BLOCK
    engine = sweeps.engine(like, band)
    return (min(128, count) if engine is None else engine.LANES), BLOCK


def _all_pairs(left: _Slices, right: _Slices, kernel: _Kernel) -> Tensor:
    """Raw log K, float64[n, m] in the order given. If both are the same, of the upper triangle only, which is mirrored."""
    same = left is right
    rows = left.features
    moving = torch.is_grad_enabled() and (rows.requires_grad or right.features.requires_grad)
    wide, block = _block(rows, kernel.band, len(right.first))
    # Where nothing is kept for a gradient, one piece of memory serves all blocks: fresh pages cost as much as the sweep.
    most = wide * int(right.lengths[-1])
    room = rows.new_empty(0 if moving else max(min(block, len(rows) * most), int(left.lengths[-1]) * most))
    found, done, nothing = [], 0, rows.new_zeros(())
    where = torch.zeros(len(left.first), len(right.first), dtype=torch.long, device=rows.device)
    ends = torch.cat([left.first, left.first.new_tensor([len(rows)])]).tolist()
    for begin in range(0, len(right.first), wide):
        end = min(begin + wide, len(right.first))
        lengths_y, index = right.among(begin, wide)
        lanes = right.facing(index.T.flatten())  # [N * B, d + 2]
        for a, b in _chunks(ends, end if same else len(left.first), most=max(1, block // len(lanes))):
            some = rows[ends[a] : ends[b]]
            out = None if moving else room[: len(some) * len(lanes)].view(len(some), len(lanes))
            cells = torch.addmm(nothing, some, lanes.T, beta=0, alpha=-2, out=out)
            cells = cells.view(-1, index.shape[1], wide)  # [R, N, B]
            x, y = left.lengths[a:b, None].expand(-1, wide), lengths_y.expand(b - a, -1)
            first = left.first[a:b] - left.first[a]
            log_k = sweeps.log_gak_cells(
                cells, first, kernel.scale(x, y).to(rows.dtype), lengths_x=x, lengths_y=y, band=kernel.band
            )
            here = torch.arange(done, done + log_k.numel(), device=rows.device).view_as(log_k)
            where[a:b, begin:end] = here[:, : end - begin]
            found.append(log_k.flatten())
            done += log_k.numel()
    where = torch.maximum(where, where.T) if same else where  # no block is begun below the diagonal twice
    back_x, back_y = left.order.argsort(), right.order.argsort()
    return torch.cat(found)[where[back_x][:, back_y]]


def _chunks(ends: list[int], count: int, *, most: int) -> Iterator[tuple[int, int]]:
    """Runs of the first `count` sequences with at most `most` slices, one sequence at least."""
    begin = 0
    for end in range(1, count + 1):
        if end == count or ends[end + 1] - ends[begin] > most:
            yield begin, end
            begin = end


def _self_terms(own: _Slices, other: _Slices, kernel: _Kernel) -> Tensor:
    """Raw log K(x, x) with the sigma of every pair, float64[n, m] in the order given: one a distinct length of the other."""
    lengths, which = torch.unique(other.lengths, return_inverse=True)
    if not kernel.by_length:
        lengths, which = lengths[:1], torch.zeros_like(which)
    rows, nothing = own.features, own.features.new_zeros(())
    wide, block = _block(rows, kernel.band, len(own.first))
    found = []
    for begin in range(0, len(own.first), wide):
        mine, index = own.among(begin, wide)  # [B], [B, N]
        square = torch.baddbmm(nothing, rows[index], own.facing(index).mT, beta=0, alpha=-2)
        square = square.permute(1, 2, 0)  # [N, N, B]
        several = []
        for some in lengths.split(max(1, block // square.numel())):
            cells = square.expand(len(some), *square.shape).flatten(0, 1)  # [U * N, N, B]
            first = torch.arange(len(some), device=rows.device) * len(square)
            both = mine.expand(len(some), -1)
            scale = kernel.scale(both, some[:, None]).to(rows.dtype)
            several.append(sweeps.log_gak_cells(cells, first, scale, lengths_x=both, lengths_y=both, band=kernel.band))
        found.append(torch.cat(several))  # [U, B]
    terms = torch.cat(found, 1).T[own.order.argsort()]  # [n, U]
    return terms[:, which[other.order.argsort()]]
