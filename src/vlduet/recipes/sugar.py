"""Sugar: generation and discrimination from one pass over interleaved slices (arXiv 2411.00304).

    sequence   [image 1] a sentence . [image 2] another one . ...                  a slice is an image or a sentence
                   ^r1            ^r2      ^r3             ^r4                     labels on all texts
    r_i = head(d_i)      d_i: mean of the image's tokens, or the text's last token; the trunk is causal, so r_i stands for
                         the prefix of the sequence that ends with slice i
    m^r_ij = cos(r_i, r_j)         of k prefixes of every sequence in the batch, drawn at random
    m^l_ij = 1 in one sequence, else how well frozen encoders align the two prefixes (vlduet.objectives.sugar_targets)

    L = L_g + alpha * L_d          L_g: next-token loss of the texts        L_d = (1/n) sum_ij (m^r_ij - m^l_ij)^2

alpha is the weight of the objective `structure`. A pair is a sequence of two slices, a retrieval record one of its query and
a positive; chats take part in L_g only.
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
from vlduet.objectives.language import language_loss
from vlduet.objectives.structure import StructureLossKind, structure_loss
from vlduet.objectives.sugar_targets import (
    SameSequenceRule,
    SingleSliceRule,
    TargetKind,
    compute_target_matrix,
    compute_target_std,
)
from vlduet.recipes.frozen import slice_cosines
from vlduet.recipes.recipe import Recipe

MIN_TARGET_STD = 0.02
"""Standard deviation of the targets below which there is hardly anything to learn."""


@dataclass(frozen=True, slots=True)
class SugarOptions:
    """What a config may set beside `recipe.name`; the paper's form is the default wherever it gives one."""

    k: int = 4
    """Prefixes of a sequence that are embedded, at least one ending with an image and one with a text."""
    pool: Literal["mean", "last"] = "mean"
    """Tokens of an image that make its embedding: all, or the last (ablation). The model's prompts must say the same."""
    pair_order: Literal["image", "either"] = "image"
    """What comes first in a pair: the image, or drawn anew each time. A text alone is embedded only where it is first."""
    target: TargetKind = "gak"
    """Alignment kernel of two prefixes; `mean` of all slice cosines (ablation); `awm`, alignment-weighted mean (ours)."""
    triple: bool = True
    """Compare two images by `vision`, two texts by `text`, and mixed slices by `cross`; false: all by `cross`."""
    delta: float = 1.0
    """Width of the alignment kernel."""
    single: SingleSliceRule = "cosine"
    """Two prefixes of one slice each: their cosine, or the kernel."""
    same_sequence: SameSequenceRule = "all"
    """Targets inside a sequence: 1 for `all`, or (ours) the share that two prefixes have in common, `nested`."""
    calibrate: bool = False
    """Ours: bring the three encoders' cosines to one scale, by the unrelated pairs of the batch."""
    loss: StructureLossKind = "mse"
    """Squared differences, or (ours) the divergence of the rows' softmaxes, `kl`, at `temperature`."""
    temperature: float = 0.1
    n_ref: int | None = None
    """mse: mean * n_ref instead of the paper's sum / n, so that alpha means the same for every batch size."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("n_ref", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{value}", place=f"recipe.{name}", fix=f"Use {least} or more")
        for name in ("delta", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{getattr(self, name)}", place=f"recipe.{name}", fix="Use a number above 0"
                )


def select_encoder_roles(options: SugarOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Roles of the frozen encoders that these losses ask; none where `structure` has no weight."""
    if not weights.get("structure"):
        return ()
    return ("vision", "text", "cross") if options.triple else ("cross",)


# ------------------------------------------------------------------ layout


