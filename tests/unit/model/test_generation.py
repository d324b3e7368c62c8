"""Generation: whole equals streamed, an answer is never empty, and control tokens are never written."""

from __future__ import annotations

import pytest
import torch

import tiny
from vlduet.data.records import Message


def turn(*parts):
    return [Message("user", parts)]


def test_streamed_equals_whole(model):
    messages = turn(tiny.picture(1), "what is it?")
    whole = model.generate(messages, max_new_tokens=12)
    assert "".join(model.generate(messages, max_new_tokens=12, stream=True)).strip() == whole


def test_an_answer_has_at_least_one_token(model, monkeypatch):
    """A model that only wants to end, or to open a turn of its own, still has to say something."""
    bias = torch.zeros(model.lm_weight.shape[0])
    bias[[0, 1, 2, 3, 4, 5]] = 100.0
    real = model.backbone.lm_head.forward
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda hidden: real(hidden) + bias)
    sequence = model.renderer.chat(tuple(turn("say")), answer=True)
    start = model.start([sequence], 6)
    ids = model.backbone.model.generate(**start.arguments(model.backbone))[0].tolist()
    assert ids[0] not in range(6) and ids[1] == 2, "one word, then the end"


def test_an_error_in_the_stream_reaches_the_reader(model, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.backbone.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.generate(turn("x"), stream=True))


def test_captions_of_a_batch_are_those_of_one(model):
    pictures = [tiny.picture(i) for i in range(3)]
    assert model.caption(pictures, max_new_tokens=6) == [model.caption([p], max_new_tokens=6)[0] for p in pictures]
