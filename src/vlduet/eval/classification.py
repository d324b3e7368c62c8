"""Zero-shot classification: an image is of the label whose prompts are nearest to it.

    from vlduet import DuetModel, ImageRef, classify

    model = DuetModel.from_pretrained("models/nano")
    result = classify(model, [ImageRef(path=Path("cat.png"))], ["a cat", "a dog"])
    result.predicted_labels[0], result.probabilities[0]  # label, float32[2]

The vector of a label is the mean of the unit vectors of its prompts, one per template, as CLIP
does. Probabilities are the softmax over the labels of cosine / temperature.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlduet.data.images import IMAGE_SUFFIXES, MISSING_IMAGE
from vlduet.data.readers.text_encoding import detect_encoding
from vlduet.data.records import ImageRef
from vlduet.errors import DataError
from vlduet.eval.protocols import cosine, unit_rows

TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "this is {}")
"""Prompts of a label; ``{}`` stands for it."""


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
    if not templates or any("{}" not in template for template in templates):
        fix = "Write templates such as 'a picture of {}'"
        raise DataError("a template without {}, or no template", place="templates", fix=fix)
    if temperature is None:
        temperature = float(np.exp(-model.logit_scale.item()))
    if not temperature > 0:
        raise DataError(f"temperature {temperature}", place="temperature", fix="Give more than 0")
    if not images:
        return Classification(tuple(labels), np.zeros((0, len(labels)), dtype=np.float32))
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    prompt_vectors = unit_rows(model.encode(prompts))
    label_vectors = prompt_vectors.reshape(len(labels), len(templates), -1).mean(1)  # [L, E]
    cosines = cosine(model.encode(list(images)), label_vectors.astype(np.float32))  # [N, L]
    logits = cosines.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = weights / weights.sum(1, keepdims=True)
    return Classification(tuple(labels), probabilities.astype(np.float32))


def check_labels(labels: Sequence[str], *, place: str = "labels") -> None:
    """Raise DataError for fewer than two labels, an empty one, or two that are equal.

    Labels are equal if they differ in case and outer blanks alone. `place` is named in the error.
    """
    if len(labels) < 2:
        fix = "Give two labels or more, with commas between them or one per line of a file"
        raise DataError(f"{len(labels)} label(s)", place=place, fix=fix)
    first_index: dict[str, int] = {}
    for index, label in enumerate(labels):
        key = label.strip().casefold()
        if not key:
            raise DataError(f"label {index + 1} is empty", place=place, fix="Remove it")
        if key in first_index:
            message = f"label '{label}' occurs twice, as {first_index[key] + 1} and {index + 1}"
            raise DataError(message, place=place, fix="Name every label once")
        first_index[key] = index


# ------------------------------------------------------------------ files


def list_images(paths: Sequence[Path]) -> list[ImageRef]:
    """Return the images of files and folders, in the given order.

    The images of a folder are all files below it with an ending of `IMAGE_SUFFIXES`, sorted by
    path; files and folders whose name starts with a dot are skipped. No image is opened.

    Raises:
        DataError: a path does not exist, or a folder has no image.
    """
    images: list[ImageRef] = []
    for path in paths:
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_image_file(file, path)]
            if not files:
                fix = f"Give a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})"
                raise DataError("no images in this folder", place=path, fix=fix)
            images += [ImageRef(path=file) for file in files]
        elif path.exists():
            images.append(ImageRef(path=path))
        else:
            raise DataError(MISSING_IMAGE, place=path, fix="Check the path")
    return images


def _is_image_file(file: Path, folder: Path) -> bool:
    """Return whether a path below a folder is a file with an image's ending and is not hidden."""
    is_hidden = any(name.startswith(".") for name in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden and file.is_file()


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
