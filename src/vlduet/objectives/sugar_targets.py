"""The target matrix of Sugar: how alike two prefixes are, told by frozen encoders (arXiv 2411.00304, section 3.2).

1. triple kernel   two slices are compared by the vision encoder (two images), the text encoder (two texts), or the cross
                   encoder (an image and a text): the choice is made for every pair of slices, inside the alignment
2. alignment       two prefixes x, y of M and N slices are compared by the global alignment kernel K on these distances,
                   with sigma = delta * sqrt((M + N) / 2), normalised: K(x, y) / sqrt(K(x, x) K(y, y)), one sigma in all
                   three. The paper leaves K raw and says that it lies in (0, 1], which only the normalised one does.
3. exceptions      two prefixes of one sequence: 1; two prefixes of one slice each: their cosine

The triple kernel mixes three geometries, so its matrices need not be positive semi-definite. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlduet.objectives.gak.api import (
    compute_alignment_weighted_mean,
    compute_log_gak,
    compute_sigma,
)

TargetKind = Literal["gak", "mean", "awm"]
SameSequenceRule = Literal["all", "nested"]
SingleSliceRule = Literal["cosine", "gak"]

MAX_CELLS_PER_CHUNK = 1 << 22
"""Cells of all alignments that are computed at one time: 32 MB a tensor in float64."""
MIN_CALIBRATION_PAIRS, MAX_CALIBRATION_PAIRS = 16, 1 << 20
"""Pairs of slices that a block's scale is estimated from: fewer leave it as it is, of more every n-th is taken."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A prefixes of sequences, as indices into U slices."""

    slice_indices: Tensor
    """int64[A, L]: the slices of every prefix in order, then padding with any valid index."""
    lengths: Tensor
    """int64[A], at least 1."""
    sequence_ids: Tensor
    """int64[A]: equal numbers are prefixes of one sequence."""

    def __len__(self) -> int:
        return len(self.lengths)


def compute_triple_cosines(
    same_modality: Tensor,
    cross_modality: Tensor,
    *,
    is_image: Tensor,
    use_triple_kernel: bool = True,
) -> Tensor:
    """Cosine of every two slices by the encoder that the pair asks for; 2 - 2 * cosine is the paper's phi.

    Args:
        same: float[U, D1] unit vectors, of the vision encoder for images and of the text encoder for texts. Both stand in
            one tensor (zeros fill the shorter kind), since they are never compared with each other.
        cross: float[U, D2] unit vectors of the cross encoder.
        image: bool[U].
        triple: False compares all pairs by the cross encoder (the paper's ablation).

    Returns:
        float[U, U]
    """
    found = cross_modality @ cross_modality.T
    if use_triple_kernel:  # a block of each kind: a mask and a second matrix of all pairs would be three times the memory
        for kind in (is_image, ~is_image):
            (at,) = kind.nonzero(as_tuple=True)
            found[at[:, None], at] = same_modality[at] @ same_modality[at].T
    return found.clamp_(-1.0, 1.0)


def cosines_to_squared_distances(cosines: Tensor) -> Tensor:
    """phi = |a - b|^2 of unit vectors, in [0, 4]."""
    return 2 - 2 * cosines


def find_related_slices(prefixes: Prefixes, num_slices: int) -> Tensor:
    """bool[U, U]: pairs of slices that stand in one sequence; U = count."""
    inside = (
        torch.arange(prefixes.slice_indices.shape[1], device=prefixes.slice_indices.device)
        < prefixes.lengths[:, None]
    )
    number, sequence = prefixes.sequence_ids.unique(return_inverse=True)
    member = torch.zeros(len(number), num_slices, device=prefixes.slice_indices.device)
    member[sequence[:, None].expand_as(inside)[inside], prefixes.slice_indices[inside]] = 1.0
    return (member.T @ member) > 0


