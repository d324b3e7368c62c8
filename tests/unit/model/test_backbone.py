"""Plain checkpoints: what is refused, and what their fingerprint depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from vlduet.errors import ModelError
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.fingerprints import fingerprint_checkpoint


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_change_of_any_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    """Merged adapters change some tensors in the middle of a file of gigabytes."""
    folder = tiny.build_llava(tmp_path)
    path = next(folder.glob("model*.safetensors"))
    weights = load_file(path)
    fingerprint = fingerprint_checkpoint(folder)
    for name in weights:
        changed = {**weights, name: weights[name] * 1.5 + 0.25}
        save_file(changed, path, metadata={"format": "pt"})
        assert fingerprint_checkpoint(folder) != fingerprint, name
    save_file(weights, path, metadata={"format": "pt"})
    assert fingerprint_checkpoint(folder) == fingerprint


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a pickle", b"\x02" + bytes(7) + b"[]", b"\xff" * 64]
)
def test_a_file_that_is_not_safetensors_has_no_fingerprint(tmp_path: Path, content: bytes) -> None:
    folder = tiny.build_llava(tmp_path)
    next(folder.glob("model*.safetensors")).write_bytes(content)
    with pytest.raises(ModelError, match=r"not a safetensors file|an object is needed"):
        fingerprint_checkpoint(folder)


def test_a_checkpoint_that_brings_code_is_refused(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path)
    change_config(tmp_path, auto_map={"AutoModel": "modeling_x.X"})
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('the checkpoint ran its code')")
    with pytest.raises(ModelError, match="auto_map"):
        DuetModel.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        DuetModel.from_pretrained(tmp_path)
    # Safetensors of another name are no weights of the checkpoint.
    save_file({"x": torch.zeros(1)}, tmp_path / "duet.safetensors")
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        DuetModel.from_pretrained(tmp_path)


def test_an_unknown_model_type_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path)
    change_config(tmp_path, model_type="blip-2")
    model_types = (
        "fast_vlm, gemma3, gemma4, glm46v, glm4v, idefics3, internvl, "
        "llava, llava_next, llava_onevision, mistral3"
    )
    with pytest.raises(ModelError, match=rf"model_type 'blip-2'.*one of these: {model_types}"):
        DuetModel.from_pretrained(tmp_path)
    change_config(tmp_path, model_type="LLaVA")
    with pytest.raises(ModelError, match="Did you mean 'llava'"):
        DuetModel.from_pretrained(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if "q_proj" in name))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing.*q_proj"):
        DuetModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "1", '"qwen2_vl"'])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    folder = tiny.build_fast_vlm(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: an object is needed"):
        load_backbone(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"]
)
def test_an_incomplete_file_of_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "base"
    tiny.build_fast_vlm(folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="base"):
        load_backbone(folder)
