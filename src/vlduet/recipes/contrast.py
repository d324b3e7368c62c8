"""What recipes share: the layout of retrieval records, and the contrastive loss of a readout over all processes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.data.keys import content_key
from vlduet.data.records import Parts
from vlduet.data.sequences import Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.model.prompts import Renderer
from vlduet.model.readout import Readout
from vlduet.objectives.contrastive import false_negatives, limited, same_content, symmetric_infonce
from vlduet.recipes.frozen import Guide, guided, shown

LEFT = ("image", "query")
RIGHT = ("text", "positive", "negative")


def retrieval(sample: Sample, renderer: Renderer, *, guide: Guide = "none") -> list[Sequence]:
    """A query, its positives and its hard negatives, a sequence each. Raises DataError, ImageError."""
    record = sample.record
    asked = [embedded(sample, renderer, record.query, role="query", guide=guide)]
    right = [embedded(sample, renderer, parts, role="positive", guide=guide) for parts in record.positive]
    return asked + right + negatives(sample, renderer, guide=guide)


def negatives(sample: Sample, renderer: Renderer, *, guide: Guide = "none") -> list[Sequence]:
    """The hard negatives that a record names. Raises DataError, ImageError."""
    return [embedded(sample, renderer, parts, role="negative", guide=guide) for parts in sample.record.negative]


def embedded(sample: Sample, renderer: Renderer, parts: Parts, *, role: str, guide: Guide = "none") -> Sequence:
    """What is read as one embedding; where there is a guide, its slices stand at the anchor for it to look at."""
    key = content_key(parts)
    found = renderer.embed(parts, query=role == "query", role=role, record=sample.name, key=key)
    return found if guide == "none" else shown(found, parts)


def contrastive(readout: Readout, logit_scale: Tensor, *, floor: float, guide: Guide = "none") -> Tensor:
    """Symmetric InfoNCE between what asks (images, queries) and what answers (texts, documents) in the global batch.

    Pairs are anchors of one record. Equal content counts as one thing on both sides: a caption that another image also
    has is a positive of both, and two copies of an image share their captions.

    Args:
        logit_scale: log(1 / temperature), learnable; floor: the lowest temperature.
        guide: frozen encoders that leave out what they find as alike as a pair (ours); `none` leaves out nothing.
    """
    left, left_anchors = readout.of(*LEFT)
    right, right_anchors = readout.of(*RIGHT)
    all_left, row = distributed.gather_rows(left)
    all_right, column = distributed.gather_rows(right)
    # Without slices: what they show is sent only where it is asked for.
    sides = [[replace(anchor, slices=()) for anchor in side] for side in (left_anchors, right_anchors)]
    facts = distributed.gather_objects(sides)
    every_left, every_right = ([a for part in side for a in part] for side in zip(*facts, strict=True))
    positive = positives(every_left, every_right)
    # What asks in one record and answers in another is not its own negative.
    ignore = same_content([a.key for a in every_left], [a.key for a in every_right]) & ~positive
    if guide != "none" and every_left and every_right:
        alike, kinds = guided(left_anchors, right_anchors, guide=guide, like=left.detach())
        ignore |= false_negatives(alike.cpu(), positive, told=_told(every_left, every_right), kinds=kinds)
    return symmetric_infonce(
        all_left,
        all_right,
        logit_scale=limited(logit_scale, floor),
        positive=positive.to(left.device),
        ignore=ignore.to(left.device),
        rows=slice(row, row + len(left)),
        columns=slice(column, column + len(right)),
        world_size=distributed.world_size(),
    )


def _told(left: list[Anchor], right: list[Anchor]) -> Tensor:
    """bool[N, M]: what a record names as a hard negative of its own."""
    lefts = [anchor.record for anchor in left]
    return same_content(lefts, [anchor.record if anchor.role == "negative" else "\0" for anchor in right])


def positives(left: list[Anchor], right: list[Anchor]) -> Tensor:
    """bool[N, M]: pairs of one record (hard negatives excepted), closed over equal content on either side."""
    lefts, rights = ({key: i for i, key in enumerate(dict.fromkeys(a.key for a in side))} for side in (left, right))
    asking: dict[str, set[int]] = {}
    for anchor in left:
        asking.setdefault(anchor.record, set()).add(lefts[anchor.key])
    paired = torch.zeros(len(lefts), len(rights), dtype=torch.bool)  # of contents
    for anchor in right:
        if anchor.role != "negative":
            paired[list(asking.get(anchor.record, ())), rights[anchor.key]] = True
    rows, columns = (torch.tensor([of[a.key] for a in side]) for of, side in ((lefts, left), (rights, right)))
    return paired[rows.long()][:, columns.long()]
