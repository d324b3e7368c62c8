"""What recipes share: the layout of retrieval records, and the contrastive loss of a readout over all processes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.data.content_keys import content_key
from vlduet.data.records import Parts
from vlduet.data.sequences import Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.objectives.contrastive import (
    clamp_logit_scale,
    contrastive_loss,
    find_false_negatives,
    match_content_keys,
)
from vlduet.recipes.frozen import GuideKind, compute_guide_scores, with_slices

QUERY_ROLES = ("image", "query")
TARGET_ROLES = ("text", "positive", "negative")


def layout_retrieval_record(
    sample: Sample, renderer: Renderer, *, guide: GuideKind = "none"
) -> list[Sequence]:
    """A query, its positives and its hard negatives, a sequence each. Raises DataError, ImageError."""
    record = sample.record
    asked = [layout_embedding(sample, renderer, record.query, role="query", guide=guide)]
    right = [
        layout_embedding(sample, renderer, parts, role="positive", guide=guide)
        for parts in record.positive
    ]
    return asked + right + layout_hard_negatives(sample, renderer, guide=guide)


def layout_hard_negatives(
    sample: Sample, renderer: Renderer, *, guide: GuideKind = "none"
) -> list[Sequence]:
    """The hard negatives that a record names. Raises DataError, ImageError."""
    return [
        layout_embedding(sample, renderer, parts, role="negative", guide=guide)
        for parts in sample.record.negative
    ]


def layout_embedding(
    sample: Sample, renderer: Renderer, parts: Parts, *, role: str, guide: GuideKind = "none"
) -> Sequence:
    """What is read as one embedding; where there is a guide, its slices stand at the anchor for it to look at."""
    key = content_key(parts)
    found = renderer.render_embedding(
        parts, is_query=role == "query", role=role, record_name=sample.record_name, content_key=key
    )
    return found if guide == "none" else with_slices(found, parts)


def compute_contrastive_loss(
    readout: Readout, logit_scale: Tensor, *, min_temperature: float, guide: GuideKind = "none"
) -> Tensor:
    """Symmetric InfoNCE between what asks (images, queries) and what answers (texts, documents) in the global batch.

    Pairs are anchors of one record. Equal content counts as one thing on both sides: a caption that another image also
    has is a positive of both, and two copies of an image share their captions.

    Args:
        logit_scale: log(1 / temperature), learnable; floor: the lowest temperature.
        guide: frozen encoders that leave out what they find as alike as a pair (ours); `none` leaves out nothing.
    """
    left, left_anchors = readout.select_roles(*QUERY_ROLES)
    right, right_anchors = readout.select_roles(*TARGET_ROLES)
    all_left, row = distributed.all_gather_rows(left)
    all_right, column = distributed.all_gather_rows(right)
    # Without slices: what they show is sent only where it is asked for.
    sides = [
        [replace(anchor, slices=()) for anchor in side] for side in (left_anchors, right_anchors)
    ]
    facts = distributed.all_gather_objects(sides)
    every_left, every_right = (
        [a for part in side for a in part] for side in zip(*facts, strict=True)
    )
    positive = find_positive_pairs(every_left, every_right)
    # What asks in one record and answers in another is not its own negative.
    ignore = (
        match_content_keys([a.key for a in every_left], [a.key for a in every_right]) & ~positive
    )
    if guide != "none" and every_left and every_right:
        alike, kinds = compute_guide_scores(
            left_anchors, right_anchors, guide=guide, like=left.detach()
        )
        ignore |= find_false_negatives(
            alike.cpu(),
            positive,
            named_negatives=_find_named_negatives(every_left, every_right),
            content_kinds=kinds,
        )
    return contrastive_loss(
        all_left,
        all_right,
        logit_scale=clamp_logit_scale(logit_scale, min_temperature),
        positive_mask=positive.to(left.device),
        ignore_mask=ignore.to(left.device),
        rows=slice(row, row + len(left)),
        columns=slice(column, column + len(right)),
        world_size=distributed.get_world_size(),
    )


def _find_named_negatives(left: list[Anchor], right: list[Anchor]) -> Tensor:
    """bool[N, M]: what a record names as a hard negative of its own."""
    lefts = [anchor.record_name for anchor in left]
    return match_content_keys(
        lefts, [anchor.record_name if anchor.role == "negative" else "\0" for anchor in right]
    )


def find_positive_pairs(left: list[Anchor], right: list[Anchor]) -> Tensor:
    """bool[N, M]: pairs of one record (hard negatives excepted), closed over equal content on either side."""
    lefts, rights = (
        {key: i for i, key in enumerate(dict.fromkeys(a.content_key for a in side))}
        for side in (left, right)
    )
    asking: dict[str, set[int]] = {}
    for anchor in left:
        asking.setdefault(anchor.record_name, set()).add(lefts[anchor.content_key])
    paired = torch.zeros(len(lefts), len(rights), dtype=torch.bool)  # of contents
    for anchor in right:
        if anchor.role != "negative":
            paired[list(asking.get(anchor.record_name, ())), rights[anchor.content_key]] = True
    rows, columns = (
        torch.tensor([of[a.content_key] for a in side])
        for of, side in ((lefts, left), (rights, right))
    )
    return paired[rows.long()][:, columns.long()]
