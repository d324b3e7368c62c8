"""Optimizer groups and learning-rate schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlduet import config
from vlduet.train.optim import REFERENCE_RMS, build_optimizer, learning_rate_factor


class StubModel:
    """One parameter of every group: an adapter, a new layer, the temperature, a frozen layer."""

    def __init__(self) -> None:
        self.adapter, self.head, self.temperature, self.frozen = (
            torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(4)
        )
        self.frozen.requires_grad_(False)

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"lora_A": self.adapter}

    def own_tensors(self) -> dict[str, Tensor]:
        return {"head": self.head, "projector": self.frozen, "logit_scale": self.temperature}


def build_stub_optimizer(**settings: Any) -> tuple[StubModel, torch.optim.Optimizer]:
    """Return a stub and the optimizer of its parameters with these settings of `train`."""
    section = config.TrainSection(steps=10, **settings)
    model: Any = StubModel()
    run_config: Any = SimpleNamespace(train=section)
    return model, build_optimizer(model, run_config, betas=(0.7, 0.8))


def rate_and_decay(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[float, float]:
    """Return learning rate and weight decay of the one group that has a parameter."""
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    assert group["initial_lr"] == group["lr"] and group["betas"] == (0.7, 0.8)
    return group["lr"], group["weight_decay"]


def test_new_parameters_have_their_own_rate_and_the_temperature_has_no_decay() -> None:
    model, optimizer = build_stub_optimizer(lr=0.1, lr_new=0.02, weight_decay=0.5)
    assert rate_and_decay(optimizer, model.adapter) == (0.1, 0.5)
    assert rate_and_decay(optimizer, model.head) == (0.02, 0.5)
    assert rate_and_decay(optimizer, model.temperature) == (0.02, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_large_projector_matrices_have_a_proportional_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = {
        "projector.large.weight": torch.full((4, 3), 2.0),
        "projector.large.bias": torch.zeros(4),
        "projector.usual.weight": torch.full((4, 3), -0.01),
        "projector.norm.weight": torch.ones(3),
        "head.layers.weight": torch.full((4, 3), 2.0),
    }
    tensors = {name: torch.nn.Parameter(value) for name, value in parameters.items()}
    monkeypatch.setattr(StubModel, "own_tensors", lambda self: tensors)
    _, optimizer = build_stub_optimizer(lr=0.1, lr_new=0.01, weight_decay=0.5)
    shrinkage = [
        rate * decay for rate, decay in (rate_and_decay(optimizer, t) for t in tensors.values())
    ]
    assert shrinkage == pytest.approx([0.01 * 0.5] * len(tensors))
    rates = {name: rate_and_decay(optimizer, tensor)[0] for name, tensor in tensors.items()}
    large = pytest.approx(0.01 * 2.0 / REFERENCE_RMS)
    assert rates == {
        "projector.large.weight": large,
        "projector.large.bias": large,
        "projector.usual.weight": 0.01,
        "projector.norm.weight": 0.01,
        "head.layers.weight": 0.01,
    }


def test_without_a_rate_of_their_own_new_parameters_have_that_of_lora() -> None:
    model, optimizer = build_stub_optimizer(lr=0.1)
    for parameter in (model.adapter, model.head, model.temperature):
        assert rate_and_decay(optimizer, parameter)[0] == 0.1


def test_without_a_gradient_only_decay_changes_parameters() -> None:
    model, optimizer = build_stub_optimizer(lr=0.1, weight_decay=0.5)
    for parameter in (model.adapter, model.head, model.temperature):
        parameter.grad = torch.zeros(2)
    optimizer.step()
    assert model.temperature.tolist() == [3.0, 3.0]
    for parameter in (model.adapter, model.head):
        torch.testing.assert_close(parameter.detach(), torch.full((2,), 3.0 * 0.95))


def test_the_learning_rate_rises_linearly_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors[-1] < 0.001
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_without_warmup_the_first_step_has_the_full_learning_rate() -> None:
    assert learning_rate_factor(0, 100, 0.0) == 1.0