def layout(sample: Sample, renderer: Renderer, options: SugarOptions) -> list[Sequence]:
    """One record -> its sequence (the figure above). Raises DataError for a record that this method cannot use."""
    record, draw = sample.record, sample.rng()
    if record.kind == "chat":
        return [renderer.render_chat(record.messages, add_generation_prompt=False)]
    if renderer.prompts.image_pool != options.pool:
        what = f"recipe.pool is {options.pool}, model.prompts.image_pool is {renderer.prompts.image_pool}"
        fix = "Set both alike: a model must be searched with the embeddings that it was trained for"
        raise ConfigError(what, place="recipe.pool", fix=fix)
    parts = select_slices(record, draw, options)
    builder, spans = renderer.render_document(parts)
    if record.kind == "interleaved" and len(spans) < len(parts):
        # Another window of a long document each time, or its end would never be seen.
        parts = parts[draw.randrange(len(parts) - len(spans) + 1) :]
        builder, spans = renderer.render_document(parts)
    slices = tuple(map(make_slice, parts[: len(spans)]))
    for i in draw_anchor_positions(
        [isinstance(part, ImageRef) for part in parts[: len(spans)]], options.k, draw
    ):
        image = isinstance(parts[i], ImageRef)
        start, end = spans[i]
        builder.add_anchor(
            (start, end) if image and options.pool == "mean" else (end - 1, end),
            role="image" if image else "text",
            record_name=sample.record_name,
            content_key="|".join(one.content_key for one in slices[: i + 1]),
            slices=slices[: i + 1],
        )
    return [builder.build(renderer.max_tokens)]


def select_slices(record: Record, draw: random.Random, options: SugarOptions) -> Parts:
    """The record's images and sentences in order: (image, short caption) of a pair, its long one where it has no short."""
    if record.kind == "interleaved":
        return record.parts
    if record.kind == "retrieval":
        return record.query + draw.choice(record.positive)
    if record.image is None:
        raise DataError(
            "an empty sequence", fix="Give the record parts, or an image with a caption"
        )
    texts = (
        (draw.choice(record.short),) if record.short else tuple(split_sentences(record.long or ""))
    )
    text_first = options.pair_order == "either" and bool(texts) and draw.random() < 0.5
    return (*texts, record.image) if text_first else (record.image, *texts)


def draw_anchor_positions(is_image: Many[bool], k: int, draw: random.Random) -> list[int]:
    """min(k, n) of n slices, rising; an image and a text are among them where there are both and k > 1."""
    chosen: list[int] = []
    kinds = [[i for i, image in enumerate(is_image) if image == kind] for kind in (True, False)]
    if k > 1 and all(kinds):
        chosen = [draw.choice(kind) for kind in kinds]
    rest = [i for i in range(len(is_image)) if i not in chosen]
    return sorted(chosen + draw.sample(rest, min(k, len(is_image)) - len(chosen)))


# ------------------------------------------------------------------ losses


def objective(readout: Readout, logit_scale: Tensor, options: SugarOptions) -> dict[str, Tensor]:
    """The two losses of this process's share of the batch, by name (see `vlduet.distributed` for the scaling)."""
    count = distributed.all_reduce_sum(len(readout.nll))
    return {
        "structure": compute_structure_loss(readout, options),
        "language": language_loss(
            readout.nll, global_token_count=count, world_size=distributed.get_world_size()
        ),
    }


def compute_structure_loss(readout: Readout, options: SugarOptions) -> Tensor:
    """L_d between this rank's prefixes and those of all. 0 at no cost where no encoder was asked: alpha is 0."""
    anchors = [anchor for anchor in readout.anchors if anchor.slices]
    seen = sum(bool(one.features) for anchor in anchors for one in anchor.slices)
    assert seen in (0, sum(len(anchor.slices) for anchor in anchors)), (
        "encoders have looked at a part of the slices"
    )
    if distributed.all_reduce_sum(seen) == 0:
        return readout.embeddings.sum() * 0.0
    rows = readout.select_roles("image", "text")[0]
    everything, begin = distributed.all_gather_rows(rows)
    mine = slice(begin, begin + len(rows))
    cosines, prefixes = slice_cosines(
        anchors, use_triple_kernel=options.triple, calibrate=options.calibrate, like=rows.detach()
    )
    target = compute_target_matrix(
        cosines,
        prefixes,
        rows=mine,
        target=options.target,
        same_sequence=options.same_sequence,
        single=options.single,
        delta=options.delta,
    )
    if compute_target_std(target, prefixes, rows=mine) < MIN_TARGET_STD:
        _warn_once(
            f"structure: the targets of a batch differ by less than {MIN_TARGET_STD}: nothing to learn"
        )
    return structure_loss(
        rows,
        everything,
        target=target,
        first_row=begin,
        kind=options.loss,
        temperature=options.temperature,
        n_ref=options.n_ref,
        world_size=distributed.get_world_size(),
    )


@functools.cache
def _warn_once(text: str) -> None:
    logger.info(text)


RECIPE = Recipe(
    name="sugar",
    options=SugarOptions,
    objectives=("structure", "language"),
    layout=layout,
    objective=objective,
    encoder_roles=select_encoder_roles,
)
