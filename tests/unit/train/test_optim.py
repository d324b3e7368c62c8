"""Learning-rate schedule."""

from __future__ import annotations

import pytest

from vlduet.train.optim import learning_rate_factor


def test_the_learning_rate_rises_linearly_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors[-1] < 0.001
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_without_warmup_the_first_step_has_the_full_learning_rate() -> None:
    assert learning_rate_factor(0, 100, 0.0) == 1.0
