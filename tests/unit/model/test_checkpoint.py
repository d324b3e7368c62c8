"""A model folder that is incomplete, changed or of another version is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel


def change_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes a key."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


@pytest.fixture
def early_folder(saved_folder: Path) -> Path:
    """A model folder of an earlier version, whose manifest does not list its files."""
    change_json(saved_folder / "vlduet.json", files=None, base_files=None, manifest_sha256=None)
    return saved_folder


def test_a_changed_base_is_refused(saved_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has changed"):
        DuetModel.from_pretrained(saved_folder)


def test_a_missing_base_is_named(saved_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "renamed")
    with pytest.raises(ModelError, match="/base' is gone"):
        DuetModel.from_pretrained(saved_folder)


@pytest.mark.parametrize("name", ["head.layers.0.weight", "logit_scale"])
def test_a_changed_tensor_is_refused(early_folder: Path, name: str) -> None:
    tensors = load_file(early_folder / "duet.safetensors")
    save_file(tensors | {name: tensors[name] + 1e-6}, early_folder / "duet.safetensors")
    with pytest.raises(ModelError, match=f"'{name}' is not what was saved"):
        DuetModel.from_pretrained(early_folder)


def test_a_changed_adapter_is_refused(early_folder: Path) -> None:
    path = early_folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * 1.001}, path)
    with pytest.raises(ModelError, match=r"lora_.*is not what was saved"):
        DuetModel.from_pretrained(early_folder)


def test_a_head_that_is_wider_than_the_vectors_is_refused(early_folder: Path) -> None:
    """Before the head is made, which would take four terabytes."""
    path = early_folder / "vlduet.json"
    change_json(path, head=json.loads(path.read_text())["head"] | {"dim": 10**11})
    with pytest.raises(ModelError, match=r"head\.dim is 100000000000, golden\.safetensors has"):
        DuetModel.from_pretrained(early_folder)


def test_an_adapter_of_another_kind_is_named_by_its_key(saved_folder: Path) -> None:
    """The list of files would only say that the file was changed."""
    change_json(saved_folder / "adapter" / "adapter_config.json", peft_type="TOWER")
    with pytest.raises(ModelError, match=r"adapter_config\.json: peft_type is 'TOWER'"):
        DuetModel.from_pretrained(saved_folder)


@pytest.mark.parametrize(
    "changes", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}, {"rank_pattern": [1]}]
)
def test_a_rank_that_the_weights_do_not_have_is_refused(
    early_folder: Path, changes: dict[str, object]
) -> None:
    path = early_folder / "adapter" / "adapter_config.json"
    change_json(path, **changes)
    with pytest.raises(ModelError, match=r"adapter_config\.json: .*rank"):
        DuetModel.from_pretrained(early_folder)


def test_a_missing_tensor_is_named(early_folder: Path) -> None:
    tensors = load_file(early_folder / "duet.safetensors")
    name = next(name for name in tensors if name.startswith("projector."))
    tensors.pop(name)
    save_file(tensors, early_folder / "duet.safetensors")
    with pytest.raises(ModelError, match=rf"'{name}' is missing"):
        DuetModel.from_pretrained(early_folder)


def test_a_missing_adapter_is_named(early_folder: Path) -> None:
    (early_folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        DuetModel.from_pretrained(early_folder)


def test_an_adapter_of_another_base_is_refused(early_folder: Path) -> None:
    config = early_folder / "adapter" / "adapter_config.json"
    change_json(config, target_modules=".*no_such_layer")
    with pytest.raises(ModelError, match="adapter"):
        DuetModel.from_pretrained(early_folder)


def test_embeddings_that_differ_from_those_at_saving_are_refused(early_folder: Path) -> None:
    path = early_folder / "golden.safetensors"
    golden_vectors = load_file(path)["vectors"]
    save_file({"vectors": golden_vectors.roll(1, dims=1).contiguous()}, path)
    with pytest.raises(ModelError, match="embeddings differ"):
        DuetModel.from_pretrained(early_folder)
    DuetModel.from_pretrained(early_folder, check_golden=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"image_backend": "torchvision"}, "torchvision"),
        ({"head": None}, "'head' is missing"),
    ],
)
def test_a_manifest_of_another_version_is_refused(
    early_folder: Path, changes: dict[str, object], message: str
) -> None:
    change_json(early_folder / "vlduet.json", **changes)
    with pytest.raises(ModelError, match=message):
        DuetModel.from_pretrained(early_folder)


@pytest.mark.parametrize("name", ["vlduet.json", "duet.safetensors", "golden.safetensors"])
def test_half_a_file_is_refused(early_folder: Path, name: str) -> None:
    content = (early_folder / name).read_bytes()
    (early_folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"broken (m|JSON).*Copy the whole folder again"):
        DuetModel.from_pretrained(early_folder)


def test_half_an_adapter_is_refused(early_folder: Path) -> None:
    file = early_folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not a safetensors file"):
        DuetModel.from_pretrained(early_folder)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither vlduet\.json nor config\.json"):
        DuetModel.from_pretrained(tmp_path)
