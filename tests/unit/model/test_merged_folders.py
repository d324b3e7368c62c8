"""Merged folders load in vLLM: which files it reads, and whether they hold the weights alone."""

from __future__ import annotations

import glob
import json
import os
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, PreTrainedModel

from helpers import tiny
from vlduet.model.adapters import LoraSettings
from vlduet.model.checkpoint import find_damage
from vlduet.model.duet import DuetModel
from vlduet.model.fingerprints import fingerprint_checkpoint

ITEMS = ["a red apple", tiny.random_image(3)]
SHARD_SIZES = {"one shard": "5GB", "several shards": "60KB"}


def list_vllm_files(folder: Path) -> list[str]:
    """Return the weight files that vLLM reads: the slow reference of its rule.

    It takes all files of the pattern in the folder itself, and of them those that the index names,
    if there is one (`filter_duplicate_safetensors_files`).
    """
    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.isfile(index):
        return files
    with open(index) as file:
        weight_map = json.load(file)["weight_map"]
    names = {os.path.join(folder, name) for name in weight_map.values()}
    return [file for file in files if file in names]


def read_tensor_names(files: list[str]) -> list[str]:
    """Return the names of all tensors in safetensors files, as often as they occur."""
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            names.extend(tensors.keys())
    return sorted(names)


@pytest.fixture(params=SHARD_SIZES)
def merged(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[DuetModel, Path]:
    """A trained model after merging, and its folder with weights in one file or in several."""
    save = partialmethod(PreTrainedModel.save_pretrained, max_shard_size=SHARD_SIZES[request.param])
    model = tiny.build_duet_model(tmp_path / "base", family="llava")
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    for parameter in model.adapter_tensors().values():
        parameter.data += 0.1
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    model.eval().save_merged(tmp_path / "merged")
    monkeypatch.undo()
    num_shards = len([*(tmp_path / "merged").glob("model*.safetensors")])
    assert (num_shards > 1) == (request.param == "several shards")
    return model, tmp_path / "merged"


def test_vllm_reads_the_weights_of_the_base_and_nothing_else(
    merged: tuple[DuetModel, Path],
) -> None:
    _, folder = merged
    base_files = list_vllm_files(folder.with_name("base"))
    assert read_tensor_names(list_vllm_files(folder)) == read_tensor_names(base_files)


def test_the_index_leaves_out_our_tensors_alone(merged: tuple[DuetModel, Path]) -> None:
    _, folder = merged
    own_files = {"duet.safetensors", "golden.safetensors"}
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files - own_files == {Path(file).name for file in list_vllm_files(folder)}
    assert own_files < files


def test_transformers_and_sentence_transformers_open_the_folder(
    merged: tuple[DuetModel, Path],
) -> None:
    model, folder = merged
    state = model.backbone.model.state_dict()
    plain, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(bool((tensor == state[name]).all()) for name, tensor in plain.state_dict().items())
    reference = SentenceTransformer(str(folder.with_name("base")), device="cpu")
    pooled = SentenceTransformer(str(folder), device="cpu").encode(["a red apple"])
    assert pooled.shape == reference.encode(["a red apple"]).shape and np.isfinite(pooled).all()


def test_a_merged_folder_reopens_and_all_of_its_files_are_listed(
    merged: tuple[DuetModel, Path],
) -> None:
    model, folder = merged
    assert np.array_equal(DuetModel.from_pretrained(folder).encode(ITEMS), model.encode(ITEMS))
    damage, num_files = find_damage(folder)
    assert damage == []
    num_unlisted = 2  # vlduet.json, README.md
    assert num_files == sum(path.is_file() for path in folder.rglob("*")) - num_unlisted


def test_a_merged_folder_of_an_earlier_version_opens(merged: tuple[DuetModel, Path]) -> None:
    """It has no index of a single file of weights, and no list of its files."""
    model, folder = merged
    num_shards = len([*folder.glob("model*.safetensors")])
    if num_shards == 1:
        (folder / "model.safetensors.index.json").unlink()
    path = folder / "vlduet.json"
    manifest = json.loads(path.read_text())
    for key in ("files", "base_files", "manifest_sha256"):
        del manifest[key]
    manifest["base_fingerprint"] = fingerprint_checkpoint(folder)
    path.write_text(json.dumps(manifest))
    early = DuetModel.from_pretrained(folder)
    assert np.array_equal(early.encode(ITEMS), model.encode(ITEMS))
    early.save_merged(folder)  # written again, it is one of this version
    assert len(list_vllm_files(folder)) >= 1 and find_damage(folder)[0] == []
    assert (folder / "model.safetensors.index.json").exists()


def test_an_adapter_folder_is_one_for_vllm(tmp_path: Path) -> None:
    """vLLM serves the base, and the LoRA from the subfolder in PEFT's layout."""
    model = tiny.build_duet_model(tmp_path / "base", family="llava")
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=False)
    model.save_pretrained(tmp_path / "model")
    adapter = tmp_path / "model" / "adapter"
    assert [Path(file).name for file in list_vllm_files(adapter)] == ["adapter_model.safetensors"]
    names = read_tensor_names(list_vllm_files(adapter))
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config.get("modules_to_save")
    assert list_vllm_files(tmp_path / "base") == [str(tmp_path / "base" / "model.safetensors")]
