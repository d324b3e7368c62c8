"""Parts that several recipes share: embedding sequences, and both losses of a readout.

The losses are this rank's shares of the losses of the global batch (see `vlduet.distributed`).
"""

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
from vlduet.objectives.language import language_loss
from vlduet.recipes.frozen import GuideKind, compute_guide_scores, with_slices

QUERY_ROLES = ("image", "query")
"""Roles of the anchors that are rows of the contrastive loss."""
TARGET_ROLES = ("text", "positive", "negative")
"""Roles of the anchors that are its columns."""


def layout_retrieval_record(
    sample: Sample, renderer: Renderer, *, guide: GuideKind = "none"
) -> list[Sequence]:
    """Return the query of a record, its positives and its hard negatives, one sequence each.

    Raises:
        DataError: content that `Renderer.render_embedding` cannot render, such as an empty one.
        ImageError: an unreadable image.
        ConfigError: the prompts need a chat template, and the checkpoint has no usable one.
    """
    record = sample.record
    sequences = [layout_embedding(sample, renderer, record.query, role="query", guide=guide)]
    for parts in record.positive:
        sequences.append(layout_embedding(sample, renderer, parts, role="positive", guide=guide))
    return sequences + layout_hard_negatives(sample, renderer, guide=guide)


def layout_hard_negatives(
    sample: Sample, renderer: Renderer, *, guide: GuideKind = "none"
) -> list[Sequence]:
    """Return the hard negatives that a record names, one sequence each; [] without any.

    Raises DataError and ImageError as `layout_retrieval_record` does.
    """
    return [
        layout_embedding(sample, renderer, parts, role="negative", guide=guide)
        for parts in sample.record.negative
    ]


def layout_embedding(
    sample: Sample, renderer: Renderer, parts: Parts, *, role: str, guide: GuideKind = "none"
) -> Sequence:
    """Return the sequence with one anchor whose embedding stands for the parts.

    Args:
        sample: gives the name of the record.
        renderer: applies the model's prompts.
        parts: images and texts.
        role: of the anchor; `query` selects the prompt for queries.
        guide: if it is not `none`, the anchor gets the parts as slices for the frozen encoders.

    Raises DataError and ImageError as `layout_retrieval_record` does.
    """
    sequence = renderer.render_embedding(
        parts,
        is_query=role == "query",
        role=role,
        record_name=sample.record_name,
        content_key=content_key(parts),
    )
    return sequence if guide == "none" else with_slices(sequence, parts)


def compute_language_loss(readout: Readout) -> Tensor:
    """Return this rank's share of the mean loss per supervised token; a collective call."""
    return language_loss(
        readout.nll,
        global_token_count=distributed.all_reduce_sum(len(readout.nll)),
        world_size=distributed.get_world_size(),
    )


def compute_contrastive_loss(
    readout: Readout, logit_scale: Tensor, *, min_temperature: float, guide: GuideKind = "none"
) -> Tensor:
    """Return this rank's share of the symmetric InfoNCE of queries and targets; a collective call.

    It is 0, still part of the graph, if no rank has a query with a positive.

    Queries are the anchors of `QUERY_ROLES`, targets those of `TARGET_ROLES`. Positives are anchors
    of one record. Equal content counts as one on both sides: a caption that a second image also has
    is a positive of both, and two copies of an image share their captions.

    Args:
        readout: of this rank; all ranks must call with theirs.
        logit_scale: scalar, log(1 / temperature), learnable.
        min_temperature: the scale is clamped to it.
        guide: frozen encoders that remove likely false negatives (ours); `none` removes none. With
            another one, the slices of the anchors must have features.

    Returns:
        A scalar; 0, still part of the graph, without positives.
    """
    queries, query_anchors = readout.select_roles(*QUERY_ROLES)
    targets, target_anchors = readout.select_roles(*TARGET_ROLES)
    all_queries, first_row = distributed.all_gather_rows(queries)
    all_targets, first_column = distributed.all_gather_rows(targets)
    all_query_anchors, all_target_anchors = _gather_anchors(query_anchors, target_anchors)
    positive_mask = find_positive_pairs(all_query_anchors, all_target_anchors)
    # Content that is a query of one record and a target of another is not its own negative.
    query_keys = [anchor.content_key for anchor in all_query_anchors]
    target_keys = [anchor.content_key for anchor in all_target_anchors]
    ignore_mask = match_content_keys(query_keys, target_keys) & ~positive_mask
    if guide != "none" and all_query_anchors and all_target_anchors:
        guide_scores, content_kinds = compute_guide_scores(
            query_anchors, target_anchors, guide=guide, like=queries.detach()
        )
        ignore_mask |= find_false_negatives(
            guide_scores.cpu(),
            positive_mask,
            named_negatives=_find_named_negatives(all_query_anchors, all_target_anchors),
            content_kinds=content_kinds,
        )
    return contrastive_loss(
        all_queries,
        all_targets,
        logit_scale=clamp_logit_scale(logit_scale, min_temperature),
        positive_mask=positive_mask.to(queries.device),
        ignore_mask=ignore_mask.to(queries.device),
        rows=slice(first_row, first_row + len(queries)),
        columns=slice(first_column, first_column + len(targets)),
        world_size=distributed.get_world_size(),
    )


def _gather_anchors(
    queries: list[Anchor], targets: list[Anchor]
) -> tuple[list[Anchor], list[Anchor]]:
    """Return queries and targets of all ranks, in rank order; a collective call.

    They are copies without slices, to send less.
    """
    own_queries = [replace(anchor, slices=()) for anchor in queries]
    own_targets = [replace(anchor, slices=()) for anchor in targets]
    by_rank = distributed.all_gather_objects((own_queries, own_targets))
    all_queries = [anchor for rank_queries, _ in by_rank for anchor in rank_queries]
    all_targets = [anchor for _, rank_targets in by_rank for anchor in rank_targets]
    return all_queries, all_targets


def _find_named_negatives(queries: list[Anchor], targets: list[Anchor]) -> Tensor:
    """Return bool[N, M]: which targets are hard negatives that the query's own record names."""
    query_records = [anchor.record_name for anchor in queries]
    # No record has this name, so that other targets match no query.
    target_records = [
        anchor.record_name if anchor.role == "negative" else "\0" for anchor in targets
    ]
    return match_content_keys(query_records, target_records)


def find_positive_pairs(queries: list[Anchor], targets: list[Anchor]) -> Tensor:
    """Return bool[N, M]: which queries and targets belong together.

    Those of one record do, except its hard negatives. If two contents belong together in one place,
    they do wherever they occur, even where the target is a hard negative.
    """
    query_contents = _number_contents(queries)
    target_contents = _number_contents(targets)
    contents_of_record: dict[str, set[int]] = {}
    for anchor in queries:
        contents = contents_of_record.setdefault(anchor.record_name, set())
        contents.add(query_contents[anchor.content_key])
    is_pair = torch.zeros(len(query_contents), len(target_contents), dtype=torch.bool)
    for anchor in targets:
        if anchor.role != "negative":
            contents = contents_of_record.get(anchor.record_name, set())
            is_pair[list(contents), target_contents[anchor.content_key]] = True
    rows = torch.tensor([query_contents[anchor.content_key] for anchor in queries]).long()
    columns = torch.tensor([target_contents[anchor.content_key] for anchor in targets]).long()
    return is_pair[rows][:, columns]


def _number_contents(anchors: list[Anchor]) -> dict[str, int]:
    """Return a number for every distinct content key, from 0 in order of appearance."""
    keys = dict.fromkeys(anchor.content_key for anchor in anchors)
    return {key: number for number, key in enumerate(keys)}
