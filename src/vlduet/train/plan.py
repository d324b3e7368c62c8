"""`--dry-run`: what a config would do, before it costs anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from vlduet.config import RunConfig
from vlduet.data.batches import Batch
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import compute_features
from vlduet.train import setup

MAX_PROBED_BATCHES, MAX_PROBED_BATCH_SIZE = 4, 512
"""Batches that are laid out to measure tokens, and the records of them at most: what a larger one needs is scaled up."""


def plan_run(config: RunConfig) -> dict[str, Any]:
    """Load model and data, lay out a few batches, train nothing.

    Returns:
        Counts of records by kind, tokens of a batch, trainable parameters, and estimated memory of a step. The memory is an
        estimate from layer shapes: weights + gradients + Adam's moments + activations of the largest probed batch.
    """
    size = min(config.train.batch_size, MAX_PROBED_BATCH_SIZE)
    times = config.train.batch_size / size
    part = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": size})})
    run = setup.prepare_run(part, write_files=False)
    probe = min(config.train.steps, MAX_PROBED_BATCHES, MAX_PROBED_BATCH_SIZE // size)
    laid_out = [chunks for _, chunks in setup.iterate_batches(run, 0, probe) if chunks]
    kinds = Counter(record.kind for source in run.mixture.sources for record in source)
    trainable = sum(p.numel() for p in run.trainable_parameters())
    tokens = [sum(chunk.num_tokens for chunk in chunks) for chunks in laid_out]
    padded = [sum(chunk.token_ids.numel() for chunk in chunks) for chunks in laid_out]
    supervised = [sum(chunk.num_supervised_tokens for chunk in chunks) for chunks in laid_out]
    # What lives at one time: a chunk, or the whole batch.
    together = (
        [[chunk] for chunks in laid_out for chunk in chunks]
        if config.train.chunk_tokens
        else laid_out
    )
    memory = max(
        (_memory(run, chunks, 1 if config.train.chunk_tokens else times) for chunks in together),
        default=0.0,
    )
    embeddings = max(
        (sum(len(chunk.anchors) for chunk in chunks) for chunks in laid_out), default=0
    )
    pictures = sum(len(record.images()) for source in run.mixture.sources for record in source)
    epochs = config.train.steps * config.train.batch_size / sum(len(s) for s in run.mixture.sources)
    return {
        "recipe": f"{run.recipe.name}, losses {', '.join(f'{w} x {n}' for n, w in config.objectives.items())}",
        "records": sum(kinds.values()),
        **{f"records: {kind}": count for kind, count in sorted(kinds.items())},
        "records dropped": run.quarantine.count,
        "steps": config.train.steps,
        "epochs": round(epochs, 2),
        "tokens a batch": round(times * sum(tokens) / max(1, len(tokens))),
        **(
            {"chunks a batch": round(times * max(map(len, laid_out), default=0))}
            if config.train.chunk_tokens
            else {}
        ),
        "padding": f"{1 - sum(tokens) / max(1, sum(padded)):.0%} of what is computed",
        "supervised tokens a batch": round(times * sum(supervised) / max(1, len(supervised))),
        "embeddings a batch": round(times * embeddings),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trainable parameters": trainable,
        "estimated memory (GB)": round(memory / 1e9, 2),
        "vision features on disk, at most (GB)": round(
            pictures * _features(run, laid_out) / 1e9, 2
        ),
        "device": str(run.model.logit_scale.device),
        "out": str(config.out),
    }


def _features(run: setup.TrainingRun, laid_out: list[list[Batch]]) -> int:
    """Bytes of what the vision tower sees in one image; 0 where nothing of it is kept on disk."""
    images = [image for chunks in laid_out for chunk in chunks for image in chunk.images]
    if not images or not isinstance(run.model, DuetModel) or run.config.data.cache is False:
        return 0
    return (
        4
        * compute_features(
            images[:1], run.model.feature_cache, run.model.backbone.compute_vision_features
        )[0].numel()
    )


def _memory(run: setup.TrainingRun, together: list[Batch], times: float) -> float:
    """Bytes: weights, then gradient and two moments of what is trained, then activations of so many times what is there, and
    one chunk of logits."""
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    moving = sum(p.numel() for p in run.trainable_parameters()) * 4 * 3
    if not isinstance(run.model, DuetModel):
        return float(weights + moving)
    tokens = times * sum(batch.token_ids.numel() for batch in together)
    supervised = sum(batch.num_supervised_tokens for batch in together)
    config = run.model.backbone.model.config.text_config
    size = torch.finfo(run.model.backbone.model.dtype).bits // 8
    # A block keeps about 12 tensors of the width and 3 of the intermediate width for its backward.
    a_block = 12 * config.hidden_size + 3 * config.intermediate_size
    kept = config.hidden_size if run.config.train.checkpointing else a_block
    a_token = (
        config.num_hidden_layers * kept + (a_block if run.config.train.checkpointing else 0)
    ) * size
    logits = min(supervised, 1024) * config.vocab_size * 4 * 2
    return float(weights + moving + tokens * a_token + logits)
