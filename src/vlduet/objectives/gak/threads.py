"""Threads whose torch keeps to one core each, for work in pieces that fit into a core's cache.

A product on all cores and then a sweep on all cores wait for each other, and hand cells from cache to cache. A piece that
one core multiplies and sweeps does neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[work(item) for item in items] without gradients, over as many threads as torch would use here; costly items first.

    Raises what `work` raises.
    """
    threads = torch.get_num_threads()
    with torch.no_grad():
        if min(threads, len(items)) < 2:
            return [work(item) for item in items]
        return list(_pool(threads).map(torch.no_grad()(work), items))  # of each thread its own


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool, begun = ThreadPoolExecutor(threads, thread_name_prefix="alignment"), Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # torch asks a thread's number once, and keeps what it is told after that
        torch.set_num_threads(1)
        begun.wait()

    try:
        for _ in range(threads):
            pool.submit(begin)
        begun.wait()
    except BaseException:  # such as no more threads: those that wait already would wait for ever
        begun.abort()
        torch.set_num_threads(threads)
        raise
    torch.set_num_threads(
        threads
    )  # of this thread, and of those that are new: theirs was changed, too
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of the threads
