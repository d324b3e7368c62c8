"""The state of a run holds all that a step changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import runs
from vlduet import config
from vlduet.config import parse_options
from vlduet.data.records import Message, Record
from vlduet.recipes.registry import find_recipe
from vlduet.train.checkpointing import find_trained_positions, load_state, save_state
from vlduet.train.loader import iterate_batches
from vlduet.train.run import TrainingRun
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward, optimizer_step


def list_moments(run: TrainingRun) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Return the number of steps and both moments of every parameter."""
    states = run.optimizer.state_dict()["state"].values()
    return [(float(s["step"]), s["exp_avg"], s["exp_avg_sq"]) for s in states]


def test_a_state_restores_tensors_moments_and_the_step(tmp_path: Path) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=3))
    run = prepare_run(run_config, write_files=False)
    _, batches = next(iterate_batches(run, 0))
    forward_backward(run, batches)
    optimizer_step(run, 0)
    save_state(run, 1)
    resumed = prepare_run(run_config, write_files=False)
    assert not list_moments(resumed)
    assert load_state(resumed) == 1
    tensors = {**run.model.own_tensors(), **run.model.adapter_tensors()}
    for name, tensor in (resumed.model.own_tensors() | resumed.model.adapter_tensors()).items():
        assert torch.equal(tensor, tensors.pop(name)), name
    assert not tensors
    expected_moments = list_moments(run)
    assert any(first.abs().max() > 0 for _, first, _ in expected_moments)
    for moments, expected in zip(list_moments(resumed), expected_moments, strict=True):
        assert moments[0] == expected[0] == 1.0
        assert torch.equal(moments[1], expected[1]) and torch.equal(moments[2], expected[2])


CHAT = Record("c", messages=(Message("user", ("What?",)), Message("assistant", ("A boat.",))))
DOCUMENT = Record("d", parts=("One.", "Two."))


@pytest.mark.parametrize(
    ("name", "records", "options", "weight", "expected"),
    [
        ("duet", [DOCUMENT, CHAT], {}, 0.3, ["answers", "documents"]),
        ("duet", [CHAT], {}, 0.3, ["answers"]),
        ("duet", [CHAT, DOCUMENT], {"structure_on": "documents"}, 0.3, ["documents"]),
        ("duet", [CHAT, DOCUMENT], {}, 0.0, []),
        ("sugar", [CHAT, DOCUMENT], {}, 0.3, ["documents"]),
        ("vladva", [CHAT, DOCUMENT], {}, 0.3, []),
    ],
)
def test_positions_are_those_that_the_structure_loss_has_records_for(
    name: str, records: list[Record], options: dict[str, Any], weight: float, expected: list[str]
) -> None:
    recipe = find_recipe(name)
    weights = {"language": 1.0} | ({"structure": weight} if weight else {})
    bound = recipe.bind(parse_options(recipe.options, options, place="recipe"), weights)
    run: Any = SimpleNamespace(
        recipe=bound, sources=[SimpleNamespace(records=records)], loss_weights=lambda: weights
    )
    assert find_trained_positions(run) == expected
