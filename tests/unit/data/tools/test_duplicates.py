"""Near-duplicates and groups: what must stand in one split."""

from __future__ import annotations

import numpy as np
import pytest

from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    UnionFind,
    find_near_duplicates,
    fingerprint_image,
    is_near_duplicate,
)


def _scene(seed: int, size: int = 96) -> np.ndarray:
    """A drawing: coloured rectangles on white."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    for _ in range(6):
        top, left = rng.integers(0, size - 20, 2)
        high, wide = rng.integers(12, size // 2, 2)
        pixels[top : top + high, left : left + wide] = rng.integers(0, 255, 3)
    return pixels


def _print(pixels: np.ndarray) -> ImageFingerprint:
    return fingerprint_image(ImageRef(data=images.encode_png(images.from_pixels(pixels))))


def test_scaled_reencoded_and_slightly_changed_copies_look_alike() -> None:
    for seed in range(10):
        pixels = _scene(seed)
        image = images.from_pixels(pixels)
        original = _print(pixels)
        assert is_near_duplicate(original, _print(images.to_pixels(images.scale_down(image, 60))))
        assert is_near_duplicate(
            original, fingerprint_image(ImageRef(data=images.encode_jpeg(image)))
        )
        touched = pixels.copy()
        touched[40:46, 40:46] = 0
        assert is_near_duplicate(original, _print(touched))


def test_other_drawings_and_other_colours_do_not() -> None:
    prints = [_print(_scene(seed)) for seed in range(40)]
    assert find_near_duplicates(prints) == []
    pixels = _scene(1)
    recoloured = np.where(pixels == 255, pixels, pixels[..., ::-1])
    assert not is_near_duplicate(_print(pixels), _print(recoloured.astype(np.uint8)))


def test_pairs_agree_with_comparing_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlduet.data.tools.duplicates._BLOCK_SIZE", 7)
    rng = np.random.default_rng(0)
    base = [int(x) for x in rng.integers(0, 2**63, 5)]
    prints = [
        ImageFingerprint(base[i % 5] ^ (1 << int(rng.integers(0, 60))), bytes(192))
        for i in range(30)
    ]
    slow = [
        (i, j)
        for i in range(30)
        for j in range(i + 1, 30)
        if is_near_duplicate(prints[i], prints[j])
    ]
    assert find_near_duplicates(prints) == slow and slow
    across = [
        (i, j) for i in range(10) for j in range(20) if is_near_duplicate(prints[i], prints[10 + j])
    ]
    assert find_near_duplicates(prints[:10], prints[10:]) == across
    assert find_near_duplicates([]) == find_near_duplicates(prints, []) == []


def test_groups() -> None:
    groups = UnionFind(6)
    groups.union_equal(["a", "b", "a", "c", "b", "d"])
    assert groups.groups() == [[0, 2], [1, 4], [3], [5]]
    groups.union(4, 2)
    assert groups.groups() == [[0, 1, 2, 4], [3], [5]]
    assert groups.find(4) == 0
