"""The four public losses outside vlduet's own loop: their docstrings, and a short loop of each."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from vlduet import objectives
from vlduet.objectives import contrastive_loss, gak_matrix, structure_loss, sugar_targets


@pytest.mark.parametrize("name", ["contrastive", "gak.api", "structure", "sugar_targets"])
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(f"vlduet.objectives.{name}")
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_exactly_four_functions_are_exported_and_need_no_process_group() -> None:
    names = ["contrastive_loss", "gak_matrix", "structure_loss", "sugar_targets"]
    assert objectives.__all__ == names
    assert not dist.is_initialized()


def test_contrastive_loss_trains_two_linear_towers() -> None:
    torch.manual_seed(0)
    contents = torch.randn(8, 4)
    images, texts = contents @ torch.randn(4, 6), contents @ torch.randn(4, 5)
    image_tower, text_tower = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)
    optimizer = torch.optim.Adam([*image_tower.parameters(), *text_tower.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        a, b = F.normalize(image_tower(images), dim=1), F.normalize(text_tower(texts), dim=1)
        loss = contrastive_loss(a, b, logit_scale=torch.tensor(2.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_sugar_targets_and_structure_loss_teach_embeddings_the_order_of_slices() -> None:
    slices = torch.eye(4)  # the same four images in two orders, and four texts alone
    targets = sugar_targets(
        torch.cat([slices, slices]),
        torch.cat([slices, slices]),
        is_image=torch.arange(8) < 4,
        slice_indices=torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [7, 6, 5, 4]]),
        lengths=torch.tensor([4, 4, 4]),
        sequence_ids=torch.arange(3),
        delta=0.5,
    )
    assert 1 > targets[0, 1] > targets[0, 2]
    embeddings = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.1)
    for _ in range(200):
        unit = F.normalize(embeddings, dim=1)
        loss = structure_loss(unit, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
    torch.testing.assert_close((unit @ unit.T).detach(), targets, atol=0.05, rtol=0)


def test_gak_matrix_is_a_differentiable_similarity_of_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    fixed = F.normalize(torch.randn(3, 5, generator=generator), dim=1)
    learned = torch.randn(4, 5, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=0.1)
    similarities = []
    for _ in range(50):
        kernel = gak_matrix([F.normalize(learned, dim=1)], [fixed])
        optimizer.zero_grad()
        (-kernel.sum()).backward()
        optimizer.step()
        similarities.append(kernel.item())
    assert similarities[-1] > similarities[0] + 0.1
