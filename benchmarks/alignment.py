"""All-pairs alignment kernel: `gak_matrix` against tslearn, and against its lower bound.

    gak_matrix              normalised, float32, with the paper's sigma, which depends on the
                            lengths of a pair
    gak_matrix, log space   the same without numba, as on other devices and in other dtypes
    gak_matrix + backward   the same with the gradient of all slices
    tslearn                 tslearn.metrics.cdist_gak(sequences, sigma=1, n_jobs=1), in float64; two
                            jobs are slower
    triangle product        the inner products of all slices alone, upper triangle; no kernel can do
                            without them

The sequences are unit vectors of 384 numbers, and their lengths are uniform between L/2 and L. The
kernels are first compared with each other at one sigma, since tslearn has no other. Memory is what
a new process adds for 1,024 sequences.

    python benchmarks/alignment.py [--quick] [--repeats N]
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from itertools import pairwise

import _bench
import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.objectives.gak import api
from vlduet.objectives.gak.api import gak_matrix

DIM = 384
NUM_PANELS = 16
"""Number of column blocks of the triangle product."""
QUICK_SIZES = [(64, 16)]
SIZES = [(64, 16), (128, 16), (256, 8), (256, 16), (256, 32)]
"""(number of sequences, largest length) of every comparison."""
MEMORY_LENGTH = 16


def draw_sequences(count: int, max_length: int, seed: int) -> list[Tensor]:
    """Return sequences of unit vectors, float32[n, 384] each, n from max_length / 2."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max_length // 2, max_length + 1, (count,), generator=generator)
    return [F.normalize(torch.randn(n, DIM, generator=generator), dim=1) for n in lengths.tolist()]


def compute_in_log_space(x: list[Tensor]) -> Tensor:
    """Return `gak_matrix(x)` as it is computed without numba."""
    engines = dict(api.ENGINES)
    api.ENGINES.clear()
    try:
        return gak_matrix(x)
    finally:
        api.ENGINES.update(engines)


def compute_with_gradient(x: list[Tensor]) -> None:
    """Compute `gak_matrix(x)` and the gradient of its sum."""
    leaves = [sequence.clone().requires_grad_() for sequence in x]
    gak_matrix(leaves).sum().backward()


def prepare_triangle_product(x: list[Tensor]) -> Callable[[], None]:
    """Return a function that multiplies blocks of slices with all slices before them.

    The products are written to memory that is allocated once.
    """
    slices = torch.cat(x)
    edges = [len(slices) * i // NUM_PANELS for i in range(NUM_PANELS + 1)]
    buffer = torch.empty(len(slices) * (len(slices) // NUM_PANELS + 1))

    def multiply() -> None:
        for begin, end in pairwise(edges):
            out = buffer[: end * (end - begin)].view(end, end - begin)
            torch.mm(slices[:end], slices[begin:end].T, out=out)

    return multiply


def prepare_tslearn(x: list[Tensor]) -> Callable[[], object]:
    """Return a function that computes the kernel of all pairs by tslearn."""
    from tslearn.metrics import cdist_gak

    arrays = [sequence.numpy() for sequence in x]
    return lambda: cdist_gak(arrays, sigma=1.0, n_jobs=1)


def compare(count: int, max_length: int, *, repeats: int, seed: int) -> None:
    """Measure all contenders on one size, and print their rates and the largest difference."""
    x = draw_sequences(count, max_length, seed)
    tslearn = prepare_tslearn(x)
    difference = gak_matrix(x, sigma=1.0).double() - torch.as_tensor(tslearn())
    contenders: dict[str, Callable[[], object]] = {
        "gak_matrix": lambda: gak_matrix(x),
        "gak_matrix, log space": lambda: compute_in_log_space(x),
        "gak_matrix + backward": lambda: compute_with_gradient(x),
        "triangle product": prepare_triangle_product(x),
        "tslearn": tslearn,
    }
    for name, contender in contenders.items():
        if name != "tslearn":  # has run above
            contender()
    seconds = _bench.time_in_turns(contenders, repeats)
    title = f"{count} sequences x {max_length}"
    num_pairs = count * (count + 1) / 2
    _bench.print_ratios(title, "pairs/s", seconds, work=num_pairs, reference="gak_matrix")
    gak_seconds = statistics.median(seconds["gak_matrix"])
    bound = statistics.median(seconds["triangle product"])
    print(
        f"  {gak_seconds * 1e3:.1f} ms: {gak_seconds / bound:.2f} x the triangle product; "
        f"largest difference to tslearn {float(difference.abs().max()):.0e}",
        flush=True,
    )


def measure_memory(
    count: int, max_length: int, has_gradient: bool, result: multiprocessing.Queue[float]
) -> None:
    """Put the GB that this process adds at its peak, after a small run has loaded all libraries."""
    compute = compute_with_gradient if has_gradient else gak_matrix
    compute(draw_sequences(8, 4, 0))
    x = draw_sequences(count, max_length, 0)
    before = _bench.peak_memory_gb()
    compute(x)
    result.put(_bench.peak_memory_gb() - before)


def measure_memory_in_new_process(count: int, max_length: int, *, has_gradient: bool) -> float:
    """Return the GB of `measure_memory`; exit if its process fails."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    arguments = (count, max_length, has_gradient, result)
    process = context.Process(target=measure_memory, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the process that measures memory ended with {process.exitcode}")
    return float(result.get())


def main() -> None:
    """Print the environment, the comparisons of all sizes, and the memory."""
    options = _bench.build_parser(__doc__).parse_args()
    repeats = options.repeats or (3 if options.quick else 7)
    _bench.print_machine()
    packages = ("torch", "numba", "tslearn", "vlduet")
    versions = [f"{name} {_bench.installed_version(name)}" for name in packages]
    print(f"versions  {', '.join(versions)}")
    print(f"run       seed {options.seed}, {'quick' if options.quick else 'full'}", flush=True)
    if api.load_numba_engine() is None:
        print("numba is missing (extra `fast`): gak_matrix is computed in log space throughout")
    if _bench.installed_version("tslearn") == "missing":
        raise SystemExit("tslearn is missing: pip install 'vlduet[bench]'")
    for count, max_length in QUICK_SIZES if options.quick else SIZES:
        compare(count, max_length, repeats=repeats, seed=options.seed)
    count = 256 if options.quick else 1024
    print(f"\nmemory, {count} sequences x {MEMORY_LENGTH}")
    for has_gradient in (False, True):
        gb = measure_memory_in_new_process(count, MEMORY_LENGTH, has_gradient=has_gradient)
        print(f"  {'with gradient' if has_gradient else 'values':42} {gb:12.2f} GB", flush=True)


if __name__ == "__main__":
    main()
