"""Conversations as contents that are embedded, and the tokens that continue an answer.

A conversation is embedded where its last turn ends: at the last token of its last text, or at its
last image. Nothing follows that place, neither the end of the turn nor a prompt. It is therefore
the position at which an answer is read while it is generated (`generation.interleave`), and at
which the recipe duet trains embeddings of chats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from vlduet.data.records import Conversation, ImageRef, Message, Part, Parts
from vlduet.data.sequences import Sequence, trim
from vlduet.errors import DataError
from vlduet.model.sequence_builder import SequenceBuilder

if TYPE_CHECKING:
    from vlduet.model.prompts import Renderer

ANCHOR_ROLE = "conversation"
UNLIMITED_TOKENS = 1 << 40
"""Limit of a sequence that is not cut."""


def is_conversation(item: Part | Parts | Conversation) -> TypeGuard[Conversation]:
    """Return whether a content is a conversation and not a text, an image or a tuple of both."""
    return not isinstance(item, str | ImageRef) and isinstance(next(iter(item), None), Message)


def render_conversation(renderer: Renderer, messages: Conversation) -> Sequence:
    """Return a conversation up to where its last turn ends, with one anchor there and no labels.

    Earlier turns are rendered by the chat template. Of a last turn of the assistant, the template
    renders only the first text; further texts and images follow without anything between them, as
    in an answer with images that is being generated. Nothing is cut.

    Raises:
        DataError: the last turn is blank, or the chat template refuses the turns.
        ImageError: an image cannot be decoded.
        ConfigError: the checkpoint has no usable chat template.
    """
    *context, last = messages
    parts = [part for part in last.parts if not _is_blank(part)]
    if not parts:
        raise DataError("nothing to embed in the last turn", fix="Give it a text or an image")
    if last.role == "assistant":
        builder, segment, part = _render_answer(renderer, tuple(context), parts)
    else:
        turns = (*context, replace(last, parts=tuple(parts)))
        builder, rendered = renderer.render_chat_parts(turns, add_generation_prompt=False)
        segment, part = rendered[-1].segment, rendered[-1].part
        builder.drop_segments(segment + 1)
    _add_anchor(renderer, builder, segment, part)
    trimmed = trim(builder.build(UNLIMITED_TOKENS), labels=False, anchors=True)
    assert trimmed is not None, "the sequence has an anchor"
    return trimmed


def _render_answer(
    renderer: Renderer, context: Conversation, parts: list[Part]
) -> tuple[SequenceBuilder, int, Part]:
    """Return the builder of a conversation that ends with an answer, its last segment and part."""
    first = parts[0]
    if isinstance(first, str):
        turns = (*context, Message("assistant", (first,)))
        builder, rendered = renderer.render_chat_parts(turns, add_generation_prompt=False)
        segment, part = rendered[-1].segment, rendered[-1].part
        builder.drop_segments(segment + 1)
        parts = parts[1:]
    else:
        builder, _ = renderer.render_chat_parts(context, add_generation_prompt=True)
    for part in parts:
        segment = _append_part(renderer, builder, part)
    return builder, segment, part


def render_answer_prompt(renderer: Renderer, messages: Conversation) -> Sequence:
    """Return a conversation up to where an answer begins, with an anchor where its last turn ends.

    Nothing is cut. Raises as `render_conversation`.
    """
    builder, rendered = renderer.render_chat_parts(messages, add_generation_prompt=True)
    visible = [
        part for part in rendered if not (isinstance(part.part, str) and not part.part.strip())
    ]
    if not visible:
        raise DataError("nothing to answer", fix="Give a text or an image")
    _add_anchor(renderer, builder, visible[-1].segment, visible[-1].part)
    return builder.build(UNLIMITED_TOKENS)


def render_continuation(renderer: Renderer, parts: Parts) -> Sequence:
    """Return the tokens of images and texts that follow a sequence, with an anchor at their end.

    Raises ImageError for an image that cannot be decoded.
    """
    builder = renderer.new_builder()
    builder.continues = True
    for part in parts:
        segment = _append_part(renderer, builder, part)
    _add_anchor(renderer, builder, segment, parts[-1])
    return builder.build(UNLIMITED_TOKENS)


def _append_part(renderer: Renderer, builder: SequenceBuilder, part: Part) -> int:
    """Append a text, or an image between its delimiters, in place; return its segment."""
    if isinstance(part, ImageRef):
        return builder.append_image(renderer.prepare_image(part))
    return builder.append_text(part)


def _add_anchor(renderer: Renderer, builder: SequenceBuilder, segment: int, part: Part) -> None:
    """Add an anchor at the last visible character of a text, or at the tokens of an image."""
    builder.add_prefix_anchor(
        segment,
        role=ANCHOR_ROLE,
        record_name="",
        slices=(),
        text_end=len(part.rstrip()) if isinstance(part, str) else None,
        is_mean=not isinstance(part, str) and renderer.prompts.image_pool == "mean",
    )


def _is_blank(part: Part) -> bool:
    """Return whether a part is a text without visible characters."""
    return isinstance(part, str) and not part.strip()
