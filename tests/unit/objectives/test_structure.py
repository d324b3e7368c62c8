"""L_d against a float64 loop that follows the formulas one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers.infonce_reference import draw_unit_vectors
from vlduet.objectives.structure import structure_loss

FORMS = [{}, {"n_ref": 11}, {"kind": "kl"}, {"kind": "kl", "temperature": 0.5}]


def compute_reference_loss(
    vectors: Tensor,
    target: Tensor,
    *,
    kind: str = "mse",
    temperature: float = 0.1,
    n_ref: int | None = None,
) -> Tensor:
    """Return L_d with its gradient in the vectors."""
    n = len(vectors)
    cosine = vectors @ vectors.T
    if kind == "mse":
        total = torch.zeros((), dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                total = total + (cosine[i, j] - target[i, j]) ** 2
        return total / n if n_ref is None else total / n**2 * n_ref
    divergence = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        columns = [j for j in range(n) if j != i]
        q = torch.stack([torch.exp(cosine[i, j] / temperature) for j in columns])
        p = torch.tensor([math.exp(float(target[i, j]) / temperature) for j in columns]).double()
        q = q / q.sum()
        p = p / p.sum()
        forward = (p * (p.log() - q.log())).sum()
        backward = (q * (q.log() - p.log())).sum()
        divergence = divergence + (forward + backward) / 2
    return divergence / n


def draw_target(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(5, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_equal_the_loop(form) -> None:
    embeddings = draw_unit_vectors(5, 0).requires_grad_()
    reference = draw_unit_vectors(5, 0).requires_grad_()
    target = draw_target(0)
    loss = structure_loss(embeddings, target, **form)
    expected = compute_reference_loss(reference, target, **form)
    assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    loss.backward()
    expected.backward()
    assert_close(embeddings.grad, reference.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_mean_of_the_shares_of_ranks_is_the_loss(form) -> None:
    embeddings = draw_unit_vectors(5, 1)
    target = draw_target(1)
    shares = []
    for begin, end in ((0, 2), (2, 2), (2, 5)):
        share = structure_loss(
            embeddings[begin:end],
            target[begin:end],
            all_embeddings=embeddings,
            first_row=begin,
            world_size=3,
            **form,
        )
        shares.append(share)
    assert_close(torch.stack(shares).mean(), structure_loss(embeddings, target, **form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare_gives_0_that_is_part_of_the_graph(form, count) -> None:
    embeddings = draw_unit_vectors(count, 2).requires_grad_()
    loss = structure_loss(embeddings, torch.ones(count, count), **form)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert bool(embeddings.grad.isfinite().all())


def test_n_ref_equal_to_n_gives_the_loss_of_the_paper() -> None:
    embeddings = draw_unit_vectors(4, 3)
    target = torch.zeros(4, 4, dtype=torch.float64)
    loss = structure_loss(embeddings, target, n_ref=4)
    assert_close(loss, structure_loss(embeddings, target))
