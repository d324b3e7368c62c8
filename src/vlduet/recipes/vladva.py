"""VladVA: contrastive loss on short captions, next-token loss on long ones, from one image pass (arXiv 2412.04378).

    image sequence   [image prompt with the image] ^summary | long caption </s>        labels on the caption
    text sequence    [text prompt with the short caption] ^summary

    L = L_c(short) + L_CE(long)

L_c is the symmetric InfoNCE between the readings at ^summary of both sequences, both directions summed, with a learnable
temperature. L_CE is the mean over supervised tokens of the global batch. An image with both captions goes through the model
once. Records with one kind of caption take part in one loss; chats take part in L_CE, retrieval records in L_c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from vlduet import distributed
from vlduet.data.records import Record
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.objectives.language import language_loss
from vlduet.recipes.contrast import (
    compute_contrastive_loss,
    layout_embedding,
    layout_hard_negatives,
    layout_retrieval_record,
)
from vlduet.recipes.frozen import GUIDE_ROLES, GuideKind, with_slices
from vlduet.recipes.recipe import Recipe


@dataclass(frozen=True, slots=True)
class VladvaOptions:
    """What a config may set beside `recipe.name`."""

    split: Literal["fields", "length"] = "fields"
    """Which captions are short and which are long: as the record's fields say, or (the paper) as their tokens count:
    below `short_below`, and from there to `long_up_to`; longer ones are left out."""
    short_below: int = 30
    long_up_to: int = 500
    language_on: Literal["long", "any"] = "long"
    """Captions that carry the next-token loss: `long` (the paper), or `any`: the short one where there is no long one."""
    temperature_floor: float = 0.01
    """Lowest temperature of the contrastive loss."""
    guide: GuideKind = "none"
    """Ours: frozen encoders leave out of L_c the negatives that they find as alike as a pair; `cross` alone, or the
    `triple` kernel of Sugar."""


def select_encoder_roles(options: VladvaOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Roles of the frozen encoders that guide L_c."""
    return GUIDE_ROLES[options.guide] if weights.get("contrastive") else ()


def layout(sample: Sample, renderer: Renderer, options: VladvaOptions) -> list[Sequence]:
    """One record -> its sequences (the figure above). Raises DataError for a record that this method cannot use."""
    record = sample.record
    if record.kind == "chat":
        return [renderer.render_chat(record.messages, add_generation_prompt=False)]
    if record.kind == "retrieval":
        return layout_retrieval_record(sample, renderer, guide=options.guide)
    if record.kind == "interleaved":
        return _interleaved(record, renderer)
    assert record.image is not None
    shorts, longs = split_captions(record, renderer, options)
    if not shorts and not longs:
        raise DataError("an image without a caption", fix="`vlduet caption` writes what is missing")
    draw = sample.rng()
    short = draw.choice(shorts) if shorts else None
    long = draw.choice(longs) if longs else (short if options.language_on == "any" else None)
    if long is None:
        image = layout_embedding(
            sample, renderer, (record.image,), role="image", guide=options.guide
        )
    else:
        image = renderer.render_caption(record.image, long, record_name=sample.record_name)
        image = image if options.guide == "none" else with_slices(image, (record.image,))
    if (
        short is None
    ):  # nor is it anybody's negative: which short captions are true of it is not known
        return [replace(image, anchors=())]
    text = layout_embedding(sample, renderer, (short,), role="text", guide=options.guide)
    return [image, text, *layout_hard_negatives(sample, renderer, guide=options.guide)]


def split_captions(
    record: Record, renderer: Renderer, options: VladvaOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The short and the long captions of a pair. Raises DataError where `split: length` leaves none of those it has."""
    longs = (record.long,) if record.long else ()
    if options.split == "fields":
        return record.short, longs
    every = {
        text: len(renderer.tokenizer.encode(text, add_special_tokens=False))
        for text in (*record.short, *longs)
    }
    short = tuple(text for text, count in every.items() if count < options.short_below)
    long = tuple(
        text for text, count in every.items() if options.short_below <= count <= options.long_up_to
    )
    if every and not short and not long:
        what = f"its captions have {min(every.values())} tokens and more, recipe.long_up_to is {options.long_up_to}"
        raise DataError(what, fix="Cut them, or raise it")
    return short, long


def _interleaved(record: Record, renderer: Renderer) -> list[Sequence]:
    """A document has no pair to contrast; its text is learned as it stands."""
    builder = renderer.new_builder()
    for part in record.parts:
        if isinstance(part, str):
            builder.append_text(part + " ", supervised=True)
        else:
            builder.append_image(renderer.prepare_image(part))
    return [builder.build(renderer.max_tokens)]


def objective(readout: Readout, logit_scale: Tensor, options: VladvaOptions) -> dict[str, Tensor]:
    """The two losses of this process's share of the batch, by name (see `vlduet.distributed` for the scaling)."""
    count = distributed.all_reduce_sum(len(readout.nll))
    return {
        "contrastive": compute_contrastive_loss(
            readout, logit_scale, min_temperature=options.temperature_floor, guide=options.guide
        ),
        "language": language_loss(
            readout.nll, global_token_count=count, world_size=distributed.get_world_size()
        ),
    }


RECIPE = Recipe(
    name="vladva",
    options=VladvaOptions,
    objectives=("contrastive", "language"),
    layout=layout,
    objective=objective,
    encoder_roles=select_encoder_roles,
)
