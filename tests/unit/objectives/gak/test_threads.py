"""Pool of threads: order, gradients, one core per thread, and torch's number of threads kept."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.testing import assert_close

from helpers.gak_reference import draw_sequences
from vlduet.objectives.gak import all_pairs, threads
from vlduet.objectives.gak.api import gak_matrix


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    """Let torch use this number of threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_each_thread_uses_one_core(num_threads):
    x = torch.ones(2, requires_grad=True)

    def task(n: int) -> tuple[int, int, str, bool]:
        name = threading.current_thread().name
        return n, torch.get_num_threads(), name, (x * n).requires_grad

    for _ in range(2):
        results = threads.map_in_threads(task, range(20))
        assert [n for n, *_ in results] == list(range(20))
        assert not any(requires_grad for *_, requires_grad in results)
        if num_threads > 1:
            assert {cores for _, cores, *_ in results} == {1}
            assert all(name.startswith("alignment") for _, _, name, _ in results)
    assert torch.get_num_threads() == num_threads
    assert torch.is_grad_enabled()


def test_threads_that_start_later_use_all_cores(num_threads):
    threads.map_in_threads(abs, [1, 2, 3])
    cores: list[int] = []
    later = threading.Thread(target=lambda: cores.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert cores == [num_threads]


def test_an_error_of_a_task_is_raised_and_the_pool_goes_on(num_threads):
    def task(n: int) -> int:
        if n == 3:
            raise ValueError("three")
        return n

    with pytest.raises(ValueError, match="three"):
        threads.map_in_threads(task, range(6))
    assert threads.map_in_threads(task, [1, 2]) == [1, 2]


def test_a_system_without_more_threads_raises_and_does_not_hang(monkeypatch):
    before = torch.get_num_threads()
    real_submit = threads.ThreadPoolExecutor.submit
    futures = []

    def submit(pool, *task):
        if futures:
            raise RuntimeError("can't start new thread")
        futures.append(real_submit(pool, *task))
        return futures[0]

    torch.set_num_threads(7)  # no other test has a pool of seven
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threads.ThreadPoolExecutor, "submit", submit)
            with pytest.raises(RuntimeError, match="new thread"):
                threads.map_in_threads(abs, [1, 2, 3])
        assert isinstance(futures[0].exception(timeout=60), threading.BrokenBarrierError)
        assert threads.map_in_threads(abs, [-1, 2, -3]) == [1, 2, 3]
    finally:
        torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_kernel(monkeypatch):
    monkeypatch.setattr(all_pairs, "MIN_CELLS_PER_THREAD", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (150,), generator=generator).tolist()
    x = draw_sequences(lengths, dim=24, dtype=torch.float32)
    before = torch.get_num_threads()
    kernels = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            kernels.append((gak_matrix(x), gak_matrix(x, x[40:75])))
    finally:
        torch.set_num_threads(before)
    square, oblong = kernels[0]
    for other_square, other_oblong in kernels[1:]:
        assert_close(other_square, square, rtol=1e-5, atol=1e-7)
        assert_close(other_oblong, oblong, rtol=1e-5, atol=1e-7)
    assert_close(square[:, 40:75], oblong, rtol=1e-5, atol=1e-6)
