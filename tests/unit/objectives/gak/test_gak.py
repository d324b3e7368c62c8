"""The alignment kernel against the paper's recursion in plain loops: values, gradients, both sweeps, every edge."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from vlduet.objectives.gak import all_pairs, log_space
from vlduet.objectives.gak.api import (
    alignment_posterior,
    compute_alignment_posterior,
    compute_alignment_weighted_mean,
    compute_sigma,
    gak_matrix,
    gak_pairs,
    soft_dtw,
)


@pytest.fixture(params=["compiled", "log space"])
def sweep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(log_space, "compiled", lambda: None)
    return str(request.param)


def slow_k(distance: list[list[float]], sigma: float, band: int | None = None) -> float:
    """G[M,N] of the paper, one cell at a time; distances are squared."""
    m, n = len(distance), len(distance[0])
    g = [[0.0] * (n + 1) for _ in range(m + 1)]
    g[0][0] = 1.0
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            weight = 1.0 if band is None else max(0.0, 1 - abs(i - j) / band)
            s = weight * math.exp(-distance[i - 1][j - 1] / (2 * sigma**2))
            g[i][j] = (g[i][j - 1] + g[i - 1][j - 1] + g[i - 1][j]) * s / (2 - s)
    return g[m][n]


def slow_matrix(x, y, *, sigma=None, delta=1.0, normalize=True, band=None) -> Tensor:
    def distance(a, b):
        return (a[:, None] - b).square().sum(2).tolist()

    def one(a, b):
        width = sigma or delta * math.sqrt((len(a) + len(b)) / 2)
        k = slow_k(distance(a, b), width, band)
        own = slow_k(distance(a, a), width, band) * slow_k(distance(b, b), width, band)
        return k / math.sqrt(own) if normalize else k

    return torch.tensor([[one(a, b) for b in y] for a in x], dtype=torch.float64)


def sequences(lengths, *, seed=0, dim=5, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(n, dim, dtype=torch.float64, generator=generator), dim=1).to(dtype)
        for n in lengths
    ]


def distances(pairs, m, n, *, seed=0, most=4.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sqdist = torch.rand(pairs, m, n, dtype=torch.float64, generator=generator) * most
    x, y = (torch.randint(1, size + 1, (pairs,), generator=generator) for size in (m, n))
    return sqdist, x, y


# ------------------------------------------------------------------ values


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([None, 0.4, 1.5]),
    st.booleans(),
    st.sampled_from([None, 6, 7]),
)
def test_is_the_slow_loop(lengths_x, lengths_y, sigma, normalize, band):
    x, y = sequences(lengths_x), sequences(lengths_y, seed=1)
    options = {"sigma": sigma, "delta": 0.7, "normalize": normalize, "band": band}
    slow = slow_matrix(x, y, **options)
    assert_close(gak_matrix(x, y, **options), slow, rtol=1e-9, atol=1e-12)
    single = [each.float() for each in x], [each.float() for each in y]
    assert_close(gak_matrix(*single, **options).double(), slow, rtol=3e-5, atol=1e-7)


def test_more_sequences_than_fit_side_by_side(sweep):
    lengths = [1 + i * 5 % 7 for i in range(40)]
    x, y = (
        sequences(lengths, dtype=torch.float32),
        sequences(lengths[:35], seed=1, dtype=torch.float32),
    )
    assert_close(
        gak_matrix(x, delta=0.6).double(), slow_matrix(x, x, delta=0.6), rtol=1e-5, atol=1e-6
    )
    assert_close(
        gak_matrix(x, y, delta=0.6).double(), slow_matrix(x, y, delta=0.6), rtol=1e-5, atol=1e-6
    )


def test_one_against_itself_is_one_and_the_matrix_symmetric(sweep):
    x = sequences([3, 1, 8, 5, 5], dtype=torch.float32)
    k = gak_matrix(x)
    assert_close(k, k.T, rtol=0, atol=0)
    assert k.diagonal().tolist() == [1.0] * 5
    assert_close(gak_matrix(x, list(x)), k)
    assert ((k > 0) & (k <= 1)).all()


def test_raw_and_logarithm():
    x = [torch.ones(8, 3) / math.sqrt(3)]
    assert_close(
        gak_matrix(x, normalize=False), torch.tensor([[48639.0]]), rtol=1e-5, atol=0
    )  # Delannoy D(7, 7)
    assert_close(gak_matrix(x, normalize=False, log=True), torch.tensor([[math.log(48639)]]))


def test_reference_implementation():
    tslearn = pytest.importorskip("tslearn.metrics")
    x, y = sequences([3, 9, 5, 7]), sequences([4, 2, 8], seed=1)
    for sigma in (0.5, 2.0):
        theirs = tslearn.cdist_gak(
            [each.numpy() for each in x], [each.numpy() for each in y], sigma=sigma
        )
        assert_close(gak_matrix(x, y, sigma=sigma), torch.tensor(theirs), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("band", [None, 1, 3])
def test_pairs_are_the_slow_loop(sweep, band):
    sqdist, x, y = distances(40, 7, 9)
    for sigma in (0.5, compute_sigma(x, y, 0.8)):
        widths = torch.as_tensor(sigma).expand(40).tolist()
        slow = [slow_k(sqdist[p, : x[p], : y[p]].tolist(), widths[p], band) for p in range(40)]
        slow = torch.tensor(slow, dtype=torch.float64).log()  # -inf where the band leaves nothing
        assert_close(gak_pairs(sqdist, x, y, sigma=sigma, band=band), slow, rtol=1e-10, atol=1e-10)
        assert_close(
            gak_pairs(sqdist.float(), x, y, sigma=sigma, band=band).double(),
            slow,
            rtol=1e-5,
            atol=1e-5,
        )


def test_what_lies_beyond_the_lengths_is_never_read(sweep):
    sqdist, x, y = distances(40, 6, 5)
    sqdist = sqdist.float()
    outside = ~log_space.inside(torch.ones(40, 6, 5), x, y).bool()
    dirty = sqdist.masked_fill(outside, math.nan).requires_grad_()
    found = gak_pairs(dirty, x, y, sigma=1.0)
    assert_close(found, gak_pairs(sqdist, x, y, sigma=1.0))
    found.sum().backward()
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[outside].any()


# ------------------------------------------------------------------ gradients


def test_gradients_in_float64():
    sqdist, x, y = distances(4, 3, 4)
    sqdist.requires_grad_()
    assert torch.autograd.gradcheck(lambda d: gak_pairs(d, x, y, sigma=0.9), (sqdist,))
    assert torch.autograd.gradcheck(lambda d: gak_pairs(d, x, y, sigma=0.9, band=4), (sqdist,))
    assert torch.autograd.gradcheck(lambda d: soft_dtw(d, x, y, gamma=0.3), (sqdist,))


@pytest.mark.parametrize(
    "options", [{}, {"sigma": 0.8}, {"normalize": False, "log": True}, {"band": 4}]
)
def test_gradients_through_the_slices(options):
    x, y = sequences([2, 1, 3], dim=3), sequences([2, 3], seed=1, dim=3)
    inputs = tuple(each.requires_grad_() for each in (*x, *y))
    assert torch.autograd.gradcheck(lambda *each: gak_matrix(each[:3], each[3:], **options), inputs)
    assert torch.autograd.gradcheck(lambda *each: gak_matrix(each, **options), tuple(x))


def test_gradients_of_slices_cut_from_one_tensor(sweep):
    """As a recipe has them: rows of one forward's embeddings, one row in several prefixes."""
    states = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))  # rows of one forward

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = states.detach().clone().to(dtype).requires_grad_()
        unit = F.normalize(leaf, dim=1)
        k = gak_matrix([unit[:3], unit[:7], unit[7:8], unit[7:12]], delta=0.5)
        (k * torch.arange(16, dtype=dtype).view(4, 4)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    assert_close(gradient(torch.float32), gradient(torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sigma", [None, 0.6, 0.02], ids=["by length", "one", "beyond the sweep's range"]
)
@pytest.mark.parametrize("sides", ["x alone", "x and y", "x of both"])
def test_gradients_of_many_blocks_are_those_of_log_space(monkeypatch, sweep, sides, sigma):
    """Blocks of a few sequences, made and added up by threads."""
    monkeypatch.setattr(all_pairs, "BLOCK", 1 << 11)
    monkeypatch.setattr(all_pairs, "ENOUGH", 1)
    draw = torch.Generator().manual_seed(1)
    x, y = (
        sequences(torch.randint(1, 10, (count,), generator=draw).tolist(), seed=count)
        for count in (70, 41)
    )
    shape = (70, 70) if sides == "x of both" else (70, 41)
    weights = torch.randn(shape, dtype=torch.float64, generator=draw)

    def gradient(dtype: torch.dtype) -> list[Tensor]:
        left, right = ([one.to(dtype).requires_grad_() for one in side] for side in (x, y))
        other = {"x alone": [one.detach() for one in right], "x and y": right, "x of both": None}[
            sides
        ]
        k = gak_matrix(left, other, sigma=sigma, log=True)
        (k * weights.to(dtype)).sum().backward()
        return [one.grad.double() for one in (left + right if sides == "x and y" else left)]

    for found, wanted in zip(gradient(torch.float32), gradient(torch.float64), strict=True):
        # 1 / (2 sigma^2) = 1,250 times the digits that single precision loses of a distance
        away = 2e-2 if sigma == 0.02 else 2e-4
        assert_close(found, wanted, rtol=0, atol=away * max(float(wanted.abs().max()), 1))


def test_slow_twin_of_the_gradient(sweep):
    """Finite differences of the slow loop."""
    sqdist, x, y = distances(3, 4, 3)
    given = sqdist.float().requires_grad_()
    gak_pairs(given, x, y, sigma=0.8).sum().backward()
    step = 1e-6
    for p in range(3):
        cells = sqdist[p, : x[p], : y[p]]
        for i in range(int(x[p])):
            for j in range(int(y[p])):
                around = []
                for sign in (1, -1):
                    moved = cells.clone()
                    moved[i, j] += sign * step
                    around.append(math.log(slow_k(moved.tolist(), 0.8)))
                assert float(given.grad[p, i, j]) == pytest.approx(
                    (around[0] - around[1]) / (2 * step), abs=1e-5
                )


# ------------------------------------------------------------------ posterior, awm, soft-DTW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior(sweep, dtype):
    sqdist, x, y = distances(37, 8, 6)
    sqdist = sqdist.to(dtype)
    posterior = compute_alignment_posterior(sqdist, x, y, sigma=0.7)
    # Autograd of log K by log kappa, through plain operations.
    log_kappa = log_space.log_kappas(
        sqdist.double(), torch.full((37,), 0.5 / 0.7**2), None
    ).requires_grad_()
    for p in range(37):
        plain_log_k(log_kappa[p, : x[p], : y[p]]).backward()
    assert_close(posterior.double(), log_kappa.grad, rtol=1e-5, atol=1e-6)
    last = torch.arange(37)
    assert_close(
        posterior[:, 0, 0], torch.ones(37, dtype=dtype)
    )  # every alignment starts and ends at the corners
    assert_close(posterior[last, x - 1, y - 1], torch.ones(37, dtype=dtype))
    inside = torch.arange(8) < x[:, None]
    assert (posterior.sum(2)[inside] > 1 - 1e-5).all()  # and passes every slice
    cells = posterior.double().sum((1, 2))
    assert (cells > torch.maximum(x, y) - 1e-4).all()
    assert (cells < x + y - 1 + 1e-4).all()


def plain_log_k(log_kappa: Tensor) -> Tensor:
    m, n = log_kappa.shape
    rows = [[log_kappa.new_tensor(-math.inf)] * (n + 1) for _ in range(m + 1)]
    rows[0][0] = log_kappa.new_tensor(0.0)
    for i in range(m):
        for j in range(n):
            before = [
                each
                for each in (rows[i + 1][j], rows[i][j], rows[i][j + 1])
                if float(each.detach()) > -math.inf
            ]
            rows[i + 1][j + 1] = torch.logsumexp(torch.stack(before), 0) + log_kappa[i, j]
    return rows[m][n]


def test_posterior_of_one_pair():
    x, y = sequences([4, 6])
    posterior = alignment_posterior(x, y, sigma=0.2)
    assert posterior.shape == (4, 6)
    same = alignment_posterior(x, x, sigma=0.1)
    assert_close(same, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-3)
    near = (torch.arange(4)[:, None] - torch.arange(6)).abs() < 3
    banded = alignment_posterior(x, y, sigma=0.2, band=3)
    assert banded[~near].abs().max() == 0 and float(banded[3, 5]) == pytest.approx(1), (
        "every path ends in the last cell"
    )


def test_alignment_weighted_mean(sweep):
    x, y = sequences([5, 5])
    cosine = torch.stack([x @ x.T, x @ x.flip(0).T, x @ y.T]).float()
    length = torch.full((3,), 5)
    same, reversed_, other = compute_alignment_weighted_mean(
        2 - 2 * cosine, length, length, sigma=0.2
    ).tolist()
    assert same == pytest.approx(1, abs=1e-3)
    assert reversed_ < 0.8  # the same slices in another order
    assert -1 <= other < 0.8
    weight = compute_alignment_posterior(2 - 2 * cosine, length, length, sigma=0.2)
    assert_close(torch.tensor(other), (weight[2] * cosine[2]).sum() / weight[2].sum())
    nothing = compute_alignment_weighted_mean(
        torch.ones(1, 5, 2), torch.tensor([5]), torch.tensor([2]), sigma=0.2, band=1
    )
    assert nothing.tolist() == [0.0]


def test_a_short_pair_beside_a_long_one(sweep):
    """The rows after the short one's end are swept with the long one's, and must leave nothing in it."""
    cells, x, y = torch.rand(2, 300, 280) * 2, torch.tensor([1, 300]), torch.tensor([280, 280])
    found = compute_alignment_weighted_mean(cells, x, y, sigma=1.0)
    assert_close(
        found.double(),
        compute_alignment_weighted_mean(cells.double(), x, y, sigma=1.0),
        atol=1e-4,
        rtol=0,
    )


def test_soft_dtw():
    cost, x, y = distances(12, 5, 6)
    for gamma in (0.01, 1.0):
        found = soft_dtw(cost, x, y, gamma=gamma)
        for p in range(12):
            assert float(found[p]) == pytest.approx(
                slow_soft_dtw(cost[p, : x[p], : y[p]].tolist(), gamma), abs=1e-9
            )
    # The identity: soft-DTW of gamma (-log kappa) is -gamma log K.
    log_kappa = log_space.log_kappas(cost, torch.full((12,), 0.5, dtype=torch.float64), None)
    assert_close(
        soft_dtw(-0.3 * log_kappa, x, y, gamma=0.3), -0.3 * gak_pairs(cost, x, y, sigma=1.0)
    )


def slow_soft_dtw(cost: list[list[float]], gamma: float) -> float:
    m, n = len(cost), len(cost[0])
    r = [[math.inf] * (n + 1) for _ in range(m + 1)]
    r[0][0] = 0.0
    for i in range(m):
        for j in range(n):
            three = [r[i][j], r[i][j + 1], r[i + 1][j]]
            least = min(three)
            r[i + 1][j + 1] = (
                cost[i][j]
                + least
                - gamma * math.log(sum(math.exp((least - v) / gamma) for v in three))
            )
    return r[m][n]


# ------------------------------------------------------------------ stability


@pytest.mark.parametrize("sigma", [0.02, 0.3, 20.0])
def test_float32_to_length_512(sweep, sigma):
    """Far beyond the range of a plain product, both ways; the compiled sweep rescales, or hands over to log space."""
    sqdist, _, _ = distances(2, 512, 512, most=2.0)
    sqdist[0] = 0
    x, y = torch.tensor([512, 500]), torch.tensor([512, 512])
    exact = gak_pairs(sqdist, x, y, sigma=sigma)
    given = sqdist.float().requires_grad_()
    found = gak_pairs(given, x, y, sigma=sigma)
    assert_close(found.double(), exact, rtol=2e-6, atol=2e-3)
    found.sum().backward()
    assert given.grad.isfinite().all()
    posterior = compute_alignment_posterior(given, x, y, sigma=sigma)
    assert_close(posterior[[0, 1], x - 1, y - 1], torch.ones(2))
    assert_close(posterior[[0, 1], 0, 0], torch.ones(2), rtol=0, atol=2e-3)


def test_normalised_float32_of_long_sequences(sweep):
    lengths = [260, 1, 130]
    x = sequences(lengths, dim=16)
    for delta in (0.05, 0.7):
        single = gak_matrix([each.float() for each in x], delta=delta)
        assert single.isfinite().all()
        assert_close(single.double(), gak_matrix(x, delta=delta), rtol=1e-3, atol=1e-4)


def test_features_far_from_the_origin(sweep):
    x = sequences([3, 6, 4], dtype=torch.float32)
    assert_close(gak_matrix([each + 100 for each in x]), gak_matrix(x), rtol=0, atol=1e-3)


def test_zero_features_are_equal_slices(sweep):
    x = [torch.zeros(n, 4) for n in (1, 3, 8)]
    assert_close(gak_matrix(x, sigma=1.0).diagonal(), torch.ones(3))
    assert_close(gak_matrix(x, x, normalize=False)[1, 2], torch.tensor(113.0))  # Delannoy D(2, 7)


def test_half_precision_comes_back_as_it_came():
    x = sequences([3, 5], dtype=torch.float32)
    half = gak_matrix([each.bfloat16() for each in x])
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), gak_matrix(x), rtol=0, atol=0.02)


