"""Sizes in configs that weights or images cannot have are refused before anything is allocated."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import published_settings, tiny
from helpers.published_settings import FAMILIES, PublishedFamily
from vlduet.encoders.loading import load_text_encoder, open_encoder
from vlduet.errors import ModelError
from vlduet.model.config_limits import check_config_numbers
from vlduet.model.duet import DuetModel


def change_number(path: Path, key: str, value: Any) -> None:
    """Set a key with dots of a JSON file; where the last names a list, its first item."""
    tree = json.loads(path.read_text())
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node[name]
    if isinstance(node.get(last), list):
        node[last][0] = value
    else:
        node[last] = value
    path.write_text(json.dumps(tree))


def check(folder: Path) -> None:
    check_config_numbers(folder, json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("name", sorted(tiny.FAMILY_BUILDERS))
def test_checkpoints_of_every_family_pass(name: str, tmp_path: Path) -> None:
    check(tiny.FAMILY_BUILDERS[name](tmp_path / "base"))


@pytest.mark.parametrize("published", FAMILIES, ids=lambda family: family.label)
def test_published_image_settings_pass(published: PublishedFamily, tmp_path: Path) -> None:
    folder = published_settings.write_checkpoint(published, tmp_path / "base")
    save_file({"embed_tokens.weight": torch.zeros(300_000, 1)}, folder / "model.safetensors")
    check(folder)


HOSTILE_NUMBERS = {
    "qwen2_vl": [
        ("config.json", "text_config.hidden_size"),
        ("config.json", "text_config.intermediate_size"),
        ("config.json", "text_config.num_attention_heads"),
        ("config.json", "text_config.num_hidden_layers"),
        ("config.json", "text_config.max_position_embeddings"),
        ("config.json", "text_config.vocab_size"),
        ("config.json", "text_config.rope_parameters.mrope_section"),
        ("config.json", "vision_config.depth"),
        ("config.json", "vision_config.embed_dim"),
        ("config.json", "vision_config.patch_size"),
        ("config.json", "vision_config.temporal_patch_size"),
        ("config.json", "image_token_id"),
        ("preprocessor_config.json", "merge_size"),
        ("preprocessor_config.json", "patch_size"),
        ("preprocessor_config.json", "temporal_patch_size"),
        ("preprocessor_config.json", "size.shortest_edge"),
        ("preprocessor_config.json", "size.longest_edge"),
    ],
    "llava": [
        ("config.json", "vision_config.image_size"),
        ("config.json", "vision_config.num_hidden_layers"),
        ("config.json", "vision_feature_layer"),
        ("config.json", "image_token_index"),
    ],
    "gemma3": [
        ("config.json", "mm_tokens_per_image"),
        ("config.json", "text_config.head_dim"),
        ("config.json", "text_config.num_key_value_heads"),
    ],
    "fast_vlm": [
        ("config.json", "vision_config.num_block_repeats"),
        ("config.json", "vision_config.out_channels"),
        ("config.json", "image_seq_length"),
    ],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each family of HOSTILE_NUMBERS."""
    root = tmp_path_factory.mktemp("bases")
    for name in HOSTILE_NUMBERS:
        tiny.FAMILY_BUILDERS[name](root / name)
    return root


@pytest.mark.parametrize("value", [10**8 + 1, 10**18])
@pytest.mark.parametrize(
    ("family_name", "file", "key"),
    [(family, *number) for family, numbers in HOSTILE_NUMBERS.items() for number in numbers],
)
def test_a_hostile_number_is_named(
    family_name: str, file: str, key: str, value: int, *, bases: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bases / family_name, tmp_path / "base")
    path = folder / file
    if not path.exists():
        path = folder / "processor_config.json"
    if key == "text_config.max_position_embeddings":
        value *= 2
    change_number(path, key, value)
    start = time.monotonic()
    with pytest.raises(ModelError) as error_info:
        DuetModel.from_pretrained(folder)
    assert time.monotonic() - start < 5
    message = str(error_info.value)
    assert str(path) in message and key.rpartition(".")[2] in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_token_index", -1),
        ("vision_config.num_attention_heads", -1),
        ("vision_config.num_hidden_layers", -1),
        ("vision_config.num_hidden_layers", 0),  # the config names the last layer but one
        ("text_config.hidden_size", -1),
    ],
)
def test_a_number_that_is_too_small_is_refused(key: str, value: int, tmp_path: Path) -> None:
    folder = tiny.FAMILY_BUILDERS["llava"](tmp_path / "base")
    change_number(folder / "config.json", key, value)
    with pytest.raises(ModelError, match="but the weights have no such size"):
        DuetModel.from_pretrained(folder)


@settings(max_examples=30, deadline=None)
@given(side=st.integers(8_001, 10**12), key=st.sampled_from(["height", "width", "shortest_edge"]))
def test_no_image_processor_makes_larger_images_than_are_read(side: int, key: str) -> None:
    """A side of 30,000 pixels would need 10 GB for a picture of any size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps({"image_processor_type": "X", "crop_size": {key: side}}))
        with pytest.raises(ModelError, match=rf"'crop_size\.{key}' is {side}, but no image"):
            check_config_numbers(Path(folder), {})


@pytest.mark.parametrize("key", ["merge_size", "patch_size", "temporal_patch_size"])
def test_squares_of_another_size_than_those_of_the_tower_are_refused(
    key: str, tmp_path: Path
) -> None:
    folder = tiny.build_qwen2_vl(tmp_path / "base")
    path = folder / "preprocessor_config.json"
    change_number(path, key, json.loads(path.read_text())[key] + 1)
    with pytest.raises(ModelError, match=f"'{key}' is .*, that of the vision tower"):
        DuetModel.from_pretrained(folder)


@pytest.mark.parametrize("token", ["<pad>", "red", "new"])
def test_a_token_without_a_row_in_the_embedding_table_is_refused(
    token: str, tmp_path: Path
) -> None:
    folder = tiny.FAMILY_BUILDERS["gemma3"](tmp_path / "base")
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"][token] = 10**9
    path.write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=rf"tokenizer\.json: token '{token}' has the id 10000000"):
        DuetModel.from_pretrained(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "max_position_embeddings"])
def test_a_hostile_encoder_is_refused(key: str, tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "text")
    change_number(folder / "config.json", key, 10**9)
    for load in (open_encoder, load_text_encoder):
        with pytest.raises(ModelError, match=f"'{key}' is 1000000000"):
            load(folder)


@pytest.mark.parametrize("value", [7, "0.02", [1]])
def test_a_value_of_another_type_is_one_line(value: Any, tmp_path: Path) -> None:
    """transformers has an exception of its own for these."""
    folder = tiny.build_qwen2_vl(tmp_path / "base")
    change_number(folder / "config.json", "text_config.initializer_range", value)
    with pytest.raises(ModelError, match="initializer_range") as error_info:
        DuetModel.from_pretrained(folder)
    assert len(str(error_info.value).splitlines()) == 1
