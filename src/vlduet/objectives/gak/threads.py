"""Pool of threads in which torch uses one core each, for tasks whose data fits the cache of a core.

If all cores share one product and then one sweep, they wait for each other twice, and cells travel
from cache to cache. A core that multiplies and sweeps its own block avoids both.
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


def map_in_threads(task: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return [task(item) for item in items], computed without gradients by a pool of threads.

    The pool has as many threads as torch uses in the calling thread. With one thread, or with fewer
    than two items, the calling thread does the work. Items start in their order: put costly ones
    first.

    Raises:
        Exception: the first error that `task` raises, in the order of the items.
    """
    num_threads = torch.get_num_threads()
    with torch.no_grad():
        if min(num_threads, len(items)) < 2:
            return [task(item) for item in items]
        # Gradient mode belongs to a thread, so that every task has to switch it off again.
        return list(_get_pool(num_threads).map(torch.no_grad()(task), items))


@cache
def _get_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return the pool of `num_threads` threads in which torch uses one core each.

    Its threads start at the first call and are kept for ever. Torch's number of threads elsewhere
    is `num_threads` afterwards.

    Raises:
        RuntimeError: the system starts no more threads; the number that torch uses is restored.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="alignment")
    all_started = Barrier(num_threads + 1)

    def limit_to_one_core() -> None:
        # Torch reads a thread's number of cores at its first use only, so that a later change of
        # the global number, below, does not reach this thread.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    try:
        for _ in range(num_threads):
            pool.submit(limit_to_one_core)
        all_started.wait()
    except BaseException:  # threads that already wait at the barrier would wait for ever
        all_started.abort()
        torch.set_num_threads(num_threads)
        raise
    # The threads changed the number of the calling thread and of all new threads, too.
    torch.set_num_threads(num_threads)
    return pool


# A forked process has none of the threads.
os.register_at_fork(after_in_child=_get_pool.cache_clear)
