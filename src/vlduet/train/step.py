"""One training step: forward and backward pass, average over ranks, clipping, optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from vlduet import distributed
from vlduet.data.batches import Batch
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import concatenate_readouts, create_empty_readout
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.optim import learning_rate_factor
from vlduet.train.run import TrainingRun


def seed_step(seed: int, step: int) -> None:
    """Seed torch by (seed, step, rank), so that dropout in a resumed run draws the same numbers."""
    key = np.random.SeedSequence((seed % 2**64, step, distributed.get_rank()))
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def forward_backward(run: TrainingRun, batches: list[Batch]) -> dict[str, float]:
    """Compute L = sum of weight * loss and leave its gradients, averaged and clipped, in `.grad`.

    Collective: every rank must call it, even one without a batch. The model runs in its present
    mode (train or eval), and gradients are added to those that `.grad` holds before.

    Args:
        run: the run; the values of its parameters are not changed.
        batches: this rank's batches of the step, from `loader.iterate_batches`; their number may
            differ between ranks.

    Returns:
        Every loss with a weight and their weighted sum `loss`, for the global batch; `grad_norm`,
        the norm of all averaged gradients before they are clipped to `train.clip`; and
        `temperature`. A loss without a label or anchor in the global batch is left out, since its
        0 is no measurement, and so is the sum without any loss. Equal on all ranks. Values may be
        infinite or NaN, which the caller checks before the optimizer step.
    """
    # Even without a batch this rank takes part in all collectives, or the others would wait for
    # ever.
    empty = create_empty_readout(run.model.dim, like=run.model.logit_scale.detach())
    if run.config.train.chunk_tokens:
        losses = compute_cached_losses(
            run.model, batches, compute_losses=run.compute_losses, empty=empty
        )
    else:
        readouts = [run.model(batch) for batch in batches]
        losses = run.compute_losses(concatenate_readouts([empty, *readouts]))
        losses["loss"].backward()
    parameters = run.trainable_parameters()
    distributed.average_gradients(parameters)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.train.clip)
    has_labels = distributed.all_reduce_sum(sum(b.num_supervised_tokens for b in batches)) > 0
    has_anchors = distributed.all_reduce_sum(sum(len(b.anchors) for b in batches)) > 0
    has_terms = {name: has_labels if name == "language" else has_anchors for name in losses}
    has_terms["loss"] = has_labels or has_anchors
    return {
        **{
            name: _average_over_ranks(float(loss.detach()))
            for name, loss in losses.items()
            if has_terms[name]
        },
        "grad_norm": float(grad_norm),
        "temperature": float(torch.exp(-run.model.logit_scale.detach())),
    }


def _average_over_ranks(value: float) -> float:
    """Return the mean of a number over all ranks (collective).

    The losses are W-fold shares, so their mean is the loss of the global batch.
    """
    return distributed.all_reduce_sum(value) / distributed.get_world_size()


def all_finite(values: Mapping[str, float]) -> bool:
    """Return whether no value is infinite or NaN."""
    return all(math.isfinite(value) for value in values.values())


def optimizer_step(run: TrainingRun, step: int) -> None:
    """Update the parameters at the learning rate of `step`, and set their gradients to None.

    The learning rate is stored in the optimizer's groups. The recipe's hook `after_step`, if it has
    one, may then modify the model.
    """
    factor = learning_rate_factor(step, run.num_steps, run.config.train.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    run.optimizer.step()
    if run.recipe.after_step is not None:
        assert isinstance(run.model, DuetModel), "a recipe that builds its own model needs no hook"
        run.recipe.after_step(run.model)
    run.optimizer.zero_grad(set_to_none=True)
