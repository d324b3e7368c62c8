"""Readings of nothing stay in the graph: on several processes the backward of the gather is a collective."""

from __future__ import annotations

import torch

from helpers import tiny
from vlduet.data.records import Message
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import create_empty_readout, pool_hidden_states


def test_pooling_nowhere_is_part_of_the_graph() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    found = pool_hidden_states(hidden, torch.zeros(0, 3, dtype=torch.long))
    assert found.shape == (0, 4) and found.requires_grad


def test_a_batch_without_anchors_reads_empty_embeddings_with_a_gradient(model: DuetModel) -> None:
    chat = (Message("user", (tiny.random_image(1), "q")), Message("assistant", ("a",)))
    readout = model(model.collate([model.renderer.render_chat(chat, add_generation_prompt=False)]))
    assert (
        readout.embeddings.shape == (0, model.dim)
        and readout.embeddings.requires_grad
        and len(readout.nll) == 2
    )


def test_an_empty_readout_has_the_shapes_of_a_full_one_and_takes_part_in_backward() -> None:
    readout = create_empty_readout(5, like=torch.zeros(()))
    rows, anchors = readout.select_roles("image", "text")
    assert (
        rows.shape == (0, 5) and anchors == [] and rows.requires_grad and readout.nll.shape == (0,)
    )
