"""Layout of a content that is embedded: its parts, what surrounds them, and where it is read.

1. `append_embedding`   the texts of the prompts around the parts, or the turn of a chat template,
                        and the anchor where the embedding is read
2. `find_prompt_texts`  what surrounds the parts alone, for documents
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlduet.data.records import ImageRef, Message, Parts, extract_images
from vlduet.model.sequence_builder import SequenceBuilder

if TYPE_CHECKING:
    from vlduet.model.prompts import Renderer


def append_embedding(
    renderer: Renderer,
    builder: SequenceBuilder,
    parts: Parts,
    *,
    is_query: bool = False,
    role: str,
    record_name: str,
    content_key: str,
) -> str:
    """Append `parts`, at least one, in their embedding prompt to `builder`, in place.

    The anchor's embedding is read at the image's tokens in two cases: it is the only part and
    `prompts.image_pool` is not `last`; or the prompt ends with it and `image_pool` is `mean`. Else
    it is read where `prompts.pool` says.

    Returns:
        White space that the chat template writes next, and that the tokenizer merges into what
        follows.

    Raises:
        ImageError: an image cannot be decoded.
        DataError: the chat template refuses a single turn of a user.
        ConfigError: the prompts need a chat template, and the checkpoint has no usable one.
    """
    prompts = renderer.prompts
    reads_image = False
    num_tokens_before = 0
    if prompts.template:
        segment, num_tokens_before = _append_turn(renderer, builder, parts, is_query=is_query)
        closing = segment
        space = ""
    else:
        before, after, space = find_prompt_texts(renderer, parts)
        builder.append_control(before)
        for i in range(len(parts)):
            segment = append_part(renderer, builder, parts, index=i, is_query=is_query)
        is_single_image = len(parts) == 1 and isinstance(parts[0], ImageRef)
        ends_with_image = isinstance(parts[-1], ImageRef) and not after
        reads_image = is_single_image and prompts.image_pool != "last"
        reads_image = reads_image or (ends_with_image and prompts.image_pool == "mean")
        closing = builder.append_control(after)
    span = None
    if prompts.pool != "last" and not reads_image:
        first = 0 if prompts.pool_system else num_tokens_before
        span = (first, first + 1 if prompts.pool == "first" else None)
    builder.add_anchor(
        segment if reads_image else closing,
        is_last=not reads_image,
        role=role,
        record_name=record_name,
        content_key=content_key,
        span=span,
    )
    return space


def _append_turn(
    renderer: Renderer, builder: SequenceBuilder, parts: Parts, *, is_query: bool
) -> tuple[int, int]:
    """Append what `prompts.template` writes for `parts` in a turn of a user, in place.

    As in transformers, the tokenizer's special tokens are around it unless it begins with that of
    the beginning.

    Returns:
        The last segment, and the number of tokens before the first part, which is 0 if
        `prompts.pool_system` has no use for it.
    """
    layouts = renderer.template_layouts(is_query=is_query)
    layout = layouts.layout([Message("user", parts)], add_generation_prompt=False)
    images = extract_images(parts)
    texts = [_join_text(parts, i) for i, part in enumerate(parts) if isinstance(part, str)]
    segment = num_tokens_before = 0
    if renderer.template_delimits_images:
        builder.image_delimiters = ("", "")
    for part in layout:
        if part.kind == "image":
            builder.append_image(renderer.prepare_image(images[part.index]))
            segment = len(builder.segments) - 1
        elif part.kind == "text":
            text = texts[part.index]
            text = text.lstrip() if part.strips[0] else text
            segment = builder.append_text(text.rstrip() if part.strips[1] else text)
        else:
            segment = builder.append_control(part.text)
            if part is layout[0] and not renderer.prompts.pool_system:
                num_tokens_before = builder.count_tokens()[-1]
    bos = renderer.tokenizer.bos_token
    if bos is None or not layout[0].text.startswith(str(bos)):
        for token_id in renderer.end_ids:
            segment = builder.append_token(token_id)
    return segment, num_tokens_before


def find_prompt_texts(renderer: Renderer, parts: Parts) -> tuple[str, str, str]:
    """Return the control texts before and after contents that are embedded, and a space.

    The prompt is `parts` for a mixture, `text` for texts and `image` for images; with
    `prompts.joined` off, `text` for several images, too. With `prompts.chat` the texts include the
    chat template around a user turn, up to where the answer begins. White space at its end that the
    tokenizer merges into an answer is the third result; with `joined` off it remains. With
    `prompts.template` they are what it writes before the first part and after the last.

    Raises DataError and ConfigError as `append_embedding`.
    """
    prompts = renderer.prompts
    if prompts.template:
        layouts = renderer.template_layouts(is_query=False)
        layout = layouts.layout([Message("user", parts)], add_generation_prompt=False)
        texts = [part.text if part.kind == "control" else None for part in layout]
        first, last = texts.index(None), len(texts) - texts[::-1].index(None)
        return "".join(map(str, texts[:first])), "".join(map(str, texts[last:])), ""
    has_image = any(isinstance(part, ImageRef) for part in parts)
    has_text = any(isinstance(part, str) for part in parts)
    if has_image and has_text:
        template = prompts.parts
    elif has_image and (prompts.joined or len(parts) == 1):
        template = prompts.image
    else:
        template = prompts.text
    before, after = prompts.split(template)
    space = ""
    if prompts.chat:
        opening, closing, space = renderer.layouts.user_turn()
        if not prompts.joined:
            closing += space
            space = ""
        before = opening + before
        after = after + closing
    if not prompts.joined:
        before = before.removeprefix(renderer.bos_text)
    return before, after, space


def append_part(
    renderer: Renderer,
    builder: SequenceBuilder,
    parts: Parts,
    *,
    index: int,
    is_query: bool = False,
    supervised: bool = False,
) -> int:
    """Append the part `index` to `builder` in place and return its segment; raises ImageError.

    A text gets a space before it if it follows a text, then the query prompt if `is_query`;
    `supervised` makes its tokens labels. An image is decoded, and takes none of these.
    """
    part = parts[index]
    if isinstance(part, ImageRef):
        return builder.append_image(renderer.prepare_image(part))
    prefix = renderer.prompts.query if is_query else ""
    return builder.append_text(_join_text(parts, index, prefix=prefix), supervised=supervised)


def _join_text(parts: Parts, i: int, *, prefix: str = "") -> str:
    """Return the text that is part i after a prefix, with a space before if it follows a text."""
    separator = " " if i and isinstance(parts[i - 1], str) else ""
    return f"{separator}{prefix}{parts[i]}"
