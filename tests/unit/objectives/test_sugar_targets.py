"""The target matrix and L_d against float64 loops that follow the paper's formulas one pair at a time, for every switch."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vlduet.objectives import sugar_targets
from vlduet.objectives.gak import log_space
from vlduet.objectives.structure import structure_loss
from vlduet.objectives.sugar_targets import (
    Prefixes,
    calibrate_cosines,
    compute_target_matrix,
    compute_target_std,
    compute_triple_cosines,
    find_related_slices,
)


def unit(rows: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # An offset, as real encoders have it: unrelated things are not orthogonal.
    return F.normalize(
        torch.randn(rows, width, dtype=torch.float64, generator=generator) + 0.4, dim=1
    )


class Stories:
    """Sequences of slices, some of them in several sequences, and a few prefixes of each."""

    def __init__(
        self, seed: int = 0, *, lengths: tuple[int, ...] = (3, 1, 4, 2, 1), slices: int = 9
    ):
        draw = np.random.default_rng(seed)
        self.image = torch.tensor(draw.random(slices) < 0.5)
        self.vision, self.text = unit(slices, seed, 5), unit(slices, seed + 1, 7)
        self.cross = unit(slices, seed + 2, 4)
        self.same = torch.where(self.image[:, None], F.pad(self.vision, (0, 2)), self.text)
        self.documents = [draw.choice(slices, size=n, replace=False).tolist() for n in lengths]
        self.prefixes = [
            (number, document[:end])
            for number, document in enumerate(self.documents)
            for end in sorted({1, (len(document) + 1) // 2, len(document)})
        ]

    def tensors(self) -> Prefixes:
        longest = max(len(slices) for _, slices in self.prefixes)
        return Prefixes(
            torch.tensor([slices + [0] * (longest - len(slices)) for _, slices in self.prefixes]),
            torch.tensor([len(slices) for _, slices in self.prefixes]),
            torch.tensor([number for number, _ in self.prefixes]),
        )

    def cosines(self, *, without_triple: bool = False) -> torch.Tensor:
        return compute_triple_cosines(
            self.same, self.cross, is_image=self.image, use_triple_kernel=not without_triple
        )


# ---------------------------------------------------------------------- the slow twin


def phi(stories: Stories, a: int, b: int, *, without_triple: bool = False) -> float:
    """|a1 - b1|^2 or |a2 - b2|^2."""
    if without_triple or stories.image[a] != stories.image[b]:
        first, second = stories.cross[a], stories.cross[b]
    elif stories.image[a]:
        first, second = stories.vision[a], stories.vision[b]
    else:
        first, second = stories.text[a], stories.text[b]
    return sum((x - y) ** 2 for x, y in zip(first.tolist(), second.tolist(), strict=True))


def kappa(distance: float, sigma: float) -> float:
    s = math.exp(-distance / (2 * sigma**2))
    return s / (2 - s)


def kernel(x: list[int], y: list[int], distance, sigma: float) -> float:
    grid = [[0.0] * (len(y) + 1) for _ in range(len(x) + 1)]
    grid[0][0] = 1.0
    for i, j in itertools.product(range(1, len(x) + 1), range(1, len(y) + 1)):
        grid[i][j] = (grid[i][j - 1] + grid[i - 1][j - 1] + grid[i - 1][j]) * kappa(
            distance(x[i - 1], y[j - 1]), sigma
        )
    return grid[-1][-1]


def posterior(x: list[int], y: list[int], distance, sigma: float) -> list[list[float]]:
    """Share of the total weight of all alignment paths that passes each cell, by walking every path."""
    cells = [[0.0] * len(y) for _ in x]
    total = 0.0

    def walk(path: list[tuple[int, int]], weight: float) -> None:
        nonlocal total
        i, j = path[-1]
        weight *= kappa(distance(x[i], y[j]), sigma)
        if (i, j) == (len(x) - 1, len(y) - 1):
            total += weight
            for a, b in path:
                cells[a][b] += weight
        for a, b in ((i + 1, j), (i + 1, j + 1), (i, j + 1)):
            if a < len(x) and b < len(y):
                walk([*path, (a, b)], weight)

    walk([(0, 0)], 1.0)
    return [[cell / total for cell in row] for row in cells]


def slow_targets(
    stories: Stories, distance, *, target="gak", same_sequence="all", single="cosine", delta=1.0
):
    def one(first: tuple[int, list[int]], second: tuple[int, list[int]]) -> float:
        (p, x), (q, y) = first, second
        if p == q:
            contained = x if len(x) < len(y) else y
            return 1.0 if same_sequence == "all" else len(contained) / max(len(x), len(y))
        cosines = [[1 - distance(a, b) / 2 for b in y] for a in x]
        if target == "mean" or (len(x) == len(y) == 1 and single == "cosine"):
            return statistics.fmean(itertools.chain.from_iterable(cosines))
        if target == "awm":
            weights = posterior(x, y, distance, delta)
            cells = list(itertools.product(range(len(x)), range(len(y))))
            return sum(weights[i][j] * cosines[i][j] for i, j in cells) / sum(
                weights[i][j] for i, j in cells
            )
        sigma = delta * math.sqrt((len(x) + len(y)) / 2)
        own = kernel(x, x, distance, sigma) * kernel(y, y, distance, sigma)
        return min(1.0, kernel(x, y, distance, sigma) / math.sqrt(own))

    rows = [[one(a, b) for b in stories.prefixes] for a in stories.prefixes]
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize("without_triple", [False, True])
def test_the_triple_kernel_chooses_for_every_pair(without_triple: bool) -> None:
    stories = Stories(1)
    found = sugar_targets.cosines_to_squared_distances(
        stories.cosines(without_triple=without_triple)
    )
    for a, b in itertools.product(range(9), range(9)):
        assert float(found[a, b]) == pytest.approx(
            phi(stories, a, b, without_triple=without_triple), abs=1e-12
        )


@pytest.mark.parametrize("without_triple", [False, True])
@pytest.mark.parametrize("same_sequence", ["all", "nested"])
@pytest.mark.parametrize("single", ["cosine", "gak"])
@pytest.mark.parametrize("delta", [0.35, 1.0])
@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_targets_are_the_slow_loop(target, delta, single, same_sequence, without_triple) -> None:
    stories = Stories(2)
    rules = {"target": target, "same_sequence": same_sequence, "single": single, "delta": delta}
    found = compute_target_matrix(
        stories.cosines(without_triple=without_triple), stories.tensors(), **rules
    )
    wanted = slow_targets(
        stories, lambda a, b: phi(stories, a, b, without_triple=without_triple), **rules
    )
    assert_close(found, wanted, atol=1e-10, rtol=1e-9)
    assert bool(found.diagonal().eq(1).all()) and bool((found <= 1).all())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("delta", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("target", ["gak", "awm"])
def test_targets_in_single_precision_are_those_in_double(
    target, delta, compiled, monkeypatch
) -> None:
    """By the compiled sweep, where there is one, and without; long prefixes among short ones, and a kernel so narrow that
    the compiled sweep runs out of range."""
    if not compiled:
        monkeypatch.setattr(log_space, "compiled", lambda: None)
    stories = Stories(3, lengths=(40, 1, 17, 70, 2, 33), slices=80)
    rules = {"target": target, "delta": delta, "single": "gak"}
    found = compute_target_matrix(stories.cosines().float(), stories.tensors(), **rules)
    wanted = compute_target_matrix(stories.cosines(), stories.tensors(), **rules)
    assert found.dtype == torch.float32 and wanted.std() > 0.1
    assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_rows_of_a_rank_are_rows_of_the_whole(target) -> None:
    stories = Stories(3)
    cosines, prefixes = stories.cosines(), stories.tensors()
    whole = compute_target_matrix(cosines, prefixes, target=target)
    for begin, stop in ((0, 4), (4, 5), (5, len(prefixes)), (2, 2)):
        assert_close(
            compute_target_matrix(cosines, prefixes, target=target, rows=slice(begin, stop)),
            whole[begin:stop],
        )
    assert_close(whole, whole.T)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = Stories(4)
    for target in ("gak", "awm"):
        monkeypatch.setattr(sugar_targets, "MAX_CELLS_PER_CHUNK", 1 << 22)
        whole = compute_target_matrix(stories.cosines(), stories.tensors(), target=target)
        monkeypatch.setattr(sugar_targets, "MAX_CELLS_PER_CHUNK", 20)
        assert_close(
            compute_target_matrix(stories.cosines(), stories.tensors(), target=target), whole
        )


def test_what_fills_the_padding_changes_nothing() -> None:
    stories = Stories(5)
    prefixes = stories.tensors()
    inside = torch.arange(prefixes.slice_indices.shape[1]) < prefixes.lengths[:, None]
    other = Prefixes(
        torch.where(inside, prefixes.slice_indices, 7), prefixes.lengths, prefixes.sequence_ids
    )
    for target in ("gak", "mean", "awm"):
        for same in ("all", "nested"):
            assert_close(
                compute_target_matrix(
                    stories.cosines(), prefixes, target=target, same_sequence=same
                ),
                compute_target_matrix(stories.cosines(), other, target=target, same_sequence=same),
            )
    assert torch.equal(find_related_slices(prefixes, 9), find_related_slices(other, 9))


def test_order_matters_to_the_alignment_and_not_to_the_mean() -> None:
    """The reason for GAK: the same slices in another order."""
    stories = Stories(6, slices=5)
    stories.prefixes = [(0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 4]), (2, [4, 2, 0, 3, 1])]
    for target, blind in (("gak", False), ("awm", False), ("mean", True)):
        found = compute_target_matrix(
            stories.cosines(), stories.tensors(), target=target, delta=0.5
        )
        assert (abs(float(found[0, 1] - found[0, 2])) < 1e-9) == blind
        assert float(found[0, 1]) >= float(found[0, 2]) - 1e-9


def test_one_prefix_and_one_long_one() -> None:
    stories = Stories(7, lengths=(1,))
    assert compute_target_matrix(stories.cosines(), stories.tensors()).tolist() == [[1.0]]
    stories.prefixes = [
        (0, [i % 9 for i in range(500)]),
        (1, [3]),
        (2, [i % 7 for i in range(480)]),
    ]
    for target in ("gak", "mean", "awm"):
        found = compute_target_matrix(stories.cosines().float(), stories.tensors(), target=target)
        assert bool(found.isfinite().all()), target


MEMORY = """
import resource, sys
import torch
from vlduet.objectives.triple import Prefixes, target_matrix, triple_cosines
count, length, target = int(sys.argv[1]), 16, sys.argv[2]
same, cross = (torch.nn.functional.normalize(torch.randn(count * length, 64), dim=1) for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prefixes = Prefixes(torch.arange(count * length).view(count, length), torch.full((count,), length), torch.arange(count))
found = target_matrix(triple_cosines(same, cross, image=torch.arange(count * length) % 2 == 0), prefixes, target=target)
assert found.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of peak memory")
@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_the_memory_of_targets(target: str) -> None:
    """1,024 sequences of 16 distinct slices are to fit in 4 GB; half as many take a fourth of it."""
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, "512", target], capture_output=True, check=True, timeout=300
    )
    assert int(ended.stdout) * 1024 < 1e9


