"""One step: the weighted sum of the losses, clipped gradients, and the random numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import runs
from vlduet import config
from vlduet.model.pooling import Readout, create_empty_readout
from vlduet.train.loader import iterate_batches
from vlduet.train.run import TrainingRun, count_steps
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward, optimizer_step, seed_step


def make_stub_run(losses: dict[str, Tensor], weights: dict[str, float]) -> TrainingRun:
    """Return a run whose recipe has these losses, whatever is read."""

    def objective(readout: Readout, logit_scale: Tensor) -> dict[str, Tensor]:
        return losses

    parts: dict[str, Any] = dict.fromkeys(
        ("sources", "mixture", "num_steps", "optimizer", "quarantine", "encoders")
    )
    parts |= {
        "config": SimpleNamespace(objectives=weights),
        "model": SimpleNamespace(logit_scale=torch.tensor(0.0)),
        "recipe": SimpleNamespace(objective=objective),
    }
    return TrainingRun(**parts)


def test_the_loss_is_the_weighted_sum_of_the_losses_with_a_weight() -> None:
    values = {"contrastive": 3.0, "language": 5.0, "structure": 100.0}
    losses = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    weights = {"contrastive": 2.0, "language": 0.5, "structure": 0.0}
    run = make_stub_run(losses, weights)
    results = run.compute_losses(create_empty_readout(4, like=torch.zeros(())))
    assert {name: loss.item() for name, loss in results.items()} == {
        "loss": 2.0 * 3.0 + 0.5 * 5.0, "contrastive": 3.0, "language": 5.0,
    }  # fmt: skip
    results["loss"].backward()
    gradients = {name: None if t.grad is None else t.grad.item() for name, t in losses.items()}
    assert gradients == {"contrastive": 2.0, "language": 0.5, "structure": None}


@pytest.mark.parametrize("chunk_tokens", [None, 60])
def test_gradients_are_scaled_down_to_the_clipping_norm(
    tmp_path: Path, chunk_tokens: int | None
) -> None:
    path = runs.write_run_config(tmp_path, steps=1, chunk_tokens=chunk_tokens, lora=None)
    gradients: dict[float, Tensor] = {}
    norms: dict[float, float] = {}
    for clip in (1e-3, 1e6):
        run_config = config.load_run_config(path, [f"train.clip={clip}"])
        run = prepare_run(run_config, write_files=False)
        _, batches = next(iterate_batches(run, 0))
        norms[clip] = forward_backward(run, batches)["grad_norm"]
        grads = [p.grad.flatten() for p in run.trainable_parameters() if p.grad is not None]
        gradients[clip] = torch.cat(grads)
    # Both report the norm before clipping, and only the larger limit keeps it.
    assert norms[1e-3] == pytest.approx(norms[1e6], rel=1e-5)
    assert float(gradients[1e6].norm()) == pytest.approx(norms[1e6], rel=1e-5)
    assert norms[1e6] > 0.1 and float(gradients[1e-3].norm()) == pytest.approx(1e-3, rel=1e-2)
    assert_close(
        gradients[1e-3] / gradients[1e-3].norm(), gradients[1e6] / norms[1e6], atol=1e-5, rtol=0
    )


def test_a_step_has_the_scheduled_share_of_every_initial_rate() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": [p], "lr": rate, "initial_lr": rate}
        for p, rate in zip(parameters, (1.0, 0.1), strict=True)
    ]
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(warmup=0.5)),
        num_steps=4,
        optimizer=torch.optim.SGD(groups),
        recipe=SimpleNamespace(after_step=None),
    )
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    optimizer_step(run, 0)  # half of the rates: the first of two steps of the warm-up
    assert [parameter.item() for parameter in parameters] == pytest.approx([-0.5, -0.05])
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({"epochs": 1, "batch_size": 4}, 3),
        ({"epochs": 2, "batch_size": 4}, 5),
        ({"epochs": 0.1, "batch_size": 2}, 1),
        ({"epochs": 0.8, "batch_size": 4}, 2),
        ({"steps": 7, "batch_size": 4}, 7),
    ],
)
def test_epochs_are_rounded_up_to_whole_steps(settings: dict[str, Any], num_steps: int) -> None:
    assert count_steps(config.TrainSection(**settings), 10) == num_steps


def test_random_numbers_depend_on_seed_and_step() -> None:
    numbers = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        seed_step(seed, step)
        numbers[seed, step] = torch.rand(2).tolist()
    assert len({tuple(pair) for pair in numbers.values()}) == 4
    seed_step(0, 1)
    assert torch.rand(2).tolist() == numbers[0, 1]
