"""Gradient of the alignment kernel against autograd, finite differences and the other engine."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from helpers.gak_reference import compute_reference_kernel, cut, draw_pairs, draw_sequences
from vlduet.objectives.gak import all_pairs, api
from vlduet.objectives.gak.api import gak_matrix
from vlduet.objectives.gak.engine import PairGrid


@pytest.mark.parametrize(
    "options", [{}, {"sigma": 0.8}, {"normalize": False, "log": True}, {"normalize": False}]
)
def test_gradient_in_float64_passes_gradcheck(options):
    x = draw_sequences([2, 1, 3], dim=3)
    y = draw_sequences([2, 3], seed=1, dim=3)
    inputs = tuple(sequence.requires_grad_() for sequence in (*x, *y))
    assert torch.autograd.gradcheck(lambda *s: gak_matrix(s[:3], s[3:], **options), inputs)
    assert torch.autograd.gradcheck(lambda *s: gak_matrix(s, **options), tuple(x))


def test_gradient_of_cells_equals_finite_differences(engine):
    distances, lengths_x, lengths_y = draw_pairs(3, 4, 3)
    sigma = 0.8
    cells = distances.float().permute(1, 2, 0)  # one sequence x against three sequences y
    selected = api.select_engine(cells)
    num_lanes = selected.choose_group_size(cells.device, 3)
    padding = num_lanes - 3
    grid = PairGrid(
        first_rows=torch.tensor([0]),
        scale=torch.full((1, num_lanes), 0.5 / sigma**2),
        lengths_x=F.pad(lengths_x, (0, padding), value=1)[None],
        lengths_y=F.pad(lengths_y, (0, padding), value=1)[None],
    )
    padded = F.pad(cells, (0, padding)).contiguous()
    log_k, gradient = selected.log_gak_and_weights(padded.clone, grid, kind="gradient")
    assert_close(selected.log_gak(padded, grid), log_k)
    step = 1e-6
    for p in range(3):
        pair = cut(distances[p], lengths_x[p], lengths_y[p])
        expected = math.log(compute_reference_kernel(pair, sigma))
        assert float(log_k[0, p]) == pytest.approx(expected, abs=1e-5)
        for i, row in enumerate(pair):
            for j, distance in enumerate(row):
                values = []
                for sign in (1, -1):
                    row[j] = distance + sign * step
                    values.append(math.log(compute_reference_kernel(pair, sigma)))
                row[j] = distance
                difference = (values[0] - values[1]) / (2 * step)
                assert float(gradient[i, j, p]) == pytest.approx(difference, abs=1e-5)


def test_gradient_of_slices_cut_from_one_tensor_equals_float64(engine):
    """As in a recipe: rows of one forward pass, one row in several prefixes."""
    states = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

    def compute_gradient(dtype: torch.dtype) -> Tensor:
        leaf = states.detach().clone().to(dtype).requires_grad_()
        unit = F.normalize(leaf, dim=1)
        kernel = gak_matrix([unit[:3], unit[:7], unit[7:8], unit[7:12]], delta=0.5)
        (kernel * torch.arange(16, dtype=dtype).view(4, 4)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    single = compute_gradient(torch.float32)
    assert_close(single, compute_gradient(torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [None, 0.6, 0.02], ids=["by length", "fixed", "out of range"])
@pytest.mark.parametrize("sides", ["x, constant y", "x and y", "x alone"])
def test_gradient_of_many_blocks_equals_float64(monkeypatch, engine, sides, sigma):
    """Blocks of a few sequences, computed and summed up by threads."""
    monkeypatch.setattr(all_pairs, "MAX_CELLS_PER_BLOCK", 1 << 11)
    monkeypatch.setattr(all_pairs, "MIN_CELLS_PER_THREAD", 1)
    generator = torch.Generator().manual_seed(1)
    lengths_x = torch.randint(1, 10, (70,), generator=generator).tolist()
    lengths_y = torch.randint(1, 10, (41,), generator=generator).tolist()
    x = draw_sequences(lengths_x, seed=70)
    y = draw_sequences(lengths_y, seed=41)
    shape = (70, 70) if sides == "x alone" else (70, 41)
    weights = torch.randn(shape, dtype=torch.float64, generator=generator)

    def compute_gradients(dtype: torch.dtype) -> list[Tensor]:
        left = [sequence.clone().to(dtype).requires_grad_() for sequence in x]
        right = [sequence.clone().to(dtype) for sequence in y]
        leaves = list(left)
        if sides == "x and y":
            leaves += [sequence.requires_grad_() for sequence in right]
        kernel = gak_matrix(left, None if sides == "x alone" else right, sigma=sigma, log=True)
        (kernel * weights.to(dtype)).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    # With sigma = 0.02, the digits that float32 loses of a distance count 1 / (2 sigma^2) = 1,250
    # times.
    tolerance = 2e-2 if sigma == 0.02 else 2e-4
    expected = compute_gradients(torch.float64)
    for gradient, reference in zip(compute_gradients(torch.float32), expected, strict=True):
        largest = max(float(reference.abs().max()), 1)
        assert_close(gradient, reference, rtol=0, atol=tolerance * largest)


def sum_kernel_in_child(queue: multiprocessing.Queue) -> None:
    # As torch's loaders do: OpenMP hangs in a fork of a process that has used its threads.
    torch.set_num_threads(1)
    queue.put(float(gak_matrix(draw_sequences([40] * 35, dtype=torch.float32)).sum()))


def test_kernel_in_a_forked_process_equals_that_of_its_parent():
    """Loader workers are forks: they have the memory of the pool, and none of its threads."""
    expected = float(gak_matrix(draw_sequences([40] * 35, dtype=torch.float32)).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=sum_kernel_in_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == pytest.approx(expected)
    process.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_values_and_gradient_on_a_gpu_equal_those_on_the_cpu():
    x = draw_sequences([1, 9, 4, 30, 17], dim=32, dtype=torch.float32)
    on_gpu = [sequence.cuda().requires_grad_() for sequence in x]
    kernel = gak_matrix(on_gpu, delta=0.7)
    kernel.square().sum().backward()
    on_cpu = [sequence.clone().requires_grad_() for sequence in x]
    expected = gak_matrix(on_cpu, delta=0.7)
    expected.square().sum().backward()
    assert_close(kernel.cpu(), expected, rtol=1e-4, atol=1e-5)
    for gpu_sequence, cpu_sequence in zip(on_gpu, on_cpu, strict=True):
        assert_close(gpu_sequence.grad.cpu(), cpu_sequence.grad, rtol=1e-3, atol=1e-5)
