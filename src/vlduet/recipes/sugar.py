"""Sugar: generation and discrimination from one pass over interleaved slices (arXiv 2411.00304).

    sequence   [image 1] a sentence. [image 2] another one. ...          labels on all texts
                      ^r1         ^r2       ^r3          ^r4             a slice: image or sentence
    r_i = head(d_i)             d_i: mean over the image's tokens, or the text's last token.
                                Attention is causal: r_i stands for the prefix that ends at slice i
    m^r_ij = cos(r_i, r_j)      of k prefixes of every sequence of the batch, drawn at random
    m^l_ij = 1                  in one sequence; else how well frozen encoders align the prefixes
                                (vlduet.objectives.sugar_targets)

    L   = L_g + alpha * L_d     L_g: next-token loss of the texts
    L_d = (1/n) sum_ij (m^r_ij - m^l_ij)^2

alpha is the weight of the loss `structure`. A pair is a sequence of two slices, a retrieval record
one of its query and a positive. Chats take part in L_g only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlduet.data.records import Parts, Record, split_sentences
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.errors import ConfigError, DataError
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.recipes.contrast import compute_language_loss
from vlduet.recipes.prefixes import (
    StructureOptions,
    add_slice_anchors,
    compute_structure_loss,
    draw_anchor_positions,
    render_window,
    select_structure_roles,
)
from vlduet.recipes.recipe import Recipe, has_answer, has_text

PREFIX_ROLES = ("image", "text")
"""Roles of the anchors that are compared: of prefixes that end with an image, and with a text."""


@dataclass(frozen=True, slots=True)
class SugarOptions(StructureOptions):
    """Keys of `recipe` in a config beside `name`. Defaults are the paper's where it gives them."""

    pool: Literal["mean", "last"] = "mean"
    """Tokens that make the embedding of an image: all, or the last one (ablation).
    `model.prompts.image_pool` must be the same."""
    pair_order: Literal["image", "either"] = "image"
    """First slice of a pair: the image, or either at random. A text alone is embedded only where it
    comes first."""


# ------------------------------------------------------------------ layout


def layout(sample: Sample, renderer: Renderer, options: SugarOptions) -> list[Sequence]:
    """Return the one sequence of a record: its slices in order, with labels on all texts.

    The sample's own random generator draws the slices (see `select_slices`) and min(k, slices)
    anchors, each with role `image` or `text` and all slices up to its own. Slices beyond the
    model's token limit are left out; of a long document, a random window is used. A chat has labels
    on its answers and no anchor.

    Raises:
        DataError: a record without an image or text, or an image beyond the token limit.
        ImageError: an unreadable image.
        ConfigError: `recipe.pool` differs from the prompts of the model, or there is no chat
            template for a chat or the prompts.
    """
    record = sample.record
    draw = sample.rng()
    if record.kind == "chat":
        return [renderer.render_chat(record.messages, add_generation_prompt=False)]
    image_pool = renderer.prompts.image_pool
    if image_pool != options.pool:
        message = f"recipe.pool is {options.pool}, model.prompts.image_pool is {image_pool}"
        fix = "Set both alike: a model must be searched with the embeddings that it was trained for"
        raise ConfigError(message, place="recipe.pool", fix=fix)
    window = render_window(
        renderer,
        select_slices(record, draw, options),
        draw=draw if record.kind == "interleaved" else None,
    )
    image_role, text_role = PREFIX_ROLES
    add_slice_anchors(
        window,
        draw_anchor_positions(window.kinds, options.k, draw),
        image_role=image_role,
        text_role=text_role,
        image_pool=options.pool,
        record_name=sample.record_name,
    )
    return [window.builder.build(renderer.max_tokens)]


def select_slices(record: Record, draw: random.Random, options: SugarOptions) -> Parts:
    """Return images and sentences of a record, in order.

    An interleaved record gives all parts, a retrieval record its query and one positive, drawn at
    random. A pair gives its image and one short caption, drawn at random; without a short caption,
    the sentences of its long one, if any. With `pair_order: either`, these texts come before the
    image in half of the cases.

    Raises:
        DataError: the record is neither interleaved nor for retrieval, and has no image.
    """
    if record.kind == "interleaved":
        return record.parts
    if record.kind == "retrieval":
        return record.query + draw.choice(record.positive)
    if record.image is None:
        fix = "Give the record parts, or an image with a caption"
        raise DataError("an empty sequence", fix=fix)
    if record.short:
        texts: Parts = (draw.choice(record.short),)
    else:
        texts = tuple(split_sentences(record.long or ""))
    if options.pair_order == "either" and texts and draw.random() < 0.5:
        return (*texts, record.image)
    return (record.image, *texts)


def find_losses(record: Record, options: SugarOptions) -> tuple[str, ...]:
    """Return the names of the losses that a record may have something for, see `layout`."""
    if record.kind == "chat":
        return ("language",) if has_answer(record) else ()
    texts = (*record.parts, *record.query, *record.short, *filter(None, (record.long,)))
    texts += tuple(part for parts in record.positive for part in parts)
    if not texts and record.image is None:
        return ()
    return ("structure", "language") if has_text(texts) else ("structure",)


# ------------------------------------------------------------------ losses


def objective(readout: Readout, logit_scale: Tensor, options: SugarOptions) -> dict[str, Tensor]:
    """Return this rank's shares of L_d, `structure`, and L_g, `language`."""
    return {
        "structure": compute_structure_loss(readout, options, roles=PREFIX_ROLES),
        "language": compute_language_loss(readout),
    }


RECIPE = Recipe(
    name="sugar",
    options=SugarOptions,
    objectives=("structure", "language"),
    layout=layout,
    objective=objective,
    find_losses=find_losses,
    requirements={
        "structure": "images and texts in reading order, an image with a caption, or a query with "
        "a positive",
        "language": "a document with texts, an image with a caption, or a chat",
    },
    encoder_roles=select_structure_roles,
)