def test_targets_have_no_gradient() -> None:
    stories = Stories(8)
    assert not compute_target_matrix(
        stories.cosines().requires_grad_(), stories.tensors()
    ).requires_grad


# ---------------------------------------------------------------------- calibration


def test_calibration_is_the_slow_loop() -> None:
    stories = Stories(9, slices=40, lengths=(9, 8, 7, 8))
    cosines, prefixes = stories.cosines(), stories.tensors()
    found = calibrate_cosines(
        cosines, is_image=stories.image, is_related=find_related_slices(prefixes, 40)
    )
    together = {(a, b) for d in stories.documents for a in d for b in d}
    for kinds in ({(True, True)}, {(False, False)}, {(True, False), (False, True)}):
        block = [
            (a, b)
            for a, b in itertools.product(range(40), range(40))
            if (bool(stories.image[a]), bool(stories.image[b])) in kinds
        ]
        chance = sorted(float(cosines[a, b]) for a, b in block if (a, b) not in together)
        middle, high = chance[(len(chance) - 1) // 2], float(np.quantile(chance, 0.995))
        for a, b in block:
            wanted = min(1.0, max(-1.0, (float(cosines[a, b]) - middle) / (high - middle)))
            assert float(found[a, b]) == pytest.approx(wanted, abs=1e-12)


def test_a_block_with_too_few_pairs_stays_as_it_is() -> None:
    stories = Stories(10, slices=5)
    cosines = stories.cosines()
    assert torch.equal(
        calibrate_cosines(
            cosines, is_image=stories.image, is_related=torch.eye(5, dtype=torch.bool)
        ),
        cosines,
    )
    equal = torch.ones(40, 40)
    assert torch.equal(
        calibrate_cosines(equal, is_image=torch.ones(40, dtype=torch.bool), is_related=equal < 0),
        equal,
    )


def test_related_slices_stand_in_one_sequence() -> None:
    prefixes = Prefixes(
        torch.tensor([[0, 1, 1], [2, 0, 3]]), torch.tensor([2, 1]), torch.tensor([4, 9])
    )
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[:2, :2] = wanted[2, 2] = True
    assert torch.equal(find_related_slices(prefixes, 4), wanted)


def test_spread_is_over_different_sequences() -> None:
    prefixes = Prefixes(
        torch.zeros(3, 1, dtype=torch.long),
        torch.ones(3, dtype=torch.long),
        torch.tensor([0, 0, 1]),
    )
    target = torch.tensor([[1.0, 1.0, 0.2], [1.0, 1.0, 0.4], [0.2, 0.4, 1.0]])
    assert compute_target_std(target, prefixes) == pytest.approx(
        statistics.stdev([0.2, 0.4, 0.2, 0.4])
    )
    assert compute_target_std(target[2:], prefixes, rows=slice(2, 3)) == pytest.approx(
        statistics.stdev([0.2, 0.4])
    )


# ---------------------------------------------------------------------- the loss


def slow_loss(vectors, target, *, loss="mse", temperature=0.1, n_ref=None) -> torch.Tensor:
    n = len(vectors)
    cosine = [[(vectors[i] * vectors[j]).sum() for j in range(n)] for i in range(n)]
    if loss == "mse":
        total = sum((cosine[i][j] - float(target[i][j])) ** 2 for i in range(n) for j in range(n))
        return total / n if n_ref is None else total / n**2 * n_ref
    rows = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        q = [torch.exp(cosine[i][j] / temperature) for j in others]
        p = [math.exp(float(target[i][j]) / temperature) for j in others]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        there = sum(a * (math.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))
        back = sum(b * (torch.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))
        rows.append((there + back) / 2)
    return sum(rows) / n


FORMS = [{}, {"n_ref": 11}, {"loss": "kl"}, {"loss": "kl", "temperature": 0.5}]


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_the_slow_loop_with_its_gradient(form) -> None:
    fast, slow = unit(5, 0).requires_grad_(), unit(5, 0).requires_grad_()
    target = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        structure_loss(fast, fast, target=target, **form),
        slow_loss(slow, target, **form),
    )
    assert_close(found, wanted)
    found.backward()
    wanted.backward()
    assert_close(fast.grad, slow.grad)


@pytest.mark.parametrize("form", FORMS)
def test_shares_of_ranks_sum_to_the_whole(form) -> None:
    vectors = unit(5, 1)
    target = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shares = [
        structure_loss(vectors[a:b], vectors, target=target[a:b], first_row=a, world_size=3, **form)
        for a, b in ((0, 2), (2, 2), (2, 5))
    ]
    assert_close(sum(shares) / 3, structure_loss(vectors, vectors, target=target, **form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare_is_zero_and_part_of_the_graph(form, count) -> None:
    vectors = unit(count, 2).requires_grad_()
    loss = structure_loss(vectors, vectors, target=torch.ones(count, count), **form)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert vectors.grad is not None and bool(vectors.grad.isfinite().all())


def test_n_ref_is_the_paper_s_where_n_is_n_ref() -> None:
    vectors, target = unit(4, 3), torch.zeros(4, 4, dtype=torch.float64)
    assert_close(
        structure_loss(vectors, vectors, target=target, n_ref=4),
        structure_loss(vectors, vectors, target=target),
    )
