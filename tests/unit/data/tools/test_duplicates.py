"""Near-duplicates are found whatever the order of comparison; groups unite related items."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    UnionFind,
    caption_key,
    find_near_duplicates,
    fingerprint_image,
    is_near_duplicate,
)


def draw_rectangles(seed: int, size: int = 96) -> np.ndarray:
    """Return a drawing, uint8[size, size, 3]: coloured rectangles on white."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    for _ in range(6):
        top, left = rng.integers(0, size - 20, 2)
        height, width = rng.integers(12, size // 2, 2)
        pixels[top : top + height, left : left + width] = rng.integers(0, 255, 3)
    return pixels


def fingerprint_pixels(pixels: np.ndarray) -> ImageFingerprint:
    return fingerprint_image(ImageRef(data=images.encode_png(images.from_pixels(pixels))))


@pytest.mark.parametrize("seed", range(10))
def test_scaled_reencoded_and_slightly_changed_copies_are_near_duplicates(seed: int) -> None:
    pixels = draw_rectangles(seed)
    image = images.from_pixels(pixels)
    original = fingerprint_pixels(pixels)
    scaled = fingerprint_pixels(images.to_pixels(images.scale_down(image, 60)))
    assert is_near_duplicate(original, scaled)
    reencoded = fingerprint_image(ImageRef(data=images.encode_jpeg(image)))
    assert is_near_duplicate(original, reencoded)
    pixels[40:46, 40:46] = 0
    assert is_near_duplicate(original, fingerprint_pixels(pixels))


def test_other_drawings_and_other_colours_are_not_near_duplicates() -> None:
    fingerprints = [fingerprint_pixels(draw_rectangles(seed)) for seed in range(40)]
    assert find_near_duplicates(fingerprints) == []
    pixels = draw_rectangles(1)
    recoloured = np.where(pixels == 255, pixels, pixels[..., ::-1]).astype(np.uint8)
    assert not is_near_duplicate(fingerprint_pixels(pixels), fingerprint_pixels(recoloured))


@pytest.mark.parametrize(
    ("num_bits", "colour_difference", "is_expected"),
    [(0, 13, True), (0, 14, False), (6, 10, True), (7, 10, False), (16, 5, True), (17, 0, False)],
)
def test_bits_plus_twice_the_difference_of_colours_decide(
    num_bits: int, colour_difference: int, is_expected: bool
) -> None:
    first = ImageFingerprint(0, bytes([100]) * 192)
    second = ImageFingerprint((1 << num_bits) - 1, bytes([100 - colour_difference]) * 192)
    assert is_near_duplicate(first, second) is is_expected
    assert is_near_duplicate(second, first) is is_expected


def test_the_blockwise_search_equals_comparing_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlduet.data.tools.duplicates._BLOCK_SIZE", 7)
    rng = np.random.default_rng(0)
    hashes = [int(value) for value in rng.integers(0, 2**63, 5)]
    fingerprints = []
    for i in range(30):
        flipped_bit = 1 << int(rng.integers(0, 60))
        fingerprints.append(ImageFingerprint(hashes[i % 5] ^ flipped_bit, bytes(192)))
    within = [
        (i, j)
        for i, j in combinations(range(30), 2)
        if is_near_duplicate(fingerprints[i], fingerprints[j])
    ]
    assert find_near_duplicates(fingerprints) == within and len(within) == 75
    rows, columns = fingerprints[:10], fingerprints[10:]
    across = [
        (i, j) for i, j in product(range(10), range(20)) if is_near_duplicate(rows[i], columns[j])
    ]
    assert find_near_duplicates(rows, columns) == across and across
    assert find_near_duplicates([]) == find_near_duplicates(rows, []) == []


@pytest.mark.parametrize("chunk_size", [3, 1 << 16])
def test_groups_of_near_duplicates_equal_those_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    monkeypatch.setattr("vlduet.data.tools.duplicates._BLOCK_SIZE", 7)
    monkeypatch.setattr("vlduet.data.tools.duplicates._CHUNK_SIZE", chunk_size)
    rng = np.random.default_rng(1)
    fingerprints = []
    for _ in range(5):
        # A chain: neighbours are near-duplicates, and its ends are not.
        hash_bits = int(rng.integers(0, 2**63))
        for _ in range(12):
            for position in rng.integers(0, 63, 9).tolist():
                hash_bits ^= 1 << position
            colours = rng.integers(100, 110, 192, dtype=np.uint8)
            fingerprints.append(ImageFingerprint(hash_bits, colours.tobytes()))
    fingerprints = [fingerprints[i] for i in rng.permutation(60)]
    expected = UnionFind(60)
    for i, j in combinations(range(60), 2):
        if is_near_duplicate(fingerprints[i], fingerprints[j]):
            expected.union(i, j)
    groups = UnionFind(60)
    groups.union_near_duplicates(fingerprints)
    assert groups.groups() == expected.groups() and len(groups.groups()) == 5
    UnionFind(0).union_near_duplicates([])


def test_captions_are_compared_without_case_and_punctuation() -> None:
    assert caption_key("A boat, on the  LAKE.") == caption_key("a boat on the lake")
    assert caption_key("a boat on the lake") != caption_key("a goat on the lake")
    assert caption_key("A dog!!!!!!!!!!!!!") is None, "a short caption repeats by chance"


def test_union_find_merges_groups_with_equal_keys() -> None:
    items = UnionFind(6)
    items.union_equal(["a", "b", "a", "c", "b", "d"])
    assert items.groups() == [[0, 2], [1, 4], [3], [5]]
    items.union(4, 2)
    assert items.groups() == [[0, 1, 2, 4], [3], [5]]
    assert items.find(4) == 0
