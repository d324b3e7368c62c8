"""Zero-shot classification: an image is of the label whose prompts are nearest to it.

    from vlduet import DuetModel, ImageRef, classify

    model = DuetModel.from_pretrained("models/nano")
    result = classify(model, [ImageRef(path=Path("cat.png"))], ["a cat", "a dog"])
    result.predicted_labels[0], result.probabilities[0]  # label, float32[2]

`data/labels.py` has the prompts and the arithmetic.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.images import MISSING_IMAGE
from vlduet.data.labels import (
    TEMPLATES,
    check_labels,
    check_templates,
    fill_templates,
    label_probabilities,
)
from vlduet.data.readers.folder_scan import iter_folders
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.readers.text_encoding import detect_encoding
from vlduet.data.records import ImageRef
from vlduet.errors import DataError
from vlduet.logs import logger


class LabelEmbedder(Protocol):
    """Model that embeds images and texts, and has a temperature."""

    logit_scale: Any
    """Log of 1 / temperature, a tensor or a numpy scalar."""

    def encode(self, items: Any) -> np.ndarray:
        """Return the embeddings of a list of images, or of texts, float32[N, E]."""
        ...


@dataclass(frozen=True, slots=True)
class Classification:
    """Probabilities of labels for N images."""

    labels: tuple[str, ...]
    """The L labels, in the given order."""
    probabilities: NDArray[np.float32]
    """float32[N, L]; every row adds up to 1."""

    @property
    def predicted_labels(self) -> list[str]:
        """Likeliest label of every image; the first one of equally likely labels."""
        return [self.labels[i] for i in self.probabilities.argmax(1)]


def classify(
    model: LabelEmbedder,
    images: Sequence[ImageRef],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    temperature: float | None = None,
) -> Classification:
    """Classify images by labels that the model was not trained on.

    Args:
        model: a `DuetModel` or a dual encoder.
        images: images; none give a result with no rows.
        labels: at least two texts such as "a cat"; they differ in more than case and outer blanks.
        templates: prompts of a label, each with ``{}`` in its place; their vectors are averaged.
        temperature: divisor of the cosines; None is the model's own, as it was trained.

    Raises:
        DataError: fewer than two labels, an empty or repeated one, no template or one without
            ``{}``, or a temperature that is not positive.
        ImageError: an image cannot be read.
    """
    check_labels(labels)
    check_templates(templates)
    if temperature is None:
        temperature = float(np.exp(-model.logit_scale.item()))
    if not temperature > 0:
        raise DataError(f"temperature {temperature}", place="temperature", fix="Give more than 0")
    if not images:
        return Classification(tuple(labels), np.zeros((0, len(labels)), dtype=np.float32))
    probabilities = label_probabilities(
        model.encode(list(images)),
        model.encode(fill_templates(labels, templates)),
        num_labels=len(labels),
        temperature=temperature,
    )
    return Classification(tuple(labels), probabilities)


# ------------------------------------------------------------------ files


def list_images(paths: Sequence[Path]) -> list[ImageRef]:
    """Return the images of files and folders, in the given order.

    The images of a folder are those of `folder_scan` below it, sorted by path; a warning tells what
    else is there. No image is decoded.

    Raises:
        DataError: a path does not exist, or a folder has no image or cannot be read.
    """
    images: list[ImageRef] = []
    for path in paths:
        if path.is_dir():
            images += [ImageRef(path=file) for file in _list_folder_images(path)]
        elif path.exists():
            images.append(ImageRef(path=path))
        else:
            raise DataError(MISSING_IMAGE, place=path, fix="Check the path")
    return images


def _list_folder_images(path: Path) -> list[Path]:
    """Return the images below a folder; log, or raise DataError, as `list_images` says."""
    ignored = IgnoredData()
    errors: list[tuple[Path, OSError]] = []
    files: list[Path] = []
    for folder, content in iter_folders(path, ignored, errors=errors):
        files += [folder / name for name in content.images]
        for name in content.other_files:
            ignored.add_file(folder / name)
    for folder, error in errors:
        message = f"the folder cannot be read ({error.strerror})"
        raise DataError(message, place=folder, fix="Check its permissions")
    if not files:
        fix = f"Give a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})"
        raise DataError("no images in this folder", place=path, fix=fix)
    for message in ignored.describe_files() + ignored.describe_system_files():
        logger.warning(f"{path}: {message}")
    return sorted(files)


def read_labels(text: str) -> list[str]:
    """Return labels from a file with one per line, or from a text with commas between them.

    The text is a file name if such a file exists. Outer blanks are removed, and empty lines and
    empty texts between commas are skipped.

    Raises:
        DataError: as `check_labels`, or the file cannot be decoded.
    """
    raw_labels = text.split(",")
    if os.path.isfile(text):  # Path.is_file raises OSError for a text longer than a file name
        path = Path(text)
        try:
            raw_labels = path.read_text(encoding=detect_encoding(path)).splitlines()
        except UnicodeError:
            raise DataError("not UTF-8", place=path, fix="Save it as UTF-8") from None
    labels = [label.strip() for label in raw_labels if label.strip()]
    check_labels(labels, place=text)
    return labels
