"""Labels of zero-shot classification: their checks, their prompts, and their probabilities.

The vector of a label is the mean of the unit vectors of its prompts, one per template, as CLIP
does. Probabilities are the softmax over the labels of cosine / temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlduet.data.vectors import unit_rows
from vlduet.errors import DataError

TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "this is {}")
"""Prompts of a label; ``{}`` stands for it."""


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


def check_templates(templates: Sequence[str]) -> None:
    """Raise DataError if there is no template, or one without ``{}``."""
    if not templates or any("{}" not in template for template in templates):
        fix = "Write templates such as 'a picture of {}'"
        raise DataError("a template without {}, or no template", place="templates", fix=fix)


def fill_templates(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return L * T prompts: those of the first label, then those of the second, and so on."""
    return [template.replace("{}", label) for label in labels for template in templates]


def label_probabilities(
    vectors: NDArray[np.float32],
    prompt_vectors: NDArray[np.float32],
    *,
    num_labels: int,
    temperature: float,
) -> NDArray[np.float32]:
    """Return the probabilities of L labels for N items, float32[N, L]; every row adds up to 1.

    Args:
        vectors: embeddings of the items, float[N, E], of any length but 0.
        prompt_vectors: embeddings of the prompts in the order of `fill_templates`, float[L * T, E].
        num_labels: number L of labels.
        temperature: positive divisor of the cosines.
    """
    prompts = unit_rows(prompt_vectors)
    label_vectors = unit_rows(prompts.reshape(num_labels, -1, prompts.shape[1]).mean(1))  # [L, E]
    cosines = (unit_rows(vectors) @ label_vectors.T).astype(np.float32)  # [N, L]
    logits = cosines.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return probabilities.astype(np.float32)
