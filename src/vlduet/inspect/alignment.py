"""Align two records slice by slice, as the structure loss of Sugar or a model compares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlduet.config import RunConfig
from vlduet.data.records import (
    ImageRef,
    Part,
    Parts,
    Record,
    iter_labelled_parts,
    split_sentences,
)
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders, get_modality, make_slice
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.objectives.gak.api import compute_alignment_posterior, compute_sigma
from vlduet.objectives.sugar_targets import (
    Prefixes,
    TargetKind,
    compute_target_matrix,
    compute_triple_cosines,
    cosines_to_squared_distances,
)
from vlduet.recipes.registry import load_recipe
from vlduet.train import setup


@dataclass(frozen=True, slots=True)
class Alignment:
    """Comparison of two records of M and N slices."""

    first: str
    """Id of the first record."""
    second: str
    """Id of the second record."""
    rows: Parts
    """The M slices of the first record, images and sentences."""
    columns: Parts
    """The N slices of the second record."""
    source: str
    """Name of whatever computed the cosines, for messages."""
    cosines: list[list[float]]
    """float[M, N], cosine of every pair of slices."""
    posterior: list[list[float]]
    """float[M, N], probability that the alignment passes through a cell."""
    gak: float
    """Normalised global alignment kernel."""
    awm: float
    """Alignment-weighted mean of the cosines."""
    mean: float
    """Mean of all cosines, which does not depend on the order of slices."""
    sigma: float
    """Width of the kernel for these lengths."""

    @property
    def row_labels(self) -> list[str]:
        """Slices of the first record as texts: a sentence, or the name of an image in brackets."""
        return [slice_label(part) for part in self.rows]

    @property
    def column_labels(self) -> list[str]:
        """Slices of the second record as texts: a sentence, or the name of an image in brackets."""
        return [slice_label(part) for part in self.columns]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values; slices as their labels and `source` as ``judge``."""
        return {
            "first": self.first,
            "second": self.second,
            "rows": self.row_labels,
            "columns": self.column_labels,
            "judge": self.source,
            "cosines": self.cosines,
            "posterior": self.posterior,
            "gak": self.gak,
            "awm": self.awm,
            "mean": self.mean,
            "sigma": self.sigma,
        }


def slice_label(part: Part) -> str:
    """Return a slice as a text: a sentence as it is, or the name of an image in brackets."""
    return f"[{part.name}]" if isinstance(part, ImageRef) else part


def split_into_slices(record: Record) -> Parts:
    """Return the slices of a record of any kind: images and single sentences, in reading order.

    All texts are split, also captions, messages and candidates; only those of interleaved records
    are slices already. A record without parts gives ().
    """
    if record.kind == "interleaved":
        return record.parts
    slices: list[Part] = []
    for _, part in iter_labelled_parts(record):
        slices += [part] if isinstance(part, ImageRef) else split_sentences(part)
    return tuple(slices)


def config_encoder_cosines(parts: Parts, config: RunConfig) -> Tensor:
    """Return the cosines float[U, U] of U slices by the frozen encoders of a config.

    Args:
        config: a config whose recipe is sugar; its encoders are opened and its switches count.

    Raises:
        ConfigError, ModelError, DataError: as training with this config does.
    """
    recipe = load_recipe(config)
    encoders = setup.load_encoders(
        config, recipe, trained_model=None, cache=config.data.cache or None
    )
    return encoder_cosines(parts, encoders)


def encoder_cosines(parts: Parts, encoders: FrozenEncoders) -> Tensor:
    """Return the cosines float[U, U] of U > 0 slices by the triple kernel.

    Two images are compared by the encoder in the role ``vision``, two texts by ``text``, and an
    image with a text by ``cross``; without ``vision``, ``cross`` compares all pairs. New vectors
    are stored in the cache of the encoders. No slices raise RuntimeError.

    Raises:
        DataError, ModelError: as `FrozenEncoders.encode_slices` does.
        KeyError: there is no encoder in the role ``cross``, or with ``vision`` none in ``text``.
    """
    slices = encoders.encode_slices([make_slice(part) for part in parts])
    is_image = torch.tensor([get_modality(part) == "image" for part in parts])
    cross = torch.stack([item.features["cross"] for item in slices])
    if "vision" not in encoders.by_role:
        return compute_triple_cosines(cross, cross, is_image=is_image, use_triple_kernel=False)
    roles = ["vision" if flag else "text" for flag in is_image.tolist()]
    same_kind = [item.features[role] for item, role in zip(slices, roles, strict=True)]
    # Image and text vectors differ in width; padding with zeros leaves cosines as they are.
    padded = torch.nn.utils.rnn.pad_sequence(same_kind, batch_first=True)
    return compute_triple_cosines(padded, cross, is_image=is_image)


def model_cosines(parts: Parts, model: DuetModel | DualEncoder) -> Tensor:
    """Return the cosines float[U, U] of a model's own embeddings, each slice embedded alone."""
    vectors = torch.from_numpy(model.encode(parts))
    return (vectors @ vectors.T).clamp(-1.0, 1.0)


def align_records(
    first: Record, second: Record, *, cosines: Tensor, source: str, delta: float
) -> Alignment:
    """Align two records by the global alignment kernel, in float64.

    Args:
        cosines: float[M + N, M + N] of the M slices of the first record by `split_into_slices`,
            then the N of the second.
        source: name of whatever computed the cosines, for messages.
        delta: width of the kernel; sigma is delta * sqrt((M + N) / 2).

    Raises:
        DataError: a record without a slice.
    """
    rows = split_into_slices(first)
    columns = split_into_slices(second)
    for record, slices in ((first, rows), (second, columns)):
        if not slices:
            raise DataError(
                f"record '{record.id}' is an empty sequence",
                place=record.place,
                fix="Give it parts",
            )
    m = len(rows)
    n = len(columns)
    index = torch.zeros(2, max(m, n), dtype=torch.long)
    index[0, :m] = torch.arange(m)
    index[1, :n] = m + torch.arange(n)
    lengths = torch.tensor([m, n])
    prefixes = Prefixes(index, lengths, torch.arange(2))
    cosines = cosines.double()
    block = cosines[:m, m:]  # [M, N]
    sigma = compute_sigma(lengths[:1].double(), lengths[1:].double(), delta)
    distances = cosines_to_squared_distances(block)[None]
    posterior = compute_alignment_posterior(distances, lengths[:1], lengths[1:], sigma=sigma)[0]

    def similarity(target: TargetKind) -> float:
        return float(compute_target_matrix(cosines, prefixes, target=target, delta=delta)[0, 1])

    return Alignment(
        first=first.id,
        second=second.id,
        rows=rows,
        columns=columns,
        source=source,
        cosines=block.tolist(),
        posterior=posterior.tolist(),
        gak=similarity("gak"),
        awm=similarity("awm"),
        mean=similarity("mean"),
        sigma=float(sigma),
    )
