"""Threads that share work, each computing alone: everything is done once, and nothing of the caller's changes."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnprune
from attnprune.nn import products, thread_pool
from attnprune.nn.thread_pool import shared


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_task_is_done_once_by_a_thread_that_computes_alone(two_threads: None) -> None:
    done: list[tuple[int, int, str, int]] = []

    def work(task: int, place: int) -> None:
        torch.ones(100, 100) @ torch.ones(100, 100)
        done.append((task, place, threading.current_thread().name, torch.get_num_threads()))

    assert shared(range(50), work, 2)
    assert Counter(task for task, *_ in done) == Counter(range(50))
    assert {place for _, place, *_ in done} <= {0, 1}
    assert {rest for _, _, *rest in map(tuple, done) for rest in [tuple(rest)]} == {("attnprune", 1)}
    assert torch.get_num_threads() == 2


def test_threads_to_come_have_as_many_as_before(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_THREADS", [])  # new ones are started
    assert shared([1], lambda *_: None, 2)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt, MemoryError])
def test_what_a_thread_raises_is_raised_here(error: type[BaseException], two_threads: None) -> None:
    done: list[int] = []

    def work(task: int, place: int) -> None:
        if task == 3:
            raise error("task 3")
        done.append(task)

    with pytest.raises(error, match="task 3"):
        shared(range(200_000), work, 2)
    assert len(done) < 199_999, "the rest is left"
    done.clear()
    assert shared([1, 2], work, 2)
    assert sorted(done) == [1, 2]


def test_one_order_at_a_time(two_threads: None) -> None:
    inside: list[bool] = []
    assert shared([1], lambda *_: inside.append(shared([2], lambda *_: None, 2)), 2)
    assert inside == [False]


def test_an_interrupted_caller_leaves_the_threads_to_others(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(thread_pool.Order):
        def wait(self) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(thread_pool, "Order", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            shared([1], lambda *_: None, 2)
    assert shared([1], lambda *_: None, 2)


def test_inference_mode_is_that_of_the_caller(two_threads: None) -> None:
    made: list[torch.Tensor] = []
    with torch.inference_mode():
        assert shared([1], lambda *_: made.append(torch.ones(1)), 2)
    assert shared([1], lambda *_: made.append(torch.ones(1, requires_grad=True) * 2), 2)
    assert [one.is_inference() for one in made] == [True, False]
    assert not made[1].requires_grad


def test_what_would_be_missed_in_other_threads_runs_here(two_threads: None) -> None:
    with FlopCounterMode(display=False):
        assert not shared([1], lambda *_: None, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not shared([1], lambda *_: None, 2)
    with torch.device("cpu"):
        assert not shared([1], lambda *_: None, 2)
    assert shared([1], lambda *_: None, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_its_own(two_threads: None) -> None:
    assert shared([1], lambda *_: None, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # instead of waiting for threads that are not there
        os._exit(0 if thread_pool._THREADS == [] and shared([1], lambda *_: None, 2) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_pruned_model_gives_the_same_with_any_number_of_threads(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    attnprune.prune_attention(model, 0.5, heads="ragged", scope="global", scorer="random")
    x = torch.randn(2, 40, 32)
    orders: list[int] = []

    def counted(tasks: list[products.Piece], work: thread_pool.Work, threads: int) -> bool:
        orders.append(len(tasks))
        return shared(tasks, work, threads)

    for name, value in (("WHOLE", 0), ("MANY", 0), ("OWN", 1000), ("shared", counted)):
        monkeypatch.setattr(products, name, value)
    with torch.inference_mode():
        found = model(x)
        assert len(orders) == 2
        assert min(orders) >= 16, "two items, four heads, runs of their queries"
        torch.set_num_threads(1)
        assert torch.allclose(model(x), found, atol=1e-6)
        assert len(orders) == 2, "one thread shares nothing"
