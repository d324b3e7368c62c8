"""`--dry-run`: what a config would do, before it costs anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from vlduet.config import RunConfig
from vlduet.data.sequences import IGNORE
from vlduet.model.duet import DuetModel
from vlduet.train import setup

PROBE = 4
"""Batches that are laid out to measure tokens."""


def plan(config: RunConfig) -> dict[str, Any]:
    """Load model and data, lay out a few batches, train nothing.

    Returns:
        Counts of records by kind, tokens of a batch, trainable parameters, and estimated memory of a step. The memory is an
        estimate from layer shapes: weights + gradients + Adam's moments + activations of the largest probed batch.
    """
    run = setup.prepare(config, keep=False)
    laid_out = [batch for _, (_, batch) in zip(range(PROBE), setup.batches(run, 0), strict=False) if batch is not None]
    kinds = Counter(record.kind for source in run.mixture.sources for record in source)
    trainable = sum(p.numel() for p in run.trainable())
    tokens = [batch.num_tokens for batch in laid_out]
    padded = [batch.ids.numel() for batch in laid_out]
    supervised = [int((batch.labels != IGNORE).sum()) for batch in laid_out]
    epochs = config.train.steps * config.train.batch_size / sum(len(s) for s in run.mixture.sources)
    return {
        "recipe": f"{run.recipe.name}, losses {', '.join(f'{w} x {n}' for n, w in config.objectives.items())}",
        "records": sum(kinds.values()),
        **{f"records: {kind}": count for kind, count in sorted(kinds.items())},
        "records dropped": run.quarantine.count,
        "steps": config.train.steps,
        "epochs": round(epochs, 2),
        "tokens a batch": round(sum(tokens) / max(1, len(tokens))),
        "padding": f"{1 - sum(tokens) / max(1, sum(padded)):.0%} of what is computed",
        "supervised tokens a batch": round(sum(supervised) / max(1, len(supervised))),
        "embeddings a batch": max((len(batch.anchors) for batch in laid_out), default=0),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trainable parameters": trainable,
        "estimated memory (GB)": round(_memory(run, max(padded, default=0), max(supervised, default=0)) / 1e9, 2),
        "device": str(run.model.logit_scale.device),
        "out": str(config.out),
    }


def _memory(run: setup.Run, tokens: int, supervised: int) -> float:
    """Bytes: weights, then gradient and two moments of what is trained, then activations and one chunk of logits."""
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    moving = sum(p.numel() for p in run.trainable()) * 4 * 3
    if not isinstance(run.model, DuetModel):
        return float(weights + moving)
    config = run.model.backbone.model.config.text_config
    size = torch.finfo(run.model.backbone.model.dtype).bits // 8
    # A block keeps about 12 tensors of the width and 3 of the intermediate width for its backward.
    a_token = config.num_hidden_layers * (12 * config.hidden_size + 3 * config.intermediate_size) * size
    logits = min(supervised, 1024) * config.vocab_size * 4 * 2
    return float(weights + moving + tokens * a_token + logits)
