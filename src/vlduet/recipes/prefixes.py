"""Parts that recipes with the structure loss share: anchors of prefixes, and the loss of a readout.

    slices     image 1   sentence 1   sentence 2   image 2 ...
    anchors       ^           ^            ^          ^          of each, all slices up to its own

The loss is this rank's share of the loss of the global batch (see `vlduet.distributed`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

from torch import Tensor

from vlduet import distributed
from vlduet.data.records import ImageRef, Parts
from vlduet.data.sequences import Slice, join_content_keys
from vlduet.encoders.frozen import make_slice
from vlduet.errors import ConfigError
from vlduet.logs import logger
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.model.sequence_builder import SequenceBuilder
from vlduet.objectives.structure import StructureLossKind, structure_loss
from vlduet.objectives.sugar_targets import (
    SameSequenceRule,
    SingleSliceRule,
    TargetKind,
    compute_target_matrix,
    compute_target_std,
)
from vlduet.recipes.frozen import slice_cosines

MIN_TARGET_STD = 0.02
"""Standard deviation of the targets below which there is hardly anything to learn."""


@dataclass(frozen=True, slots=True)
class StructureOptions:
    """Options of the structure loss. Defaults are those of Sugar's paper where it gives them."""

    k: int = 4
    """Number of prefixes of a sequence that are embedded. Every kind of slice that the sequence has
    is among them, if k > 1 and as far as k allows."""
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


# ------------------------------------------------------------------ anchors


@dataclass(frozen=True, slots=True)
class DocumentWindow:
    """Contiguous parts of a document in a sequence under construction."""

    builder: SequenceBuilder
    parts: Parts
    """The parts that fit the token limit, at least one."""
    segments: list[int]
    """Segment of every part in the builder."""

    @property
    def kinds(self) -> list[str]:
        """`image` or `text` of every part."""
        return ["image" if isinstance(part, ImageRef) else "text" for part in self.parts]


def render_window(
    renderer: Renderer,
    parts: Parts,
    *,
    draw: random.Random | None = None,
    has_end_token: bool = True,
) -> DocumentWindow:
    """Render the parts of a document that fit the token limit, in the prompt for their kinds.

    Args:
        renderer: applies the model's prompts.
        parts: images and texts in order, at least one.
        draw: draws the first part if not all fit; None: the first of `parts`.
        has_end_token: see `Renderer.render_document`.

    Raises:
        DataError, ImageError, ConfigError: as `Renderer.render_document`.
    """
    builder, segments = renderer.render_document(parts, has_end_token=has_end_token)
    if draw is not None and len(segments) < len(parts):
        first = draw.randrange(len(parts) - len(segments) + 1)
        parts = parts[first:]
        builder, segments = renderer.render_document(parts, has_end_token=has_end_token)
    return DocumentWindow(builder, parts[: len(segments)], segments)


def draw_anchor_positions(kinds: Many[str], k: int, draw: random.Random) -> list[int]:
    """Draw min(k, n) indices of n slices, ascending.

    If k > 1 and the slices are of several kinds, at least one is drawn of each of the first k
    kinds, in alphabetical order.

    Args:
        kinds: kind of every slice, such as `image` and `text`.
        k: number of indices.
        draw: source of the draws, which advances.
    """
    drawn: list[int] = []
    names = sorted(set(kinds))
    if k > 1 and len(names) > 1:
        for name in names[:k]:
            drawn.append(draw.choice([i for i, kind in enumerate(kinds) if kind == name]))
    remaining = [i for i in range(len(kinds)) if i not in drawn]
    return sorted(drawn + draw.sample(remaining, min(k, len(kinds)) - len(drawn)))


def add_slice_anchors(
    window: DocumentWindow,
    positions: Many[int],
    *,
    image_role: str,
    text_role: str,
    image_pool: str,
    record_name: str,
) -> tuple[Slice, ...]:
    """Add an anchor with all slices up to its own at some parts of a document, and return all.

    Args:
        window: its builder gets the anchors.
        positions: indices of parts.
        image_role: role of an anchor at an image.
        text_role: role of an anchor at a text, which is read at its last token.
        image_pool: `mean` reads an anchor at an image at all its tokens, else the last is read.
        record_name: field of the anchors.

    Raises:
        ImageError: an image cannot be read.
    """
    slices = tuple(make_slice(part) for part in window.parts)
    for i in positions:
        is_image = isinstance(window.parts[i], ImageRef)
        window.builder.add_anchor(
            window.segments[i],
            is_last=not is_image or image_pool != "mean",
            role=image_role if is_image else text_role,
            record_name=record_name,
            content_key=join_content_keys(slices[: i + 1]),
            slices=slices[: i + 1],
        )
    return slices


# ------------------------------------------------------------------ loss


def compute_structure_loss(
    readout: Readout, options: StructureOptions, *, roles: tuple[str, ...]
) -> Tensor:
    """Return this rank's share of L_d: its prefixes against those of all ranks. A collective call.

    Where no rank has the features that L_d compares, because it has no weight, it is 0 and costs
    nothing. Logs an INFO message, once per process, if the targets hardly differ.

    Args:
        readout: of this rank.
        options: targets and form of the loss.
        roles: roles of the anchors that are prefixes; all of them have slices.

    Raises:
        AssertionError: only some of this rank's slices have features.
    """
    embeddings, anchors = readout.select_roles(*roles)
    slices = [part for anchor in anchors for part in anchor.slices]
    num_with_features = sum(_has_features(part, triple=options.triple) for part in slices)
    assert num_with_features in (0, len(slices)), "only a part of the slices has features"
    if distributed.all_reduce_sum(num_with_features) == 0:
        return readout.embeddings.sum() * 0.0
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


def _has_features(part: Slice, *, triple: bool) -> bool:
    """Return whether a slice has the features that the kernel compares."""
    modality_role = "vision" if isinstance(part.part, ImageRef) else "text"
    return part.features.keys() >= ({modality_role, "cross"} if triple else {"cross"})


@functools.cache
def _log_once(message: str) -> None:
    """Log a message, unless this process has logged it before."""
    logger.info(message)


def select_structure_roles(
    options: StructureOptions, weights: Mapping[str, float]
) -> tuple[str, ...]:
    """Return the roles of the frozen encoders that L_d needs; none if it has no weight."""
    if not weights.get("structure"):
        return ()
    return ("vision", "text", "cross") if options.triple else ("cross",)
