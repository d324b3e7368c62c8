"""The registry of families, and checkpoint folders as the Hugging Face Hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import tiny
from helpers.family_checks import WIDE
from vlduet.errors import ModelError
from vlduet.model.backbone import load_backbone
from vlduet.model.families.family import Family
from vlduet.model.families.registry import FAMILIES, find_family

HUB_SETTINGS = {
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessorFast",
        "size": {"height": 16, "width": 16},
        "processor_class": "Gemma3Processor",
    },
    "gemma4": {
        "image_processor_type": "Gemma4ImageProcessor",
        "max_soft_tokens": 70,
        "pooling_kernel_size": 2,
        "patch_size": 4,
    },
    "mistral3": {
        "image_processor_type": "PixtralImageProcessorFast",
        "size": {"longest_edge": 32},
        "processor_class": "PixtralProcessor",
    },
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 16},
        "aspect_ratio_setting": "anyres",
    },
    "llava_onevision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_pad": True,
    },
    "glm4v": {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 512, "longest_edge": 2048},
    },
    "glm46v": {
        "image_processor_type": "Glm46VImageProcessor",
        "size": {"shortest_edge": 512, "longest_edge": 2048},
    },
}
"""Image processor settings of each family in the form that Hub checkpoints have."""
TINY_SETTINGS = (
    "crop_size",
    "image_grid_pinpoints",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "image_mean",
    "image_std",
)
"""Settings that are taken from the tiny checkpoint, for its small images."""


@pytest.mark.parametrize("family", HUB_SETTINGS)
def test_hub_folder_opens_without_torchvision(tmp_path: Path, family: str) -> None:
    tiny.FAMILY_BUILDERS[family](tmp_path / "base")
    expected = load_backbone(tmp_path / "base").prepare_image(WIDE)
    path = tmp_path / "base" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    shared = {name: settings[name] for name in TINY_SETTINGS if settings.get(name)}
    path.write_text(json.dumps(shared | HUB_SETTINGS[family]))
    prepared = load_backbone(tmp_path / "base").prepare_image(WIDE)
    assert torch.equal(prepared.inputs["pixel_values"], expected.inputs["pixel_values"])


def test_every_family_has_a_tiny_twin_and_says_what_differs() -> None:
    assert FAMILIES.keys() <= tiny.FAMILY_BUILDERS.keys()
    for family in FAMILIES.values():
        assert issubclass(family, Family)
        assert family.__doc__ not in (None, Family.__doc__)


def test_unknown_model_type_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_type 'blip-2' is not supported") as raised:
        find_family("blip-2", tmp_path)
    assert all(model_type in str(raised.value) for model_type in FAMILIES)
    with pytest.raises(ModelError, match="Did you mean 'qwen2_vl'"):
        find_family("qwen2-vl", tmp_path)