def test_no_pairs():
    assert gak_pairs(torch.zeros(0, 3, 4), torch.zeros(0), torch.zeros(0), sigma=1.0).shape == (0,)
    assert compute_alignment_posterior(
        torch.zeros(0, 3, 4), torch.zeros(0), torch.zeros(0), sigma=1.0
    ).shape == (0, 3, 4)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([torch.ones(2, 3), torch.ones(0, 3)], None, {}, r"x\[1\] has the shape \(0, 3\)"),
        ([torch.ones(2, 3)], [torch.ones(3)], {}, r"y\[0\] has the shape"),
        ([torch.ones(2, 3), torch.ones(2, 4)], None, {}, r"x\[1\] has the shape \(2, 4\)"),
        ([torch.ones(2, 3)], [torch.ones(2, 4)], {}, "3 numbers in x and 4 in y"),
        ([], None, {}, "x holds no sequences"),
        (
            [torch.ones(2, 3), torch.full((1, 3), math.nan)],
            None,
            {},
            r"x\[1\] has features that are not finite",
        ),
        (
            [torch.ones(2, 3)],
            [torch.full((1, 3), math.inf)],
            {},
            r"y\[0\] has features that are not finite",
        ),
        ([torch.ones(2, 3)], None, {"sigma": 0.0}, "a width of 0"),
        ([torch.ones(2, 3)], None, {"delta": -1.0}, "a width of -1"),
        ([torch.ones(2, 3)], None, {"band": 0}, "band = 0"),
    ],
)
def test_errors_say_what_is_wrong(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        gak_matrix(x, y, **options)


def test_errors_of_pairs():
    two = torch.tensor([2, 2])
    with pytest.raises(ValueError, match="pair 1: 0 slices in x"):
        gak_pairs(torch.ones(2, 3, 3), torch.tensor([1, 0]), two, sigma=1.0)
    with pytest.raises(ValueError, match="pair 0: 4 slices in y"):
        gak_pairs(torch.ones(2, 3, 3), two, torch.tensor([4, 1]), sigma=1.0)
    with pytest.raises(ValueError, match="pair 1: NaN"):
        gak_pairs(
            torch.tensor([[[0.0]], [[math.nan]]]),
            torch.tensor([1, 1]),
            torch.tensor([1, 1]),
            sigma=1.0,
        )
    with pytest.raises(ValueError, match="lengths of x"):
        gak_pairs(torch.ones(2, 3, 3), torch.tensor([1]), two, sigma=1.0)


# ------------------------------------------------------------------ machines


def child(queue) -> None:
    torch.set_num_threads(
        1
    )  # as torch's loaders do: OpenMP hangs in a fork of a process that has used its threads
    queue.put(float(gak_matrix(sequences([40] * 35, dtype=torch.float32)).sum()))


def test_works_after_a_fork():
    """Loader workers are forks: they have the memory of the threads that sweep, and none of the threads."""
    here = float(gak_matrix(sequences([40] * 35, dtype=torch.float32)).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == pytest.approx(here)
    process.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_is_the_cpu():
    x = sequences([1, 9, 4, 30, 17], dim=32, dtype=torch.float32)
    there = [each.cuda().requires_grad_() for each in x]
    k = gak_matrix(there, delta=0.7)
    k.square().sum().backward()
    here = [each.clone().requires_grad_() for each in x]
    expected = gak_matrix(here, delta=0.7)
    expected.square().sum().backward()
    assert_close(k.cpu(), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(there, here, strict=True):
        assert_close(a.grad.cpu(), b.grad, rtol=1e-3, atol=1e-5)
