"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlduet.config import RunConfig
from vlduet.train.run import TrainableModel

REFERENCE_RMS = 0.02
"""Root mean square of the weights of a new layer in most language models."""


def build_optimizer(
    model: TrainableModel, config: RunConfig, *, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return AdamW over all parameters that require a gradient.

    LoRA matrices have the learning rate `train.lr`. All other parameters are new to the checkpoint
    and have `train.lr_new` (default `train.lr`), times `relative_rate` in a projector. The
    temperature has no weight decay. The others shrink by `train.weight_decay` times the rate
    without that factor. Each group also stores its rate as `initial_lr`, which
    `step.optimizer_step` scales.

    Args:
        model: its parameters must be selected for training already; only `adapter_tensors` and
            `own_tensors` are looked at.
        betas: coefficients of Adam, which the recipe decides.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    train = config.train
    new_lr = train.lr_new or train.lr
    lora = [p for p in model.adapter_tensors().values() if p.requires_grad]
    trained = {name: p for name, p in model.own_tensors().items() if p.requires_grad}
    temperature = [trained.pop("logit_scale")] if "logit_scale" in trained else []
    groups: list[dict[str, Any]] = [
        {"params": lora, "lr": train.lr},
        {"params": temperature, "lr": new_lr, "weight_decay": 0.0},
    ]
    by_rate: dict[float, list[Tensor]] = {}
    for name, parameter in trained.items():
        layer = name.rpartition(".")[0]
        # The bias of a layer is as large as its weights.
        weight = trained.get(f"{layer}.weight", parameter)
        rate = relative_rate(weight) if name.startswith("projector.") else 1.0
        by_rate.setdefault(rate, []).append(parameter)
    for rate, group in by_rate.items():
        # AdamW shrinks weights by learning rate times decay, a share of them whatever their size.
        decay = train.weight_decay / rate
        groups.append({"params": group, "lr": new_lr * rate, "weight_decay": decay})
    groups = [group | {"initial_lr": group["lr"]} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=betas, weight_decay=train.weight_decay)


def relative_rate(weight: Tensor) -> float:
    """Return the factor of the learning rate of a projector's layer, at least 1.

    Adam moves every weight by about the rate, however large the weight is, so a matrix with large
    weights would hardly change: nano's last one is 300 times larger than usual. The factor is the
    root mean square of a matrix divided by `REFERENCE_RMS`; a vector, as of a norm, has 1.
    """
    if weight.ndim < 2:
        return 1.0
    rms = float(weight.detach().float().pow(2).mean().sqrt())
    return max(1.0, rms / REFERENCE_RMS)


def count_warmup_steps(steps: int, warmup: float) -> int:
    """Return the share `warmup` of `steps` in whole steps: 0 without warm-up, else at least 1."""
    return max(1, round(warmup * steps)) if warmup else 0


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate in a step, above 0 and at most 1.

    With w warm-up steps, it rises as (step + 1) / w, which is 1 in step w - 1, and falls from 1 in
    step w as half a cosine, which would reach 0 in step `steps`.

    Args:
        step: number of the step, from 0 to `steps` - 1.
        steps: number of steps of the run.
        warmup: w as a share of `steps`, see `count_warmup_steps`.
    """
    warmup_steps = count_warmup_steps(steps, warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
