"""Dry run of a config: what a run would do and need, before it costs anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlduet.config import RunConfig
from vlduet.data.batches import Batch
from vlduet.model.duet import DuetModel
from vlduet.train.cache_size import measure_cache_size
from vlduet.train.loader import iterate_batches
from vlduet.train.memory import count_batch, count_state_bytes, measure_activations
from vlduet.train.run import TrainingRun
from vlduet.train.setup import prepare_run
from vlduet.train.source_check import (
    check_sources,
    count_epochs,
    describe_data,
    describe_risks,
)

MAX_PROBED_BATCHES = 4
"""Number of steps that are laid out."""
MAX_PROBED_BATCH_SIZE = 512
"""Number of records that are laid out in all; the numbers of a larger batch are scaled up from
them."""


def plan_run(config: RunConfig) -> dict[str, Any]:
    """Load model and data and lay out a few batches; train nothing and write nothing to disk.

    As `prepare_run`, it sets torch's global seed and may log warnings. Records that cannot be laid
    out are only counted.

    Returns:
        Numbers and texts by their labels, to be shown in this order: recipe and losses, records in
        all and by kind, records held out, records dropped and a summary of the data (by those that
        were looked at), steps, epochs, sizes of a batch, parameters, memory, disk, device, out; and
        `warnings`, a list of texts. Sizes are those of the whole `train.batch_size`, as means over
        the probed steps with something to learn, 0 without any (embeddings and chunks: the
        maximum). Memory is that of the largest probed step, measured by `train.memory`.

    Raises:
        ConfigError, DataError, ModelError: as `prepare_run`, `check_sources` and `iterate_batches`.
    """
    run = prepare_run(config, write_files=False)
    check = check_sources(run)
    records = [record for source in run.mixture.sources for record in source]
    kinds = Counter(record.kind for record in records)
    losses = ", ".join(f"{weight} x {name}" for name, weight in config.objectives.items())
    data = {
        "recipe": f"{run.recipe.name}, losses {losses}",
        "records": len(records),
        **{f"records: {kind}": count for kind, count in sorted(kinds.items())},
        "records held out": sum(source.num_holdout for source in run.sources),
        "records dropped": run.quarantine.count,
        "data": describe_data(run, check),
        "steps": run.num_steps,
        "epochs": round(count_epochs(run), 2),
    }
    risks = describe_risks(run, check)
    cache_size = measure_cache_size(run)
    cached_bytes = 0.0
    if cache_size is not None:
        cached_bytes = cache_size.num_bytes
        if cache_size.exceeds_limit:
            risks.append(str(cache_size))
            cached_bytes = 0.0
    return {
        **data,
        **_measure_batches(run),
        "vision features on disk, at most (GB)": round(cached_bytes / 1e9, 2),
        "device": str(run.model.logit_scale.device),
        "out": str(config.out),
        "warnings": risks,
    }


def _measure_batches(run: TrainingRun) -> dict[str, Any]:
    """Lay out the first batches of a run, and return sizes of a batch, parameters and memory.

    The run gets the smaller batch size of the probed steps.
    """
    config = run.config
    train = config.train
    batch_size = min(train.batch_size, MAX_PROBED_BATCH_SIZE)
    scale = train.batch_size / batch_size
    probed_train = train.model_copy(update={"batch_size": batch_size})
    run.config = config.model_copy(update={"train": probed_train})
    num_probed_steps = min(run.num_steps, MAX_PROBED_BATCHES, MAX_PROBED_BATCH_SIZE // batch_size)
    steps = [batches for _, batches in iterate_batches(run, 0, num_probed_steps) if batches]

    all_batches = [batch for batches in steps for batch in batches]
    tokens = sum(batch.num_tokens for batch in all_batches)
    padded_tokens = sum(batch.token_ids.numel() for batch in all_batches)
    labels = sum(batch.num_supervised_tokens for batch in all_batches)
    step_sizes = [sum(map(_count_anchors, batches)) for batches in steps]

    chunks = {}
    if train.chunk_tokens:
        chunks = {"chunks a batch": round(scale * max(map(len, steps), default=0))}
    return {
        "tokens a batch": round(scale * tokens / max(1, len(steps))),
        **chunks,
        "padding": f"{1 - tokens / max(1, padded_tokens):.0%} of what is computed",
        "supervised tokens a batch": round(scale * labels / max(1, len(steps))),
        "embeddings a batch": round(scale * max(step_sizes, default=0)),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trainable parameters": sum(p.numel() for p in run.trainable_parameters()),
        **_estimate_memory(run, steps, scale),
    }


def _count_anchors(batch: Batch) -> int:
    """Return the number of embeddings of a batch."""
    return len(batch.anchors)


def _estimate_memory(run: TrainingRun, steps: list[list[Batch]], scale: float) -> dict[str, float]:
    """Return the memory of the largest step in GB (three digits), in all and by its parts.

    State is the weights (frozen encoders as large as their files), and gradients and moments of
    trained parameters. Activations are those that `train.memory` measures; for other models than
    `DuetModel`, which have small ones, they are left out.

    Args:
        run: the run; its model reads a few tokens, and nothing is modified.
        steps: batches that were laid out, by step.
        scale: ratio of the true batch size to that of `steps`.
    """
    state = count_state_bytes(run.model) + _count_encoder_bytes(run)
    saved, backward = 0.0, 0.0
    if isinstance(run.model, DuetModel) and steps:
        profile = measure_activations(run.model, [batch for batches in steps for batch in batches])
        for batches in steps:
            sizes = [count_batch(run.model, batch) for batch in batches]
            if run.config.train.chunk_tokens:  # one batch is in memory at a time
                step_saved = max(map(profile.count_saved_bytes, sizes))
            else:
                sizes = [size.scale(scale) for size in sizes]
                step_saved = sum(map(profile.count_saved_bytes, sizes))
            saved = max(saved, step_saved)
            backward = max(backward, *map(profile.count_backward_bytes, sizes))
    parts = {
        "estimated memory (GB)": state + saved + backward,
        "weights and optimizer (GB)": state,
        "activations (GB)": saved,
    }
    return {label: float(f"{num_bytes / 1e9:.3g}") for label, num_bytes in parts.items()}


def _count_encoder_bytes(run: TrainingRun) -> int:
    """Return the bytes of the weight files of the run's frozen encoders.

    An encoder in the folder of the trained model shares its vision tower, and does not count.
    """
    folders = {encoder.folder for encoder in run.encoders.by_role.values()}
    if isinstance(run.model, DuetModel):
        folders.discard(run.model.backbone.folder)
    weight_files = [file for folder in folders for file in folder.glob("*.safetensors")]
    return sum(file.stat().st_size for file in weight_files)
