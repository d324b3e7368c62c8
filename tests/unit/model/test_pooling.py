"""Pooling of hidden states, and readouts without any content, which must stay in the graph."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.records import Message
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import create_empty_readout, pool_hidden_states


def test_pooling_is_the_mean_over_each_span_forward_and_backward() -> None:
    hidden = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    spans = torch.tensor([[0, 0, 1], [2, 3, 7], [1, 6, 7], [0, 1, 4], [1, 6, 7], [2, 0, 7]])
    expected = torch.stack([hidden[row, start:end].mean(0) for row, start, end in spans.tolist()])
    pooled = pool_hidden_states(hidden, spans)
    assert_close(pooled, expected)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), hidden)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    assert_close(gradient, expected_gradient)


def test_spans_of_one_token_are_single_hidden_states() -> None:
    hidden = torch.randn(3, 7, 4)
    spans = torch.tensor([[0, 0, 1], [1, 6, 7], [1, 6, 7]])
    assert torch.equal(pool_hidden_states(hidden, spans), hidden[[0, 1, 1], [0, 6, 6]])


def test_pooling_without_spans_is_part_of_the_graph() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    pooled = pool_hidden_states(hidden, torch.zeros(0, 3, dtype=torch.long))
    assert pooled.shape == (0, 4) and pooled.requires_grad


def test_a_batch_without_anchors_has_empty_embeddings_with_a_gradient(model: DuetModel) -> None:
    chat = (Message("user", (tiny.random_image(1), "q")), Message("assistant", ("a",)))
    sequence = model.renderer.render_chat(chat, add_generation_prompt=False)
    readout = model(model.collate([sequence]))
    assert readout.embeddings.shape == (0, model.dim) and readout.embeddings.requires_grad
    assert len(readout.nll) == 2


def test_an_empty_readout_has_the_shapes_of_a_full_one_and_a_gradient() -> None:
    """On several processes the backward pass of the gather is a collective."""
    readout = create_empty_readout(5, like=torch.zeros(()))
    embeddings, anchors = readout.select_roles("image", "text")
    assert embeddings.shape == (0, 5) and embeddings.requires_grad and anchors == []
    assert readout.nll.shape == (0,) and readout.nll.requires_grad
