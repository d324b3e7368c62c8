"""Generation: whole equals streamed, an answer is never empty, and control tokens are never written."""

from __future__ import annotations

import numpy as np
import torch

from helpers import tiny
from vlduet.data.records import Message
from vlduet.model.generation import beam
from vlduet.model.generation.continuous import ContinuousBatcher, Request


def turn(*parts):
    return [Message("user", parts)]


def test_streamed_equals_whole(model):
    messages = turn(tiny.random_image(1), "what is it?")
    whole = model.generate(messages, max_new_tokens=12)
    assert "".join(model.generate(messages, max_new_tokens=12, stream=True)).strip() == whole


def test_an_answer_has_at_least_one_token(model, monkeypatch):
    """A model that only wants to end, or to open a turn of its own, still has to say something."""
    bias = torch.zeros(model.lm_weight.shape[0])
    bias[[0, 1, 2, 3, 4, 5]] = 100.0
    real = model.backbone.lm_head.forward
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda hidden: real(hidden) + bias)
    start = model.start([model.renderer.chat(tuple(turn("say")), answer=True)])
    with beam.generate_arguments(model.backbone, start, 6) as given:
        ids = model.backbone.model.generate(**given)[0].tolist()
    assert ids[0] not in range(6) and ids[1] == 2, "one word, then the end"
    decoder, answer = ContinuousBatcher(model.backbone, start.eos_ids), Request(6)
    decoder.add_requests(start, [answer])
    while decoder.requests:
        decoder.step()
    assert answer.token_ids == ids[:2], "streamed likewise"


def test_captions_of_a_batch_are_those_of_one(model):
    pictures = [tiny.random_image(i) for i in range(3)]
    assert model.caption(pictures, max_new_tokens=6) == [
        model.caption([p], max_new_tokens=6)[0] for p in pictures
    ]


def test_of_several_drafts_the_nearest_in_its_own_embedding_is_kept(model):
    pictures = [tiny.random_image(i) for i in range(3)]
    sequences = [model.renderer.ask_for_caption(picture, "") for picture in pictures]
    several = beam.generate_drafts(model.backbone, model.start(sequences), 6, num_drafts=4)
    assert all(len(some) == 4 and len(set(some)) > 1 for some in several)
    for picture, some in zip(pictures, several, strict=True):
        near = [
            model.encode_query([text])[0] @ model.encode_document([picture])[0] if text else -2.0
            for text in some
        ]
        assert model.caption([picture], max_new_tokens=6, drafts=4) == [some[int(np.argmax(near))]]
    assert model.caption(pictures, max_new_tokens=6, drafts=4, batch=2) == [
        model.caption([picture], max_new_tokens=6, drafts=4)[0] for picture in pictures
    ]


def test_a_prompt_is_read_once_for_all_its_drafts(model):
    start = model.start(
        [model.renderer.ask_for_caption(tiny.random_image(i), "") for i in range(2)]
    )
    seen = []
    keep = model.backbone.trunk.register_forward_hook(
        lambda _, __, given, out: seen.append(tuple(given["inputs_embeds"].shape[:2])),
        with_kwargs=True,
        prepend=True,
    )
    try:
        beam.generate_drafts(model.backbone, start, 3, num_drafts=4)
    finally:
        keep.remove()
    assert seen[0] == tuple(start.mask.shape) and set(seen[1:]) == {(8, 1)}
