"""Beam search, and properties of an answer that greedy generation and beam search share."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny
from vlduet.data.records import Message
from vlduet.model.generation.beam import beam_search, generate_arguments
from vlduet.model.generation.continuous import ContinuousBatcher, Request
from vlduet.model.generation.rerank import generate_drafts


def render_caption_requests(model, count):
    return [model.renderer.render_caption_request(tiny.random_image(i), "") for i in range(count)]


def test_answer_has_at_least_one_token_and_no_control_token(model, monkeypatch):
    """A bias makes the end token and the tokens that open a turn the most likely ones."""
    control_ids = range(6)
    bias = torch.zeros(model.lm_head_weight.shape[0])
    bias[list(control_ids)] = 100.0
    forward = model.backbone.lm_head.forward
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda states: forward(states) + bias)
    chat = model.renderer.render_chat((Message("user", ("say",)),), add_generation_prompt=True)
    prefill_inputs = model.prefill_inputs([chat])
    with generate_arguments(model.backbone, prefill_inputs, 6, num_beams=1) as arguments:
        token_ids = model.backbone.model.generate(**arguments)[0].tolist()
    assert token_ids[0] not in control_ids
    assert token_ids[1] == 2, "the second token must be the end token"
    batcher = ContinuousBatcher(model.backbone, prefill_inputs.eos_token_ids)
    request = Request(6)
    batcher.add_requests(prefill_inputs, [request])
    while batcher.requests:
        batcher.step()
    assert request.token_ids == token_ids[:2]


def test_each_prompt_is_prefilled_once_for_all_its_beams(model):
    prefill_inputs = model.prefill_inputs(render_caption_requests(model, 2))
    shapes = []
    hook = model.backbone.language_model.register_forward_hook(
        lambda _, __, kwargs, ___: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
        prepend=True,
    )
    try:
        beam_search(model.backbone, prefill_inputs, 3, num_beams=4)
    finally:
        hook.remove()
    assert shapes[0] == tuple(prefill_inputs.attention_mask.shape)
    assert set(shapes[1:]) == {(2 * 4, 1)}


def test_one_draft_is_greedy_and_several_are_the_beams(model):
    prefill_inputs = model.prefill_inputs(render_caption_requests(model, 3))
    with generate_arguments(model.backbone, prefill_inputs, 6, num_beams=1) as arguments:
        token_ids = model.backbone.model.generate(**arguments)
    decoded = model.backbone.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    greedy = generate_drafts(model.backbone, prefill_inputs, 6, num_drafts=1)
    assert greedy == [[text.strip()] for text in decoded]
    drafts = generate_drafts(model.backbone, prefill_inputs, 6, num_drafts=4)
    assert drafts == beam_search(model.backbone, prefill_inputs, 6, num_beams=4)
    with pytest.raises(ValueError, match="num_drafts must be at least 1, not 0"):
        generate_drafts(model.backbone, prefill_inputs, 6, num_drafts=0)
