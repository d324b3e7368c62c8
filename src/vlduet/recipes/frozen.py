"""Similarities by frozen encoders of the anchors of all ranks.

They are Sugar's targets, and they guide the contrastive loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.data.records import ImageRef, Parts
from vlduet.data.sequences import Anchor, Sequence, Slice
from vlduet.encoders.frozen import make_slice
from vlduet.objectives.sugar_targets import (
    Prefixes,
    calibrate_cosines,
    compute_target_matrix,
    compute_triple_cosines,
    find_related_slices,
)

GuideKind = Literal["none", "cross", "triple"]
GUIDE_ROLES: dict[GuideKind, tuple[str, ...]] = {
    "none": (),
    "cross": ("cross",),
    "triple": ("vision", "text", "cross"),
}
"""Kind of guide -> roles of the frozen encoders that it needs."""

IMAGE_KIND = 1
TEXT_KIND = 2
"""Kinds of the content of an anchor; an anchor with images and texts has their sum."""


def with_slices(sequence: Sequence, parts: Parts) -> Sequence:
    """Return a sequence of one anchor with the parts as slices of that anchor.

    Raises:
        ImageError: an unreadable image.
    """
    (anchor,) = sequence.anchors
    slices = tuple(make_slice(part) for part in parts)
    return replace(sequence, anchors=(replace(anchor, slices=slices),))


def compute_guide_scores(
    queries: list[Anchor], targets: list[Anchor], *, guide: GuideKind, like: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the similarity of queries and targets of all ranks by the encoders of a guide.

    It is the alignment kernel of their slices, and the cosine of two single slices, as
    `compute_target_matrix` computes them. A collective call.

    Args:
        queries: anchors of this rank, with the features of their slices.
        targets: likewise. Over all ranks, there must be a query or a target.
        guide: `cross` or `triple`.
        like: tensor whose device and dtype the scores get.

    Returns:
        float[N, M], in rank order, and the kinds of content of queries and of targets, int64[N] and
        int64[M] on the CPU: `IMAGE_KIND`, `TEXT_KIND`, or their sum.
    """
    cosines, prefixes = slice_cosines(
        [*queries, *targets], use_triple_kernel=guide == "triple", calibrate=False, like=like
    )
    is_target = [False] * len(queries) + [True] * len(targets)
    kinds = [_content_kind(anchor) for anchor in (*queries, *targets)]
    by_rank = distributed.all_gather_objects((is_target, kinds))
    all_is_target = torch.tensor([flag for flags, _ in by_rank for flag in flags])
    all_kinds = torch.tensor([kind for _, rank_kinds in by_rank for kind in rank_kinds])
    order = all_is_target.long().argsort(stable=True)  # the queries of all ranks, then the targets
    num_queries = len(order) - int(all_is_target.sum())
    device_order = order.to(like.device)
    # Every anchor is a sequence of its own: belonging to one record does not make it similar.
    prefixes = Prefixes(
        prefixes.slice_indices[device_order],
        prefixes.lengths[device_order],
        torch.arange(len(order), device=like.device),
    )
    scores = compute_target_matrix(cosines, prefixes, rows=slice(0, num_queries))
    sorted_kinds = all_kinds[order]
    return scores[:, num_queries:], (sorted_kinds[:num_queries], sorted_kinds[num_queries:])


