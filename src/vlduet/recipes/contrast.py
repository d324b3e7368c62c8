"""What recipes share: the layout of retrieval records, and the contrastive loss of a readout over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.data.keys import content_key
from vlduet.data.sequences import Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.model.prompts import Renderer
from vlduet.model.readout import Readout
from vlduet.objectives.contrastive import limited, same_content, symmetric_infonce

LEFT = ("image", "query", "mixed")
RIGHT = ("text", "positive", "negative")


def retrieval(sample: Sample, renderer: Renderer) -> list[Sequence]:
    """A query, its positives and its hard negatives, a sequence each. Raises DataError, ImageError."""
    record = sample.record
    rows = [("query", record.query)]
    rows += [("positive", parts) for parts in record.positive] + [("negative", parts) for parts in record.negative]
    return [
        renderer.embed(parts, query=role == "query", role=role, record=sample.name, key=content_key(parts))
        for role, parts in rows
    ]


def contrastive(readout: Readout, logit_scale: Tensor, *, floor: float) -> Tensor:
    """Symmetric InfoNCE between what asks (images, queries) and what answers (texts, documents) in the global batch.

    Pairs are anchors of one record. Equal content counts as one thing on both sides: a caption that another image also
    has is a positive of both, and two copies of an image share their captions.

    Args:
        logit_scale: log(1 / temperature), learnable; floor: the lowest temperature.
    """
    left, left_anchors = readout.of(*LEFT)
    right, right_anchors = readout.of(*RIGHT)
    all_left, row = distributed.gather_rows(left)
    all_right, column = distributed.gather_rows(right)
    facts = distributed.gather_objects((left_anchors, right_anchors))
    every_left, every_right = ([a for part in side for a in part] for side in zip(*facts, strict=True))
    positive = positives(every_left, every_right)
    # What asks in one record and answers in another is not its own negative.
    itself = same_content([a.key for a in every_left], [a.key for a in every_right]) & ~positive
    return symmetric_infonce(
        all_left,
        all_right,
        logit_scale=limited(logit_scale, floor),
        positive=positive.to(left.device),
        ignore=itself.to(left.device),
        rows=slice(row, row + len(left)),
        columns=slice(column, column + len(right)),
        world_size=distributed.world_size(),
    )


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
