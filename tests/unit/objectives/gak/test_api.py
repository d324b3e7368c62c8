"""Alignment kernel against the paper's recursion in plain loops: values, stability and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers.gak_reference import (
    compute_reference_kernel,
    compute_reference_log_kernel,
    compute_reference_matrix,
    cut,
    draw_pairs,
    draw_sequences,
)
from vlduet.objectives.gak import api
from vlduet.objectives.gak.api import (
    compute_alignment_posterior,
    compute_alignment_weighted_mean,
    compute_log_gak,
    compute_sigma,
    gak_matrix,
)
from vlduet.objectives.gak.log_space import LogSpaceEngine, compute_log_kappa

# ------------------------------------------------------------------ engines


def test_log_space_is_selected_for_float64_and_without_numba(monkeypatch):
    assert isinstance(api.select_engine(torch.zeros(1, dtype=torch.float64)), LogSpaceEngine)
    monkeypatch.setitem(api.ENGINES, ("cpu", torch.float32), lambda: None)
    assert isinstance(api.select_engine(torch.zeros(1)), LogSpaceEngine)


def test_numba_is_selected_for_float32_on_a_cpu():
    cpu_numba = pytest.importorskip("vlduet.objectives.gak.cpu_numba")
    assert isinstance(api.select_engine(torch.zeros(1)), cpu_numba.NumbaEngine)


# ------------------------------------------------------------------ gak_matrix


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([None, 0.4, 1.5]),
    st.booleans(),
)
def test_matrix_equals_the_recursion_of_the_paper(lengths_x, lengths_y, sigma, normalize):
    x = draw_sequences(lengths_x)
    y = draw_sequences(lengths_y, seed=1)
    options = {"sigma": sigma, "delta": 0.7, "normalize": normalize}
    expected = compute_reference_matrix(x, y, **options)
    assert_close(gak_matrix(x, y, **options), expected, rtol=1e-9, atol=1e-12)
    single_x = [sequence.float() for sequence in x]
    single_y = [sequence.float() for sequence in y]
    matrix = gak_matrix(single_x, single_y, **options)
    assert_close(matrix.double(), expected, rtol=3e-5, atol=1e-7)


def test_matrix_of_more_sequences_than_one_group_holds(engine):
    lengths = [1 + i * 5 % 7 for i in range(40)]
    x = draw_sequences(lengths, dtype=torch.float32)
    y = draw_sequences(lengths[:35], seed=1, dtype=torch.float32)
    for other in (x, y):
        expected = compute_reference_matrix(x, other, delta=0.6)
        matrix = gak_matrix(x, None if other is x else other, delta=0.6)
        assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-6)


def test_matrix_of_x_alone_is_symmetric_with_diagonal_1(engine):
    x = draw_sequences([3, 1, 8, 5, 5], dtype=torch.float32)
    kernel = gak_matrix(x)
    assert torch.equal(kernel, kernel.T)
    assert kernel.diagonal().tolist() == [1.0] * 5
    assert_close(gak_matrix(x, list(x)), kernel)
    assert ((kernel > 0) & (kernel <= 1)).all()


def test_raw_kernel_of_equal_slices_is_a_delannoy_number():
    x = [torch.ones(8, 3) / math.sqrt(3)]
    delannoy_7_7 = 48639.0
    assert_close(gak_matrix(x, normalize=False), torch.tensor([[delannoy_7_7]]), rtol=1e-5, atol=0)
    log_kernel = gak_matrix(x, normalize=False, log=True)
    assert_close(log_kernel, torch.tensor([[math.log(delannoy_7_7)]]))


def test_matrix_equals_tslearn():
    tslearn = pytest.importorskip("tslearn.metrics")
    x = draw_sequences([3, 9, 5, 7])
    y = draw_sequences([4, 2, 8], seed=1)
    for sigma in (0.5, 2.0):
        numpy_x = [sequence.numpy() for sequence in x]
        numpy_y = [sequence.numpy() for sequence in y]
        expected = torch.tensor(tslearn.cdist_gak(numpy_x, numpy_y, sigma=sigma))
        assert_close(gak_matrix(x, y, sigma=sigma), expected, rtol=1e-7, atol=1e-10)


# ------------------------------------------------------------------ pairs


def test_log_kernel_of_pairs_equals_the_recursion_of_the_paper(engine):
    distances, lengths_x, lengths_y = draw_pairs(40, 7, 9)
    for sigma in (torch.tensor(0.5), compute_sigma(lengths_x, lengths_y, 0.8)):
        kernels = [
            compute_reference_kernel(cut(distances[p], lengths_x[p], lengths_y[p]), float(width))
            for p, width in enumerate(sigma.expand(40))
        ]
        expected = torch.tensor(kernels, dtype=torch.float64).log()
        log_k = compute_log_gak(distances, lengths_x, lengths_y, sigma=sigma)
        assert_close(log_k, expected, rtol=1e-10, atol=1e-10)
        log_k = compute_log_gak(distances.float(), lengths_x, lengths_y, sigma=sigma)
        assert_close(log_k, expected, rtol=1e-5, atol=1e-5)


def test_entries_beyond_the_lengths_are_not_read(engine):
    distances, lengths_x, lengths_y = draw_pairs(40, 6, 5)
    distances = distances.float()
    is_row_outside = torch.arange(6) >= lengths_x[:, None]
    is_column_outside = torch.arange(5) >= lengths_y[:, None]
    is_outside = is_row_outside[:, :, None] | is_column_outside[:, None, :]
    with_nan = distances.masked_fill(is_outside, math.nan)
    for compute in (compute_log_gak, compute_alignment_posterior, compute_alignment_weighted_mean):
        expected = compute(distances, lengths_x, lengths_y, sigma=1.0)
        assert_close(compute(with_nan, lengths_x, lengths_y, sigma=1.0), expected)
    posterior = compute_alignment_posterior(with_nan, lengths_x, lengths_y, sigma=1.0)
    assert not posterior[is_outside].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_is_the_gradient_of_the_reference(engine, dtype):
    distances, lengths_x, lengths_y = draw_pairs(37, 8, 6)
    posterior = compute_alignment_posterior(distances.to(dtype), lengths_x, lengths_y, sigma=0.7)
    scale = torch.tensor(0.5 / 0.7**2, dtype=torch.float64)
    log_kappa = compute_log_kappa(distances.to(dtype).double(), scale).requires_grad_()
    for p in range(37):
        compute_reference_log_kernel(log_kappa[p, : lengths_x[p], : lengths_y[p]]).backward()
    assert posterior.dtype == dtype
    assert_close(posterior.double(), log_kappa.grad, rtol=1e-5, atol=1e-6)


def test_posterior_is_that_of_alignments_from_corner_to_corner(engine):
    distances, lengths_x, lengths_y = draw_pairs(37, 8, 6)
    posterior = compute_alignment_posterior(distances.float(), lengths_x, lengths_y, sigma=0.7)
    pair = torch.arange(37)
    ones = torch.ones(37)
    assert_close(posterior[:, 0, 0], ones)
    assert_close(posterior[pair, lengths_x - 1, lengths_y - 1], ones)
    is_slice = torch.arange(8) < lengths_x[:, None]
    assert (posterior.sum(2)[is_slice] > 1 - 1e-5).all(), "an alignment passes every slice"
    num_cells = posterior.double().sum((1, 2))
    assert (num_cells > torch.maximum(lengths_x, lengths_y) - 1e-4).all()
    assert (num_cells < lengths_x + lengths_y - 1 + 1e-4).all()


def test_posterior_of_a_sequence_with_itself_is_its_diagonal_if_sigma_is_small():
    (x,) = draw_sequences([4])
    distances = torch.cdist(x, x)[None] ** 2
    length = torch.tensor([4])
    (posterior,) = compute_alignment_posterior(distances, length, length, sigma=0.1)
    assert_close(posterior, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-3)


def test_alignment_weighted_mean_depends_on_the_order(engine):
    x, y = draw_sequences([5, 5])
    cosines = torch.stack([x @ x.T, x @ x.flip(0).T, x @ y.T]).float()
    lengths = torch.full((3,), 5)
    distances = 2 - 2 * cosines
    means = compute_alignment_weighted_mean(distances, lengths, lengths, sigma=0.2)
    with_itself, with_reversed, with_other = means.tolist()
    assert with_itself == pytest.approx(1, abs=1e-3)
    assert with_reversed < 0.8
    assert -1 <= with_other < 0.8
    weights = compute_alignment_posterior(distances, lengths, lengths, sigma=0.2)
    expected = (weights[2] * cosines[2]).sum() / weights[2].sum()
    assert_close(torch.tensor(with_other), expected)


def test_a_short_pair_does_not_change_a_long_one_of_the_same_batch(engine):
    distances = torch.rand(2, 300, 280, generator=torch.Generator().manual_seed(0)) * 2
    lengths_x = torch.tensor([1, 300])
    lengths_y = torch.tensor([280, 280])
    single = compute_alignment_weighted_mean(distances, lengths_x, lengths_y, sigma=1.0)
    double = compute_alignment_weighted_mean(distances.double(), lengths_x, lengths_y, sigma=1.0)
    assert_close(single.double(), double, atol=1e-4, rtol=0)


def test_no_pairs_give_empty_tensors():
    none = torch.zeros(0)
    distances = torch.zeros(0, 3, 4)
    assert compute_log_gak(distances, none, none, sigma=1.0).shape == (0,)
    assert compute_alignment_posterior(distances, none, none, sigma=1.0).shape == (0, 3, 4)
    assert compute_alignment_weighted_mean(distances, none, none, sigma=1.0).shape == (0,)


# ------------------------------------------------------------------ stability


@pytest.mark.parametrize("sigma", [0.02, 0.3, 20.0])
def test_float32_equals_float64_up_to_length_512(engine, sigma):
    """Far beyond the range of a plain product: numba rescales, or hands pairs to log space."""
    distances, _, _ = draw_pairs(2, 512, 512, max_distance=2.0)
    distances[0] = 0
    lengths_x = torch.tensor([512, 500])
    lengths_y = torch.tensor([512, 512])
    expected = compute_log_gak(distances, lengths_x, lengths_y, sigma=sigma)
    log_k = compute_log_gak(distances.float(), lengths_x, lengths_y, sigma=sigma)
    assert_close(log_k, expected, rtol=2e-6, atol=2e-3)
    posterior = compute_alignment_posterior(distances.float(), lengths_x, lengths_y, sigma=sigma)
    assert posterior.isfinite().all()
    assert_close(posterior[[0, 1], lengths_x - 1, lengths_y - 1], torch.ones(2))
    assert_close(posterior[[0, 1], 0, 0], torch.ones(2), rtol=0, atol=2e-3)


def test_normalised_kernel_of_long_sequences_in_float32_equals_float64(engine):
    x = draw_sequences([260, 1, 130], dim=16)
    for delta in (0.05, 0.7):
        single = gak_matrix([sequence.float() for sequence in x], delta=delta)
        assert single.isfinite().all()
        assert_close(single.double(), gak_matrix(x, delta=delta), rtol=1e-3, atol=1e-4)


def test_kernel_does_not_depend_on_the_origin(engine):
    x = draw_sequences([3, 6, 4], dtype=torch.float32)
    shifted = [sequence + 100 for sequence in x]
    assert_close(gak_matrix(shifted), gak_matrix(x), rtol=0, atol=1e-3)


def test_zero_features_are_equal_slices(engine):
    x = [torch.zeros(length, 4) for length in (1, 3, 8)]
    assert_close(gak_matrix(x, sigma=1.0).diagonal(), torch.ones(3))
    delannoy_2_7 = 113.0
    assert_close(gak_matrix(x, x, normalize=False)[1, 2], torch.tensor(delannoy_2_7))


def test_half_precision_returns_half_precision():
    x = draw_sequences([3, 5], dtype=torch.float32)
    half = gak_matrix([sequence.bfloat16() for sequence in x])
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), gak_matrix(x), rtol=0, atol=0.02)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([torch.ones(2, 3), torch.ones(0, 3)], None, {}, r"x\[1\] has the shape \(0, 3\)"),
        ([torch.ones(2, 3)], [torch.ones(3)], {}, r"y\[0\] has the shape"),
        ([torch.ones(2, 3), torch.ones(2, 4)], None, {}, r"x\[1\] has the shape \(2, 4\)"),
        ([torch.ones(2, 3)], [torch.ones(2, 4)], {}, "x have 3 features, those of y have 4"),
        ([], None, {}, "x holds no sequences"),
        ([torch.ones(2, 3), torch.full((1, 3), math.nan)], None, {}, r"x\[1\] .*not finite"),
        ([torch.ones(2, 3)], [torch.full((1, 3), math.inf)], {}, r"y\[0\] .*not finite"),
        ([torch.ones(2, 3)], None, {"sigma": 0.0}, "sigma or delta is 0"),
        ([torch.ones(2, 3)], None, {"delta": -1.0}, "sigma or delta is -1"),
    ],
)
def test_wrong_arguments_of_the_matrix_are_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        gak_matrix(x, y, **options)


@pytest.mark.parametrize(
    ("distances", "lengths_x", "lengths_y", "message"),
    [
        (torch.ones(2, 3, 3), [1, 0], [2, 2], "pair 1: 0 slices in x"),
        (torch.ones(2, 3, 3), [2, 2], [4, 1], "pair 0: 4 slices in y"),
        (torch.tensor([[[0.0]], [[math.nan]]]), [1, 1], [1, 1], "pair 1: NaN"),
        (torch.ones(2, 3, 3), [1], [2, 2], "lengths_x"),
        (torch.ones(2, 3), [1, 1], [1, 1], "squared_distances has the shape"),
    ],
)
def test_wrong_arguments_of_pairs_are_named(distances, lengths_x, lengths_y, message):
    with pytest.raises(ValueError, match=message):
        compute_log_gak(distances, torch.tensor(lengths_x), torch.tensor(lengths_y), sigma=1.0)