def calibrate_cosines(cosines: Tensor, *, is_image: Tensor, is_related: Tensor) -> Tensor:
    """The three kinds of cosines on one scale: raw ones teach that texts are closer to each other than to images.

    In every block (two images, two texts, one of each) the median of unrelated pairs becomes 0 and their 99.5th percentile
    1; what lies outside [-1, 1] is cut. A block with fewer than `MIN_PAIRS` unrelated pairs stays as it is.

    Args:
        cosines: float[U, U]; image: bool[U]; related: bool[U, U], pairs that say nothing of chance.
    """
    kind = is_image[:, None].to(torch.uint8) + is_image[None, :].to(torch.uint8)  # 0 TT, 1 IT, 2 II
    found = cosines.clone()
    for block in range(3):
        chosen = kind == block
        unrelated = cosines[chosen & ~is_related]
        if len(unrelated) < MIN_CALIBRATION_PAIRS:
            continue
        unrelated = unrelated[:: len(unrelated) // MAX_CALIBRATION_PAIRS + 1]
        middle, high = unrelated.median(), torch.quantile(unrelated, 0.995)
        if high > middle:
            found[chosen] = ((cosines[chosen] - middle) / (high - middle)).clamp(-1.0, 1.0)
    return found


@torch.no_grad()
def compute_target_matrix(
    cosines: Tensor,
    prefixes: Prefixes,
    *,
    rows: slice = slice(None),
    target: TargetKind = "gak",
    same_sequence: SameSequenceRule = "all",
    single: SingleSliceRule = "cosine",
    delta: float = 1.0,
) -> Tensor:
    """m^l: what the similarity of two prefixes' embeddings shall be.

    Args:
        cosines: float[U, U] of slices, of `triple_cosines`, perhaps calibrated.
        prefixes: A of them.
        rows: a contiguous run of prefixes (this rank's).
        target: `gak` (the paper); `mean` of the cosines of all pairs of slices (its ablation); `awm`, their mean weighted
            by the posterior of the alignment at sigma = delta: on the scale of cosines, and so blind to length.
        same_sequence: `all`: 1 for every two prefixes of one sequence (the paper). `nested`: 1 only where they contain
            each other; else the share of the longer one that both have in common, so a story's first and last image
            are not made one.
        single: two prefixes of one slice each: `cosine` (the paper) or `gak`.
        delta: width of the kernel.

    Returns:
        float[R, A], R the number of rows.
    """
    begin, stop, _ = rows.indices(len(prefixes))
    mine = torch.arange(begin, stop, device=cosines.device)
    lengths, first = prefixes.lengths, prefixes.slice_indices[:, 0]
    same = prefixes.sequence_ids[mine][:, None] == prefixes.sequence_ids[None, :]
    short = (lengths[mine] == 1)[:, None] & (lengths == 1)[None, :]
    direct = short if single == "cosine" else torch.zeros_like(short)
    if target == "mean":
        found = _means(cosines, prefixes)[mine]
    else:
        compare = _gak if target == "gak" else _awm
        found = _compared(
            cosines,
            prefixes,
            wanted=~same & ~direct,
            begin=begin,
            compare=lambda x, y: compare(cosines, prefixes, x, y, delta),
        )
    found = torch.where(direct, cosines[first[mine]][:, first], found)
    return torch.where(
        same, _common(prefixes, mine, same).to(found) if same_sequence == "nested" else 1.0, found
    )


def compute_target_std(target: Tensor, prefixes: Prefixes, *, rows: slice = slice(None)) -> float:
    """Standard deviation of the targets of different sequences: near 0 there is nothing to learn. NaN for less than 2."""
    others = target[prefixes.sequence_ids[rows][:, None] != prefixes.sequence_ids[None, :]]
    return float(others.std()) if len(others) > 1 else float("nan")


def _common(prefixes: Prefixes, mine: Tensor, same: Tensor) -> Tensor:
    """Slices that both prefixes begin with / length of the longer one, where `same`; float[R, A]."""
    i, j = same.nonzero(as_tuple=True)
    i_lengths, j_lengths = prefixes.lengths[mine[i]], prefixes.lengths[j]
    at = torch.arange(prefixes.slice_indices.shape[1], device=same.device)
    equal = prefixes.slice_indices[mine[i]] == prefixes.slice_indices[j]  # [P, L]
    equal &= at < torch.minimum(i_lengths, j_lengths)[:, None]
    leading = equal.long().cumprod(1).sum(1)
    shares = torch.zeros(same.shape, dtype=torch.float64, device=same.device)
    shares[i, j] = leading / torch.maximum(i_lengths, j_lengths).double()
    return shares


def _means(cosines: Tensor, prefixes: Prefixes) -> Tensor:
    """Mean cosine over all pairs of slices of two prefixes, float[A, A]."""
    inside = (
        torch.arange(prefixes.slice_indices.shape[1], device=cosines.device)
        < prefixes.lengths[:, None]
    )
    share = inside.to(cosines) / prefixes.lengths[:, None]
    weights = cosines.new_zeros(len(prefixes), len(cosines)).scatter_add_(
        1, prefixes.slice_indices, share
    )  # [A, U]
    return weights @ cosines @ weights.T


def _compared(
    cosines: Tensor,
    prefixes: Prefixes,
    *,
    wanted: Tensor,
    begin: int,
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`compare` of every wanted pair, float[R, A]; what is not wanted is 0. A pair of two own rows is computed once."""
    number = torch.arange(len(prefixes), device=cosines.device)
    mine = number[begin : begin + len(wanted)]
    mirrored = (number >= begin) & (number < mine[:, None])  # a later row has it already
    i, j = (wanted & ~mirrored).nonzero(as_tuple=True)
    found = cosines.new_zeros(wanted.shape)
    if len(i) == 0:
        return found
    found[i, j] = compare(mine[i], j)
    own = (j >= begin) & (j < begin + len(wanted))
    found[j[own] - begin, mine[i[own]]] = found[i[own], j[own]]
    return found


def _gak(cosines: Tensor, prefixes: Prefixes, x: Tensor, y: Tensor, delta: float) -> Tensor:
    """Normalised global alignment kernel of the prefixes x[p] and y[p], float[P]."""
    lengths = prefixes.lengths
    # The compiled sweep of a CPU keeps a logarithm's digits; a GPU's log space does in double precision, at little cost.
    dtype = cosines.dtype if cosines.device.type == "cpu" else torch.float64

    def log_kernel(x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        return _in_chunks(
            cosines,
            prefixes,
            x,
            y,
            lambda part, d, m, n: compute_log_gak(d, m, n, sigma=sigma[part]),
            dtype=dtype,
        )

    # K(x, x) depends on the partner only by its length: far fewer kernels than pairs.
    wide = int(lengths.max()) + 1
    partner = torch.cat([lengths[y], lengths[x]])
    keys = torch.cat([x, y]) * wide + partner
    met = torch.zeros(len(prefixes) * wide, dtype=torch.bool, device=keys.device)
    met[keys] = True
    (found,) = met.nonzero(as_tuple=True)  # a table, where `unique` would sort all pairs
    own, of_partner = found // wide, found % wide
    log_own = log_kernel(own, own, compute_sigma(lengths[own].double(), of_partner, delta))[
        (met.cumsum(0) - 1)[keys]
    ]
    log_joint = log_kernel(x, y, compute_sigma(lengths[x].double(), lengths[y], delta))
    # Without positive semi-definiteness nothing bounds it by 1, and a cosine cannot be more.
    return (
        (log_joint - (log_own[: len(x)] + log_own[len(x) :]) / 2).exp().clamp(max=1.0).to(cosines)
    )


def _awm(cosines: Tensor, prefixes: Prefixes, x: Tensor, y: Tensor, delta: float) -> Tensor:
    """sum P cos / sum P with P the alignment posterior at sigma = delta, float[P]."""
    # In double precision: the posterior of a long path among short ones leaves float32.
    found = _in_chunks(
        cosines,
        prefixes,
        x,
        y,
        lambda _, d, m, n: compute_alignment_weighted_mean(d, m, n, sigma=delta),
        dtype=torch.float64,
    )
    return found.to(cosines)


def _in_chunks(
    cosines: Tensor,
    prefixes: Prefixes,
    x: Tensor,
    y: Tensor,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """`compute(chosen pairs, distances [p, M, N], lengths of x, of y)` over pairs of like length, float64[P].

    Distances are made a chunk at a time, in `dtype`: all of them, or all cosines in double precision, would take gigabytes.
    """
    longer = torch.maximum(prefixes.lengths[x], prefixes.lengths[y])
    order = longer.argsort(descending=True)
    found = cosines.new_empty(len(x), dtype=torch.float64)
    while len(order):
        size = max(1, MAX_CELLS_PER_CHUNK // int(longer[order[0]]) ** 2)
        part, order = order[:size], order[size:]
        m, n = prefixes.lengths[x[part]], prefixes.lengths[y[part]]
        i, j = (
            prefixes.slice_indices[x[part], : int(m.max())],
            prefixes.slice_indices[y[part], : int(n.max())],
        )
        distances = cosines_to_squared_distances(cosines[i[:, :, None], j[:, None, :]].to(dtype))
        found[part] = compute(part, distances, m, n)
    return found
