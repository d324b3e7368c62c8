"""Vision features are computed once, never stale, and memory stays bounded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.records import ImageRef
from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache


@pytest.fixture
def image_files(tmp_path: Path) -> list[ImageRef]:
    refs = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        path.write_bytes(tiny.random_image(i).data or b"")
        refs.append(ImageRef(path=path))
    return refs


def test_memory_is_bounded_and_holds_the_newest_features() -> None:
    cache = FeatureCache(None, memory_bytes=100)
    for i in range(5):
        cache.put(str(i), torch.full((4, 2), float(i)))  # 32 bytes
    assert [cache.get(str(i)) is not None for i in range(5)] == [False, False, True, True, True]
    cache.put("4", torch.zeros(4, 2))
    replaced = cache.get("4")
    assert cache.get("2") is not None and replaced is not None and bool((replaced == 0).all())
    cache.put("large", torch.zeros(4, 100))
    assert cache.get("large") is None


@pytest.mark.parametrize(("limit_bytes", "num_files"), [(0, 0), (95, 2), (96, 3), (1e6, 5)])
def test_files_end_at_the_limit_and_memory_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit_bytes: float, num_files: int
) -> None:
    """How many features come is not known beforehand."""
    cache = FeatureCache(tmp_path, memory_bytes=64, limit_bytes=limit_bytes)
    for i in range(5):
        cache.put(f"key {i}", torch.full((4, 2), float(i)))  # 32 bytes
    assert len(list(tmp_path.rglob("*.npy"))) == num_files
    values = [cache.get(f"key {i}") for i in range(5)]
    in_reach = set(range(num_files)) | {3, 4}
    assert {i for i, value in enumerate(values) if value is not None} == in_reach
    assert all(bool((values[i] == i).all()) for i in in_reach)
    assert len(caplog.messages) == (num_files < 5)
    if num_files < 5:
        assert f"data.cache_limit: {32 * num_files} bytes are in {tmp_path}" in caplog.text
    again = FeatureCache(tmp_path, limit_bytes=0)
    assert sum(again.get(f"key {i}") is not None for i in range(5)) == num_files


@pytest.mark.parametrize("limit_bytes", [0, 500, 1000])
def test_embeddings_do_not_depend_on_the_limit_of_files(
    tmp_path: Path, image_files: list[ImageRef], limit_bytes: float
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    expected = model.encode(image_files)
    model.feature_cache = FeatureCache(
        tmp_path / "features", memory_bytes=6000, limit_bytes=limit_bytes
    )
    for _ in range(2):
        prepared = [model.prepare_image(ref) for ref in image_files]
        assert_close(model.encode(image_files), expected, atol=1e-6, rtol=0)
        assert_close(
            model.vision_features(prepared),
            model.backbone.compute_vision_features(
                [model.backbone.prepare_image(ref) for ref in image_files]
            ),
        )
    size = sum(file.stat().st_size - 128 for file in (tmp_path / "features").rglob("*.npy"))
    assert size <= limit_bytes


@pytest.mark.parametrize("memory_bytes", [0, 400, 1 << 20])
def test_embeddings_do_not_depend_on_the_content_of_the_cache(
    tmp_path: Path, image_files: list[ImageRef], memory_bytes: int
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    expected = model.encode(image_files)
    model.feature_cache = FeatureCache(None, memory_bytes=memory_bytes)
    for _ in range(3):
        assert_close(model.encode(image_files[:3]), expected[:3], atol=1e-6, rtol=0)
        # Cached and new images in one batch: new features displace cached ones before they are
        # read.
        assert_close(model.encode(image_files), expected, atol=1e-6, rtol=0)


def test_features_on_disk_spare_decoding_and_the_vision_tower(
    tmp_path: Path, image_files: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.feature_cache = FeatureCache(tmp_path / "features")
    expected = model.encode(image_files)

    def decode_again(ref: ImageRef) -> None:
        pytest.fail(f"{ref.name} was decoded again")

    def encode_again(images: object) -> None:
        pytest.fail("the vision tower ran again")

    monkeypatch.setattr(model.backbone, "prepare_image", decode_again)
    monkeypatch.setattr(model.backbone, "compute_vision_features", encode_again)
    assert np.array_equal(model.encode(image_files), expected)


def test_features_on_disk_are_read_only_when_needed(
    tmp_path: Path, image_files: list[ImageRef]
) -> None:
    """A batch holds no features: neither their memory nor file mappings, which are limited."""
    model = tiny.build_duet_model(tmp_path / "base")
    model.feature_cache = FeatureCache(tmp_path / "features")
    expected = model.encode(image_files)
    prepared = [model.prepare_image(ref) for ref in image_files]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "features") not in maps.read_text()
    assert_close(model.vision_features(prepared)[:4], model.vision_features(prepared[:1]))
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(
        ModelError, match=r"features: cached features have disappeared.*start again"
    ):
        model.vision_features(prepared)
    assert np.array_equal(model.encode(image_files), expected), "they are computed again"


def test_a_file_with_new_content_is_another_image(
    tmp_path: Path, image_files: list[ImageRef]
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    before = model.encode(image_files[:1])
    assert image_files[0].path is not None
    image_files[0].path.write_bytes(tiny.random_image(99, side=25).data or b"")
    assert abs(model.encode(image_files[:1]) - before).max() > 1e-6


@pytest.mark.parametrize("index", [0, -1])
def test_a_vision_tower_with_other_weights_has_other_cache_keys(
    tmp_path: Path, image_files: list[ImageRef], index: int
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    copy = DuetModel.from_pretrained(tmp_path / "base")
    assert model.prepare_image(image_files[0]).cache_key == (
        copy.prepare_image(image_files[0]).cache_key
    )
    changed = DuetModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        list(changed.backbone.vision_tower.parameters())[index].add_(1)
    assert model.prepare_image(image_files[0]).cache_key != (
        changed.prepare_image(image_files[0]).cache_key
    )


@pytest.mark.parametrize("num_bytes", [0, 10, 200])
def test_an_incomplete_file_counts_as_missing(tmp_path: Path, num_bytes: int) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("abcd", torch.ones(4, 8))
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert cache.get("abcd") is None


def test_features_of_an_image_do_not_depend_on_its_batch(model: DuetModel) -> None:
    """The batches of a resumed run depend on which images are cached: compare bit for bit."""
    prepared = [model.prepare_image(tiny.random_image(i)) for i in range(5)]
    compute = model.backbone.compute_vision_features
    single = [compute([image]) for image in prepared]
    assert torch.equal(compute(prepared), torch.cat(single))
    assert torch.equal(compute(prepared[3:0:-1]), torch.cat(single[3:0:-1]))


def test_drafts_of_killed_processes_and_failed_writes_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = torch.ones(2, 2)
    FeatureCache(tmp_path).put("a" * 64, features)
    (file,) = tmp_path.rglob("*.npy")
    draft = file.with_name(f".{file.name}.4711.draft")
    draft.write_bytes(b"half")
    cache = FeatureCache(tmp_path)
    cache.put("a" * 64, features)
    assert not draft.exists() and cache.get("a" * 64) is not None

    def fail(file: object, array: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.put("a" * 64, features)
    assert list(file.parent.iterdir()) == [file]


def test_a_draft_that_another_process_deletes_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = np.save

    def save_and_delete(file: Any, array: object) -> None:
        save(file, array)
        Path(file.name).unlink()

    monkeypatch.setattr(np, "save", save_and_delete)
    cache = FeatureCache(tmp_path)
    cache.put("key", torch.ones(2))
    assert cache.get("key") is None
