"""Near-duplicate images: candidates by perceptual hash, confirmed by colour.

Two images are near-duplicates if (differing bits of 64) + 2 * (mean absolute difference of their
8 x 8 thumbnails, from 0 to 255) <= `MAX_DISTANCE`. The second term is needed: drawings on white
share many bits, and recoloured copies share all of them. On 792 clip-art stamps, the rule finds the
variants of one drawing (eyes in three colours, five dreidels), and no others.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlduet.data import images
from vlduet.data.records import ImageRef

MAX_HASH_DISTANCE = 16
"""Largest number of differing bits of candidates."""
MAX_DISTANCE = 26.0
MIN_CAPTION_LENGTH = 12
"""Characters that a repeated caption must have to count: "a dog" repeats by chance."""
_BLOCK_SIZE = 2048  # rows and columns compared at once, to limit memory
_CHUNK_SIZE = 1 << 16  # candidates whose colours are compared at once

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImageFingerprint:
    """Compact description of an image's appearance, by which two images are compared."""

    hash: int
    """64 bits, see `images.compute_perceptual_hash`."""
    colours: bytes
    """192 bytes, see `images.compute_thumbnail_colours`."""


def fingerprint_image(ref: ImageRef) -> ImageFingerprint:
    """Decode an image and return its fingerprint. Raise ImageError as `images.load_image` does."""
    image = images.load_image(ref)
    return ImageFingerprint(
        images.compute_perceptual_hash(image), images.compute_thumbnail_colours(image)
    )


def is_near_duplicate(first: ImageFingerprint, second: ImageFingerprint) -> bool:
    """Return whether two images are near-duplicates, equal images included.

    The hashes differ in at most `MAX_HASH_DISTANCE` bits, and these bits plus twice the mean
    difference of the colours are at most `MAX_DISTANCE`.
    """
    num_bits = (first.hash ^ second.hash).bit_count()
    if num_bits > MAX_HASH_DISTANCE:
        return False
    a = np.frombuffer(first.colours, np.uint8).astype(np.int16)
    b = np.frombuffer(second.colours, np.uint8).astype(np.int16)
    return num_bits + 2.0 * float(np.abs(a - b).mean()) <= MAX_DISTANCE


def caption_key(caption: str) -> str | None:
    """Return a caption without case, punctuation and repeated white space, to compare it by.

    None for one of fewer than `MIN_CAPTION_LENGTH` characters then, which equals others by chance.
    """
    key = " ".join(re.sub(r"[^\w]+", " ", caption.casefold()).split())
    return key if len(key) >= MIN_CAPTION_LENGTH else None


def find_near_duplicates(
    rows: Sequence[ImageFingerprint], columns: Sequence[ImageFingerprint] | None = None
) -> list[tuple[int, int]]:
    """Return the sorted index pairs (i, j) for which rows[i] and columns[j] are near-duplicates.

    Without `columns`, the rows are compared with one another, and i < j. No images give []. Time
    grows with len(rows) * len(columns), about 1 s for 20,000 x 10,000; memory only with the result.
    """
    columns_or_rows = rows if columns is None else columns
    row_colours, column_colours = _stack_colours(rows), _stack_colours(columns_or_rows)
    pairs: list[tuple[int, int]] = []
    for i, j, num_bits in _iter_candidates(rows, columns):
        is_near = _compare_colours(row_colours[i], column_colours[j], num_bits)
        pairs += zip(i[is_near].tolist(), j[is_near].tolist(), strict=True)
    return sorted(pairs)


def _iter_candidates(
    rows: Sequence[ImageFingerprint], columns: Sequence[ImageFingerprint] | None
) -> Iterator[tuple[Indices, Indices, NDArray[np.uint8]]]:
    """Yield (i, j, differing bits) of the pairs with similar hashes, `_CHUNK_SIZE` at most at once.

    Without `columns`, the rows are compared with one another, and i < j.
    """
    row_hashes = np.array([fingerprint.hash for fingerprint in rows], dtype=np.uint64)
    column_hashes = row_hashes
    if columns is not None:
        column_hashes = np.array([fingerprint.hash for fingerprint in columns], dtype=np.uint64)
    for top in range(0, len(row_hashes), _BLOCK_SIZE):
        for left in range(top if columns is None else 0, len(column_hashes), _BLOCK_SIZE):
            row_block = row_hashes[top : top + _BLOCK_SIZE, None]
            column_block = column_hashes[None, left : left + _BLOCK_SIZE]
            num_bits = np.bitwise_count(row_block ^ column_block)
            i, j = np.nonzero(num_bits <= MAX_HASH_DISTANCE)
            if columns is None and top == left:
                is_above = i < j
                i, j = i[is_above], j[is_above]
            for start in range(0, len(i), _CHUNK_SIZE):
                chunk = slice(start, start + _CHUNK_SIZE)
                yield i[chunk] + top, j[chunk] + left, num_bits[i[chunk], j[chunk]]


def _stack_colours(fingerprints: Sequence[ImageFingerprint]) -> NDArray[np.uint8]:
    """Return the colours of N images as uint8[N, 192]."""
    colours = b"".join(fingerprint.colours for fingerprint in fingerprints)
    return np.frombuffer(colours, np.uint8).reshape(len(fingerprints), -1 if colours else 192)


def _compare_colours(
    first: NDArray[np.uint8], second: NDArray[np.uint8], num_bits: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Return, bool[N], whether N candidates (colours uint8[N, 192] each) are near-duplicates."""
    differences = np.abs(first.astype(np.int16) - second).mean(axis=1)
    near: NDArray[np.bool_] = num_bits + 2.0 * differences <= MAX_DISTANCE
    return near


class UnionFind:
    """Partition of the items 0 ... size - 1 into groups, which can be merged.

    Corpora use it to keep everything that is related in one split.
    """

    def __init__(self, size: int):
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """Return the smallest member of the group of `item`."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]  # halves the path
            item = self._parent[item]
        return item

    def union(self, first: int, second: int) -> None:
        """Merge the groups of two items."""
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low

    def union_equal(self, keys: Iterable[Hashable]) -> None:
        """Merge the groups of all items whose keys are equal; the i-th key belongs to item i."""
        first_item: dict[Hashable, int] = {}
        for item, key in enumerate(keys):
            self.union(first_item.setdefault(key, item), item)

    def union_near_duplicates(self, fingerprints: Sequence[ImageFingerprint]) -> None:
        """Merge the groups of the items whose images are near-duplicates.

        Item i has fingerprints[i]. Memory does not grow with the number of pairs, and pairs whose
        items are in one group already cost little.
        """
        colours = _stack_colours(fingerprints)
        labels: Indices = np.empty(0, np.int64)
        for i, j, num_bits in _iter_candidates(fingerprints, None):
            # Thousands of nearly equal images have millions of pairs: a few of them unite the rest.
            if not labels.size:
                labels = np.array([self.find(item) for item in range(len(fingerprints))])
            is_new = labels[i] != labels[j]
            i, j, num_bits = i[is_new], j[is_new], num_bits[is_new]
            is_near = _compare_colours(colours[i], colours[j], num_bits)
            for first, second in zip(i[is_near].tolist(), j[is_near].tolist(), strict=True):
                self.union(first, second)
                labels = labels[:0]

    def groups(self) -> list[list[int]]:
        """Return all groups, each sorted, in the order of their smallest members."""
        members: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            members.setdefault(self.find(item), []).append(item)
        return list(members.values())
