"""Captions of images: drafts, reranked by the embeddings of the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlduet.model.backbone import Backbone
from vlduet.model.generation.beam import beam_search
from vlduet.model.generation.inputs import PrefillInputs, build_prefill_inputs
from vlduet.model.generation.offline import generate_texts
from vlduet.model.limits import log_first_truncation

if TYPE_CHECKING:
    from vlduet.data.records import ImageRef
    from vlduet.model.duet import DuetModel


def caption_images(
    model: DuetModel,
    images: Sequence[ImageRef],
    *,
    prompt: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 32,
    num_drafts: int = 1,
) -> list[str]:
    """Return one caption per image, in order; [] for no images.

    Args:
        prompt: question to answer; if empty, the model continues the image's embedding prompt.
        max_new_tokens: largest number of tokens of a caption.
        batch_size: number of images generated for at once.
        num_drafts: 1 is greedy. With more, a beam search writes drafts, and the one whose
            embedding is nearest to that of the image becomes the caption.

    Raises:
        ImageError: an image is missing or cannot be decoded.
        ConfigError: a prompt for a checkpoint without a chat template.
        DataError: an image exceeds the model's `max_tokens` (a long prompt is cut), or the chat
            template refuses the message.
        ModelError: a greedy caption has logits that are not finite.
        ValueError: `num_drafts` or `max_new_tokens` is less than 1.
    """
    drafts: list[list[str]] = []
    for begin in range(0, len(images), batch_size):
        sequences = [
            model.renderer.render_caption_request(image, prompt)
            for image in images[begin : begin + batch_size]
        ]
        prefill_inputs = build_prefill_inputs(model, sequences)
        drafts += generate_drafts(
            model.backbone, prefill_inputs, max_new_tokens, num_drafts=num_drafts
        )
    note = log_first_truncation("drafts of captions")
    return select_nearest_drafts(
        drafts,
        embed_images=lambda: model.encode(images),
        embed_texts=partial(model.encode_query, on_truncate=note),
    )


def generate_drafts(
    backbone: Backbone, prefill_inputs: PrefillInputs, max_new_tokens: int, *, num_drafts: int
) -> list[list[str]]:
    """Return `num_drafts` continuations of every prompt, the most likely first.

    One draft is greedy; several come from a beam search. All are stripped.

    Raises:
        ModelError: a greedy draft has logits that are not finite.
        ValueError: `num_drafts` or `max_new_tokens` is less than 1.
    """
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, not {num_drafts}")
    if num_drafts > 1:
        return beam_search(backbone, prefill_inputs, max_new_tokens, num_beams=num_drafts)
    return [[text] for text in generate_texts(backbone, prefill_inputs, max_new_tokens)]


def select_nearest_drafts(
    drafts: Sequence[Sequence[str]],
    *,
    embed_images: Callable[[], np.ndarray],
    embed_texts: Callable[[list[str]], np.ndarray],
) -> list[str]:
    """Return the draft of each image with the largest cosine to the image; of equals the first.

    An empty draft is chosen only if an image has no other. If no image has several drafts, or all
    drafts are empty, nothing is embedded and the first drafts are returned.

    Args:
        drafts: at least one draft for each of N images; N may be 0.
        embed_images: returns unit vectors of all N images, float[N, D]; called once at most.
        embed_texts: distinct non-empty texts -> unit vectors, float[texts, D]; called once at most.
    """
    texts = list(dict.fromkeys(text for texts in drafts for text in texts if text))
    if not texts or all(len(candidates) == 1 for candidates in drafts):
        return [candidates[0] for candidates in drafts]
    text_embeddings = dict(zip(texts, embed_texts(texts), strict=True))
    selected = []
    for image, candidates in zip(embed_images(), drafts, strict=True):
        scores = {text: float(text_embeddings[text] @ image) for text in candidates if text}
        selected.append(max(scores, key=scores.__getitem__, default=candidates[0]))
    return selected
