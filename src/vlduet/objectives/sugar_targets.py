"""Target matrix of Sugar: the similarity of two prefixes according to frozen encoders.

arXiv 2411.00304, section 3.2:

1. Triple kernel. Two slices are compared by the vision encoder (two images), the text encoder (two
   texts) or the cross encoder (an image and a text). The choice is made for every pair of slices,
   inside the alignment.
2. Alignment. Two prefixes x, y of M and N slices are compared by the global alignment kernel K of
   these distances, with sigma = delta * sqrt((M + N) / 2), normalised as K(x, y) / sqrt(K(x, x)
   K(y, y)) with one sigma in all three. The paper leaves K raw and says that it lies in (0, 1],
   which is only true of the normalised one.
3. Exceptions. Two prefixes of one sequence: 1. Two prefixes of one slice each: their cosine.

The triple kernel mixes three geometries, so that its matrices need not be positive semi-definite.
Nothing in this module has a gradient.
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
"""Number of cells of the alignments that are computed at once: 32 MB per tensor in float64."""
MIN_CALIBRATION_PAIRS = 16
"""Number of unrelated slice pairs below which the scale of a block is not estimated."""
MAX_CALIBRATION_PAIRS = 1 << 20
"""Number of unrelated slice pairs above which only every n-th is used."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A prefixes of sequences, as indices into U slices."""

    slice_indices: Tensor
    """int64[A, L]: slices of every prefix in order, padded with any valid index."""
    lengths: Tensor
    """int64[A]: number of slices, at least 1."""
    sequence_ids: Tensor
    """int64[A]: prefixes of one sequence have the same number."""

    def __len__(self) -> int:
        return len(self.lengths)

    def is_filled(self) -> Tensor:
        """Return bool[A, L]: True at slices, False at padding."""
        position = torch.arange(self.slice_indices.shape[1], device=self.lengths.device)
        return position < self.lengths[:, None]


def sugar_targets(
    same_modality: Tensor,
    cross_modality: Tensor,
    *,
    is_image: Tensor,
    slice_indices: Tensor,
    lengths: Tensor,
    sequence_ids: Tensor,
    target: TargetKind = "gak",
    delta: float = 1.0,
) -> Tensor:
    """Return the target matrix of Sugar for A prefixes over U slices, without gradient.

    Use it as the target of `structure_loss` for the embeddings of the same prefixes. For the other
    switches of the recipe, see `compute_triple_cosines` and `compute_target_matrix`.

    Args:
        same_modality: float[U, D1], unit vectors by the vision encoder of images and by the text
            encoder of texts. Zeros fill up the narrower kind.
        cross_modality: float[U, D2], unit vectors by the cross encoder (CLIP or similar).
        is_image: bool[U], False for texts.
        slice_indices: int64[A, L], the slices of every prefix in order, then any valid index.
        lengths: int64[A], number of slices of every prefix, at least 1.
        sequence_ids: int64[A], equal for prefixes of one sequence.
        target: `gak`, `mean` or `awm`, see `compute_target_matrix`.
        delta: width of the kernel.

    Returns:
        float[A, A], symmetric, at most 1, with 1 for prefixes of one sequence.

    Example:
        >>> import torch
        >>> from vlduet.objectives import sugar_targets
        >>> images, texts = torch.eye(2, 8), torch.eye(2, 8)  # slices 0, 1 and 2, 3
        >>> targets = sugar_targets(
        ...     torch.cat([images, texts]), torch.cat([images, texts]),
        ...     is_image=torch.tensor([True, True, False, False]),
        ...     slice_indices=torch.tensor([[0, 2], [1, 3]]),  # image 0, text 0; image 1, text 1
        ...     lengths=torch.tensor([2, 2]), sequence_ids=torch.tensor([0, 1]))
        >>> targets.diagonal().tolist(), bool(targets[0, 1] < 1)
        ([1.0, 1.0], True)
    """
    cosines = compute_triple_cosines(same_modality, cross_modality, is_image=is_image)
    prefixes = Prefixes(slice_indices, lengths, sequence_ids)
    return compute_target_matrix(cosines, prefixes, target=target, delta=delta)


