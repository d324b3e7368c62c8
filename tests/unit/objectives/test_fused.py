"""The fused kernels against the sweep in log space, forward and back: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from vlduet.objectives.gak import log_space
from vlduet.objectives.gak.api import compute_alignment_posterior, gak_matrix, gak_pairs

HERE = Path(__file__)
NEEDS = "triton is not installed: it comes with CUDA builds of torch, or by 'pip install triton' on Linux"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=NEEDS)
def test_in_the_interpreter() -> None:
    """In a process of its own: triton decides at its import whether it interprets."""
    source = HERE.parents[3] / "src"
    paths = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(HERE)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "agree"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    pytest.importorskip("triton", reason=NEEDS)
    compare("cuda", lengths=[1 + i * 7 % 40 for i in range(70)], dim=32)


def compare(device: str, *, lengths: list[int], dim: int) -> None:
    """Every way into the kernels, against float64 in log space on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = [F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in lengths]
    calls: list[str] = []
    fused = log_space.fused()
    assert fused is not None
    plain = fused.run

    def counted(*given: Tensor, **named: object) -> tuple[Tensor, Tensor]:
        calls.append(str(named["weigh"]))
        found: tuple[Tensor, Tensor] = plain(*given, **named)
        return found

    fused.run = counted
    for delta in (0.1, 0.8):
        leaves = [each.to(device).clone().requires_grad_() for each in x]
        exact = [each.double().requires_grad_() for each in x]
        found, wanted = gak_matrix(leaves, delta=delta), gak_matrix(exact, delta=delta)
        assert_close(found.double().cpu(), wanted, rtol=1e-4, atol=1e-5)
        weight = torch.rand(wanted.shape, generator=generator, dtype=torch.float64)
        (found * weight.to(found)).sum().backward()
        (wanted * weight).sum().backward()
        for ours, theirs in zip(leaves, exact, strict=True):
            assert_close(ours.grad.double().cpu(), theirs.grad, rtol=1e-3, atol=1e-4)
    assert set(calls) == {"gradient"}
    calls.clear()

    pairs, m, n = 35, 4, 3
    sqdist = torch.rand(pairs, m, n, dtype=torch.float64, generator=generator) * 4
    ends = [torch.randint(1, most + 1, (pairs,), generator=generator) for most in (m, n)]
    for sigma in (0.02, 0.7, 20.0):
        given = sqdist.float().to(device), *(each.to(device) for each in ends)
        assert_close(
            gak_pairs(*given, sigma=sigma).double().cpu(),
            gak_pairs(sqdist, *ends, sigma=sigma),
            rtol=1e-5,
            atol=1e-4,
        )
        posterior = compute_alignment_posterior(*given, sigma=sigma).double().cpu()
        # At the smallest width log K is of thousands, and float32 distances alone move it by some 1e-3.
        assert_close(
            posterior,
            compute_alignment_posterior(sqdist, *ends, sigma=sigma),
            rtol=1e-3,
            atol=5e-3 if sigma < 0.1 else 1e-5,
        )
    assert set(calls) == {"None", "posterior"}
    fused.run = plain


if __name__ == "__main__":
    interpreted = log_space.fused()
    on_cpu = log_space.engine
    # Tensors of the interpreter lie on the CPU.
    log_space.engine = lambda like, band: (
        interpreted if on_cpu(like.float(), band) and like.dtype == torch.float32 else None
    )
    compare("cpu", lengths=[3, 1, 6, 4], dim=5)
    print("agree")
