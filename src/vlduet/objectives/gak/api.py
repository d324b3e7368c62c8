"""Global alignment kernel (GAK), its alignment posterior, and the alignment-weighted mean.

    phi_ij   = |x_i - y_j|^2                         sigma = delta sqrt((M + N) / 2)
    s_ij     = exp(-phi_ij / (2 sigma^2))            kappa_ij = s_ij / (2 - s_ij)
    G[0,0]   = 1, G[i,0] = G[0,j] = 0
    G[i,j]   = (G[i,j-1] + G[i-1,j-1] + G[i-1,j]) kappa_ij            K(x, y) = G[M,N]

Sugar (arXiv 2411.00304), section 3.2; Cuturi et al. 2007, eq. 5. The alignment posterior of a cell
is d log K / d log kappa_ij: the probability that an alignment passes through the cell if alignments
are drawn in proportion to their product of kappas (Cuturi and Blondel 2017, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.objectives.gak import threads
from vlduet.objectives.gak.all_pairs import all_pairs, self_terms
from vlduet.objectives.gak.engine import Engine, PairGrid
from vlduet.objectives.gak.log_space import LogSpaceEngine
from vlduet.objectives.gak.slice_table import SigmaRule, SliceTable

MIN_CELLS_PER_SHARE = 1 << 17
"""Number of cells that one thread sweeps before another could have started."""


@cache
def load_numba_engine() -> Engine | None:
    """Return the compiled engine; None if numba is missing or has no folder for its cache."""
    try:
        from vlduet.objectives.gak.cpu_numba import NumbaEngine
    except (ImportError, RuntimeError):
        return None
    return NumbaEngine()


ENGINES: dict[tuple[str, torch.dtype], Callable[[], Engine | None]] = {
    ("cpu", torch.float32): load_numba_engine,
}
"""Device type and dtype -> function that returns their engine, or None if it is not installed."""


def select_engine(cells: Tensor) -> Engine:
    """Return the engine for the device and dtype of a tensor: that of `ENGINES`, else log space."""
    load_engine = ENGINES.get((cells.device.type, cells.dtype))
    engine = load_engine() if load_engine else None
    return engine or LogSpaceEngine()


def gak_matrix(
    x: Sequence[Tensor],
    y: Sequence[Tensor] | None = None,
    *,
    sigma: float | None = None,
    delta: float = 1.0,
    normalize: bool = True,
    log: bool = False,
) -> Tensor:
    """Return the global alignment kernel K of every sequence of x with every sequence of y.

    Differentiable once in the slices. Half precision is computed in float32.

    Args:
        x: sequences of slices, float[n_i, d] each, n_i >= 1.
        y: likewise, with the same d; float64 if and only if x has float64. None: x itself; the
            matrix is symmetric and half the work.
        sigma: width of the kernel of all pairs. None: delta * sqrt((M + N) / 2), as in the paper;
            without the lengths in it, the normalised kernel of long sequences of unit vectors
            becomes the identity matrix.
        delta: see sigma; not used if sigma is given.
        normalize: return K(x, y) / sqrt(K(x, x) K(y, y)), in (0, 1], with the sigma of the pair in
            all three terms. Raw K grows like the Delannoy numbers and overflows float32 at about 50
            slices and float16 at 9: ask for its logarithm.
        log: return the logarithm.

    Returns:
        float[len(x), len(y)], of the dtype of x[0].

    Raises:
        ValueError: no sequences, an empty one, different d, features that are not finite, or sigma
            or delta not above 0.

    Example:
        >>> import torch
        >>> from vlduet.objectives import gak_matrix
        >>> a, b, c = torch.eye(3)  # three slices: orthogonal unit vectors
        >>> story = torch.stack([a, b, c])
        >>> shuffled = torch.stack([c, a, b])
        >>> kernel = gak_matrix([story, shuffled, story[:2]], delta=0.5)
        >>> kernel.shape
        torch.Size([3, 3])
        >>> bool(kernel[0, 1] < kernel[0, 0])  # the order of the slices matters
        True
    """
    factor = float(delta if sigma is None else sigma)
    _check_sigma(torch.tensor(factor))
    left = SliceTable.from_sequences(x, "x")
    right = left if y is None else SliceTable.from_sequences(y, "y")
    dim_x = left.features.shape[1]
    dim_y = right.features.shape[1]
    if dim_x != dim_y:
        raise ValueError(f"the slices of x have {dim_x} features, those of y have {dim_y}")
    center = left.mean
    left.center(center)
    if y is not None:
        right.center(center)
    rule = SigmaRule(factor, depends_on_length=sigma is None)
    engine = select_engine(left.features)
    log_k = all_pairs(left, right, rule, engine=engine)
    if normalize:
        self_x = self_terms(left, right, rule, engine=engine)
        self_y = self_x.T if y is None else self_terms(right, left, rule, engine=engine).T
        log_k = log_k - (self_x + self_y) / 2
        if y is None:
            log_k = log_k - torch.diag(log_k.diagonal())  # K(x, x) = 1 exactly, without rounding
    return (log_k if log else log_k.exp()).to(x[0].dtype)


@torch.no_grad()
def compute_log_gak(
    squared_distances: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float
) -> Tensor:
    """Return raw log K of every pair from the squared distances of its slices, without gradient.

    Args:
        squared_distances: float[P, M, N]. Entries beyond the lengths of a pair are not read, and
            negative ones count as 0. Half precision is computed in float32.
        lengths_x: int[P], from 1 to M.
        lengths_y: int[P], from 1 to N.
        sigma: width of the kernel, float[P] or a number.

    Returns:
        float64[P], since logarithms of kernels are subtracted from each other.

    Raises:
        ValueError: lengths that do not fit, sigma not above 0, or NaN among the distances.
    """
    pairs = _check_pairs(squared_distances, lengths_x, lengths_y, sigma)
    if not len(pairs.cells):
        return torch.zeros(0, dtype=torch.float64, device=pairs.cells.device)
    return _map_shares(pairs, lambda engine, cells, grid: engine.log_gak(cells, grid).flatten())


@torch.no_grad()
def compute_alignment_posterior(
    squared_distances: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float
) -> Tensor:
    """Return the probability that an alignment passes through each cell, without gradient.

    Arguments and errors are those of `compute_log_gak`.

    Returns:
        float[P, M, N], 0 beyond the lengths; float64 for float64 distances, else float32.
    """
    pairs = _check_pairs(squared_distances, lengths_x, lengths_y, sigma)
    if not len(pairs.cells):
        return pairs.cells

    def compute_posterior(engine: Engine, cells: Tensor, grid: PairGrid) -> Tensor:
        _, weights = engine.log_gak_and_weights(cells.clone, grid, kind="posterior")
        by_row: Tensor = weights.unflatten(0, (len(grid.first_rows), -1))  # [A, M, N, B]
        return by_row.permute(0, 3, 1, 2).flatten(0, 1)  # [A * B, M, N]

    return _map_shares(pairs, compute_posterior)


@torch.no_grad()
def compute_alignment_weighted_mean(
    squared_distances: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, sigma: Tensor | float
) -> Tensor:
    """Return sum_ij P_ij cos_ij / sum_ij P_ij of every pair of sequences of unit vectors.

    P is the alignment posterior, and cos_ij = 1 - squared_distances_ij / 2. The mean stays on the
    scale of cosines, does not fall with length, and depends on the order of the slices. It has no
    gradient. Arguments and errors are those of `compute_log_gak`.

    Returns:
        float[P] in [-1, 1]; float64 for float64 distances, else float32.
    """
    pairs = _check_pairs(squared_distances, lengths_x, lengths_y, sigma)
    posterior = compute_alignment_posterior(pairs.cells, lengths_x, lengths_y, sigma=sigma)
    return (posterior * (1 - pairs.cells / 2)).sum((1, 2)) / posterior.sum((1, 2))


def compute_sigma(lengths_x: Tensor, lengths_y: Tensor, delta: float = 1.0) -> Tensor:
    """Return delta * sqrt((M + N) / 2), the width that Sugar gives to a pair of M and N slices.

    The lengths broadcast; the result is float64.
    """
    return delta * ((lengths_x + lengths_y).double() / 2).sqrt()


# ------------------------------------------------------------------ pairs


@dataclass(frozen=True, slots=True)
class _Pairs:
    """P pairs whose arguments have been checked."""

    cells: Tensor
    """float[P, M, N], squared distances; 0 beyond the lengths of a pair."""
    scale: Tensor
    """float[P], 1 / (2 sigma^2)."""
    lengths_x: Tensor
    """int64[P]."""
    lengths_y: Tensor
    """int64[P]."""

    def arrange(self, share: slice, group_size: int) -> tuple[Tensor, PairGrid]:
        """Return cells, float[A * M, N, group_size], and the grid of a share of the pairs.

        Each of the A rows of the grid has `group_size` consecutive pairs. The last one is filled
        with pairs of length 1 and distance 0.
        """
        cells = self.cells[share]
        num_pairs, num_rows, num_columns = cells.shape
        padding = -num_pairs % group_size
        shape = (-1, group_size)
        padded = F.pad(cells, (0, 0, 0, 0, 0, padding)).view(*shape, num_rows, num_columns)
        lanes = padded.permute(0, 2, 3, 1).contiguous()  # [A, M, N, B]
        grid = PairGrid(
            first_rows=torch.arange(len(lanes), device=cells.device) * num_rows,
            scale=F.pad(self.scale[share], (0, padding), value=1.0).view(shape),
            lengths_x=F.pad(self.lengths_x[share], (0, padding), value=1).view(shape),
            lengths_y=F.pad(self.lengths_y[share], (0, padding), value=1).view(shape),
        )
        return lanes.flatten(0, 1), grid


def _check_pairs(
    squared_distances: Tensor, lengths_x: Tensor, lengths_y: Tensor, sigma: Tensor | float
) -> _Pairs:
    """Check the arguments of `compute_log_gak`, and return copies on the device of the distances.

    Half precision becomes float32, and entries beyond the lengths 0. Raises ValueError for another
    shape than [P, M, N], lengths of another shape or out of range, sigma not above 0, or NaN.
    """
    if squared_distances.dim() != 3:
        shape = tuple(squared_distances.shape)
        raise ValueError(
            f"squared_distances has the shape {shape}; expected [pairs, slices of x, slices of y]"
        )
    if squared_distances.dtype != torch.float64:
        squared_distances = squared_distances.float()
    num_pairs, num_rows, num_columns = squared_distances.shape
    device = squared_distances.device
    lengths_x = lengths_x.to(device, torch.long)
    lengths_y = lengths_y.to(device, torch.long)
    for name, lengths, longest in (("x", lengths_x, num_rows), ("y", lengths_y, num_columns)):
        if lengths.shape != (num_pairs,):
            raise ValueError(f"lengths_{name} has {tuple(lengths.shape)} for {num_pairs} pairs")
        invalid = ((lengths < 1) | (lengths > longest)).nonzero()
        if len(invalid):
            pair = int(invalid[0])
            count = int(lengths[pair])
            raise ValueError(f"pair {pair}: {count} slices in {name}; expected 1 to {longest}")
    sigmas = torch.as_tensor(sigma, dtype=squared_distances.dtype, device=device).expand(num_pairs)
    _check_sigma(sigmas)
    is_row = torch.arange(num_rows, device=device) < lengths_x[:, None]
    is_column = torch.arange(num_columns, device=device) < lengths_y[:, None]
    cells = squared_distances.masked_fill(~(is_row[:, :, None] & is_column[:, None, :]), 0.0)
    if bool(cells.isnan().any()):
        pair = int(cells.isnan().flatten(1).any(1).nonzero()[0])
        raise ValueError(f"pair {pair}: NaN among the squared distances")
    return _Pairs(cells, 0.5 / sigmas**2, lengths_x, lengths_y)


def _check_sigma(sigma: Tensor) -> None:
    """Raise ValueError unless all widths are above 0."""
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma or delta is {float(sigma.min())}; expected a number above 0")


def _map_shares(pairs: _Pairs, compute: Callable[[Engine, Tensor, PairGrid], Tensor]) -> Tensor:
    """Return `compute` of all pairs, in their order; by several threads if the engine uses one.

    `compute(engine, cells, grid)` must return one row per pair of the grid. There must be at least
    one pair.
    """
    num_pairs = len(pairs.cells)
    engine = select_engine(pairs.cells)
    group_size = engine.choose_group_size(pairs.cells.device, num_pairs)
    num_groups = -(-num_pairs // group_size)
    num_shares = 1
    if engine.runs_in_one_thread:
        worthwhile = 1 + pairs.cells.numel() // MIN_CELLS_PER_SHARE
        num_shares = min(torch.get_num_threads(), worthwhile, num_groups)
    edges = [num_groups * i // num_shares * group_size for i in range(num_shares + 1)]
    shares = [slice(begin, end) for begin, end in pairwise(edges)]

    def compute_share(share: slice) -> Tensor:
        return compute(engine, *pairs.arrange(share, group_size))

    return torch.cat(threads.map_in_threads(compute_share, shares))[:num_pairs]
