"""VladVA: contrastive and next-token loss from one image pass (arXiv 2412.04378).

    image sequence   [image prompt with the image] ^summary | long caption </s>   labels: caption
    text sequence    [text prompt with the short caption] ^summary

    L = L_c(short captions) + L_CE(long captions)

L_c is the symmetric InfoNCE, both directions summed, of the embeddings at ^summary of the two
sequences, with a learnable temperature. L_CE is the mean over the supervised tokens of the global
batch. An image with both captions goes through the model once. A record with one kind of caption
takes part in one loss; chats take part in L_CE, retrieval records in L_c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from vlduet.data.records import Record
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.recipes.contrast import (
    compute_contrastive_loss,
    compute_language_loss,
    layout_embedding,
    layout_hard_negatives,
    layout_retrieval_record,
)
from vlduet.recipes.frozen import GUIDE_ROLES, GuideKind, with_slices
from vlduet.recipes.recipe import Recipe, has_answer, has_text


@dataclass(frozen=True, slots=True)
class VladvaOptions:
    """Keys of `recipe` in a config beside `name`."""

    split: Literal["fields", "length"] = "fields"
    """Criterion for short and long captions: the fields `short` and `long` of a record, or (the
    paper) the number of tokens."""
    short_below: int = 30
    """With `split: length`, a caption with fewer tokens is short."""
    long_up_to: int = 500
    """With `split: length`, a caption with more tokens is not used."""
    contrastive_on: Literal["short", "long"] = "short"
    """Captions of L_c: the short ones (the paper), or the long one (its control)."""
    language_on: Literal["long", "any", "short"] = "long"
    """Captions of L_CE: the long one (the paper); with `any`, the short one if there is no long
    one; with `short` (a control of the paper), the short one alone."""
    temperature_floor: float = 0.01
    """Lowest temperature of L_c."""
    guide: GuideKind = "none"
    """Ours: frozen encoders remove negatives from L_c that they find as similar as a pair. `cross`:
    one encoder; `triple`: the triple kernel of Sugar."""


# ------------------------------------------------------------------ layout


def layout(sample: Sample, renderer: Renderer, options: VladvaOptions) -> list[Sequence]:
    """Return the sequences of a record.

    A pair: its image with an anchor, then the supervised caption as labels (the long one, or see
    `language_on`); a short caption (or see `contrastive_on`) with an anchor; one per hard negative.
    The sample's own random generator draws one short and one long caption of several, so that both
    losses of one length have the same one. A pair without a caption for L_c: the image sequence
    alone, without its anchor, since the captions of other records may be true of its image; []
    without one for L_CE, too. A retrieval record: see `layout_retrieval_record`. A chat or
    document: one sequence without anchors, with labels on its answers or on all texts.

    Raises:
        DataError: a pair without a usable caption, or content that cannot be rendered.
        ImageError: an unreadable image.
        ConfigError: the prompts or a chat need a chat template, and the checkpoint has none.
    """
    record = sample.record
    if record.kind == "chat":
        return [renderer.render_chat(record.messages, add_generation_prompt=False)]
    if record.kind == "retrieval":
        return layout_retrieval_record(sample, renderer, guide=options.guide)
    if record.kind == "interleaved":
        return [_layout_document(record, renderer)]
    assert record.image is not None
    short_captions, long_captions = split_captions(record, renderer, options)
    if not short_captions and not long_captions:
        raise DataError("an image without a caption", fix="`vlduet caption` writes what is missing")
    draw = sample.rng()
    short = draw.choice(short_captions) if short_captions else None
    long = draw.choice(long_captions) if long_captions else None
    contrasted = short if options.contrastive_on == "short" else long
    supervised = short if options.language_on == "short" else long
    if supervised is None and options.language_on == "any":
        supervised = short
    guide = options.guide
    if contrasted is None and supervised is None:
        return []
    if supervised is None:
        image = layout_embedding(sample, renderer, (record.image,), role="image", guide=guide)
    else:
        image = renderer.render_caption(record.image, supervised, record_name=sample.record_name)
        if guide != "none":
            image = with_slices(image, (record.image,))
    if contrasted is None:
        return [replace(image, anchors=())]
    text = layout_embedding(sample, renderer, (contrasted,), role="text", guide=guide)
    return [image, text, *layout_hard_negatives(sample, renderer, guide=guide)]


def split_captions(
    record: Record, renderer: Renderer, options: VladvaOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the short and the long captions of a pair, as `options.split` says.

    With `fields`, they are `record.short` and `record.long`. With `length`, short ones have fewer
    tokens than `short_below` and long ones up to `long_up_to`; longer ones are dropped, and equal
    texts count once. Either result may be empty.

    Raises:
        DataError: `split: length`, and all captions of the record are too long.
    """
    long_field = (record.long,) if record.long else ()
    if options.split == "fields":
        return record.short, long_field
    num_tokens = {}
    for text in (*record.short, *long_field):
        num_tokens[text] = len(renderer.tokenizer.encode(text, add_special_tokens=False))
    low = options.short_below
    high = options.long_up_to
    short = tuple(text for text, count in num_tokens.items() if count < low)
    long = tuple(text for text, count in num_tokens.items() if low <= count <= high)
    if num_tokens and not short and not long:
        shortest = min(num_tokens.values())
        message = f"its captions have {shortest} tokens and more, recipe.long_up_to is {high}"
        raise DataError(message, fix="Cut the captions, or raise recipe.long_up_to")
    return short, long


