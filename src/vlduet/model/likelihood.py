"""Negative log-likelihoods of sequences, captions and answers under a `DuetModel`."""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING

import torch

from vlduet.data import prefix_sharing
from vlduet.data.batches import FORWARD_MAX_TOKENS
from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import Sequence
from vlduet.model.backbone import eval_mode

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel


@torch.no_grad()
def compute_sequence_nll(model: DuetModel, sequences: list[Sequence]) -> list[tuple[float, int]]:
    """Return (total negative log-likelihood in nats, number of labels) of every sequence, in order.

    No graph is built, and the model is in evaluation mode meanwhile. Consecutive sequences with a
    common prefix, such as the options of a question, read it once (`data.prefix_sharing`). A
    sequence without labels gives (0.0, 0); anchors are ignored.
    """
    results = [(0.0, 0)] * len(sequences)
    with eval_mode(model):
        for indices, rows in prefix_sharing.group_rows(sequences, FORWARD_MAX_TOKENS):
            batch = prefix_sharing.collate_shared_prefixes(
                rows, pad_token_id=model.backbone.pad_token_id
            ).to(model.backbone.device)
            counts = [sequences[i].num_labels for i in indices]
            nll = model(batch).nll.double().cpu()
            for i, sequence_nll in zip(indices, nll.split(counts), strict=True):
                results[i] = (float(sequence_nll.sum()), len(sequence_nll))
    return results


def compute_caption_nll(
    model: DuetModel, pairs: abc.Sequence[tuple[ImageRef, str]], *, batch_size: int = 32
) -> list[tuple[float, int]]:
    """Return (total negative log-likelihood in nats, number of tokens) of each caption, in order.

    A caption follows its image's embedding prompt, and its end-of-text token counts. The model is
    in evaluation mode meanwhile. A caption that is too long is cut.

    Args:
        pairs: images with their captions.
        batch_size: number of pairs that are rendered at once; bounds the decoded images in memory.

    Raises:
        DataError, ImageError, ConfigError: a pair cannot be rendered (`Renderer.render_caption`).
    """
    results: list[tuple[float, int]] = []
    for begin in range(0, len(pairs), batch_size):
        sequences = [
            model.renderer.render_caption(image, caption)
            for image, caption in pairs[begin : begin + batch_size]
        ]
        results += compute_sequence_nll(model, sequences)
    return results


def compute_answer_nll(
    model: DuetModel, pairs: abc.Sequence[tuple[str, str]]
) -> list[tuple[float, int]]:
    """Return (total negative log-likelihood in nats, number of tokens) of each answer, in order.

    The model is in evaluation mode meanwhile.

    Args:
        pairs: questions without an image, each with the answer of the assistant's next turn.

    Raises:
        ConfigError: the model has no chat template.
    """
    sequences = []
    for question, answer in pairs:
        messages = (Message("user", (question,)), Message("assistant", (answer,)))
        sequences.append(model.renderer.render_chat(messages, add_generation_prompt=False))
    return compute_sequence_nll(model, sequences)
