"""All-pairs alignment kernel: `gak_matrix` against tslearn, and against the matrix product that bounds it.

    gak_matrix              normalised, float32, the paper's sigma, which differs by the pair's lengths
    gak_matrix, log space   the same without numba: what other devices and dtypes take
    gak_matrix + backward   the same with the gradient of all slices
    tslearn                 tslearn.metrics.cdist_gak(sequences, sigma=1, n_jobs=1), float64; two jobs are slower
    triangle product        the inner products of all slices alone, upper triangle, in the plainest order: no kernel can
                            do without them

The sequences are unit vectors of 384 numbers; their lengths are even between L/2 and L. The kernels are compared first, at
one sigma, as tslearn knows no other. Memory is what a fresh process adds for 1,024 sequences.

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

from vlduet.objectives.gak import log_space
from vlduet.objectives.gak.api import gak_matrix

DIM = 384
PANELS = 16


def sequences(count: int, longest: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    return [F.normalize(torch.randn(n, DIM, generator=generator), dim=1) for n in lengths]


def in_log_space(x: list[Tensor]) -> Tensor:
    found = log_space.compiled
    log_space.compiled = lambda: None
    try:
        return gak_matrix(x)
    finally:
        log_space.compiled = found


def with_gradient(x: list[Tensor]) -> None:
    leaves = [each.clone().requires_grad_() for each in x]
    gak_matrix(leaves).sum().backward()


def triangle(x: list[Tensor]) -> Callable[[], None]:
    """Products of panels with all that comes before them, into memory that is there already."""
    slices = torch.cat(x)
    edges = [len(slices) * i // PANELS for i in range(PANELS + 1)]
    room = torch.empty(len(slices) * (len(slices) // PANELS + 1))

    def run() -> None:
        for begin, end in pairwise(edges):
            out = room[: end * (end - begin)].view(end, end - begin)
            torch.mm(slices[:end], slices[begin:end].T, out=out)

    return run


def tslearn(x: list[Tensor]) -> Callable[[], object]:
    from tslearn.metrics import cdist_gak

    plain = [each.numpy() for each in x]
    return lambda: cdist_gak(plain, sigma=1.0, n_jobs=1)


def compare(count: int, longest: int, *, repeats: int, seed: int) -> None:
    x = sequences(count, longest, seed)
    peer = tslearn(x)
    worst = float(
        (gak_matrix(x, sigma=1.0).double() - torch.as_tensor(peer())).abs().max()
    )  # and all is warm
    contenders: dict[str, Callable[[], object]] = {
        "gak_matrix": lambda: gak_matrix(x),
        "gak_matrix, log space": lambda: in_log_space(x),
        "gak_matrix + backward": lambda: with_gradient(x),
        "triangle product": triangle(x),
        "tslearn": peer,
    }
    for name, contender in contenders.items():
        if name != "tslearn":
            contender()
    seconds = _bench.interleaved(contenders, repeats)
    pairs = count * (count + 1) / 2
    _bench.table(
        f"{count} sequences x {longest}", "pairs/s", seconds, work=pairs, ours="gak_matrix"
    )
    mine = statistics.median(seconds["gak_matrix"])
    bound = mine / statistics.median(seconds["triangle product"])
    print(
        f"  {mine * 1e3:.1f} ms: {bound:.2f} x the triangle product; largest difference to tslearn {worst:.0e}",
        flush=True,
    )


def memory(count: int, longest: int, gradient: bool, answer: multiprocessing.Queue[float]) -> None:
    """GB that a fresh process adds at its highest, after a small run has loaded what is loaded once."""
    run = with_gradient if gradient else gak_matrix
    run(sequences(8, 4, 0))
    x = sequences(count, longest, 0)
    before = _bench.highest()
    run(x)
    answer.put(_bench.highest() - before)


def peak(count: int, longest: int, *, gradient: bool) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=memory, args=(count, longest, gradient, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the process that measures memory ended with {process.exitcode}")
    return float(answer.get())


def main() -> None:
    options = _bench.arguments(__doc__).parse_args()
    repeats = options.repeats or (3 if options.quick else 7)
    _bench.machine()
    names = ("torch", "numba", "tslearn", "vlduet")
    print(f"versions  {', '.join(f'{name} {_bench.installed(name)}' for name in names)}")
    print(f"run       seed {options.seed}, {'quick' if options.quick else 'full'}", flush=True)
    if log_space.compiled() is None:
        print("numba is missing (extra `fast`): gak_matrix sweeps in log space throughout")
    if _bench.installed("tslearn") == "missing":
        raise SystemExit("tslearn is missing: pip install 'vlduet[bench]'")
    for count, longest in (
        [(64, 16)] if options.quick else [(64, 16), (128, 16), (256, 8), (256, 16), (256, 32)]
    ):
        compare(count, longest, repeats=repeats, seed=options.seed)
    count = 256 if options.quick else 1024
    print(f"\nmemory, {count} sequences x 16")
    for gradient in (False, True):
        print(
            f"  {'with gradient' if gradient else 'values':42} {peak(count, 16, gradient=gradient):12.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
