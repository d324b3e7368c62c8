"""What is named as a checkpoint and is none gets one line that says what it is and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import tiny
from vlduet.encoders.dual import open_frozen_encoder
from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel
from vlduet.model.families.registry import FAMILIES, find_family
from vlduet.model.feature_cache import FeatureCache


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny checkpoint, which tests copy."""
    return tiny.FAMILY_BUILDERS["fast_vlm"](tmp_path_factory.mktemp("checks") / "base")


@pytest.fixture
def base(checkpoint: Path, tmp_path: Path) -> Path:
    """Copy of the tiny checkpoint, to be modified."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


def change_config(folder: Path, changes: dict[str, object]) -> None:
    """Set keys of a checkpoint's config.json, in place."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def open_error(folder: Path) -> str:
    """Return the error of opening a folder as a model, which is one line."""
    with pytest.raises(ModelError) as raised:
        DuetModel.from_pretrained(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "8 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq, 3 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"format": "int-quantized"}}, "int-quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ({"quantization_config": "nonsense"}, "quantization_config"),
    ],
)
def test_a_quantised_checkpoint_is_named(base: Path, changes: dict[str, object], name: str) -> None:
    change_config(base, changes)
    error = open_error(base)
    assert f"{name})" in error
    assert "quantised" in error
    assert "unquantised checkpoint" in error


def test_early_quantised_checkpoints_are_known_by_their_files(base: Path) -> None:
    (base / "quantize_config.json").write_text("{}")
    assert "quantised checkpoint (gptq)" in open_error(base)


def test_a_quantised_encoder_is_named(tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "words")
    change_config(folder, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(ModelError, match="quantised"):
        open_frozen_encoder(folder, cache=FeatureCache(None))


def test_an_empty_quantisation_is_none(base: Path) -> None:
    change_config(base, {"quantization_config": {}, "quantization": None})
    assert DuetModel.from_pretrained(base).fingerprint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_no_file(base: Path, name: str) -> None:
    (base / name).write_text("version https://git-lfs.example/spec/v1\noid sha256:00\nsize 5\n")
    assert f"{name} is a pointer of Git LFS" in open_error(base)


def replace_weights(name: str) -> Callable[[Path], None]:
    """Return a function that gives the weights of a folder another name."""

    def rename(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return rename


def list_missing_shard(folder: Path) -> None:
    """Split the weights into a shard that is there and one that is not."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("modify", "message"),
    [
        (replace_weights("pytorch_model.bin"), "pickled weights (pytorch_model.bin)"),
        (replace_weights("tiny-Q4_K_M.gguf"), "weights in GGUF format"),
        (replace_weights("tf_model.h5"), "weights in TensorFlow format"),
        (replace_weights("consolidated.safetensors"), "consolidated.safetensors instead of"),
        (replace_weights("README.txt"), "the download or copy is incomplete"),
        (list_missing_shard, "missing, such as model-00002-of-00002.safetensors"),
    ],
)
def test_weights_that_cannot_be_read_are_named(
    base: Path, modify: Callable[[Path], None], message: str
) -> None:
    modify(base)
    assert message in open_error(base)


def test_an_adapter_names_its_base(tmp_path: Path, base: Path) -> None:
    adapter = {"base_model_name_or_path": "acme/base-9b", "peft_type": "LORA"}
    for folder in (tmp_path / "tuned", base):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")
    for folder in (tmp_path / "tuned", base):
        assert "an adapter of PEFT for 'acme/base-9b'" in open_error(folder)
    (tmp_path / "tuned" / "adapter_config.json").write_text("[")
    assert "an adapter of PEFT for 'an unknown model'" in open_error(tmp_path / "tuned")


def test_a_root_of_the_cache_names_its_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "models--acme--tiny"
    (root / "snapshots" / "0123abc").mkdir(parents=True)
    for folder in (root, root / "snapshots"):
        assert f"Name {root / 'snapshots' / '0123abc'}" in open_error(folder)


def test_other_folders_and_files_are_named(tmp_path: Path, checkpoint: Path) -> None:
    weights = tmp_path / "tiny.gguf"
    weights.write_bytes(b"GGUF")
    assert "weights in GGUF format" in open_error(weights)
    assert "a file, not a model folder" in open_error(checkpoint / "model.safetensors")
    assert f"Name {checkpoint}" in open_error(checkpoint.parent)
    (tmp_path / "params.json").write_text("{}")
    assert "original layout" in open_error(tmp_path)
    (tmp_path / "params.json").rename(tmp_path / "dual.json")
    assert "a dual encoder" in open_error(tmp_path)
    (tmp_path / "dual.json").rename(tmp_path / "notes.txt")
    weights.unlink()
    assert "neither vlduet.json nor config.json" in open_error(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "remedy"),
    [
        ("paligemma", "Use a checkpoint of one of these"),
        ("qwen2-vl", "Did you mean 'qwen2_vl'?"),
        ("llava_llama", "ends in -hf"),
        ("siglip", "name it under encoders"),
    ],
)
def test_an_unknown_type_gets_a_sensible_remedy(
    tmp_path: Path, model_type: str, remedy: str
) -> None:
    with pytest.raises(ModelError, match=f"'{model_type}' is not supported") as raised:
        find_family(model_type, tmp_path)
    assert remedy in str(raised.value)
    if remedy.startswith("Use a checkpoint"):
        assert all(name in str(raised.value) for name in FAMILIES)


def test_code_of_a_checkpoint_is_refused_with_the_version_to_use(base: Path) -> None:
    change_config(base, {"model_type": "internvl_chat", "auto_map": {"AutoModel": "x.Y"}})
    assert "ends in -hf" in open_error(base)