def slice_cosines(
    anchors: list[Anchor], *, use_triple_kernel: bool, calibrate: bool, like: Tensor
) -> tuple[Tensor, Prefixes]:
    """Return the cosines of the distinct slices of all ranks, and the anchors as prefixes of them.

    A collective call; over all ranks, there must be an anchor.

    Args:
        anchors: of this rank. Their slices need the features of `cross`, and for the triple kernel
            also those of `vision` or `text`; KeyError otherwise.
        use_triple_kernel: compare each pair by the encoder for its kinds; False: all by `cross`.
        calibrate: bring the cosines to one scale, see `calibrate_cosines`.
        like: tensor whose device and dtype the cosines get.

    Returns:
        float[U, U] for U distinct slices, and the A prefixes of all ranks in rank order.
    """
    slices = list({s.content_key: s for anchor in anchors for s in anchor.slices}.values())
    cross = [s.features["cross"] for s in slices]
    same = cross
    if use_triple_kernel:
        same = [s.features["vision" if _is_image(s) else "text"] for s in slices]
    prefixes = []
    for anchor in anchors:
        keys = [s.content_key for s in anchor.slices]
        prefixes.append((anchor.record_name, keys))
    by_rank = distributed.all_gather_objects(
        (
            [(s.content_key, _is_image(s)) for s in slices],
            prefixes,
            # A rank without slices learns the dimensions from the others.
            (max(map(len, same), default=0), max(map(len, cross), default=0)),
        )
    )
    all_slices = [pair for rank_slices, _, _ in by_rank for pair in rank_slices]
    row_of_key: dict[str, int] = {}
    for row, (key, _) in enumerate(all_slices):
        row_of_key.setdefault(key, row)
    rows = list(row_of_key.values())  # of every distinct slice, where it occurs first
    same_dim = max(dims[0] for _, _, dims in by_rank)
    cross_dim = max(dims[1] for _, _, dims in by_rank)
    all_same, _ = distributed.all_gather_rows(_stack_vectors(same, same_dim, like))
    all_cross, _ = distributed.all_gather_rows(_stack_vectors(cross, cross_dim, like))
    is_image = torch.tensor([all_slices[row][1] for row in rows]).bool().to(like.device)
    cosines = compute_triple_cosines(
        all_same[rows], all_cross[rows], is_image=is_image, use_triple_kernel=use_triple_kernel
    )
    all_prefixes = [prefix for _, rank_prefixes, _ in by_rank for prefix in rank_prefixes]
    packed = _pack_prefixes(all_prefixes, list(row_of_key), like.device)
    if calibrate:
        is_related = find_related_slices(packed, len(rows))
        cosines = calibrate_cosines(cosines, is_image=is_image, is_related=is_related)
    return cosines, packed


def _is_image(slice_: Slice) -> bool:
    """Return whether a slice is an image rather than a text."""
    return isinstance(slice_.part, ImageRef)


def _content_kind(anchor: Anchor) -> int:
    """Return the sum of the distinct kinds of an anchor's slices; 0 without slices."""
    return sum({IMAGE_KIND if _is_image(s) else TEXT_KIND for s in anchor.slices})


def _stack_vectors(vectors: list[Tensor], dim: int, like: Tensor) -> Tensor:
    """Return vectors of at most `dim` numbers as float[len(vectors), dim], filled up with zeros.

    Vectors of two encoders share the tensor, but they are never compared with each other.
    """
    stacked = like.new_zeros(len(vectors), dim)
    for row, vector in zip(stacked, vectors, strict=True):
        row[: len(vector)] = vector.to(like)
    return stacked


def _pack_prefixes(
    prefixes: list[tuple[str, list[str]]], keys: list[str], device: torch.device
) -> Prefixes:
    """Return prefixes, given as record name and keys of their slices, as indices into `keys`.

    Prefixes of one record get one sequence id, numbered from 0 in order of appearance. Padding is
    0. Raises ValueError without prefixes.
    """
    index = {key: i for i, key in enumerate(keys)}
    number_of_record: dict[str, int] = {}
    longest = max(len(slice_keys) for _, slice_keys in prefixes)
    slice_indices = []
    sequence_ids = []
    for record_name, slice_keys in prefixes:
        padding = [0] * (longest - len(slice_keys))
        slice_indices.append([index[key] for key in slice_keys] + padding)
        sequence_ids.append(number_of_record.setdefault(record_name, len(number_of_record)))
    lengths = [len(slice_keys) for _, slice_keys in prefixes]
    return Prefixes(
        torch.tensor(slice_indices).to(device),
        torch.tensor(lengths, device=device),
        torch.tensor(sequence_ids, device=device),
    )
