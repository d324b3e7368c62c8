"""Vision features are computed once, never stale, and memory stays bounded."""

from __future__ import annotations

import shutil
from pathlib import Path

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
def pictures(tmp_path: Path) -> list[ImageRef]:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
    return [ImageRef(path=tmp_path / f"{i}.png") for i in range(6)]


def test_memory_is_bounded_and_keeps_the_newest() -> None:
    cache = FeatureCache(None, memory_bytes=100)
    for i in range(5):
        cache.put(str(i), torch.full((4, 2), float(i)))  # 32 bytes
    assert [cache.get(str(i)) is not None for i in range(5)] == [False, False, True, True, True]
    cache.put("4", torch.zeros(4, 2))
    assert cache.get("2") is not None and bool((cache.get("4") == 0).all())
    cache.put("large", torch.zeros(4, 100))
    assert cache.get("large") is None


@pytest.mark.parametrize("memory", [0, 400, 1 << 20])
def test_embeddings_do_not_depend_on_what_the_cache_holds(
    tmp_path: Path, pictures: list[ImageRef], memory: int
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    wanted = model.encode(pictures)
    model.feature_cache = FeatureCache(None, memory_bytes=memory)
    for _ in range(3):
        assert_close(model.encode(pictures[:3]), wanted[:3], atol=1e-6, rtol=0)
        # Cached ones and new ones in one batch: the new ones push the cached ones out before they are read.
        assert_close(model.encode(pictures), wanted, atol=1e-6, rtol=0)


def test_on_disk_an_image_is_decoded_once(
    tmp_path: Path, pictures: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.feature_cache = FeatureCache(tmp_path / "features")
    first = model.encode(pictures)
    monkeypatch.setattr(
        model.backbone, "prepare_image", lambda ref: pytest.fail(f"{ref.name} was decoded again")
    )
    monkeypatch.setattr(
        model.backbone, "compute_vision_features", lambda chunk: pytest.fail("the tower ran again")
    )
    assert np.array_equal(model.encode(pictures), first)


def test_what_is_on_disk_is_read_when_it_is_needed(
    tmp_path: Path, pictures: list[ImageRef]
) -> None:
    """A batch of any size holds no features: neither their memory nor a mapping a file, of which a process may have few."""
    model = tiny.build_duet_model(tmp_path / "base")
    model.feature_cache = FeatureCache(tmp_path / "features")
    first = model.encode(pictures)
    prepared = [model.prepare_image(picture) for picture in pictures]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "features") not in maps.read_text()
    assert_close(model.vision_features(prepared)[:4], model.vision_features(prepared[:1]))
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(
        ModelError, match=r"features: features that were here are gone.*start again"
    ):
        model.vision_features(prepared)
    assert np.array_equal(model.encode(pictures), first), "and are made anew"


def test_another_content_under_the_same_name_is_another_image(
    tmp_path: Path, pictures: list[ImageRef]
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    before = model.encode(pictures[:1])
    assert pictures[0].path is not None
    pictures[0].path.write_bytes(tiny.random_image(99, side=25).data or b"")
    assert abs(model.encode(pictures[:1]) - before).max() > 1e-6


@pytest.mark.parametrize("place", [0, -1])
def test_a_tower_with_other_weights_has_other_features(
    tmp_path: Path, pictures: list[ImageRef], place: int
) -> None:
    before, after = (
        tiny.build_duet_model(tmp_path / "base"),
        DuetModel.from_pretrained(tmp_path / "base"),
    )
    assert before.prepare_image(pictures[0]).cache_key == after.prepare_image(pictures[0]).cache_key
    after = DuetModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        list(after.backbone.vision_tower.parameters())[place].add_(1)
    assert before.prepare_image(pictures[0]).cache_key != after.prepare_image(pictures[0]).cache_key


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_broken_file_counts_as_missing(tmp_path: Path, keep: int) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("abcd", torch.ones(4, 8))
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:keep])
    assert cache.get("abcd") is None


def test_what_is_made_of_an_image_does_not_depend_on_its_company(model: DuetModel) -> None:
    """In the last bit: what a run has cached when it is resumed decides who meets whom in the tower."""
    made = [model.prepare_image(tiny.random_image(i)) for i in range(5)]
    alone = [model.backbone.compute_vision_features([image]) for image in made]
    assert torch.equal(model.backbone.compute_vision_features(made), torch.cat(alone))
    assert torch.equal(
        model.backbone.compute_vision_features(made[3:0:-1]), torch.cat(alone[3:0:-1])
    )
