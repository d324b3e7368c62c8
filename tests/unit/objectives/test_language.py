"""Chunked cross entropy against the plain one: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vlduet.objectives.language import compute_token_nll, language_loss, softcap_logits


@pytest.mark.parametrize("count", [0, 1, 5, 8, 21])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("logit_softcap", [None, 1.5])
def test_values_and_gradients_in_chunks_equal_plain_cross_entropy(
    count: int, has_bias: bool, logit_softcap: float | None
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets = torch.randint(11, (count,))
    nll = compute_token_nll(
        hidden, weight, targets, bias=bias, logit_softcap=logit_softcap, chunk_size=4
    )
    logits = F.linear(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert_close(nll.double(), expected)
    weights = torch.arange(count, dtype=torch.float64)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    grads = torch.autograd.grad(
        (nll.double() * weights).sum(), inputs, retain_graph=True, allow_unused=True
    )
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(torch.zeros_like(expected_grad) if grad is None else grad, expected_grad)


def test_softcap_bounds_logits_and_none_returns_them() -> None:
    logits = torch.tensor([-100.0, 0.0, 100.0])
    assert softcap_logits(logits, 30.0).abs().max() <= 30
    assert softcap_logits(logits, None) is logits


def test_mean_of_the_shares_of_ranks_is_the_mean_over_all_tokens() -> None:
    shares = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    losses = [language_loss(nll, global_token_count=4, world_size=2) for nll in shares]
    assert float(torch.stack(losses).mean()) == pytest.approx(16 / 4)


def test_loss_without_a_token_is_zero() -> None:
    assert float(language_loss(torch.zeros(0), global_token_count=0)) == 0
