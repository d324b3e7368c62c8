"""Dual encoder in the manner of CLIP (arXiv 2103.00020), trained over two frozen encoders.

    image -> vision encoder -> tower -> a
    text  -> text encoder   -> tower -> b                  L_c = symmetric InfoNCE of a and b

The frozen encoders and the towers are in `vlduet.encoders.dual`. It is the baseline that can only
retrieve, and the `cross` encoder of Sugar if there is no CLIP for the data. It learns from pairs,
and from images in documents with the text that follows each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlduet.config import RunConfig
from vlduet.data.content_keys import content_key
from vlduet.data.records import ImageRef, Part, Record
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
    """Keys of `recipe` in a config beside `name`."""

    temperature_floor: float = 0.01
    """Lowest temperature of L_c."""


def layout(sample: Sample, renderer: Renderer, options: ClipOptions) -> list[Sequence]:
    """Return an image of the record, a text that belongs to it, and the record's hard negatives.

    Each is a sequence of one anchor (role `image`, `text` or `negative`), whose slice has no
    features yet. The sample's own random generator draws one of the record's pairs: the image with
    each short caption (without any, with the long one), and in a document every image with the text
    right after it. Hard negatives of several parts are left out.

    Raises:
        DataError: no image with a text; ImageError: an unreadable image.
    """
    record = sample.record
    pairs = list_pairs(record)
    if not pairs:
        fix = "Train a dual encoder on pairs or documents"
        raise DataError("no image with a text of its own", fix=fix)
    image, text = sample.rng().choice(pairs)
    name = sample.record_name
    sequences = [_layout_part(image, "image", name), _layout_part(text, "text", name)]
    for parts in record.negative:
        if len(parts) == 1:
            sequences.append(_layout_part(parts[0], "negative", name))
    return sequences


def list_pairs(record: Record) -> list[tuple[ImageRef, str]]:
    """Return the images of a record that have a text, each with one; see `layout`."""
    pairs: list[tuple[ImageRef, str]] = []
    if record.image is not None:
        pairs = [(record.image, text) for text in record.short]
        if not pairs and record.long is not None:
            pairs = [(record.image, record.long)]
    for part, next_part in zip(record.parts, record.parts[1:], strict=False):
        if isinstance(part, ImageRef) and isinstance(next_part, str):
            pairs.append((part, next_part))
    return pairs


def find_losses(record: Record, options: ClipOptions) -> tuple[str, ...]:
    """Return ``contrastive`` if a record has an image with a text, else no loss."""
    return ("contrastive",) if list_pairs(record) else ()


def _layout_part(part: Part, role: str, record_name: str) -> Sequence:
    """Return a sequence of one token, which no model reads, with the part at its anchor."""
    anchor = Anchor(0, 1, role, record_name, content_key((part,)), (make_slice(part),))
    return Sequence((0,), (IGNORE_INDEX,), (anchor,))


def objective(readout: Readout, logit_scale: Tensor, options: ClipOptions) -> dict[str, Tensor]:
    """Return this rank's share of L_c, `contrastive`."""
    loss = compute_contrastive_loss(readout, logit_scale, min_temperature=options.temperature_floor)
    return {"contrastive": loss}


def select_encoder_roles(options: ClipOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the roles of the frozen encoders below the towers."""
    return ("vision", "text")


def build_model(config: RunConfig, encoders: FrozenEncoders) -> DualEncoder:
    """Return a dual encoder with new towers of width `model.dim`, on the default device.

    Seeds torch's global random generator with the seed of the config.
    """
    torch.manual_seed(config.seed)
    return DualEncoder(encoders, dim=config.model.dim).to(select_device())


RECIPE = Recipe(
    name="clip",
    options=ClipOptions,
    objectives=("contrastive",),
    layout=layout,
    objective=objective,
    find_losses=find_losses,
    requirements={"contrastive": "an image with a caption, or with a text right after it"},
    encoder_roles=select_encoder_roles,
    build_model=build_model,
)
