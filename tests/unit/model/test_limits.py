"""Length limits are saved with a model, and a limit of image tokens changes what it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from helpers import tiny
from vlduet.data import images
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.model.limits import Limits, format_truncation, log_first_truncation, log_truncation

LARGE = tiny.random_image(3, 120, width=160)
TILES = {"crop_to_patches": True}
LIMITS = {
    "qwen2_vl": 8,
    "qwen3_vl": 8,
    "glm4v": 9,
    "mistral3": 12,
    "llava_next": 14,
    "llava_onevision": 14,
    "smolvlm": 20,
    "idefics3": 20,
    "internvl": 20,
}
"""Limit of each tiny checkpoint that its own settings exceed, and that it can keep to."""


def write_base(family: str, folder: Path) -> Path:
    """Write a tiny checkpoint whose images take more tokens than its limit, and return it."""
    tiny.FAMILY_BUILDERS[family](folder)
    if family == "internvl":
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | TILES))
    return folder


def count_tokens(model: DuetModel, ref: Any = LARGE) -> int:
    return model.prepare_image(ref).num_tokens


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("manifest", "max_tokens", "expected"),
    [
        ({}, None, Limits(2048, 1536)),
        ({}, 8192, Limits(8192, 1536)),
        ({}, 1280, Limits(1280, 960)),
        ({}, 1, Limits(1, 1)),
        ({"base": "../base"}, None, Limits(2048, None)),
        ({"limits": {"max_tokens": 4096, "max_image_tokens": 900}}, None, Limits(4096, 900)),
        ({"limits": {"max_tokens": 4096, "max_image_tokens": 900}}, 64, Limits(64, 900)),
        ({"limits": {"max_tokens": 128, "max_image_tokens": None}}, None, Limits(128, None)),
    ],
)
def test_limits_of_a_checkpoint_of_an_earlier_and_of_a_new_model(
    manifest: dict[str, Any], max_tokens: int | None, expected: Limits
) -> None:
    assert Limits.from_manifest(manifest, max_tokens=max_tokens) == expected


# ---------------------------------------------------------------------- saving and opening


@pytest.mark.parametrize("family", LIMITS)
def test_a_saved_and_a_merged_model_keep_the_limit(family: str, tmp_path: Path) -> None:
    base = write_base(family, tmp_path / "base")
    own_count = count_tokens(DuetModel.from_pretrained(base))
    limit = LIMITS[family]
    model = DuetModel.from_pretrained(base, max_tokens=3000, max_image_tokens=limit)
    count = count_tokens(model)
    assert count <= limit < own_count
    embedding = model.encode([LARGE])
    model.save_pretrained(tmp_path / "model")
    saved = DuetModel.from_pretrained(tmp_path / "model")
    assert saved.limits == Limits(3000, limit)
    assert count_tokens(saved) == count and saved.fingerprint == model.fingerprint
    assert np.array_equal(saved.encode([LARGE]), embedding)
    saved.save_merged(tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "renamed")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.limits == Limits(3000, limit) and count_tokens(merged) == count
    assert merged.fingerprint == saved.fingerprint
    np.testing.assert_allclose(merged.encode([LARGE]), embedding, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "glm4v", "mistral3", "llava_next", "smolvlm"])
def test_plain_transformers_gives_as_many_tokens_for_a_merged_folder(
    family: str, tmp_path: Path
) -> None:
    base = write_base(family, tmp_path / "base")
    model = DuetModel.from_pretrained(base, max_image_tokens=LIMITS[family])
    model.save_merged(tmp_path / "merged")
    plain = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    outputs = plain(images=images.load_image(LARGE), return_tensors="pt")
    inputs = model.backbone.prepare_image(LARGE).inputs
    names = {"image_grid_thw", "image_sizes"} & inputs.keys()
    for name in names:
        assert torch.equal(outputs[name], inputs[name])
    if not names:
        assert outputs["pixel_values"].flatten(0, 1).shape == inputs["pixel_values"].shape
    if family == "llava_next":
        written = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert written["image_grid_pinpoints"] == plain.image_grid_pinpoints == [[16, 32]]


def test_a_model_folder_of_an_earlier_version_keeps_the_settings_of_its_base(
    tmp_path: Path,
) -> None:
    base = write_base("qwen2_vl", tmp_path / "base")
    model = DuetModel.from_pretrained(base, max_image_tokens=16)  # its own limit
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "vlduet.json"
    manifest = json.loads(path.read_text())
    assert manifest["image_processor"] == {}
    for name in ("limits", "image_processor", "files", "base_files", "manifest_sha256"):
        del manifest[name]
    path.write_text(json.dumps(manifest))
    earlier = DuetModel.from_pretrained(tmp_path / "model")
    assert earlier.limits == Limits(2048, None)
    assert earlier.fingerprint == model.fingerprint and count_tokens(earlier) == 12


def test_an_explicit_limit_replaces_the_saved_one_also_by_a_larger_one(tmp_path: Path) -> None:
    base = write_base("qwen2_vl", tmp_path / "base")
    DuetModel.from_pretrained(base, max_tokens=300, max_image_tokens=4).save_pretrained(
        tmp_path / "model"
    )
    saved = DuetModel.from_pretrained(tmp_path / "model")
    other = DuetModel.from_pretrained(tmp_path / "model", max_tokens=90, max_image_tokens=9)
    unlimited = DuetModel.from_pretrained(tmp_path / "model", max_image_tokens=1000)
    assert (saved.limits, other.limits) == (Limits(300, 4), Limits(90, 9))
    assert [count_tokens(model) for model in (saved, other, unlimited)] == [2, 6, 12]
    assert unlimited.backbone.image_settings == {}
    assert len({model.fingerprint for model in (saved, other, unlimited)}) == 3
    shorter = DuetModel.from_pretrained(tmp_path / "model", max_tokens=90)
    assert shorter.fingerprint == saved.fingerprint, "the longest sequence is no part of it"


def test_features_and_fingerprint_depend_on_a_limit_only_if_it_changes_images(
    tmp_path: Path,
) -> None:
    base = write_base("qwen2_vl", tmp_path / "base")
    own, equal, fewer = (
        DuetModel.from_pretrained(base, max_image_tokens=limit) for limit in (1536, 16, 8)
    )
    assert own.fingerprint == equal.fingerprint != fewer.fingerprint
    keys = [model.prepare_image(LARGE).cache_key for model in (own, equal, fewer)]
    assert keys[0] == keys[1] != keys[2]
    assert "image_processor" not in own.embedding_settings()
    assert fewer.embedding_settings()["image_processor"]["size"]["longest_edge"] == 8 * 64


def test_a_limit_that_is_changed_later_starts_from_the_checkpoint_s_own(tmp_path: Path) -> None:
    backbone = DuetModel.from_pretrained(write_base("llava_next", tmp_path / "base")).backbone
    own = backbone.prepare_image(LARGE)
    for limit in (14, 9, None):
        backbone.limit_image_tokens(limit)
        prepared = backbone.prepare_image(LARGE)
        assert (prepared.cache_key == own.cache_key) == (limit is None)
        assert backbone.max_image_tokens == limit
    assert prepared.num_tokens == own.num_tokens and backbone.image_settings == {}
    pinpoints = backbone.model.config.image_grid_pinpoints
    assert pinpoints == backbone.image_processor.image_grid_pinpoints and len(pinpoints) == 4


def test_images_that_do_not_fit_name_the_limits_and_how_to_change_them(tmp_path: Path) -> None:
    base = write_base("qwen2_vl", tmp_path / "base")
    model = DuetModel.from_pretrained(base, max_tokens=10, max_image_tokens=16)
    with pytest.raises(DataError) as raised:
        model.encode([LARGE])
    message = str(raised.value)
    for remedy in ("data.max_tokens", "model.max_image_tokens", "vlduet model limit"):
        assert remedy in message


def test_cut_texts_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with log_truncation("captions") as on_truncate:
        pass
    assert not caplog.messages
    with pytest.raises(ZeroDivisionError), log_truncation("captions") as on_truncate:
        for num_tokens in (30, 9000, 40):
            on_truncate(0, num_tokens)
        _ = 1 / 0
    assert caplog.messages == [
        "captions: 3 texts were cut at the model's limit, up to 9,000 tokens"
    ]
    assert format_truncation(1, max_tokens=8192) == "1 text was cut at 8,192 tokens"
    caplog.clear()
    note = log_first_truncation("retriever")
    note(0, 1234)
    note(1, 5678)
    (message,) = caplog.messages
    assert message.startswith("retriever: a text of 1,234 tokens is cut")
