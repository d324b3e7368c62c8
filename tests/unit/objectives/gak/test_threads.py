"""Work over threads: in order, without gradients, each thread on one core, and the caller's torch as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from vlduet.objectives.gak import all_pairs, threads
from vlduet.objectives.gak.api import gak_matrix


@pytest.fixture(params=[1, 2, 3])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_in_order_and_each_on_one_core(cores):
    x = torch.ones(2, requires_grad=True)

    def work(n: int) -> tuple[int, int, str, bool]:
        return n, torch.get_num_threads(), threading.current_thread().name, (x * n).requires_grad

    for _ in range(2):
        found = threads.map_in_threads(work, range(20))
        assert [n for n, *_ in found] == list(range(20))
        assert all(not recorded for *_, recorded in found)
        if cores > 1:
            assert {number for _, number, *_ in found} == {1}
            assert all(name.startswith("alignment") for _, _, name, _ in found)
    assert torch.get_num_threads() == cores and torch.is_grad_enabled()


def test_threads_that_begin_later_have_all_cores(cores):
    threads.map_in_threads(abs, [1, 2, 3])
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [cores]


def test_an_error_comes_out(cores):
    def work(n: int) -> int:
        if n == 3:
            raise ValueError("three")
        return n

    with pytest.raises(ValueError, match="three"):
        threads.map_in_threads(work, range(6))
    assert threads.map_in_threads(work, [1, 2]) == [1, 2]


def test_no_more_threads_is_an_error_and_no_wait(monkeypatch):
    before, real, begun = torch.get_num_threads(), threads.ThreadPoolExecutor.submit, []

    def submit(pool, *task):
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(real(pool, *task))
        return begun[0]

    torch.set_num_threads(7)  # nobody else has a pool of so many
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threads.ThreadPoolExecutor, "submit", submit)
            with pytest.raises(RuntimeError, match="new thread"):
                threads.map_in_threads(abs, [1, 2, 3])
        assert isinstance(begun[0].exception(timeout=60), threading.BrokenBarrierError), (
            "it waits no more"
        )
        assert threads.map_in_threads(abs, [-1, 2, -3]) == [1, 2, 3]
    finally:
        torch.set_num_threads(before)


def test_one_core_and_several_give_the_same_kernel(monkeypatch):
    monkeypatch.setattr(all_pairs, "ENOUGH", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (150,), generator=generator).tolist()
    x = [
        torch.nn.functional.normalize(torch.randn(n, 24, generator=generator), dim=1)
        for n in lengths
    ]
    y = x[40:75]
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append((gak_matrix(x), gak_matrix(x, y)))
    finally:
        torch.set_num_threads(before)
    for square, oblong in found[1:]:
        torch.testing.assert_close(square, found[0][0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(oblong, found[0][1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0][0][:, 40:75], found[0][1], rtol=1e-5, atol=1e-6)
