"""A dual encoder in the manner of CLIP (arXiv 2103.00020), from scratch over two frozen encoders: see encoders/dual.py.

    image -> vision encoder -> tower -> a        text -> text encoder -> tower -> b        L_c = symmetric InfoNCE(a, b)

It is the baseline that only retrieves, and the `cross` encoder of Sugar where there is no CLIP for the data at hand. It
learns of pairs, and of images in documents with the text that follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlduet.config import RunConfig
from vlduet.data.content_keys import content_key
from vlduet.data.records import ImageRef, Part
from vlduet.data.sequences import IGNORE_INDEX, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders, make_slice
from vlduet.errors import DataError
from vlduet.model.backbone import select_device
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.recipes.contrast import compute_contrastive_loss
from vlduet.recipes.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """What a config may set beside `recipe.name`."""

    temperature_floor: float = 0.01
    """Lowest temperature of the contrastive loss."""


def select_encoder_roles(options: ClipOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Roles of the frozen encoders below the towers."""
    return ("vision", "text")


def build_model(config: RunConfig, encoders: FrozenEncoders) -> DualEncoder:
    """What is trained: new towers of width `model.dim`."""
    torch.manual_seed(config.seed)
    return DualEncoder(encoders, dim=config.model.dim).to(select_device())


def layout(sample: Sample, renderer: Renderer, options: ClipOptions) -> list[Sequence]:
    """An image and a text of the record, each a sequence of one anchor. Raises DataError where there is no such two."""
    record, draw = sample.record, sample.rng()
    found: list[tuple[ImageRef, str]] = [
        (record.image, text) for text in record.short if record.image is not None
    ]
    if not found and record.image is not None and record.long is not None:
        found = [(record.image, record.long)]
    for part, following in zip(record.parts, record.parts[1:], strict=False):
        if isinstance(part, ImageRef) and isinstance(following, str):
            found.append((part, following))
    if not found:
        raise DataError(
            "no image with a text of its own", fix="Train a dual encoder on pairs or documents"
        )
    image, text = draw.choice(found)
    wrong = [
        _sequence(parts[0], "negative", sample.record_name)
        for parts in record.negative
        if len(parts) == 1
    ]
    return [
        _sequence(image, "image", sample.record_name),
        _sequence(text, "text", sample.record_name),
        *wrong,
    ]


def _sequence(part: Part, role: str, record: str) -> Sequence:
    """One token that nobody reads, under an anchor."""
    return Sequence(
        (0,),
        (IGNORE_INDEX,),
        (Anchor(0, 1, role, record, content_key((part,)), (make_slice(part),)),),
    )


def objective(readout: Readout, logit_scale: Tensor, options: ClipOptions) -> dict[str, Tensor]:
    """Symmetric InfoNCE over the global batch."""
    return {
        "contrastive": compute_contrastive_loss(
            readout, logit_scale, min_temperature=options.temperature_floor
        )
    }


RECIPE = Recipe(
    name="clip",
    options=ClipOptions,
    objectives=("contrastive",),
    layout=layout,
    objective=objective,
    encoder_roles=select_encoder_roles,
    build_model=build_model,
)
