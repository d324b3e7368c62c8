"""A model is compared with its golden vectors once for each state of its files and libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny
from vlduet.errors import ModelError
from vlduet.model import golden_memory, saving
from vlduet.model.duet import DuetModel


def test_golden_vectors_are_compared_once_where_that_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "cache"))
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    compute = saving.compute_golden_vectors
    num_computed = 0

    def count(model: DuetModel) -> object:
        nonlocal num_computed
        num_computed += 1
        return compute(model)

    monkeypatch.setattr(saving, "compute_golden_vectors", count)

    def open_once() -> int:
        DuetModel.from_pretrained(tmp_path / "model", check_golden="once")
        return num_computed

    assert [open_once(), open_once()] == [1, 1]
    DuetModel.from_pretrained(tmp_path / "model")
    assert num_computed == 2, "it is compared always unless the caller asks for less"
    monkeypatch.setattr(golden_memory, "version", lambda name: f"another {name}")
    assert [open_once(), open_once()] == [3, 3]
    model.save_pretrained(tmp_path / "model", provenance={"made_by": "another save"})
    assert open_once() == 5  # once by saving, once by opening


def test_a_cache_that_cannot_be_used_and_a_damaged_file_change_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that is too long raises at every access, as a folder without permission does.
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / ("x" * 300)))
    base = tiny.build_duet_model(tmp_path / "base")
    base.save_pretrained(tmp_path / "model")
    DuetModel.from_pretrained(tmp_path / "model", check_golden="once")
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "cache"))
    DuetModel.from_pretrained(tmp_path / "model", check_golden="once")
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="has changed"):
        DuetModel.from_pretrained(tmp_path / "model", check_golden="once")


def test_a_model_that_differs_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, so that nothing can be remembered")
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "cache"))
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    DuetModel.from_pretrained(tmp_path / "model", check_golden="once")
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "other"))
    compute = saving.compute_golden_vectors
    monkeypatch.setattr(saving, "compute_golden_vectors", lambda model: -compute(model))
    for _ in range(2):
        with pytest.raises(ModelError, match="embeddings differ"):
            DuetModel.from_pretrained(tmp_path / "model", check_golden="once")
