"""Cache of frozen features: outputs of the vision tower and of the frozen slice encoders.

On disk it has one `.npy` file for each image or text, named by a hash of its content and of
everything that the features depend on. A stale feature therefore cannot be read, and several
processes can share a folder.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.errors import ModelError
from vlduet.library_errors import name_full_disk
from vlduet.locks import draft_path, remove_drafts
from vlduet.logs import format_bytes, logger

ImageVersion = tuple[str | int, ...]
"""Result of `get_image_version`: a file, its size and time, and a range in it."""
DEFAULT_MEMORY_BYTES = 256 << 20
"""Size of a cache without a folder: enough for repeated images, harmless when a million are
indexed."""
VISION_BATCH_IMAGES = 8
"""Number of images that the vision tower encodes at once on a GPU; limits memory."""
FEATURES_INPUT = "features"
"""Name of cached vision features among the inputs of a `PreparedImage`."""


class FeatureCache:
    """Map from keys to float32 tensors: [tokens, Dv] of a vision tower, [D] of a slice encoder.

    It is safe for several threads, and with a folder also for several processes.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        limit_bytes: float = math.inf,
    ):
        """Create a cache; nothing is read or written yet.

        Args:
            folder: folder of the features, created when the first is stored, whose earlier content
                is used; None keeps them in memory.
            memory_bytes: bound on the size in memory, beyond which the features that were stored
                first are dropped. It does not hold for a folder.
            limit_bytes: bound on the size of the features that are written to the folder; further
                ones are kept in memory, as without a folder.
        """
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.limit_bytes = limit_bytes
        self._written_bytes = 0
        self._is_full = folder is None
        self._clean_folders: set[Path] = set()
        self._memory: dict[str, Tensor] = {}
        self._used_bytes = 0
        self._lock = threading.Lock()  # the thread that prepares the next batch runs encoders, too

    def get(self, key: str) -> Tensor | None:
        """Return the features of a key, float32 on the CPU, or None where there are none.

        Features in a folder are memory-mapped and read when they are used; changing the tensor does
        not change the file. Those in memory are the stored tensor itself. A file that a killed
        process left incomplete counts as missing.
        """
        features = self.get_from_memory(key)
        if features is not None or self.folder is None:
            return features
        try:
            # Copy on write: torch wants writable memory, and the file must never change.
            return torch.from_numpy(np.load(self._path(key), mmap_mode="c"))
        except (FileNotFoundError, ValueError, EOFError):
            return None

    def get_from_memory(self, key: str) -> Tensor | None:
        """Return the features of a key that are in memory, not in a file; None if they are not."""
        return self._memory.get(key)

    def put(self, key: str, features: Tensor) -> None:
        """Store features as float32 without their graph, replacing earlier ones of the key.

        With a folder, they are written to a file there, atomically; raises OSError if that fails.
        Without one, and from the first ones on that exceed `limit_bytes` (which is logged), they
        are kept in memory on the CPU. The features stored first are then dropped while all are
        larger than `memory_bytes`: the new ones themselves, if they alone are.
        """
        features = features.detach().cpu().float().contiguous()
        if not self._reserve(features.nbytes):
            with self._lock:
                replaced = self._memory.get(key)
                self._used_bytes += features.nbytes - (0 if replaced is None else replaced.nbytes)
                self._memory[key] = features
                while self._used_bytes > self.memory_bytes:
                    oldest = next(iter(self._memory))
                    self._used_bytes -= self._memory.pop(oldest).nbytes
            return
        self._write(self._path(key), features)

    def _write(self, path: Path, features: Tensor) -> None:
        """Write features to a file, atomically, without waiting for the disk.

        Before the first file of a folder, drafts that killed processes left there are deleted.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in self._clean_folders:
            remove_drafts(path.parent)
            self._clean_folders.add(path.parent)
        draft = draft_path(path)
        try:
            with name_full_disk(path), draft.open("wb") as file:
                np.save(file, features.numpy())
            # Another process that has just begun may have deleted it: the features are missing.
            with contextlib.suppress(FileNotFoundError):
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def stop_writing(self) -> None:
        """Keep further features in memory; those in the folder are still read."""
        self._is_full = True

    def _reserve(self, num_bytes: int) -> bool:
        """Return whether features of a size are to be written to the folder, and count them."""
        with self._lock:
            if self._is_full:
                return False
            self._is_full = self._written_bytes + num_bytes > self.limit_bytes
            if not self._is_full:
                self._written_bytes += num_bytes
                return True
        logger.warning(
            f"cached features have reached data.cache_limit: {format_bytes(self._written_bytes)} "
            f"are in {self.folder}, and further ones are computed again in every epoch"
        )
        return False

    def _path(self, key: str) -> Path:
        """Return the file of a key."""
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.npy"


class _LazyFeatures(Mapping[str, Tensor]):
    """Inputs of an image whose features on disk are read at each access.

    A large batch then holds no features; only those of the current chunk are in memory.
    """

    def __init__(self, cache: FeatureCache, key: str):
        self.cache = cache
        self.key = key

    def __getitem__(self, name: str) -> Tensor:
        """Return the features, read anew from their file.

        Raises:
            KeyError: `name` is not FEATURES_INPUT.
            ModelError: the file has disappeared or is incomplete.
        """
        if name != FEATURES_INPUT:
            raise KeyError(name)
        features = self.cache.get(self.key)
        if features is None:
            raise ModelError(
                "cached features have disappeared",
                place=self.cache.folder,
                fix="Leave the folder alone while it is in use, and start again",
            )
        return features

    def __iter__(self) -> Iterator[str]:
        """Yield the one name."""
        return iter((FEATURES_INPUT,))

    def __len__(self) -> int:
        """Return 1."""
        return 1


def get_image_version(ref: ImageRef) -> ImageVersion | None:
    """Return path, size and modification time in ns of an image's file, and its range inside it.

    Equal versions are taken to mean equal content, without reading it. None for a missing file and
    for an image that is only bytes.
    """
    if ref.byte_range is not None:
        span = ref.byte_range
        return str(span.file), *span.version, span.offset, span.size
    if ref.path is None or not ref.path.is_file():
        return None
    status = ref.path.stat()
    return str(ref.path), status.st_size, status.st_mtime_ns


def attach_cached_features(image: PreparedImage, cache: FeatureCache) -> PreparedImage | None:
    """Return a copy of the image with its cached features as only input; None if none are cached.

    Features in memory are held by the copy, because the cache may drop them before the batch is
    used. Those on disk are read from their file at each access.
    """
    features = cache.get_from_memory(image.cache_key)
    if features is not None:
        return replace(image, inputs={FEATURES_INPUT: features})
    if cache.get(image.cache_key) is None:
        return None
    return replace(image, inputs=_LazyFeatures(cache, image.cache_key))


def prepare_image(
    ref: ImageRef,
    cache: FeatureCache,
    *,
    by_version: MutableMapping[ImageVersion, PreparedImage],
    preprocess: Callable[[ImageRef], PreparedImage],
) -> PreparedImage:
    """Return an image with its cached features as inputs, or else preprocessed.

    Args:
        ref: the image; one without a version (`get_image_version`) is always preprocessed.
        cache: cache of the features, which is only read.
        by_version: earlier images without inputs, by version; this one is added.
        preprocess: decodes and preprocesses an image; its errors propagate.
    """
    version = get_image_version(ref)
    if version is None:
        return preprocess(ref)
    prepared = None
    if version in by_version:
        prepared = attach_cached_features(by_version[version], cache)
    if prepared is None:
        prepared = preprocess(ref)
    by_version[version] = replace(prepared, inputs={})
    return prepared


def compute_features(
    images: list[PreparedImage],
    cache: FeatureCache,
    vision_tower: Callable[[list[PreparedImage]], Tensor],
) -> list[Tensor]:
    """Return the vision features float[num_features, Dv] of every image, in order; [] for none.

    Each distinct image that is neither cached nor has its features attached goes through the vision
    tower once, VISION_BATCH_IMAGES at a time, and its features are stored in the cache. These have
    the device and dtype of the tower's output; cached ones are float32 on the CPU.

    Args:
        vision_tower: returns the features of several images, concatenated in order.

    Raises:
        ModelError: a file of attached features has disappeared.
    """
    distinct = {image.cache_key: image for image in images}
    features: dict[str, Tensor] = {}
    for key, image in distinct.items():
        if FEATURES_INPUT in image.inputs:
            features[key] = image.inputs[FEATURES_INPUT]
        elif (cached := cache.get(key)) is not None:
            features[key] = cached
    missing = [image for key, image in distinct.items() if key not in features]
    for begin in range(0, len(missing), VISION_BATCH_IMAGES):
        chunk = missing[begin : begin + VISION_BATCH_IMAGES]
        outputs = vision_tower(chunk).split([image.num_features for image in chunk])
        for image, output in zip(chunk, outputs, strict=True):
            cache.put(image.cache_key, output)
            features[image.cache_key] = output
    return [features[image.cache_key] for image in images]


def replace_pixels_by_features(
    sequences: list[Sequence],
    cache: FeatureCache,
    vision_tower: Callable[[list[PreparedImage]], Tensor],
) -> list[Sequence]:
    """Return copies of the sequences whose images have vision features as inputs, not pixels.

    The pixels of a batch that is processed in chunks would take more memory than any chunk;
    features on disk take none until they are read. Features that are not cached are computed and
    stored, as by `compute_features`.
    """
    images = [image for sequence in sequences for _, image in sequence.images]
    by_key: dict[str, PreparedImage] = {}
    for begin in range(0, len(images), VISION_BATCH_IMAGES):
        chunk = images[begin : begin + VISION_BATCH_IMAGES]
        for image, features in zip(
            chunk, compute_features(chunk, cache, vision_tower), strict=True
        ):
            cached = attach_cached_features(image, cache)
            by_key[image.cache_key] = cached or replace(image, inputs={FEATURES_INPUT: features})

    def with_features(sequence: Sequence) -> Sequence:
        images = tuple((start, by_key[image.cache_key]) for start, image in sequence.images)
        return replace(sequence, images=images)

    return [with_features(sequence) for sequence in sequences]
