"""Frozen encoders by role: cached vectors, features of slices, and errors that name the content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.records import ImageRef
from vlduet.data.sequences import Anchor, Sequence, Slice
from vlduet.encoders.frozen import FrozenEncoder, FrozenEncoders, make_slice
from vlduet.encoders.loading import load_text_encoder, open_encoder
from vlduet.errors import ConfigError, DataError, ModelError
from vlduet.model.feature_cache import FeatureCache

TEXTS = ["a cat", "a much longer sentence about a dog"]
IMAGE = tiny.random_image(0)


def open_encoders(folders: dict[str, Path], cache: Path | None = None) -> FrozenEncoders:
    by_role = {role: open_encoder(folder) for role, folder in folders.items()}
    return FrozenEncoders(by_role, cache=FeatureCache(cache))


def compute_text_vectors(encoders: FrozenEncoders, role: str = "text") -> Tensor:
    slices = [make_slice(text) for text in TEXTS]
    vectors = encoders.compute_vectors(role, slices)
    return torch.stack([vectors[part.content_key] for part in slices])


# ------------------------------------------------------------------ cache


def test_vectors_are_read_from_the_cache_without_loading_weights(
    encoder_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = {}
    for role in ("text", "cross"):
        computed[role] = compute_text_vectors(open_encoders(encoder_folders, tmp_path), role)

    def fail(encoder: FrozenEncoder) -> None:
        pytest.fail(f"{encoder.folder} was loaded")

    monkeypatch.setattr(FrozenEncoder, "encode_functions", property(fail))
    encoders = open_encoders(encoder_folders, tmp_path)
    for role, vectors in computed.items():
        assert torch.equal(compute_text_vectors(encoders, role), vectors)


def test_vectors_of_other_weights_or_pooling_are_not_read(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    compute_text_vectors(open_encoders(encoder_folders, cache))
    other = tiny.build_text_encoder(tmp_path / "other", seed=1)
    pooled = tiny.build_text_encoder(tmp_path / "pooled")
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    for folder in (other, pooled):
        vectors = compute_text_vectors(open_encoders({"text": folder}, cache))
        assert_close(vectors, load_text_encoder(folder)(TEXTS))


def test_missing_and_broken_vectors_are_computed_again(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = compute_text_vectors(open_encoders(encoder_folders, tmp_path))
    first, _ = sorted(tmp_path.rglob("*.npy"))
    np.save(first, np.full(24, np.nan, np.float32))
    assert_close(compute_text_vectors(open_encoders(encoder_folders, tmp_path)), expected)
    first.unlink()
    assert_close(compute_text_vectors(open_encoders(encoder_folders, tmp_path)), expected)


def test_a_cached_vector_of_another_dimension_is_refused(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    compute_text_vectors(open_encoders(encoder_folders, tmp_path))
    first, _ = sorted(tmp_path.rglob("*.npy"))
    np.save(first, np.ones(25, np.float32))
    with pytest.raises(ModelError, match=r"text: a cached vector has 2[45] numbers.*Delete"):
        compute_text_vectors(open_encoders(encoder_folders, tmp_path))


def test_the_content_decides_the_key_of_a_slice(tmp_path: Path) -> None:
    image = tiny.random_image(1)
    (tmp_path / "a.png").write_bytes(image.data or b"")
    key = make_slice(image).content_key
    assert make_slice(ImageRef(path=tmp_path / "a.png")).content_key == key
    assert make_slice(IMAGE).content_key != key
    assert make_slice("A cat").content_key != make_slice("a cat").content_key
    assert make_slice(key).content_key != key, "a text that spells the key of an image"


def test_slices_compare_by_content_and_not_by_features() -> None:
    assert Slice("a", "k", {"text": torch.ones(2)}) == Slice("a", "k")


# ------------------------------------------------------------------ features


def test_slices_get_the_features_of_the_roles_of_their_modality(
    encoder_folders: dict[str, Path],
) -> None:
    slices = (make_slice(IMAGE), make_slice(TEXTS[0]))
    anchors = (
        Anchor(0, 1, "image", "a", "k", slices[:1]),
        Anchor(1, 2, "text", "a", "k", slices),
        Anchor(0, 1, "x", "", ""),
    )
    sequence = Sequence((1, 2), (-100, -100), anchors)
    (encoded,) = open_encoders(encoder_folders).attach_features([sequence])
    assert encoded.anchors == anchors
    image, text = encoded.anchors[1].slices
    assert image.features.keys() == {"vision", "cross"}
    assert text.features.keys() == {"text", "cross"}
    assert encoded.anchors[0].slices[0] is image, "equal slices are encoded once"


def test_sequences_without_slices_are_returned_unchanged(
    encoder_folders: dict[str, Path],
) -> None:
    sequences = [Sequence((1,), (-100,))]
    assert open_encoders(encoder_folders).attach_features(sequences) is sequences


def test_dim_is_measured_for_images_and_texts(encoder_folders: dict[str, Path]) -> None:
    encoders = open_encoders(encoder_folders)
    assert encoders.get_dim("text") == compute_text_vectors(encoders).shape[1]
    vision_vectors = encoders.compute_vectors("vision", [make_slice(IMAGE)])
    (vector,) = vision_vectors.values()
    assert encoders.get_dim("vision") == len(vector)


# ------------------------------------------------------------------ errors


def build_faulty_encoders(value: float) -> FrozenEncoders:
    """Return a text encoder that fills the vector of the text `bad` with a value."""

    def encode(parts: list[Any]) -> Tensor:
        return torch.stack([torch.full((3,), value if part == "bad" else 1.0) for part in parts])

    encoder = FrozenEncoder(Path("x"), ("text",), lambda: {"text": encode}, "f")
    return FrozenEncoders({"text": encoder}, cache=FeatureCache(None))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "infinite numbers or zeros alone"),
        (0.0, "infinite numbers or zeros alone"),
    ],
)
def test_unusable_vectors_are_refused_with_their_content(value: float, problem: str) -> None:
    encoders = build_faulty_encoders(value)
    assert len(encoders.compute_vectors("text", [make_slice("good")])) == 1
    with pytest.raises(DataError, match=f"the text encoder x gives {problem} for 'bad'"):
        encoders.compute_vectors("text", [make_slice("good"), make_slice("bad")])


@pytest.mark.parametrize(
    ("role", "wrong_role"), [("vision", "text"), ("text", "vision"), ("cross", "vision")]
)
def test_a_role_needs_an_encoder_of_its_modalities(
    role: str, wrong_role: str, encoder_folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=f"encoders.{role}.*needs"):
        open_encoders({role: encoder_folders[wrong_role]})


def test_clip_can_fill_every_role(encoder_folders: dict[str, Path]) -> None:
    clip = encoder_folders["cross"]
    encoders = open_encoders({"vision": clip, "text": clip, "cross": clip})
    text_vectors = compute_text_vectors(encoders, "text")
    assert torch.equal(text_vectors, compute_text_vectors(encoders, "cross"))