@torch.no_grad()
def compute_triple_cosines(
    same_modality: Tensor,
    cross_modality: Tensor,
    *,
    is_image: Tensor,
    use_triple_kernel: bool = True,
) -> Tensor:
    """Return the cosine of every two slices by the encoder for their kinds, float[U, U].

    2 - 2 * cosine is phi of the paper. Rounding beyond [-1, 1] is cut off. There is no gradient.

    Args:
        same_modality: float[U, D1], unit vectors by the vision encoder of images and by the text
            encoder of texts. Both are in one tensor, with zeros behind the narrower kind, since an
            image and a text are never compared by them.
        cross_modality: float[U, D2], unit vectors by the cross encoder.
        is_image: bool[U].
        use_triple_kernel: False compares all pairs by the cross encoder (ablation of the paper).
    """
    cosines = cross_modality @ cross_modality.T
    if use_triple_kernel:
        # Block by block: a mask and a second matrix of all pairs would take three times the memory.
        for is_kind in (is_image, ~is_image):
            (rows,) = is_kind.nonzero(as_tuple=True)
            cosines[rows[:, None], rows] = same_modality[rows] @ same_modality[rows].T
    return cosines.clamp_(-1.0, 1.0)


def cosines_to_squared_distances(cosines: Tensor) -> Tensor:
    """Return |a - b|^2 = 2 - 2 cos(a, b) of unit vectors, in [0, 4]."""
    return 2 - 2 * cosines


def find_related_slices(prefixes: Prefixes, num_slices: int) -> Tensor:
    """Return bool[U, U]: which pairs of the U = `num_slices` slices occur in one sequence.

    A slice is related to itself if it is in any prefix.
    """
    is_filled = prefixes.is_filled()
    ids, sequence_index = prefixes.sequence_ids.unique(return_inverse=True)
    membership = torch.zeros(len(ids), num_slices, device=prefixes.lengths.device)
    rows = sequence_index[:, None].expand_as(is_filled)[is_filled]
    membership[rows, prefixes.slice_indices[is_filled]] = 1.0
    return (membership.T @ membership) > 0


