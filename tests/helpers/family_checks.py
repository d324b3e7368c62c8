"""Images and checks shared by the tests of all families.

The reference is always the plain transformers model of the same checkpoint, which gets token ids
and pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.batches import Batch
from vlduet.data.records import Message, Parts, as_parts
from vlduet.data.sequences import Sequence
from vlduet.model.duet import DuetModel
from vlduet.model.generation.beam import generate_arguments
from vlduet.model.prompts import Prompts

PROMPTS = Prompts(image="See {image} sum:", text="{text} sum:", parts="{parts} all:", chat=False)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
WIDE = tiny.random_image(0, 16, width=48)
TALL = tiny.random_image(1, 24, width=16)
SMALL = tiny.random_image(2, 16)
ODD = tiny.random_image(4, 29, width=40)
"""Image whose sides are no multiples of a patch."""


def render_mixed_sequences(model: DuetModel) -> list[Sequence]:
    """Return embedding sequences with several images of different shapes, and one without."""
    items: list[Parts] = [(WIDE, "then", TALL), ("before", SMALL, WIDE), (TALL,), ("no image",)]
    return [
        model.renderer.render_embedding(parts, record_name=str(i)) for i, parts in enumerate(items)
    ]


def render_prompts(model: DuetModel, turns: list[Parts]) -> list[Sequence]:
    """Return the sequences of conversations with one user turn, open for an answer."""
    return [
        model.renderer.render_chat((Message("user", parts),), add_generation_prompt=True)
        for parts in turns
    ]


def transformers_inputs_of(model: DuetModel, sequence: Sequence) -> dict[str, torch.Tensor]:
    """Return the inputs of the plain transformers model for one sequence."""
    prepared = [image for _, image in sequence.images]
    return tiny.transformers_inputs(model, torch.tensor([sequence.token_ids]), prepared)


def assert_logits_equal_transformers(model: DuetModel, batch: Batch) -> torch.Tensor:
    """Compare the logits of all real tokens and return ours, float[B, T, V]."""
    is_real = batch.segment_ids > 0
    inputs = tiny.transformers_inputs(model, batch.token_ids, batch.images)
    with torch.no_grad():
        expected = model.backbone.model(**inputs, attention_mask=is_real.long()).logits
        logits = model.backbone.compute_logits(model.hidden_states(batch))
    assert expected.std() > 0.1
    assert_close(logits[is_real], expected[is_real], atol=1e-4, rtol=1e-4)
    return logits


def assert_beams_equal_transformers(
    model: DuetModel, turns: list[Parts], *, num_beams: int
) -> None:
    """Compare six tokens of every beam of a batch of prompts with those of each prompt alone."""
    sequences = render_prompts(model, turns)
    prefill_inputs = model.prefill_inputs(sequences)
    unending = {"min_new_tokens": None, "eos_token_id": None}
    with generate_arguments(model.backbone, prefill_inputs, 6, num_beams=num_beams) as arguments:
        token_ids = model.backbone.model.generate(**arguments | unending)
    token_ids = token_ids.view(len(sequences), num_beams, -1)
    for sequence, beams in zip(sequences, token_ids, strict=True):
        expected = model.backbone.model.generate(
            **transformers_inputs_of(model, sequence),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            suppress_tokens=arguments["suppress_tokens"],
        )
        assert expected[:, len(sequence.token_ids) :].tolist() == beams.tolist()


def assert_packed_embeddings_equal_single(
    model: DuetModel, items: list[Any], *, pack_to: int
) -> Batch:
    """Compare embeddings of items alone, padded and packed; return the packed batch."""
    single = np.concatenate([model.encode([item]) for item in items])
    assert_close(model.encode(items), single, atol=1e-5, rtol=0)
    sequences = [
        model.renderer.render_embedding(as_parts(item), record_name=str(n))
        for n, item in enumerate(items)
    ]
    packed = model.collate(sequences, pack_to=pack_to)
    assert len(packed.token_ids) < len(items), "nothing was packed"
    with torch.no_grad():
        readout = model(packed)
    order = [int(anchor.record_name) for anchor in readout.anchors]
    assert_close(readout.embeddings.numpy(), single[order], atol=1e-5, rtol=0)
    return packed
