"""Trained models and their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import tiny
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel


@pytest.fixture
def trained_model(family: str, tmp_path: Path) -> DuetModel:
    """A model, based on tmp_path/base, whose trainable tensors all have changed."""
    model = tiny.build_duet_model(tmp_path / "base", family=family)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def saved_folder(trained_model: DuetModel, tmp_path: Path) -> Path:
    """The folder of `trained_model`, tmp_path/model."""
    trained_model.save_pretrained(tmp_path / "model", provenance={"made_by": "a test"})
    return tmp_path / "model"
