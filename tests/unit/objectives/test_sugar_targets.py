"""Target matrix against float64 loops that follow the paper one pair at a time, for every
switch."""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from helpers.gak_reference import compute_reference_kernel
from helpers.processes import run_process
from vlduet.objectives.gak import api
from vlduet.objectives.sugar_targets import (
    Prefixes,
    calibrate_cosines,
    compute_target_matrix,
    compute_target_std,
    compute_triple_cosines,
    cosines_to_squared_distances,
    find_related_slices,
)

Distance = Callable[[int, int], float]
"""Squared distance of two slices, given by index."""

# The package re-exports a function of the same name.
sugar_targets_module = importlib.import_module("vlduet.objectives.sugar_targets")


def draw_encoder_vectors(rows: int, seed: int, dim: int) -> Tensor:
    """Return unit vectors with an offset: unrelated vectors of encoders are not orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, dim, dtype=torch.float64, generator=generator) + 0.4
    return F.normalize(vectors, dim=1)


class Documents:
    """Sequences of slices, some of them in several sequences, with a few prefixes of each."""

    def __init__(
        self, seed: int = 0, *, lengths: tuple[int, ...] = (3, 1, 4, 2, 1), num_slices: int = 9
    ):
        rng = np.random.default_rng(seed)
        self.is_image = torch.tensor(rng.random(num_slices) < 0.5)
        self.vision = draw_encoder_vectors(num_slices, seed, 5)
        self.text = draw_encoder_vectors(num_slices, seed + 1, 7)
        self.cross = draw_encoder_vectors(num_slices, seed + 2, 4)
        self.sequences = []
        for length in lengths:
            slices = rng.choice(num_slices, size=length, replace=False)
            self.sequences.append(slices.tolist())
        self.prefixes: list[tuple[int, list[int]]] = []
        for number, slices in enumerate(self.sequences):
            for end in sorted({1, (len(slices) + 1) // 2, len(slices)}):
                self.prefixes.append((number, slices[:end]))

    def pack_prefixes(self) -> Prefixes:
        longest = max(len(slices) for _, slices in self.prefixes)
        rows = [slices + [0] * (longest - len(slices)) for _, slices in self.prefixes]
        lengths = [len(slices) for _, slices in self.prefixes]
        sequence_ids = [number for number, _ in self.prefixes]
        return Prefixes(torch.tensor(rows), torch.tensor(lengths), torch.tensor(sequence_ids))

    def compute_cosines(self, *, use_triple_kernel: bool = True) -> Tensor:
        padded_vision = F.pad(self.vision, (0, 2))
        return compute_triple_cosines(
            torch.where(self.is_image[:, None], padded_vision, self.text),
            self.cross,
            is_image=self.is_image,
            use_triple_kernel=use_triple_kernel,
        )


# ------------------------------------------------------------------ slow references


def compute_phi(documents: Documents, a: int, b: int, *, use_triple_kernel: bool = True) -> float:
    """Return |a1 - b1|^2 of one modality, and |a2 - b2|^2 of different ones."""
    if not use_triple_kernel or documents.is_image[a] != documents.is_image[b]:
        vectors = documents.cross
    elif documents.is_image[a]:
        vectors = documents.vision
    else:
        vectors = documents.text
    return float((vectors[a] - vectors[b]).square().sum())


def compute_kernel(x: list[int], y: list[int], phi: Distance, sigma: float) -> float:
    """Return raw K of two sequences of slices."""
    rows = []
    for a in x:
        rows.append([phi(a, b) for b in y])
    return compute_reference_kernel(rows, sigma)


def compute_posterior(
    x: list[int], y: list[int], phi: Distance, sigma: float
) -> dict[tuple[int, int], float]:
    """Return cell -> share of the weight of all alignments that pass it, by walking every one."""
    weight_of_cell = dict.fromkeys(itertools.product(range(len(x)), range(len(y))), 0.0)
    total = 0.0

    def walk(path: list[tuple[int, int]], weight: float) -> None:
        nonlocal total
        i, j = path[-1]
        weight *= compute_kernel([x[i]], [y[j]], phi, sigma)  # kappa
        if (i, j) == (len(x) - 1, len(y) - 1):
            total += weight
            for cell in path:
                weight_of_cell[cell] += weight
        for cell in ((i + 1, j), (i + 1, j + 1), (i, j + 1)):
            if cell in weight_of_cell:
                walk([*path, cell], weight)

    walk([(0, 0)], 1.0)
    return {cell: weight / total for cell, weight in weight_of_cell.items()}


def compute_reference_target(
    first: tuple[int, list[int]],
    second: tuple[int, list[int]],
    phi: Distance,
    *,
    target: str = "gak",
    same_sequence: str = "all",
    single: str = "cosine",
    delta: float = 1.0,
) -> float:
    """Return m^l of two prefixes, given as (sequence, slices)."""
    (sequence_x, x), (sequence_y, y) = first, second
    if sequence_x == sequence_y:
        if same_sequence == "all":
            return 1.0
        return min(len(x), len(y)) / max(len(x), len(y))
    cells = list(itertools.product(range(len(x)), range(len(y))))
    cosines = {(i, j): 1 - phi(x[i], y[j]) / 2 for i, j in cells}
    if target == "mean" or (len(cells) == 1 and single == "cosine"):
        return statistics.fmean(cosines.values())
    if target == "awm":
        weights = compute_posterior(x, y, phi, delta)
        return sum(weights[c] * cosines[c] for c in cells) / sum(weights.values())
    sigma = delta * ((len(x) + len(y)) / 2) ** 0.5
    self_terms = compute_kernel(x, x, phi, sigma) * compute_kernel(y, y, phi, sigma)
    return min(1.0, compute_kernel(x, y, phi, sigma) / self_terms**0.5)


# ------------------------------------------------------------------ cosines


@pytest.mark.parametrize("use_triple_kernel", [True, False])
def test_the_encoder_is_chosen_for_every_pair_of_slices(use_triple_kernel: bool) -> None:
    documents = Documents(1)
    cosines = documents.compute_cosines(use_triple_kernel=use_triple_kernel)
    distances = cosines_to_squared_distances(cosines)
    for a, b in itertools.product(range(9), range(9)):
        expected = compute_phi(documents, a, b, use_triple_kernel=use_triple_kernel)
        assert float(distances[a, b]) == pytest.approx(expected, abs=1e-12)


def test_related_slices_occur_in_one_sequence() -> None:
    slice_indices = torch.tensor([[0, 1, 1], [2, 0, 3]])
    prefixes = Prefixes(slice_indices, torch.tensor([2, 1]), torch.tensor([4, 9]))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = expected[2, 2] = True
    assert torch.equal(find_related_slices(prefixes, 4), expected)


def test_calibration_equals_the_loop() -> None:
    documents = Documents(9, num_slices=40, lengths=(9, 8, 7, 8))
    cosines = documents.compute_cosines()
    is_related = find_related_slices(documents.pack_prefixes(), 40)
    calibrated = calibrate_cosines(cosines, is_image=documents.is_image, is_related=is_related)
    related = set()
    for slices in documents.sequences:
        related |= set(itertools.product(slices, slices))
    for num_images in range(3):
        block = []
        for a, b in itertools.product(range(40), range(40)):
            if int(documents.is_image[a]) + int(documents.is_image[b]) == num_images:
                block.append((a, b))
        unrelated = sorted(float(cosines[pair]) for pair in block if pair not in related)
        median = unrelated[(len(unrelated) - 1) // 2]
        high = float(np.quantile(unrelated, 0.995))
        for pair in block:
            expected = min(1.0, max(-1.0, (float(cosines[pair]) - median) / (high - median)))
            assert float(calibrated[pair]) == pytest.approx(expected, abs=1e-12)


def test_a_block_with_too_few_or_equal_pairs_is_not_calibrated() -> None:
    documents = Documents(10, num_slices=5)
    cosines = documents.compute_cosines()
    is_related = torch.eye(5, dtype=torch.bool)
    calibrated = calibrate_cosines(cosines, is_image=documents.is_image, is_related=is_related)
    assert torch.equal(calibrated, cosines)
    equal = torch.ones(40, 40)
    is_image = torch.ones(40, dtype=torch.bool)
    assert torch.equal(calibrate_cosines(equal, is_image=is_image, is_related=equal < 0), equal)


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("use_triple_kernel", [True, False])
@pytest.mark.parametrize("same_sequence", ["all", "nested"])
@pytest.mark.parametrize("single", ["cosine", "gak"])
@pytest.mark.parametrize("delta", [0.35, 1.0])
@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_targets_equal_the_loop(target, delta, single, same_sequence, use_triple_kernel) -> None:
    documents = Documents(2)
    switches = {
        "target": target,
        "same_sequence": same_sequence,
        "single": single,
        "delta": delta,
    }
    cosines = documents.compute_cosines(use_triple_kernel=use_triple_kernel)
    targets = compute_target_matrix(cosines, documents.pack_prefixes(), **switches)

    def phi(a: int, b: int) -> float:
        return compute_phi(documents, a, b, use_triple_kernel=use_triple_kernel)

    for i, first in enumerate(documents.prefixes):
        for j, second in enumerate(documents.prefixes):
            expected = compute_reference_target(first, second, phi, **switches)
            assert float(targets[i, j]) == pytest.approx(expected, abs=1e-10, rel=1e-9)
    assert bool(targets.diagonal().eq(1).all())
    assert bool((targets <= 1).all())


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("delta", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("target", ["gak", "awm"])
def test_targets_in_float32_equal_those_in_float64(
    target, delta, is_compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prefixes among short ones, and a kernel so narrow that numba runs out of range."""
    if is_compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(api, "ENGINES", {})
    documents = Documents(3, lengths=(40, 1, 17, 70, 2, 33), num_slices=80)
    switches = {"target": target, "delta": delta, "single": "gak"}
    cosines = documents.compute_cosines()
    prefixes = documents.pack_prefixes()
    targets = compute_target_matrix(cosines.float(), prefixes, **switches)
    expected = compute_target_matrix(cosines, prefixes, **switches)
    assert targets.dtype == torch.float32
    assert expected.std() > 0.1
    assert_close(targets.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_targets_of_a_rank_are_rows_of_the_symmetric_matrix(target) -> None:
    documents = Documents(3)
    cosines = documents.compute_cosines()
    prefixes = documents.pack_prefixes()
    matrix = compute_target_matrix(cosines, prefixes, target=target)
    assert_close(matrix, matrix.T)
    for begin, end in ((0, 4), (4, 5), (5, len(prefixes)), (2, 2)):
        rows = compute_target_matrix(cosines, prefixes, target=target, rows=slice(begin, end))
        assert_close(rows, matrix[begin:end])


@pytest.mark.parametrize("target", ["gak", "awm"])
def test_targets_do_not_depend_on_the_chunk_size(target, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Documents(4)
    cosines = documents.compute_cosines()
    prefixes = documents.pack_prefixes()
    expected = compute_target_matrix(cosines, prefixes, target=target)
    monkeypatch.setattr(sugar_targets_module, "MAX_CELLS_PER_CHUNK", 20)
    assert_close(compute_target_matrix(cosines, prefixes, target=target), expected)


@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
@pytest.mark.parametrize("same_sequence", ["all", "nested"])
def test_targets_do_not_depend_on_the_padding(target, same_sequence) -> None:
    documents = Documents(5)
    prefixes = documents.pack_prefixes()
    indices = torch.where(prefixes.is_filled(), prefixes.slice_indices, 7)
    other_padding = Prefixes(indices, prefixes.lengths, prefixes.sequence_ids)
    cosines = documents.compute_cosines()
    assert_close(
        compute_target_matrix(cosines, prefixes, target=target, same_sequence=same_sequence),
        compute_target_matrix(cosines, other_padding, target=target, same_sequence=same_sequence),
    )
    assert torch.equal(find_related_slices(prefixes, 9), find_related_slices(other_padding, 9))


@pytest.mark.parametrize(("target", "sees_order"), [("gak", True), ("awm", True), ("mean", False)])
def test_alignment_sees_the_order_of_slices_and_the_mean_does_not(target, sees_order) -> None:
    documents = Documents(6, num_slices=5)
    ordered = [0, 1, 2, 3, 4]
    documents.prefixes = [(0, ordered), (1, ordered), (2, [4, 2, 0, 3, 1])]
    prefixes = documents.pack_prefixes()
    targets = compute_target_matrix(documents.compute_cosines(), prefixes, target=target, delta=0.5)
    assert (abs(float(targets[0, 1] - targets[0, 2])) > 1e-9) == sees_order
    assert float(targets[0, 1]) >= float(targets[0, 2]) - 1e-9


def test_targets_of_one_prefix_are_1() -> None:
    documents = Documents(7, lengths=(1,))
    targets = compute_target_matrix(documents.compute_cosines(), documents.pack_prefixes())
    assert targets.tolist() == [[1.0]]


@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_targets_of_prefixes_of_500_slices_are_finite(target) -> None:
    documents = Documents(7)
    documents.prefixes = [
        (0, [i % 9 for i in range(500)]),
        (1, [3]),
        (2, [i % 7 for i in range(480)]),
    ]
    cosines = documents.compute_cosines().float()
    targets = compute_target_matrix(cosines, documents.pack_prefixes(), target=target)
    assert bool(targets.isfinite().all())
    assert bool((targets.abs() <= 1 + 1e-6).all())


def test_targets_have_no_gradient() -> None:
    documents = Documents(8)
    cosines = documents.compute_cosines().requires_grad_()
    assert not compute_target_matrix(cosines, documents.pack_prefixes()).requires_grad


def test_std_is_that_of_targets_between_sequences() -> None:
    prefixes = Prefixes(
        torch.zeros(3, 1, dtype=torch.long),
        torch.ones(3, dtype=torch.long),
        torch.tensor([0, 0, 1]),
    )
    targets = torch.tensor([[1.0, 1.0, 0.2], [1.0, 1.0, 0.4], [0.2, 0.4, 1.0]])
    std = compute_target_std(targets, prefixes)
    assert std == pytest.approx(statistics.stdev([0.2, 0.4, 0.2, 0.4]))
    std = compute_target_std(targets[2:], prefixes, rows=slice(2, 3))
    assert std == pytest.approx(statistics.stdev([0.2, 0.4]))


MEMORY_PROGRAM = """
import resource, sys
import torch
from vlduet.objectives.sugar_targets import (
    Prefixes, compute_target_matrix, compute_triple_cosines)
count, length, target = int(sys.argv[1]), 16, sys.argv[2]
num_slices = count * length
same, cross = (
    torch.nn.functional.normalize(torch.randn(num_slices, 64), dim=1) for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prefixes = Prefixes(
    torch.arange(num_slices).view(count, length),
    torch.full((count,), length),
    torch.arange(count))
cosines = compute_triple_cosines(same, cross, is_image=torch.arange(num_slices) % 2 == 0)
targets = compute_target_matrix(cosines, prefixes, target=target)
assert targets.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("target", ["gak", "mean", "awm"])
def test_targets_of_512_sequences_take_less_than_1_gb(target: str) -> None:
    """1,024 sequences of 16 distinct slices shall fit in 4 GB; half as many take a fourth."""
    command = [sys.executable, "-c", MEMORY_PROGRAM, "512", target]
    process = run_process(command, check=True)
    kilobytes = int(process.stdout)
    assert kilobytes * 1024 < 1e9