def find_losses(record: Record, options: VladvaOptions) -> tuple[str, ...]:
    """Return the names of the losses that a record may have something for, see `layout`.

    With `split: length`, where tokens decide, a pair with any caption may have something for all.
    """
    if record.kind == "chat":
        return ("language",) if has_answer(record) else ()
    if record.kind == "retrieval":
        return ("contrastive",)
    if record.kind == "interleaved":
        return ("language",) if has_text(record.parts) else ()
    has_short, has_long = bool(record.short), bool(record.long)
    if options.split == "length":
        has_short = has_long = has_short or has_long
    is_contrasted = has_short if options.contrastive_on == "short" else has_long
    has_caption = {"short": has_short, "long": has_long, "any": has_short or has_long}
    return ("contrastive",) * is_contrasted + ("language",) * has_caption[options.language_on]


def _layout_document(record: Record, renderer: Renderer) -> Sequence:
    """Return an interleaved record as one sequence, labels on all texts, without anchors.

    There is no prompt. Parts beyond the token limit are left out (`Renderer.render_document`).
    Raises DataError if the first part alone exceeds it, and ImageError for an unreadable image.
    """
    builder, _ = renderer.render_document(record.parts, has_prompt=False)
    return builder.build(renderer.max_tokens)


# ------------------------------------------------------------------ losses


def objective(readout: Readout, logit_scale: Tensor, options: VladvaOptions) -> dict[str, Tensor]:
    """Return this rank's shares of L_c, `contrastive`, and L_CE, `language`."""
    return {
        "contrastive": compute_contrastive_loss(
            readout, logit_scale, min_temperature=options.temperature_floor, guide=options.guide
        ),
        "language": compute_language_loss(readout),
    }


def select_encoder_roles(options: VladvaOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the roles of the frozen encoders that guide L_c; none if L_c has no weight."""
    return GUIDE_ROLES[options.guide] if weights.get("contrastive") else ()


RECIPE = Recipe(
    name="vladva",
    options=VladvaOptions,
    objectives=("contrastive", "language"),
    layout=layout,
    objective=objective,
    find_losses=find_losses,
    requirements={
        "contrastive": "an image with a short caption (a long one with "
        "recipe.contrastive_on=long), or a query with a positive",
        "language": "an image with a long caption (also a short one with recipe.language_on=any, "
        "only a short one with short), a chat or a document",
    },
    encoder_roles=select_encoder_roles,
)
