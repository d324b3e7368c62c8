"""What frozen encoders say of the anchors of all ranks: Sugar's targets, and a guide of the contrastive loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.data.records import ImageRef, Parts
from vlduet.data.sequences import Anchor, Sequence
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
"""The encoders that a guide needs."""


def with_slices(sequence: Sequence, parts: Parts) -> Sequence:
    """The sequence with what its one anchor stands for, for the frozen encoders to look at."""
    (anchor,) = sequence.anchors
    return replace(sequence, anchors=(replace(anchor, slices=tuple(map(make_slice, parts))),))


def compute_guide_scores(
    left: list[Anchor], right: list[Anchor], *, guide: GuideKind, like: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """How alike the frozen encoders find what asks and what answers: their alignment kernel, a cosine where both are one
    slice (`target_matrix`).

    Args:
        left, right: this rank's, their slices seen by the encoders, not both nothing on all ranks.
        like: gives device and dtype.

    Returns:
        float[N, M], those of all ranks in rank order; and what each is made of, int64[N] and int64[M]: 1 for an image, 2 for
        a text, 3 for both.
    """
    cosines, found = slice_cosines(
        [*left, *right], use_triple_kernel=guide == "triple", calibrate=False, like=like
    )
    told = distributed.all_gather_objects(
        [(side, _made_of(a)) for side, some in enumerate((left, right)) for a in some]
    )
    of_right, made_of = (
        torch.tensor([one[n] for rank in told for one in rank], device=like.device) for n in (0, 1)
    )
    order = of_right.argsort(stable=True)  # all that asks, then all that answers
    # A sequence of its own for each: nothing is alike because it stands in one record.
    prefixes = Prefixes(
        found.slice_indices[order],
        found.lengths[order],
        torch.arange(len(order), device=like.device),
    )
    asking = len(order) - int(of_right.sum())
    kinds = made_of[order].cpu()
    return compute_target_matrix(cosines, prefixes, rows=slice(0, asking))[:, asking:], (
        kinds[:asking],
        kinds[asking:],
    )


def _made_of(anchor: Anchor) -> int:
    return sum({1 if isinstance(one.part, ImageRef) else 2 for one in anchor.slices})


def slice_cosines(
    anchors: list[Anchor], *, use_triple_kernel: bool, calibrate: bool, like: Tensor
) -> tuple[Tensor, Prefixes]:
    """Cosines float[U, U] of the distinct slices of all ranks, and the prefixes of all ranks as indices into them.

    Args:
        anchors: this rank's, their slices seen by the encoders.
        triple: by the encoder that a pair asks for, or all by `cross`; scaled: brought to one scale, by the unrelated.
        like: gives device and dtype.
    """
    slices = list({one.content_key: one for anchor in anchors for one in anchor.slices}.values())
    images = [isinstance(one.part, ImageRef) for one in slices]
    cross = [one.features["cross"] for one in slices]
    same = (
        [one.features["vision" if i else "text"] for one, i in zip(slices, images, strict=True)]
        if use_triple_kernel
        else cross
    )
    told = distributed.all_gather_objects(
        (
            [(one.content_key, image) for one, image in zip(slices, images, strict=True)],
            [
                (anchor.record_name, [one.content_key for one in anchor.slices])
                for anchor in anchors
            ],
            [
                max(map(len, half), default=0) for half in (same, cross)
            ],  # unknown to a rank without a slice
        )
    )
    rows = [row for found, _, _ in told for row in found]
    first: dict[str, int] = {}
    for at, (key, _) in enumerate(rows):
        first.setdefault(key, at)
    chosen = list(first.values())
    halves = [
        distributed.all_gather_rows(_stacked(half, max(widths[i] for _, _, widths in told), like))[
            0
        ][chosen]
        for i, half in enumerate((same, cross))
    ]
    image = torch.tensor([rows[at][1] for at in chosen], dtype=torch.bool, device=like.device)
    cosines = compute_triple_cosines(*halves, is_image=image, use_triple_kernel=use_triple_kernel)
    prefixes = _prefixes(
        [prefix for _, found, _ in told for prefix in found], list(first), like.device
    )
    if calibrate:
        cosines = calibrate_cosines(
            cosines, is_image=image, is_related=find_related_slices(prefixes, len(image))
        )
    return cosines, prefixes


def _stacked(vectors: list[Tensor], width: int, like: Tensor) -> Tensor:
    """float[U, width], short ones filled with zeros: vectors of two encoders are never compared with each other."""
    found = like.new_zeros(len(vectors), width)
    for row, vector in zip(found, vectors, strict=True):
        row[: len(vector)] = vector.to(like)
    return found


def _prefixes(
    found: list[tuple[str, list[str]]], keys: list[str], device: torch.device
) -> Prefixes:
    """(record, keys of the slices) of every prefix -> indices."""
    number = {key: i for i, key in enumerate(keys)}
    sequence: dict[str, int] = {}
    longest = max(len(prefix) for _, prefix in found)
    return Prefixes(
        torch.tensor(
            [[number[key] for key in prefix] + [0] * (longest - len(prefix)) for _, prefix in found]
        ).to(device),
        torch.tensor([len(prefix) for _, prefix in found], device=device),
        torch.tensor(
            [sequence.setdefault(record, len(sequence)) for record, _ in found], device=device
        ),
    )
