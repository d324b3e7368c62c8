"""`vlduet align`: how two records align, slice by slice, as the structure loss of Sugar sees it or as a model does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlduet.config import RunConfig
from vlduet.data import images
from vlduet.data.records import ImageRef, Part, Parts, Record, split_sentences
from vlduet.data.records import iter_labelled_parts as slices_of
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders, get_modality, make_slice
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.objectives.gak.api import compute_alignment_posterior, compute_sigma
from vlduet.objectives.sugar_targets import (
    Prefixes,
    compute_target_matrix,
    compute_triple_cosines,
    cosines_to_squared_distances,
)
from vlduet.recipes.registry import load_recipe
from vlduet.reports import pages
from vlduet.train import setup

THUMBNAIL = 64


@dataclass(frozen=True, slots=True)
class Alignment:
    """Two records, compared slice by slice."""

    first: str
    second: str
    """Their ids."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    """Every slice as a text: a sentence, or an image's name in brackets."""
    judge: str
    """What compared them."""
    cosines: list[list[float]]
    posterior: list[list[float]]
    """Probability that the alignment passes through a cell."""
    gak: float
    awm: float
    mean: float
    sigma: float


def split_into_slices(record: Record) -> Parts:
    """The slices of any kind of record: images and sentences, in reading order."""
    if record.kind == "interleaved":
        return record.parts
    found: list[Part] = []
    for _, part in slices_of(record):
        found += [part] if isinstance(part, ImageRef) else split_sentences(part)
    return tuple(found)


def config_encoder_cosines(parts: Parts, settings: RunConfig) -> Tensor:
    """Cosines float[U, U] by the frozen encoders and the switches of a config whose recipe is sugar.

    Raises:
        ConfigError, ModelError, DataError: as training with it does.
    """
    recipe = load_recipe(settings)
    encoders = setup.load_encoders(settings, recipe, own=None, cache=settings.data.cache or None)
    return encoder_cosines(parts, encoders)


def encoder_cosines(parts: Parts, encoders: FrozenEncoders) -> Tensor:
    """Cosines float[U, U] by the triple kernel, or by `cross` alone where there is no `vision`. Raises as `look` does."""
    slices = encoders.encode_slices([make_slice(part) for part in parts])
    image = torch.tensor([get_modality(part) == "image" for part in parts])
    cross = torch.stack([one.features["cross"] for one in slices])
    if "vision" not in encoders.by_role:
        return compute_triple_cosines(cross, cross, is_image=image, use_triple_kernel=False)
    own = [
        one.features["vision" if on else "text"]
        for one, on in zip(slices, image.tolist(), strict=True)
    ]
    return compute_triple_cosines(
        torch.nn.utils.rnn.pad_sequence(own, batch_first=True), cross, is_image=image
    )


def model_cosines(parts: Parts, model: DuetModel | DualEncoder) -> Tensor:
    """Cosines float[U, U] of a model's own embeddings, each slice embedded alone."""
    vectors = torch.from_numpy(model.encode(parts))
    return (vectors @ vectors.T).clamp(-1.0, 1.0)


def align_records(
    first: Record, second: Record, *, cosines: Tensor, judge: str, delta: float
) -> Alignment:
    """Compare two records.

    Args:
        cosines: float[M + N, M + N] of the slices of both, one after the other.
        judge: what made them, in words.
        delta: width of the kernel.

    Raises:
        DataError: a record without a slice.
    """
    m, n = len(split_into_slices(first)), len(split_into_slices(second))
    for record, count in ((first, m), (second, n)):
        if not count:
            raise DataError(
                f"record '{record.id}' is an empty sequence",
                place=record.place,
                fix="Give it parts",
            )
    index = torch.zeros(2, max(m, n), dtype=torch.long)
    index[0, :m], index[1, :n] = torch.arange(m), m + torch.arange(n)
    lengths = torch.tensor([m, n])
    both = Prefixes(index, lengths, torch.arange(2))
    cosines = cosines.double()
    block = cosines[:m, m:]
    sigma = compute_sigma(lengths[:1].double(), lengths[1:].double(), delta)
    posterior = compute_alignment_posterior(
        cosines_to_squared_distances(block)[None], lengths[:1], lengths[1:], sigma=sigma
    )[0]
    score = {
        target: float(compute_target_matrix(cosines, both, target=target, delta=delta)[0, 1])
        for target in ("gak", "awm", "mean")
    }
    return Alignment(
        first=first.id,
        second=second.id,
        rows=tuple(map(_named, split_into_slices(first))),
        columns=tuple(map(_named, split_into_slices(second))),
        judge=judge,
        cosines=block.tolist(),
        posterior=posterior.tolist(),
        sigma=float(sigma),
        **score,
    )


def _named(part: Part) -> str:
    return f"[{part.name}]" if isinstance(part, ImageRef) else part


def as_json(found: Alignment) -> dict[str, Any]:
    """Everything, as plain values."""
    return asdict(found)


def as_text(found: Alignment, *, width: int = 36) -> str:
    """A table for a terminal: cosines, with a star where the alignment passes likeliest in its row."""
    lines = [f"{found.first} (rows) and {found.second} (columns), by {found.judge}", ""]
    lines += [f"{c:>4}  {name}" for c, name in enumerate(found.columns, 1)]
    lines += ["", " " * (width + 5) + "".join(f"{c:>7}" for c in range(1, len(found.columns) + 1))]
    for r, (name, cosines, passes) in enumerate(
        zip(found.rows, found.cosines, found.posterior, strict=True), 1
    ):
        short = name if len(name) <= width else name[: width - 1] + "…"
        cells = "".join(
            f"{v:>6.2f}{'*' if p == max(passes) else ' '}"
            for v, p in zip(cosines, passes, strict=True)
        )
        lines.append(f"{r:>4} {short:<{width}}{cells}")
    lines += ["", f"alignment kernel {found.gak:.3f} (normalised, sigma {found.sigma:.2f})"]
    lines += [
        f"alignment-weighted mean {found.awm:.3f}, mean {found.mean:.3f}; * likeliest in its row"
    ]
    return "\n".join(lines)


def picture(found: Alignment, first: Record, second: Record) -> pages.Alignment:
    """What a page shows of it: thumbnails and sentences on both axes, cosines as shades, the path as outlines."""

    def labels(record: Record) -> tuple[str, ...]:
        return tuple(
            images.encode_thumbnail_data_url(images.load_image(part), THUMBNAIL)
            if isinstance(part, ImageRef)
            else part
            for part in split_into_slices(record)
        )

    return pages.Alignment(
        rows=labels(first),
        columns=labels(second),
        similarity=tuple(map(tuple, found.cosines)),
        # A wide kernel spreads the path over many cells; beside the likeliest of its row one still sees it.
        path=tuple(tuple(p / max(row) for p in row) for row in found.posterior),
        gak=found.gak,
        awm=found.awm,
        mean=found.mean,
        sigma=found.sigma,
    )


def write_html(path: Path, found: Alignment, *, first: Record, second: Record) -> None:
    """A page that needs no other file."""
    pages.write_page(path, "align.html", {"found": found, "drawn": picture(found, first, second)})
