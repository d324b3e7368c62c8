"""Embedding of texts, images and mixtures by a `DuetModel`.

1. `render`            the sequence of a content, refused or cut if it is longer than the limit
2. `embed_sequences`   the embeddings of sequences, in one forward pass
   `embed_in_chunks`   the embedding of one long sequence, in several shorter passes
3. `encode`            both for any number of contents
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from vlduet.data.batches import FORWARD_MAX_TOKENS, PACKED_ROW_TOKENS, group_by_length
from vlduet.data.records import Conversation, Part, Parts, as_parts
from vlduet.data.sequences import Sequence as TokenSequence
from vlduet.model.backbone import eval_mode
from vlduet.model.conversation import is_conversation, render_conversation
from vlduet.model.limits import TruncationCallback, too_long_error

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel
    from vlduet.model.prompts import Renderer

Embeddable = Part | Parts | Conversation
"""A content to embed: a text, an image, a tuple of both in order, or a tuple of `Message`s."""
ProgressCallback = Callable[[int], None] | None
"""Function that receives the number of items embedded since its last call; None reports nothing."""
MAX_DECODED_ITEMS = 512
"""Number of items that are rendered at once; bounds the decoded images in memory."""


@torch.no_grad()
def encode(
    model: DuetModel,
    items: Sequence[Embeddable],
    *,
    is_query: bool = False,
    batch_tokens: int = FORWARD_MAX_TOKENS,
    max_tokens: int | None = None,
    progress: ProgressCallback = None,
    on_truncate: TruncationCallback | None = None,
) -> np.ndarray:
    """Return the embeddings of items, float32[N, E], unit length, in their order.

    The model is in evaluation mode meanwhile; computed vision features are stored in its cache.
    Nothing is skipped: one unusable item raises.

    Args:
        items: each a text, an `ImageRef`, a tuple of both, or a conversation, which is embedded
            where its last turn ends (`conversation`); without items the result has no rows.
        is_query: embed the items as queries, whose texts get `prompts.query` as a prefix. It makes
            no difference to a conversation.
        batch_tokens: bound on the padded tokens of a forward pass; items are grouped by length, and
            short ones share packed rows.
        max_tokens: longest sequence; None is the model's own limit.
        progress: called after every forward pass with the number of items embedded by it.
        on_truncate: allows texts to be cut to `max_tokens`, and is called for every item of which
            one is cut. None refuses such items. A conversation is never cut.

    Raises:
        DataError: an item is empty or blank, longer than `max_tokens` without `on_truncate`, or
            longer without any text to cut.
        ImageError: an image cannot be decoded.
        ConfigError: the prompts need a chat template that the checkpoint does not have.
    """
    renderer = model.renderer.with_options(max_tokens=max_tokens)
    embeddings = np.empty((len(items), model.dim), dtype=np.float32)
    with eval_mode(model):
        for begin in range(0, len(items), MAX_DECODED_ITEMS):
            sequences = []
            for position, item in enumerate(items[begin : begin + MAX_DECODED_ITEMS], begin):
                sequence = render(renderer, item, is_query=is_query, truncate=bool(on_truncate))
                if on_truncate and sequence.num_cut_tokens:
                    on_truncate(position, len(sequence) + sequence.num_cut_tokens)
                sequences.append(sequence)
            for group in group_by_length([len(s) for s in sequences], batch_tokens):
                rows = [begin + i for i in group]
                embeddings[rows] = embed_sequences(model, [sequences[i] for i in group])
                if progress:
                    progress(len(group))
    return embeddings


def render(
    renderer: Renderer, item: Embeddable, *, is_query: bool, truncate: bool = False
) -> TokenSequence:
    """Return the sequence of a content to embed, with one anchor. Images are decoded.

    With `truncate`, a text beyond the limit is cut; `num_cut_tokens` of the sequence then counts
    the tokens that are missing, or some of them if the text is so long that it is cut before it
    becomes tokens.

    Raises:
        DataError: the content is empty or blank, longer than the limit without `truncate`, or
            longer without any text to cut.
        ImageError, ConfigError: as `Renderer.render_embedding`.
    """
    limit = renderer.max_tokens
    if is_conversation(item):
        sequence = render_conversation(renderer, item)
        if len(sequence) > limit:
            raise too_long_error(len(sequence), limit)
        return sequence
    max_token_chars = renderer.layouts.tokenizer.max_token_chars
    parts: list[Part] = []
    for part in as_parts(cast("Part | Parts", item)):
        # Tokens take time: a text that cannot have as few as the limit is cut or refused before.
        if isinstance(part, str) and len(part) > limit * max_token_chars:
            num_chars = find_visible_chars(part, limit * max_token_chars + 1)
            if num_chars < len(part) and not truncate:
                min_tokens = math.ceil(len("".join(part.split())) / max_token_chars)
                raise too_long_error(min_tokens, limit, is_minimum=True)
            part = part[:num_chars]
        parts.append(part)
    sequence = renderer.render_embedding(tuple(parts), is_query=is_query)
    if sequence.num_cut_tokens and not truncate:
        raise too_long_error(len(sequence) + sequence.num_cut_tokens, limit)
    return sequence


@torch.no_grad()
def embed_state(model: DuetModel, state: torch.Tensor) -> np.ndarray:
    """Return the embedding float32[E], unit length, of a hidden state float[D] of decoding."""
    with eval_mode(model):
        embedding: torch.Tensor = model.head(state[None].to(model.logit_scale.dtype))[0]
    return embedding.float().cpu().numpy()


def find_visible_chars(text: str, count: int) -> int:
    """Return the length of a prefix with `count` characters that are not white space.

    It may be longer than necessary, and is the whole text if that has fewer: some tokenizers drop
    white space, whose tokens therefore do not count.
    """
    length = count
    while length < len(text) and len("".join(text[:length].split())) < count:
        length *= 2
    return min(length, len(text))


@torch.no_grad()
def embed_sequences(model: DuetModel, sequences: Sequence[TokenSequence]) -> np.ndarray:
    """Return the embeddings float32[N, E] of at least one sequence, in order, in one forward pass.

    Short ones share rows of PACKED_ROW_TOKENS tokens. Each sequence has one anchor.
    """
    numbered = [
        # The anchor's record name carries the position through packing.
        replace(sequence, anchors=(replace(sequence.anchors[0], record_name=str(position)),))
        for position, sequence in enumerate(sequences)
    ]
    batch = model.collate(numbered, pack_to=max(PACKED_ROW_TOKENS, *map(len, sequences)))
    embeddings = np.empty((len(sequences), model.dim), dtype=np.float32)
    with eval_mode(model):
        values = model(batch).embeddings.float().cpu().numpy()
    embeddings[[int(anchor.record_name) for anchor in batch.anchors]] = values
    return embeddings


def embed_in_chunks(
    model: DuetModel, sequence: TokenSequence, chunk_tokens: int
) -> Iterator[np.ndarray | None]:
    """Yield None after each pass over `chunk_tokens` tokens, and the embedding after the last one.

    The keys and values of the earlier tokens are kept, so that the embedding, float32[1, E], is
    that of `embed_sequences`. A sequence that cannot be split is embedded in one pass: models whose
    attention masks or images need the whole sequence, and embeddings by the vision tower.
    """
    batch = model.collate([sequence])
    with torch.no_grad(), eval_mode(model):
        inputs = model.language_model_inputs(batch)
    if inputs.keys() != {"inputs_embeds"} or model.vision_anchor_mask(batch) is not None:
        yield embed_sequences(model, [sequence])
        return
    num_tokens = len(sequence)
    cache = None
    hidden: list[torch.Tensor] = []
    for start in range(0, num_tokens, chunk_tokens):
        end = min(start + chunk_tokens, num_tokens)
        with torch.no_grad(), eval_mode(model):
            outputs = model.backbone.language_model(
                inputs_embeds=inputs["inputs_embeds"][:, start:end],
                attention_mask=torch.ones(1, end, dtype=torch.long, device=model.backbone.device),
                position_ids=batch.position_ids[..., start:end],
                past_key_values=cache,
                use_cache=True,
            )
        cache = outputs.past_key_values
        hidden.append(outputs.last_hidden_state)
        if end < num_tokens:
            yield None
    with torch.no_grad(), eval_mode(model):
        embedding = model.embed_anchors(batch, torch.cat(hidden, 1), batch.anchor_spans)
    yield embedding.float().cpu().numpy()
