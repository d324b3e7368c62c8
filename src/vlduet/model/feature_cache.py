"""What frozen encoders see, on disk: computed once a content and encoder, whoever asks.

One `.npy` file an image or text, named by the hash of its content and of everything that decides the features, so a stale
feature cannot be read and several processes can share one folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.errors import ModelError

DEFAULT_MEMORY_BYTES = 256 << 20
"""Bytes that are kept without a folder: enough to see an image twice, not enough to hurt who indexes a million."""


def get_file_version(path: Path | None) -> tuple[str, int, int] | None:
    """Names a file as it is now, without reading it; None where there is none."""
    if path is None or not path.is_file():
        return None
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


VISION_BATCH_IMAGES = 8
"""Images that a vision tower is given at a time: more take memory. On a CPU it takes them one by one."""
FEATURES_INPUT = "features"
"""Name of an image's cached vision features among its inputs."""


class FeatureCache:
    """float32 tensors by key: [tokens, Dv] of a vision tower, [D] of a slice's encoder.

    Args:
        folder: where they are kept; None keeps the newest `memory` bytes of them in memory.
    """

    def __init__(self, folder: Path | None, *, memory_bytes: int = DEFAULT_MEMORY_BYTES):
        self.folder, self.memory_bytes = folder, memory_bytes
        self._memory: dict[str, Tensor] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # the thread that lays out the next batch asks encoders too

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.npy"

    def get(self, key: str) -> Tensor | None:
        """The features, or None. A file that a killed process left broken counts as missing."""
        if self.folder is None:
            return self._memory.get(key)
        try:
            # Copy on write: pages are read when they are used, and the file is never written.
            return torch.from_numpy(np.load(self._path(key), mmap_mode="c"))
        except (FileNotFoundError, ValueError, EOFError):
            return None

    def put(self, key: str, features: Tensor) -> None:
        """Keep them; atomic on disk."""
        kept = features.detach().cpu().float().contiguous()
        if self.folder is None:
            with self._lock:
                self._bytes += kept.nbytes - (
                    self._memory[key].nbytes if key in self._memory else 0
                )
                self._memory[key] = kept
                while self._bytes > self.memory_bytes:
                    self._bytes -= self._memory.pop(next(iter(self._memory))).nbytes
            return
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, kept.numpy())
        temporary.replace(path)


class _OnDisk(Mapping[str, Tensor]):
    """An image's features as its inputs, read when they are asked for: of a large batch, one chunk's are in memory."""

    def __init__(self, cache: FeatureCache, key: str):
        self.cache, self.key = cache, key

    def __getitem__(self, name: str) -> Tensor:
        if name != FEATURES_INPUT:
            raise KeyError(name)
        found = self.cache.get(self.key)
        if found is None:
            what, fix = (
                "features that were here are gone",
                "Leave the folder alone while it is in use, and start again",
            )
            raise ModelError(what, place=self.cache.folder, fix=fix)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter((FEATURES_INPUT,))

    def __len__(self) -> int:
        return 1


def attach_cached_features(image: PreparedImage, cache: FeatureCache) -> PreparedImage | None:
    """The image with its cached features as its inputs: what is in memory travels along, for the cache may let go of it
    before the batch is read. None where they are not there."""
    found = cache.get(image.cache_key)
    if found is None:
        return None
    return replace(
        image,
        inputs={FEATURES_INPUT: found} if cache.folder is None else _OnDisk(cache, image.cache_key),
    )


def compute_features(
    prepared: list[PreparedImage],
    cache: FeatureCache,
    tower: Callable[[list[PreparedImage]], Tensor],
) -> list[Tensor]:
    """float[tokens, Dv] of every image; each distinct one that is not cached goes through the tower once."""
    distinct = {image.cache_key: image for image in prepared}
    found = {
        key: p.inputs[FEATURES_INPUT] if FEATURES_INPUT in p.inputs else cache.get(key)
        for key, p in distinct.items()
    }
    missing = [image for image in distinct.values() if found[image.cache_key] is None]
    for begin in range(0, len(missing), VISION_BATCH_IMAGES):
        chunk = missing[begin : begin + VISION_BATCH_IMAGES]
        parts = tower(chunk).split([image.num_features for image in chunk])
        for image, features in zip(chunk, parts, strict=True):
            cache.put(image.cache_key, features)
            found[image.cache_key] = features
    tensors = [found[image.cache_key] for image in prepared]
    assert all(t is not None for t in tensors)
    return [t for t in tensors if t is not None]


def replace_pixels_by_features(
    sequences: list[Sequence], cache: FeatureCache, tower: Callable[[list[PreparedImage]], Tensor]
) -> list[Sequence]:
    """The sequences with vision features for pixels.

    The pixels of a batch that goes through the model in chunks would take more memory than any chunk; features on disk take
    none until they are read.
    """
    seen = [image for sequence in sequences for _, image in sequence.images]
    found = {}
    for begin in range(0, len(seen), VISION_BATCH_IMAGES):
        some = seen[begin : begin + VISION_BATCH_IMAGES]
        for image, features in zip(some, compute_features(some, cache, tower), strict=True):
            found[image.cache_key] = attach_cached_features(image, cache) or replace(
                image, inputs={FEATURES_INPUT: features}
            )
    return [
        replace(s, images=tuple((at, found[image.cache_key]) for at, image in s.images))
        for s in sequences
    ]
