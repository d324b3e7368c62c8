"""Size of the cached vision features of a run, before the first step writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlduet import distributed
from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.errors import DataError
from vlduet.logs import format_bytes, logger
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FEATURES_INPUT
from vlduet.train.run import TrainingRun

MAX_MEASURED_IMAGES = 8
"""Number of images that are decoded to measure their tokens, which differ in most families."""


@dataclass(frozen=True)
class CacheSize:
    """Number and mean size of the vision features that a run caches."""

    num_images: int
    """Number of distinct training images, at most as many as the run has samples of."""
    image_bytes: float
    """Bytes of the features of an image in float32, the mean of those that were measured."""
    limit_bytes: int
    """Value of `data.cache_limit`."""

    @property
    def num_bytes(self) -> float:
        """Bytes of the features of all images."""
        return self.num_images * self.image_bytes

    @property
    def exceeds_limit(self) -> bool:
        """Whether all features together are larger than `limit_bytes`, so that none is stored."""
        return self.num_bytes > self.limit_bytes

    def __str__(self) -> str:
        """Return a sentence with all sizes, and what follows from them."""
        size = format_bytes(self.num_bytes)
        images = f"{self.num_images:,} images ({format_bytes(self.image_bytes)} an image)"
        if not self.exceeds_limit:
            return f"the vision features of {images} take {size} of disk"
        return (
            f"the vision features of {images} would take {size}, which is more than "
            f"data.cache_limit ({format_bytes(self.limit_bytes)}): they are not stored, and images "
            "go through the vision tower in every epoch"
        )


def limit_feature_cache(run: TrainingRun) -> None:
    """Log how large the cached vision features of a run become, and do not store too large ones.

    Where all together exceed `data.cache_limit`, nothing more is written to the cache of the
    model's vision features, which is logged as a warning; features in its folder are still read.
    Without a folder, or without images, nothing happens. A collective call: every rank must make
    it, and the main process measures.
    """
    size = distributed.call_on_main(lambda: measure_cache_size(run))
    if size is None or not isinstance(run.model, DuetModel):
        return
    cache = run.model.feature_cache
    if cache.folder is None:
        return
    if size.exceeds_limit:
        cache.stop_writing()
        logger.warning(str(size))
    else:
        logger.info(f"{size}, in {cache.folder}")


def measure_cache_size(run: TrainingRun) -> CacheSize | None:
    """Return the size of all vision features of a run's training images.

    Up to MAX_MEASURED_IMAGES of them are decoded, and an image goes through the vision tower unless
    its features are cached; nothing is stored. Images that cannot be decoded are passed over.

    Returns:
        None for a model without a vision tower of its own, with `data.cache` off, and without an
        image that can be decoded.

    Raises:
        ModelError: the vision tower or the image processor fails.
    """
    model = run.model
    if not isinstance(model, DuetModel) or run.config.data.cache is False:
        return None
    images: dict[ImageRef, None] = {}  # distinct ones in order
    num_references = 0
    for source in run.mixture.sources:
        for record in source:
            references = record.images()
            num_references += len(references)
            images.update(dict.fromkeys(references))
    image_bytes = _measure_image_bytes(model, list(images))
    if image_bytes is None:
        return None
    num_samples = run.num_steps * run.config.train.batch_size
    num_seen = math.ceil(num_samples * num_references / run.mixture.num_records)
    return CacheSize(min(len(images), num_seen), image_bytes, run.config.data.cache_limit)


def _measure_image_bytes(model: DuetModel, images: list[ImageRef]) -> float | None:
    """Return the mean bytes of the features of up to MAX_MEASURED_IMAGES evenly spaced images.

    Those that cannot be decoded are left out; None if no other is there. Raises as
    `measure_cache_size` does.
    """
    num_measured = min(len(images), MAX_MEASURED_IMAGES)
    prepared: list[PreparedImage] = []
    for i in range(num_measured):
        try:
            prepared.append(model.prepare_image(images[i * len(images) // num_measured]))
        except DataError:  # training lists it in the quarantine
            continue
    if not prepared:
        return None
    features = prepared[0].inputs.get(FEATURES_INPUT)
    if features is None:
        features = model.backbone.compute_vision_features(prepared[:1])
    num_features = sum(image.num_features for image in prepared) / len(prepared)
    return 4 * num_features * features.shape[1]
