"""The chunked cross entropy against the plain one, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vlduet.objectives.language import compute_token_nll, language_loss


@pytest.mark.parametrize("count", [0, 1, 5, 8, 21])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_chunks_do_not_change_values_or_gradients(
    count: int, with_bias: bool, cap: float | None
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(11, (count,))
    found = compute_token_nll(hidden, weight, targets, bias=bias, logit_softcap=cap, chunk_size=4)
    logits = F.linear(hidden, weight, bias)
    slow = F.cross_entropy(
        logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none"
    )
    assert_close(found.double(), slow)
    weights = torch.arange(count, dtype=torch.float64)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    fast_grads = torch.autograd.grad(
        (found.double() * weights).sum(), inputs, retain_graph=True, allow_unused=True
    )
    slow_grads = torch.autograd.grad((slow * weights).sum(), inputs)
    for fast, plain in zip(fast_grads, slow_grads, strict=True):
        assert_close(torch.zeros_like(plain) if fast is None else fast, plain)


def test_the_mean_is_over_the_global_count() -> None:
    shares = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    losses = [language_loss(nll, global_token_count=4, world_size=2) for nll in shares]
    assert float(sum(losses) / 2) == pytest.approx(16 / 4)  # type: ignore[arg-type]
    assert float(language_loss(torch.zeros(0), global_token_count=0)) == 0
