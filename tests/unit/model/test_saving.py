"""A saved model opens bit for bit as it was, also by plain transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from helpers import tiny
from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel

ITEMS = [
    "a",
    "a red apple on a table",
    tiny.random_image(1),
    (tiny.random_image(2), "what is this?"),
]


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_loaded_model_is_bit_identical(trained_model: DuetModel, saved_folder: Path) -> None:
    loaded = DuetModel.from_pretrained(saved_folder)
    assert trained_model.adapter_tensors()
    expected = {**trained_model.own_tensors(), **trained_model.adapter_tensors()}
    tensors = {**loaded.own_tensors(), **loaded.adapter_tensors()}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert np.array_equal(trained_model.encode(ITEMS), loaded.encode(ITEMS))
    assert loaded.fingerprint == trained_model.fingerprint
    assert loaded.prompts == trained_model.prompts
    captions = [(tiny.random_image(1), "a caption")]
    assert loaded.compute_caption_nll(captions) == trained_model.compute_caption_nll(captions)
    assert not loaded.training


def test_saving_twice_writes_the_same_bytes(saved_folder: Path, tmp_path: Path) -> None:
    loaded = DuetModel.from_pretrained(saved_folder)
    loaded.save_pretrained(tmp_path / "twice", provenance={"made_by": "a test"})
    assert read_files(tmp_path / "twice") == read_files(saved_folder)


def test_the_manifest_lists_every_trained_tensor(
    trained_model: DuetModel, saved_folder: Path
) -> None:
    manifest = json.loads((saved_folder / "vlduet.json").read_text())
    listed = manifest["trained"]
    parameters = [p for p in trained_model.parameters() if p.requires_grad]
    assert len(listed) == len({id(p) for p in parameters})
    projector = trained_model.backbone.projector.named_parameters()
    assert {"logit_scale", *(f"projector.{name}" for name, _ in projector)} <= listed.keys()
    assert any("lora_B" in name for name in listed)
    assert any(name.startswith("head") for name in listed)
    num_listed = sum(int(np.prod(facts["shape"])) for facts in listed.values())
    assert num_listed == sum(p.numel() for p in parameters)
    assert manifest["provenance"] == {"made_by": "a test"} and manifest["base"] == "../base"


def test_folder_and_base_can_be_relocated_together(
    trained_model: DuetModel, saved_folder: Path, tmp_path: Path
) -> None:
    new_parent = tmp_path / "elsewhere"
    new_parent.mkdir()
    for folder in (tmp_path / "base", saved_folder):
        folder.rename(new_parent / folder.name)
    loaded = DuetModel.from_pretrained(new_parent / saved_folder.name)
    assert np.array_equal(trained_model.encode(ITEMS), loaded.encode(ITEMS))


# ---------------------------------------------------------------------- merging


def test_a_merged_model_equals_the_unmerged_one_and_needs_no_base(
    trained_model: DuetModel, tmp_path: Path
) -> None:
    expected = trained_model.encode(ITEMS)
    trained_model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.peft_model is None and not merged.adapter_tensors()
    assert_close(merged.encode(ITEMS), expected, atol=1e-5, rtol=0)
    (tmp_path / "base").rename(tmp_path / "renamed")
    reopened = DuetModel.from_pretrained(tmp_path / "merged")
    assert_close(reopened.encode(ITEMS), expected, atol=1e-5, rtol=0)


def test_merging_makes_the_merged_folder_the_base_of_the_model(
    trained_model: DuetModel, tmp_path: Path
) -> None:
    trained_model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert trained_model.fingerprint == merged.fingerprint
    trained_model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "vlduet.json").read_text())["base"] == "../merged"
    reopened = DuetModel.from_pretrained(tmp_path / "model")
    assert np.array_equal(reopened.encode(ITEMS), trained_model.encode(ITEMS))


def test_plain_peft_computes_the_same_hidden_states(
    trained_model: DuetModel, saved_folder: Path, tmp_path: Path
) -> None:
    sequence = trained_model.renderer.render_embedding(("a red apple",))
    batch = trained_model.collate([sequence])
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, str(saved_folder / "adapter")).eval()
    with torch.no_grad():
        theirs = plain.base_model.model.model(input_ids=batch.token_ids).last_hidden_state
        assert_close(trained_model.hidden_states(batch), theirs, atol=1e-5, rtol=1e-5)
        trained_model.peft_model.disable_adapter_layers()
        difference = (trained_model.hidden_states(batch) - theirs).abs().max()
    assert difference > 1e-3, "the adapter must matter"
    assert str(tmp_path) not in (saved_folder / "adapter" / "adapter_config.json").read_text()


def test_plain_transformers_opens_a_merged_folder(trained_model: DuetModel, tmp_path: Path) -> None:
    sequence = trained_model.renderer.render_caption(tiny.random_image(1), "a red apple")
    trained_model.save_merged(tmp_path / "merged")
    batch = trained_model.collate([sequence])
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    inputs = tiny.transformers_inputs(trained_model, batch.token_ids, batch.images)
    with torch.no_grad():
        theirs = plain.model(**inputs).last_hidden_state
        assert_close(trained_model.hidden_states(batch), theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- complete or not at all


def test_saving_over_the_base_is_refused(trained_model: DuetModel, tmp_path: Path) -> None:
    """The folder would refer to itself, and the weights would be lost."""
    before = read_files(tmp_path / "base")
    with pytest.raises(ModelError, match="base"):
        trained_model.save_pretrained(tmp_path / "base")
    assert read_files(tmp_path / "base") == before


def test_a_merged_model_can_replace_its_base(trained_model: DuetModel, tmp_path: Path) -> None:
    expected = trained_model.encode(ITEMS)
    trained_model.save_merged(tmp_path / "base")
    merged = DuetModel.from_pretrained(tmp_path / "base")
    assert_close(merged.encode(ITEMS), expected, atol=1e-5, rtol=0)


def test_a_folder_opens_after_a_kill_between_the_two_renames(
    trained_model: DuetModel, saved_folder: Path
) -> None:
    saved_folder.rename(saved_folder.with_name(".model.old"))
    loaded = DuetModel.from_pretrained(saved_folder)
    assert np.array_equal(loaded.encode(ITEMS), trained_model.encode(ITEMS))
