"""Duet: VladVA's losses of pairs and Sugar's of documents and chats, from one forward pass.

    pair       as VladVA: [image prompt] ^query | caption </s>     and     [text prompt] ^target
    document   as Sugar:  [image 1] a sentence. [image 2] ...      labels on all texts
                                  ^r1         ^r2       ^r3
    chat       <user> [image] What is it? <assistant> A red circle. It is small. </s>
                            ^r1         ^r2                      ^r3           ^r4

    L   = L_c + L_g + alpha * L_d
    L_c   symmetric InfoNCE of short captions and their images, and of retrieval records
    L_g   next-token loss: long captions (short ones where there is no long one), answers, documents
    L_d   structure loss of the prefixes r of documents and chats (vlduet.recipes.prefixes)

alpha is the weight of the loss `structure`. The anchors of L_c and of L_d have different roles, and
are never compared. Prefixes of chats end at images, at the texts of users, and at sentences *inside
answers*: a model that answers can be read at the end of every sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlduet.data.records import ImageRef, Record, find_sentences
from vlduet.data.sequences import Sequence, Slice, join_content_keys
from vlduet.data.stream import Sample
from vlduet.encoders.frozen import make_slice
from vlduet.model.embedding_layout import find_prompt_texts
from vlduet.model.pooling import Readout
from vlduet.model.prompts import ChatPart, Renderer
from vlduet.recipes import vladva
from vlduet.recipes.contrast import compute_contrastive_loss, compute_language_loss
from vlduet.recipes.frozen import GUIDE_ROLES, GuideKind
from vlduet.recipes.prefixes import (
    StructureOptions,
    add_slice_anchors,
    compute_structure_loss,
    draw_anchor_positions,
    render_window,
    select_structure_roles,
)
from vlduet.recipes.recipe import Recipe, has_answer, has_text

PREFIX_ROLE = "prefix"
"""Role of the anchors of the structure loss; the contrastive loss has none of this role."""


@dataclass(frozen=True, slots=True)
class DuetOptions(StructureOptions):
    """Keys of `recipe` in a config beside `name`."""

    calibrate: bool = True
    """Ours: bring the cosines of the three encoders to one scale by the unrelated pairs of the
    batch."""
    structure_on: Literal["all", "documents", "chats"] = "all"
    """Records of the structure loss."""
    split: Literal["fields", "length"] = "fields"
    """Criterion for short and long captions: the fields `short` and `long` of a record, or the
    number of tokens."""
    short_below: int = 30
    """With `split: length`, a caption with fewer tokens is short."""
    long_up_to: int = 500
    """With `split: length`, a caption with more tokens is not used."""
    temperature_floor: float = 0.01
    """Lowest temperature of the contrastive loss."""
    guide: GuideKind = "none"
    """Frozen encoders remove negatives from the contrastive loss that they find as similar as a
    pair: `cross`, one encoder, or `triple`, the triple kernel."""

    def pair_options(self) -> vladva.VladvaOptions:
        """Return the options by which VladVA lays out pairs and retrieval records."""
        return vladva.VladvaOptions(
            split=self.split,
            short_below=self.short_below,
            long_up_to=self.long_up_to,
            language_on="any",
            temperature_floor=self.temperature_floor,
            guide=self.guide,
        )

    def has_structure(self, record: Record) -> bool:
        """Return whether a record takes part in the structure loss."""
        if record.kind == "chat":
            return self.structure_on != "documents" and has_answer(record)
        return record.kind == "interleaved" and self.structure_on != "chats"


# ------------------------------------------------------------------ layout


def layout(sample: Sample, renderer: Renderer, options: DuetOptions) -> list[Sequence]:
    """Return the sequences of a record.

    A pair or retrieval record: see `vladva.layout`, with `language_on: any`. A document: see
    `layout_document`. A chat: see `layout_chat`.

    Raises:
        DataError: a pair without a usable caption, or content that cannot be rendered.
        ImageError: an unreadable image.
        ConfigError: the prompts or a chat need a chat template, and the checkpoint has none.
    """
    if sample.record.kind == "chat":
        return [layout_chat(sample, renderer, options)]
    if sample.record.kind == "interleaved":
        return [layout_document(sample, renderer, options)]
    return vladva.layout(sample, renderer, options.pair_options())


def layout_document(sample: Sample, renderer: Renderer, options: DuetOptions) -> Sequence:
    """Return a document in its prompt, with labels on all texts and min(k, parts) anchors.

    Parts beyond the token limit are left out; of a long document, a random window is used. The
    sample's own random generator draws the window and the parts whose ends are anchors. Where the
    prompt has text after the content, k - 1 parts are drawn, and the last anchor is at the prompt's
    end, where the whole content is embedded in a search. Raises as `layout`.
    """
    draw = sample.rng()
    parts = sample.record.parts
    _, closing, _ = find_prompt_texts(renderer, parts)
    # Before the end of a prompt, there is no end of text in a search either.
    window = render_window(renderer, parts, draw=draw, has_end_token=not closing)
    if options.has_structure(sample.record):
        has_closing = bool(window.builder.segments[-1].text)
        num_inside = options.k - has_closing
        positions = draw_anchor_positions(window.kinds, num_inside, draw) if num_inside else []
        slices = add_slice_anchors(
            window,
            positions,
            image_role=PREFIX_ROLE,
            text_role=PREFIX_ROLE,
            image_pool=renderer.prompts.image_pool,
            record_name=sample.record_name,
        )
        if has_closing:
            window.builder.add_anchor(
                len(window.builder.segments) - 1,
                is_last=True,
                role=PREFIX_ROLE,
                record_name=sample.record_name,
                content_key=join_content_keys(slices),
                slices=slices,
            )
    return window.builder.build(renderer.max_tokens)


def layout_chat(sample: Sample, renderer: Renderer, options: DuetOptions) -> Sequence:
    """Return a chat with labels on its answers, and anchors at k of its `ChatSlice`s.

    The sample's own random generator draws among images, ends of texts of a user, and sentences of
    answers that are learned (`split_chat`): one of each kind, as far as k allows.
    An anchor has all slices up to its own. If the chat is cut to the token limit, anchors at and
    after the cut are left out. Raises as `layout`.
    """
    builder, parts = renderer.render_chat_parts(sample.record.messages, add_generation_prompt=False)
    if options.has_structure(sample.record):
        chat_slices = split_chat(parts)
        slices = tuple(chat_slice.content for chat_slice in chat_slices)
        candidates = [i for i, chat_slice in enumerate(chat_slices) if chat_slice.is_candidate]
        kinds = [chat_slices[i].kind for i in candidates]
        for number in draw_anchor_positions(kinds, options.k, sample.rng()):
            i = candidates[number]
            is_image = chat_slices[i].kind == "image"
            builder.add_prefix_anchor(
                chat_slices[i].segment,
                role=PREFIX_ROLE,
                record_name=sample.record_name,
                slices=slices[: i + 1],
                text_end=chat_slices[i].text_end,
                is_mean=is_image and renderer.prompts.image_pool == "mean",
            )
    return builder.build(renderer.max_tokens)


@dataclass(frozen=True, slots=True)
class ChatSlice:
    """Image or sentence of a chat."""

    content: Slice
    kind: Literal["image", "question", "answer"]
    """`question` is a sentence of a user, `answer` of the assistant."""
    segment: int
    """Segment of its image or text in the builder."""
    text_end: int | None
    """Index in the text after the sentence; None for an image."""
    is_candidate: bool
    """An anchor may be at its end."""


def split_chat(parts: Many[ChatPart]) -> list[ChatSlice]:
    """Return the images and sentences of the parts of a chat, in order.

    System turns are left out: they are no content that two chats could have in common. Anchors may
    be at images, at the last sentence of a text of a user, and at all sentences of learned answers.

    Raises:
        ImageError: an image cannot be read.
    """
    slices = []
    for part in parts:
        if part.role == "system":
            continue
        if isinstance(part.part, ImageRef):
            content = make_slice(part.part)
            slices.append(ChatSlice(content, "image", part.segment, None, True))
            continue
        is_answer = part.role == "assistant"
        sentences = find_sentences(part.part)
        for start, end in sentences:
            slices.append(
                ChatSlice(
                    make_slice(part.part[start:end]),
                    "answer" if is_answer else "question",
                    part.segment,
                    text_end=end,
                    is_candidate=part.is_supervised if is_answer else end == sentences[-1][1],
                )
            )
    return slices


def find_losses(record: Record, options: DuetOptions) -> tuple[str, ...]:
    """Return the names of the losses that a record may have something for, see `layout`."""
    if record.kind == "chat":
        losses = ("language",) if has_answer(record) else ()
    elif record.kind == "interleaved":
        losses = ("language",) if has_text(record.parts) else ()
    else:
        return vladva.find_losses(record, options.pair_options())
    return ("structure", *losses) if options.has_structure(record) else losses


# ------------------------------------------------------------------ losses


def objective(readout: Readout, logit_scale: Tensor, options: DuetOptions) -> dict[str, Tensor]:
    """Return this rank's shares of L_c, `contrastive`, L_g, `language`, and L_d, `structure`."""
    return {
        "contrastive": compute_contrastive_loss(
            readout, logit_scale, min_temperature=options.temperature_floor, guide=options.guide
        ),
        "language": compute_language_loss(readout),
        "structure": compute_structure_loss(readout, options, roles=(PREFIX_ROLE,)),
    }


def select_encoder_roles(options: DuetOptions, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the roles of the frozen encoders of L_d and of the guide of L_c, if these have weight.

    Where L_d has weight, the embeddings of pairs are read, and their guide needs its encoders too.
    """
    roles = select_structure_roles(options, weights)
    if roles or weights.get("contrastive"):
        roles += tuple(role for role in GUIDE_ROLES[options.guide] if role not in roles)
    return roles


RECIPE = Recipe(
    name="duet",
    options=DuetOptions,
    objectives=("contrastive", "language", "structure"),
    layout=layout,
    objective=objective,
    find_losses=find_losses,
    requirements={
        "contrastive": "an image with a short caption, or a query with a positive",
        "language": "an image with a caption, a chat or a document",
        "structure": "documents of images and texts in reading order, or chats with answers",
    },
    encoder_roles=select_encoder_roles,
)
