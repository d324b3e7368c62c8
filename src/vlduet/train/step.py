"""One step: forward, losses, backward, gradients averaged over ranks, clip, move."""

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
from vlduet.train.setup import TrainingRun


def seed_step(seed: int, step: int) -> None:
    """Make dropout a pure function of (seed, step, rank), as the order of the data is: a resumed run draws the same."""
    key = np.random.SeedSequence((seed % 2**64, step, distributed.get_rank()))
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def forward_backward(run: TrainingRun, chunks: list[Batch]) -> dict[str, float]:
    """Compute L = sum of weight * loss and its gradients.

    Args:
        chunks: this rank's share of the batch, from `setup.batches`; ranks may have different numbers of them.

    Returns:
        Every loss, their weighted sum `loss`, the global gradient norm before clipping, and the temperature. Not finite
        values are returned, not hidden: the loop stops on them before anything moves.
    """
    # A rank with nothing to do still takes part in the collectives, or the others would wait for ever.
    nothing = create_empty_readout(run.model.dim, like=run.model.logit_scale.detach())
    if run.config.train.chunk_tokens:
        losses = compute_cached_losses(
            run.model, chunks, compute_losses=run.compute_losses, empty=nothing
        )
    else:
        losses = run.compute_losses(concatenate_readouts([nothing, *map(run.model, chunks)]))
        losses["loss"].backward()
    parameters = run.trainable_parameters()
    distributed.average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.train.clip)
    return {
        **{name: _mean(float(loss.detach())) for name, loss in losses.items()},
        "grad_norm": float(norm),
        "temperature": float(torch.exp(-run.model.logit_scale.detach())),
    }


def _mean(value: float) -> float:
    """The losses are W-fold shares: their mean over ranks is the loss of the global batch."""
    return distributed.all_reduce_sum(value) / distributed.get_world_size()


def all_finite(values: Mapping[str, float]) -> bool:
    """Whether everything that a step measured is a number."""
    return all(math.isfinite(value) for value in values.values())


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over that share of the steps, then a cosine to zero."""
    begin = max(1, round(warmup * steps)) if warmup else 0
    if step < begin:
        return (step + 1) / begin
    return 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, steps - begin)))


def optimizer_step(run: TrainingRun, step: int) -> None:
    """One optimiser step at this step's learning rate; gradients are cleared."""
    train = run.config.train
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(step, train.steps, train.warmup)
    run.optimizer.step()
    if run.recipe.after_step is not None:
        assert isinstance(run.model, DuetModel), "a recipe that makes its own model needs no hook"
        run.recipe.after_step(run.model)
    run.optimizer.zero_grad(set_to_none=True)