def calibrate_cosines(cosines: Tensor, *, is_image: Tensor, is_related: Tensor) -> Tensor:
    """Return the cosines of the three encoders on one scale, float[U, U].

    Raw cosines teach that texts are closer to each other than to images. In each of the three
    blocks (two images, two texts, one of each), the median of unrelated pairs becomes 0 and their
    99.5th percentile 1; values outside [-1, 1] are clamped. A block is returned unchanged if it has
    fewer than `MIN_CALIBRATION_PAIRS` unrelated pairs, or if these two quantiles are equal.

    Args:
        cosines: float[U, U], not modified.
        is_image: bool[U].
        is_related: bool[U, U], pairs that tell nothing about chance similarity.
    """
    num_images = is_image[:, None].to(torch.uint8) + is_image[None, :].to(torch.uint8)
    calibrated = cosines.clone()
    for block in range(3):
        in_block = num_images == block
        unrelated = cosines[in_block & ~is_related]
        if len(unrelated) < MIN_CALIBRATION_PAIRS:
            continue
        unrelated = unrelated[:: len(unrelated) // MAX_CALIBRATION_PAIRS + 1]
        median = unrelated.median()
        high = torch.quantile(unrelated, 0.995)
        if high > median:
            scaled = (cosines[in_block] - median) / (high - median)
            calibrated[in_block] = scaled.clamp(-1.0, 1.0)
    return calibrated


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
    """Return m^l: the target similarity of the embeddings of every two prefixes, without gradient.

    Args:
        cosines: float[U, U], of slices, from `compute_triple_cosines`, perhaps calibrated.
        prefixes: A of them.
        rows: contiguous range of prefixes, those of this rank.
        target: `gak` (the paper): normalised global alignment kernel. `mean`: mean cosine of all
            pairs of slices (its ablation). `awm`: mean weighted by the alignment posterior at
            sigma = delta, which stays on the scale of cosines and does not depend on length.
        same_sequence: `all`: 1 for every two prefixes of one sequence (the paper). `nested`: the
            number of slices that both begin with, divided by the length of the longer one. It is 1
            only for equal prefixes, so that the first and last image of a story stay different.
        single: two prefixes of one slice each, of different sequences, get their `cosine` (the
            paper) or, with `gak`, what `target` says.
        delta: width of the kernel.

    Returns:
        float[R, A] for R rows, of the dtype of the cosines.
    """
    begin, end, _ = rows.indices(len(prefixes))
    row_indices = torch.arange(begin, end, device=cosines.device)
    lengths = prefixes.lengths
    first_slices = prefixes.slice_indices[:, 0]
    is_same = prefixes.sequence_ids[row_indices][:, None] == prefixes.sequence_ids[None, :]
    is_direct = torch.zeros_like(is_same)
    if single == "cosine":
        is_direct = (lengths[row_indices] == 1)[:, None] & (lengths == 1)[None, :]
    if target == "mean":
        targets = _mean_cosines(cosines, prefixes)[row_indices]
    else:
        compare = _normalized_gak if target == "gak" else _alignment_weighted_means
        targets = _compare_pairs(
            lambda x, y: compare(cosines, prefixes, x, y, delta),
            is_needed=~is_same & ~is_direct,
            begin=begin,
            like=cosines,
        )
    targets = torch.where(is_direct, cosines[first_slices[row_indices]][:, first_slices], targets)
    if same_sequence == "all":
        return torch.where(is_same, 1.0, targets)
    return torch.where(is_same, _common_shares(prefixes, row_indices, is_same).to(targets), targets)


def compute_target_std(targets: Tensor, prefixes: Prefixes, *, rows: slice = slice(None)) -> float:
    """Return the standard deviation of the targets between different sequences.

    Near 0, there is nothing to learn. NaN for fewer than two such targets.

    Args:
        targets: float[R, A], from `compute_target_matrix`.
        prefixes: A of them.
        rows: prefixes to which the R rows belong.
    """
    ids = prefixes.sequence_ids
    between_sequences = targets[ids[rows][:, None] != ids[None, :]]
    return float(between_sequences.std()) if len(between_sequences) > 1 else float("nan")


def _common_shares(prefixes: Prefixes, row_indices: Tensor, is_same: Tensor) -> Tensor:
    """Return the number of leading slices in common / length of the longer prefix, float64[R, A].

    Only where `is_same`, bool[R, A]; 0 elsewhere.
    """
    i, j = is_same.nonzero(as_tuple=True)
    lengths_i = prefixes.lengths[row_indices[i]]
    lengths_j = prefixes.lengths[j]
    position = torch.arange(prefixes.slice_indices.shape[1], device=is_same.device)
    is_equal = prefixes.slice_indices[row_indices[i]] == prefixes.slice_indices[j]  # [P, L]
    is_equal &= position < torch.minimum(lengths_i, lengths_j)[:, None]
    num_leading = is_equal.long().cumprod(1).sum(1)
    shares = torch.zeros(is_same.shape, dtype=torch.float64, device=is_same.device)
    shares[i, j] = num_leading / torch.maximum(lengths_i, lengths_j).double()
    return shares


def _mean_cosines(cosines: Tensor, prefixes: Prefixes) -> Tensor:
    """Return the mean cosine over all pairs of slices of two prefixes, float[A, A]."""
    shares = prefixes.is_filled().to(cosines) / prefixes.lengths[:, None]
    weights = cosines.new_zeros(len(prefixes), len(cosines))
    weights.scatter_add_(1, prefixes.slice_indices, shares)  # [A, U]
    return weights @ cosines @ weights.T


def _compare_pairs(
    compare: Callable[[Tensor, Tensor], Tensor], *, is_needed: Tensor, begin: int, like: Tensor
) -> Tensor:
    """Return `compare(x, y)` of every needed pair of prefixes, float[R, A]; 0 elsewhere.

    A pair whose prefixes both belong to the rows is computed once, and mirrored.

    Args:
        compare: takes indices of prefixes, int64[P] twice, and returns float[P]. It is called once
            with all pairs, or not at all if no pair is needed.
        is_needed: bool[R, A].
        begin: index of the prefix of the first row.
        like: tensor whose device and dtype the result gets.
    """
    indices = torch.arange(is_needed.shape[1], device=like.device)
    row_indices = indices[begin : begin + len(is_needed)]
    is_mirrored = (indices >= begin) & (indices < row_indices[:, None])  # an earlier row has it
    i, j = (is_needed & ~is_mirrored).nonzero(as_tuple=True)
    scores = like.new_zeros(is_needed.shape)
    if len(i) == 0:
        return scores
    scores[i, j] = compare(row_indices[i], j)
    is_row = (j >= begin) & (j < begin + len(is_needed))
    scores[j[is_row] - begin, row_indices[i[is_row]]] = scores[i[is_row], j[is_row]]
    return scores


def _normalized_gak(
    cosines: Tensor, prefixes: Prefixes, x: Tensor, y: Tensor, delta: float
) -> Tensor:
    """Return the normalised alignment kernel of the prefixes x[p] and y[p], float[P], at most 1.

    Sigma is delta * sqrt((M + N) / 2), also in both self terms. The dtype is that of the cosines.
    """
    lengths = prefixes.lengths
    # The compiled engine of the CPU keeps the digits of a logarithm in float32. Log space, used on
    # a GPU, needs float64 for it, at little cost.
    dtype = cosines.dtype if cosines.device.type == "cpu" else torch.float64

    def compute_log_kernel(x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        def _compute(chunk: Tensor, distances: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return compute_log_gak(distances, m, n, sigma=sigma[chunk])

        return _map_chunks(_compute, cosines, prefixes, x, y, dtype=dtype)

    # K(x, x) depends on the partner only by its length: there are far fewer kernels than pairs.
    # A table of flags finds the distinct ones; `unique` would sort all pairs.
    base = int(lengths.max()) + 1
    keys = torch.cat([x, y]) * base + torch.cat([lengths[y], lengths[x]])
    is_used = torch.zeros(len(prefixes) * base, dtype=torch.bool, device=keys.device)
    is_used[keys] = True
    (distinct_keys,) = is_used.nonzero(as_tuple=True)
    index_of_key = is_used.cumsum(0) - 1
    prefix = distinct_keys // base
    sigma = compute_sigma(lengths[prefix].double(), distinct_keys % base, delta)
    log_self = compute_log_kernel(prefix, prefix, sigma)[index_of_key[keys]]
    sigma = compute_sigma(lengths[x].double(), lengths[y], delta)
    log_joint = compute_log_kernel(x, y, sigma)
    log_k = log_joint - (log_self[: len(x)] + log_self[len(x) :]) / 2
    # Without positive semi-definiteness nothing bounds K by 1, and a cosine cannot be more.
    return log_k.exp().clamp(max=1.0).to(cosines)


def _alignment_weighted_means(
    cosines: Tensor, prefixes: Prefixes, x: Tensor, y: Tensor, delta: float
) -> Tensor:
    """Return the alignment-weighted mean cosine of prefixes x[p] and y[p], float[P]."""

    def _compute(chunk: Tensor, distances: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return compute_alignment_weighted_mean(distances, m, n, sigma=delta)

    # In float64: the posterior of a long alignment among short ones leaves the range of float32.
    return _map_chunks(_compute, cosines, prefixes, x, y, dtype=torch.float64).to(cosines)


def _map_chunks(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    cosines: Tensor,
    prefixes: Prefixes,
    x: Tensor,
    y: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return `compute(chunk, distances, lengths_x, lengths_y)` of pairs (x[i], y[i]), float64[P].

    A chunk has pairs of similar length: their indices i, int64[p], and squared distances [p, M, N]
    in `dtype`, of which those beyond the lengths have no meaning. Only those of one chunk exist at
    once, since all of them would take gigabytes.
    """
    longer = torch.maximum(prefixes.lengths[x], prefixes.lengths[y])
    order = longer.argsort(descending=True)
    results = cosines.new_empty(len(x), dtype=torch.float64)
    while len(order):
        size = max(1, MAX_CELLS_PER_CHUNK // int(longer[order[0]]) ** 2)
        chunk = order[:size]
        order = order[size:]
        lengths_x = prefixes.lengths[x[chunk]]
        lengths_y = prefixes.lengths[y[chunk]]
        i = prefixes.slice_indices[x[chunk], : int(lengths_x.max())]
        j = prefixes.slice_indices[y[chunk], : int(lengths_y.max())]
        pair_cosines = cosines[i[:, :, None], j[:, None, :]].to(dtype)
        distances = cosines_to_squared_distances(pair_cosines)
        results[chunk] = compute(chunk, distances, lengths_x, lengths_y)
    return results
