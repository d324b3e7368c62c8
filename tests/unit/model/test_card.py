"""Model card: how a model was trained, where its embeddings were trained, and who may edit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from vlduet.model.card import (
    CARD_NAME,
    describe_slice_positions,
    find_slice_positions,
    format_card,
)
from vlduet.model.checkpoint import find_damage
from vlduet.model.duet import DuetModel

TRAINING = {
    "config": {
        "recipe": {"name": "duet"},
        "objectives": {"contrastive": 1.0, "language": 0.0, "structure": 0.3},
        "train": {"batch_size": 32},
    },
    "steps": 64,
    "records": [579, 2412],
}


def without_structure() -> dict[str, Any]:
    """Return the provenance of an earlier version's run without the loss `structure`."""
    return {**TRAINING, "config": {**TRAINING["config"], "objectives": {"contrastive": 1.0}}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("provenance", "positions", "sentence"),
    [
        ({"slice_positions": ["answers", "documents"]}, ("answers", "documents"), "while the"),
        ({"slice_positions": ["documents"]}, ("documents",), "inside answers were not trained"),
        ({"slice_positions": []}, (), "where a whole content ends"),
        ({"slice_positions": ["else"]}, (), "were not trained"),
        (without_structure(), (), "were not trained"),
        (TRAINING, None, "not recorded"),
        ({}, None, "not recorded"),
        ({"config": "x", "slice_positions": 3}, None, "not recorded"),
    ],
)
def test_positions_are_those_of_the_last_run(
    provenance: dict[str, Any], positions: tuple[str, ...] | None, sentence: str
) -> None:
    assert find_slice_positions(provenance) == positions
    assert sentence in describe_slice_positions(positions)


def test_card_has_recipe_losses_and_sizes_and_no_path() -> None:
    manifest = {
        "vlduet": "1.0",
        "base": "/home/me/base",
        "base_name": "org/name@1234",
        "head": {"kind": "linear", "dim": 384},
        "provenance": {**TRAINING, "slice_positions": ["answers"], "limits_of": "/home/me/model"},
    }
    card = format_card(manifest)
    assert card.startswith("---\nlibrary_name: vlduet\nbase_model: org/name\n---\n")
    assert "| Recipe | `duet`, with the losses contrastive 1.0, structure 0.3 |" in card
    assert "| Training | 64 steps of 32 of 579 + 2412 records |" in card
    assert "384 numbers" in card and "inside answers, so that images" in card
    assert "/home" not in card
    foreign = {**TRAINING, "records": ["a | b\n"], "steps": 3}
    card = format_card({**manifest, "base_name": None, "base": ".", "provenance": foreign})
    assert "| Training | 3 steps of 32 of a   b  records |" in card
    assert "base_model" not in card and "| Base | this folder |" in card
    assert "Recipe" not in format_card({**manifest, "provenance": {"config": 3}})


def test_card_of_a_saved_model_may_be_edited(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.build_duet_model(tmp_path / "base").save_pretrained(folder)
    card = folder / CARD_NAME
    assert (
        "not recorded" in card.read_text() and "| Base | a local checkpoint |" in card.read_text()
    )
    card.write_text("Mine.")
    assert find_damage(folder)[0] == []
    DuetModel.from_pretrained(folder)
