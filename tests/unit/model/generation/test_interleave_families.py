"""Interleaved answers of every family: the state of decoding is that of one pass over everything.

The images that are fed back differ in size, and families in what follows from that: positions on
three axes, tiles, masks in which the tokens of an image see each other, features of earlier layers
of the vision tower, and embeddings of every layer. docs/interleave.md has the table of families.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.model.conversation import render_continuation, render_conversation
from vlduet.model.families.registry import FAMILIES
from vlduet.model.generation.continuous import ContinuousBatcher, Request
from vlduet.model.generation.interleave import InterleavedAnswer

DOCUMENT = Path(__file__).parents[4] / "docs" / "interleave.md"
WIDE = tiny.random_image(0, 16, width=48)
TALL = tiny.random_image(1, 24, width=16)
OTHER_IMAGES = (tiny.random_image(2, 16, width=48), tiny.random_image(3, 24, width=16))
"""Images of the same sizes as those that are fed back, with other pixels."""
QUESTION = (Message("user", (TALL, "tell me of a dog")),)
TEXTS = ("a dog runs.", " then it sleeps for a long time.")
TEMPLATE = f"{TEXTS[0]}{{image}}{TEXTS[1]}{{image}}{{image}}"
ANSWERS = ((TEXTS[0],), (TEXTS[0], WIDE, TEXTS[1]), (TEXTS[0], WIDE, TEXTS[1], TALL))
"""What the answer has at each of its three places."""
ENDING = " so it"
NEW_TOKENS = (30, 31, 32)


@dataclass(frozen=True)
class FoundImage:
    """Hit of a search."""

    image: ImageRef
    id: str = ""
    score: float = 1.0
    text: str = ""
    metadata: tuple[()] = ()


class RecordingRequest(Request):
    """Request that generates prescribed tokens and records the logits it was offered."""

    def __init__(self) -> None:
        super().__init__(max_new_tokens=1)
        self.logits: list[torch.Tensor] = []

    def sample_token(self, logits):
        self.logits.append(logits[0].clone())
        return torch.tensor([NEW_TOKENS[len(self.token_ids)]])


def read_places(model, batcher, request):
    """Run an answer up to its last place; return the tokens and the embedding at every place."""
    answer = InterleavedAnswer(model, QUESTION, request, template=TEMPLATE, feed_back=True)
    prompt = answer.render_prompt(model.renderer)
    outputs = batcher.add_requests(model.prefill_inputs([prompt]), [request])
    token_ids, vectors = [prompt.token_ids], []
    for image in (WIDE, TALL):
        ((_, slice_end),) = outputs
        vectors.append(answer.embed(slice_end))
        num_cached = batcher.count_cached_tokens(request)
        step = answer.advance(model.renderer, FoundImage(image), slice_end, num_cached=num_cached)
        assert step.is_fed_back
        outputs = extend(model, batcher, request, step.sequence)
        token_ids.append(token_ids[-1] + step.sequence.token_ids)
    ((_, slice_end),) = outputs
    vectors.append(answer.embed(slice_end))
    return token_ids, np.stack(vectors)


def extend(model, batcher, request, sequence):
    """Let a request read a sequence; return the outputs."""
    num_past = batcher.count_cached_tokens(request)
    return batcher.extend(request, model.prefill_inputs([sequence], num_past=num_past))


def reference_logits(model, images, token_ids, *, count=1):
    """Return the last `count` logits float[count, V] of one forward pass without a cache."""
    sequence = Sequence(tuple(token_ids), (IGNORE_INDEX,) * len(token_ids), (), images)
    with torch.no_grad():
        hidden = model.hidden_states(model.collate([sequence]))[0, -count:]
        return model.backbone.compute_logits(hidden)


@pytest.mark.parametrize("family", sorted(tiny.FAMILY_BUILDERS))
def test_states_and_logits_are_those_of_one_forward_pass(family, tmp_path):
    """At three places of a template, and for tokens that are generated after the last image."""
    model = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", family=family))
    batcher = ContinuousBatcher(model.backbone, model.renderer.eos_token_ids)
    request = RecordingRequest()
    token_ids, vectors = read_places(model, batcher, request)
    turns = [(*QUESTION, Message("assistant", parts)) for parts in ANSWERS]
    sequences = [render_conversation(model.renderer, conversation) for conversation in turns]
    for sequence, decoded_ids in zip(sequences, token_ids, strict=True):
        # What follows an image, such as its closing delimiter, has been read when it is embedded.
        assert decoded_ids[: len(sequence)] == sequence.token_ids
        assert len(decoded_ids) <= len(sequence) + 2
    np.testing.assert_allclose(vectors, model.encode(turns), atol=1e-5)
    # The template is complete; the request goes on as one that writes.
    request.generates, request.max_new_tokens = True, len(NEW_TOKENS)
    ending = render_continuation(model.renderer, (ENDING,))
    extend(model, batcher, request, ending)
    while batcher.requests:
        batcher.step()
    logits = torch.stack(request.logits)
    expected = [
        reference_logits(model, sequence.images, decoded_ids)
        for sequence, decoded_ids in zip(sequences, token_ids, strict=True)
    ]
    all_ids = (*token_ids[-1], *ending.token_ids, *NEW_TOKENS[:-1])
    expected.append(reference_logits(model, sequences[-1].images, all_ids, count=len(NEW_TOKENS)))
    first, *starts = sequences[-1].images
    other_images = [
        (start, model.prepare_image(image))
        for (start, _), image in zip(starts, OTHER_IMAGES, strict=True)
    ]
    change = reference_logits(model, (first, *other_images), token_ids[-1]) - expected[2]
    assert change.abs().max() > 0.01, "the images have no effect on what follows"
    is_allowed = logits.isfinite()  # no end of the answer, and no other special token
    assert is_allowed.float().mean() > 0.5
    assert_close(logits[is_allowed], torch.cat(expected)[is_allowed], atol=1e-4, rtol=1e-4)


def test_the_table_of_families_is_complete():
    """Every `model_type` is in docs/interleave.md, and has a tiny checkpoint that is tested."""
    section = DOCUMENT.read_text(encoding="utf-8").split("### Families")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| [^|]+ \| (\w+) \|$", section, re.MULTILINE)
    names = [name for cells, _ in rows for name in re.findall(r"`(\w+)`", cells)]
    assert sorted(names) == sorted(FAMILIES)
    assert {verdict for _, verdict in rows} == {"supported"}
    assert set(names) <= set(tiny.FAMILY_BUILDERS)
