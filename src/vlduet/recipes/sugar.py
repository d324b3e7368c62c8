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

import functools
import random
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlduet import distributed
from vlduet.data.records import ImageRef, Parts, Record, split_sentences
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.encoders.frozen import make_slice
from vlduet.errors import ConfigError, DataError
from vlduet.logs import logger
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.objectives.structure import StructureLossKind, structure_loss
from vlduet.objectives.sugar_targets import (
    SameSequenceRule,
    SingleSliceRule,
    TargetKind,
    compute_target_matrix,
    compute_target_std,
)
from vlduet.recipes.contrast import compute_language_loss
from vlduet.recipes.frozen import slice_cosines
from vlduet.recipes.recipe import Recipe, has_answer, has_text

MIN_TARGET_STD = 0.02
"""Standard deviation of the targets below which there is hardly anything to learn."""


@dataclass(frozen=True, slots=True)
class SugarOptions:
    """Keys of `recipe` in a config beside `name`. Defaults are the paper's where it gives them."""

    k: int = 4
    """Number of prefixes of a sequence that are embedded. At least one ends with an image and one
    with a text, if the sequence has both and k > 1."""
    pool: Literal["mean", "last"] = "mean"
    """Tokens that make the embedding of an image: all, or the last one (ablation).
    `model.prompts.image_pool` must be the same."""
    pair_order: Literal["image", "either"] = "image"
    """First slice of a pair: the image, or either at random. A text alone is embedded only where it
    comes first."""
    target: TargetKind = "gak"
    """Target of two prefixes: alignment kernel; `mean` of all slice cosines (ablation); `awm`,
    alignment-weighted mean (ours)."""
    triple: bool = True
    """Triple kernel: compare two images by `vision`, two texts by `text`, mixed slices by `cross`.
    False: all by `cross` (ablation)."""
    delta: float = 1.0
    """Width of the alignment kernel."""
    single: SingleSliceRule = "cosine"
    """Target of two prefixes of one slice each: their cosine, or the kernel."""
    same_sequence: SameSequenceRule = "all"
    """Target in one sequence: 1, or, with `nested` (ours), the share that both prefixes have in
    common."""
    calibrate: bool = False
    """Ours: bring the cosines of the three encoders to one scale by the unrelated pairs of the
    batch."""
    loss: StructureLossKind = "mse"
    """L_d: squared differences, or, with `kl` (ours), the divergence of the softmaxes of rows."""
    temperature: float = 0.1
    """Temperature of `loss: kl`."""
    n_ref: int | None = None
    """With `loss: mse`, take mean * n_ref instead of the paper's sum / n, so that alpha means the
    same for every batch size."""

    def __post_init__(self) -> None:
        """Raise ConfigError for k or n_ref below 1, and delta or temperature not above 0."""
        for name, count in (("k", self.k), ("n_ref", self.n_ref)):
            if count is not None and count < 1:
                raise ConfigError(f"{count}", place=f"recipe.{name}", fix="Use 1 or more")
        for name, number in (("delta", self.delta), ("temperature", self.temperature)):
            if not number > 0:
                raise ConfigError(f"{number}", place=f"recipe.{name}", fix="Use a number above 0")


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
    parts = select_slices(record, draw, options)
    builder, segments = renderer.render_document(parts)
    if record.kind == "interleaved" and len(segments) < len(parts):
        first = draw.randrange(len(parts) - len(segments) + 1)
        parts = parts[first:]
        builder, segments = renderer.render_document(parts)
    slices = tuple(make_slice(part) for part in parts[: len(segments)])
    is_image = [isinstance(part, ImageRef) for part in parts[: len(segments)]]
    for i in draw_anchor_positions(is_image, options.k, draw):
        prefix = slices[: i + 1]
        builder.add_anchor(
            segments[i],
            is_last=not is_image[i] or options.pool == "last",
            role="image" if is_image[i] else "text",
            record_name=sample.record_name,
            content_key="|".join(part.content_key for part in prefix),
            slices=prefix,
        )
    return [builder.build(renderer.max_tokens)]


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


def draw_anchor_positions(is_image: Many[bool], k: int, draw: random.Random) -> list[int]:
    """Draw min(k, n) indices of n slices, ascending.

    If k > 1 and there are images and texts, at least one of each is drawn.
    """
    drawn: list[int] = []
    images = [i for i, flag in enumerate(is_image) if flag]
    texts = [i for i, flag in enumerate(is_image) if not flag]
    if k > 1 and images and texts:
        drawn = [draw.choice(images), draw.choice(texts)]
    remaining = [i for i in range(len(is_image)) if i not in drawn]
    return sorted(drawn + draw.sample(remaining, min(k, len(is_image)) - len(drawn)))


# ------------------------------------------------------------------ losses


def objective(readout: Readout, logit_scale: Tensor, options: SugarOptions) -> dict[str, Tensor]:
    """Return this rank's shares of L_d, `structure`, and L_g, `language`."""
    return {
        "structure": compute_structure_loss(readout, options),
        "language": compute_language_loss(readout),
    }


def compute_structure_loss(readout: Readout, options: SugarOptions) -> Tensor:
    """Return this rank's share of L_d: its prefixes against those of all ranks. A collective call.

    Prefixes are the anchors with slices. Where no rank has features, because alpha is 0, it is 0
    and costs nothing. Logs an INFO message, once per process, if the targets hardly differ.

    Raises:
        AssertionError: only some of this rank's slices have features.
    """
    anchors = [anchor for anchor in readout.anchors if anchor.slices]
    slices = [part for anchor in anchors for part in anchor.slices]
    num_with_features = sum(bool(part.features) for part in slices)
    assert num_with_features in (0, len(slices)), "only a part of the slices has features"
    if distributed.all_reduce_sum(num_with_features) == 0:
        return readout.embeddings.sum() * 0.0
    embeddings, _ = readout.select_roles("image", "text")
    all_embeddings, first_row = distributed.all_gather_rows(embeddings)
    rows = slice(first_row, first_row + len(embeddings))
    cosines, prefixes = slice_cosines(
        anchors,
        use_triple_kernel=options.triple,
        calibrate=options.calibrate,
        like=embeddings.detach(),
    )
    target = compute_target_matrix(
        cosines,
        prefixes,
        rows=rows,
        target=options.target,
        same_sequence=options.same_sequence,
        single=options.single,
        delta=options.delta,
    )
    if compute_target_std(target, prefixes, rows=rows) < MIN_TARGET_STD:
        difference = f"the targets of a batch differ by less than {MIN_TARGET_STD}"
        _log_once(f"structure: {difference}: nothing to learn")
    return structure_loss(
        embeddings,
        target,
        all_embeddings=all_embeddings,
        first_row=first_row,
        kind=options.loss,
        temperature=options.temperature,
        n_ref=options.n_ref,
        world_size=distributed.get_world_size(),
    )


@functools.cache
def _log_once(message: str) -> None:
    """Log a message, unless this process has logged it before."""
    logger.info(message)


def select_encoder_roles(options: SugarOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the roles of the frozen encoders that L_d needs; none if it has no weight."""
    if not weights.get("structure"):
        return ()
    return ("vision", "text", "cross") if options.triple else ("cross",)


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
    encoder_roles=select_encoder_roles,
)
