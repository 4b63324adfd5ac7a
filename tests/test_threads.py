"""Several threads: as alone, or a named refusal."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprune
from attnprune import apply_plan, make_plan, masked, prune_attention
from attnprune.errors import AttnPruneError, BusyError, PlanMismatchError
from attnprune.nn import attempt
from attnprune.nn.policy import execution, forced

from .conformance import family, fresh, inputs
from .selection import ALL

ROUNDS = int(os.environ.get("ATTNPRUNE_ROUNDS", 200 if ALL else 2))


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each gives, or the error that it raises; each in a thread of its own, from one moment on."""
    found: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(place: int, call: Callable[[], Any]) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            found[place] = call()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def settings() -> Any:
    return torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads(), torch.is_grad_enabled(), forced()


def encoder(seed: int) -> nn.TransformerEncoder:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 1).eval()


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def planned(model: nn.Module) -> Any:
    return make_plan(model, 0.5, data=[X, X], progress=False).digest


def test_models_of_their_own() -> None:
    """Two that plan and two that infer, by the fast path, which leaves out padded tokens."""
    planners, dense = [encoder(0), encoder(1)], [encoder(2), encoder(3)]

    def inferred(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [model(X, src_key_padding_mask=PADDED) for _ in range(30)]

    alone = [planned(copy.deepcopy(one)) for one in planners], [inferred(one)[0] for one in dense]
    before, state = settings(), torch.get_rng_state()
    for _ in range(ROUNDS):
        found = at_once(
            *(lambda one=one: planned(one) for one in planners), *(lambda one=one: inferred(one) for one in dense)
        )
        assert found[:2] == alone[0]
        for outputs, expected in zip(found[2:], alone[1], strict=True):
            assert all(torch.equal(one, expected) for one in outputs)
        assert settings() == before
        assert torch.equal(torch.get_rng_state(), state)


def test_the_fast_path_is_on_in_other_threads_while_one_plans() -> None:
    """A call that plans says when it is in the middle of its data."""
    inside, go, seen = threading.Event(), threading.Event(), []

    def data() -> Any:
        yield X
        inside.set()
        go.wait(10)
        yield X

    def look() -> None:
        inside.wait(10)
        with torch.no_grad():
            zeros = encoder(1)(X, src_key_padding_mask=PADDED)[1, 3:]
        seen.append(bool((zeros == 0).all()))
        go.set()

    _, error = at_once(lambda: make_plan(encoder(0), 0.5, data=data(), progress=False), look)
    assert (error, seen) == (None, [True])


def test_a_forward_while_another_thread_plans() -> None:
    """It is refused; once planning is over it is as before."""
    model, inside, go = encoder(0), threading.Event(), threading.Event()
    expected = model(X).detach()

    def data() -> Any:
        for _ in range(2):
            yield X
            inside.set()
            go.wait(10)

    def run() -> Any:
        inside.wait(10)
        try:
            return model(X)
        finally:
            go.set()

    plan, refused = at_once(lambda: make_plan(model, 0.5, data=data(), progress=False), run)
    assert isinstance(plan, attnprune.Plan)
    assert isinstance(refused, BusyError)
    assert "another thread" in str(refused)
    assert torch.equal(model(X), expected)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["MHA", pytest.param("ViT", marks=pytest.mark.long)])
def test_forwards_of_a_model_that_is_planned(name: str) -> None:
    model, given = fresh(name, 0), inputs(name, 0)
    expected = family(name).run(model, given).detach()
    plain = {key: value.detach() if isinstance(value, Tensor) else value for key, value in given.items()}

    def plan() -> Any:
        def loss(one: Any, batch: Any) -> Tensor:
            return family(name).run(one, batch).square().mean()

        return make_plan(model, 0.5, data=[plain] * 3, loss_fn=loss, progress=False).digest

    def forwards() -> list[Any]:
        found: list[Any] = []
        for _ in range(15):
            try:
                found.append(family(name).run(model, given).detach())
            except Exception as error:
                found.append(error)
        return found

    alone = plan()
    for _ in range(ROUNDS):
        mine, theirs = at_once(plan, forwards)
        assert mine == alone
        for one in theirs:
            assert isinstance(one, BusyError) or torch.equal(one, expected), one


def test_a_forward_that_goes_on_is_waited_for() -> None:
    inside, go = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder(0)

        def forward(self, x: Tensor, wait: bool = False) -> Tensor:
            if wait:
                inside.set()
                go.wait(0.2)
            return self.inner(x)

    model = Slow().eval()
    expected = model(X)

    def prune() -> None:
        inside.wait(10)
        prune_attention(model, 0.5)

    found, _ = at_once(lambda: model(X, wait=True), prune)
    assert torch.equal(found, expected)
    assert model(X).shape == expected.shape


def test_a_forward_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "PATIENCE", 0.05)
    inside, go = threading.Event(), threading.Event()
    model = encoder(0)

    def hook(*_: Any) -> None:
        inside.set()
        go.wait(10)

    handle = model.layers[0].register_forward_pre_hook(hook)

    def prune() -> None:
        inside.wait(10)
        try:
            prune_attention(model, 0.5)
        finally:
            go.set()

    _, refused = at_once(lambda: model(X), prune)
    handle.remove()
    assert isinstance(refused, BusyError)
    prune_attention(model, 0.5)


@pytest.mark.parametrize("how", ["join", "event", "future"])
def test_a_loss_that_waits_for_another_thread(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for is refused there, and the call itself goes on."""
    monkeypatch.setattr(attempt, "PATIENCE", 0.05)
    found: list[Any] = []

    def other(done: threading.Event | None = None) -> None:
        try:
            found.append(make_plan(encoder(1), 0.5))
        except AttnPruneError as error:
            found.append(error)
        if done is not None:
            done.set()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        done = threading.Event()
        if how == "future":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(other).result()
        else:
            thread = threading.Thread(target=other, args=(done,))
            thread.start()
            thread.join() if how == "join" else done.wait()
        return model(x).square().mean()

    plan = make_plan(encoder(0), 0.5, data=[X], loss_fn=loss, scorer="fisher", progress=False)
    assert isinstance(plan, attnprune.Plan)
    assert found
    assert all(isinstance(one, BusyError) for one in found)
    assert "maybe for this thread" in str(found[0])
    monkeypatch.undo()
    other()
    assert isinstance(found[-1], attnprune.Plan)


def test_a_call_that_takes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "PATIENCE", 0.02)
    begun = threading.Event()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        begun.set()
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass
        return model(x).square().mean()

    def short() -> Any:
        begun.wait(10)
        return make_plan(encoder(1), 0.5)

    long = partial(make_plan, encoder(0), 0.5, data=[X], loss_fn=loss, scorer="fisher", progress=False)
    assert all(isinstance(one, attnprune.Plan) for one in at_once(long, short))


@pytest.mark.parametrize("name", ["MHA", "ViT"])
def test_one_plan_applied_twice_at_once(name: str) -> None:
    for _ in range(ROUNDS):
        model, other = fresh(name, 0), fresh(name, 0)
        plan = make_plan(model, 0.5, scope="local")
        apply_plan(other, plan)
        found = at_once(*[partial(apply_plan, model, plan)] * 3)
        assert sum(isinstance(one, PlanMismatchError) for one in found) == 2, found
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_two_plans_that_fit_at_once() -> None:
    """As one after the other, whichever comes first."""
    for _ in range(ROUNDS):
        model = encoder(0)
        found = at_once(*(partial(prune_attention, model, {kind: 0.5}) for kind in ("qk", "vo")))
        assert not [one for one in found if isinstance(one, BaseException)]
        (spec,) = attnprune.find_attention(model)
        assert spec.qk_dims == spec.vo_dims == (4, 4)


def test_a_layout_forced_in_one_thread_is_not_in_another() -> None:
    ready, done = threading.Event(), threading.Event()

    def force() -> str:
        with execution("padded"):
            ready.set()
            done.wait(10)
            return forced()

    def look() -> str:
        ready.wait(10)
        try:
            return forced()
        finally:
            done.set()

    assert at_once(force, look) == ["padded", "auto"]


def test_pruning_a_masked_model_is_refused() -> None:
    """Inside the block in this thread as in others; what it would keep are zeros."""
    model = encoder(0)
    plan = make_plan(model, 0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    with masked(model, plan):
        for call in (lambda: apply_plan(model, plan), lambda: prune_attention(model, 0.25)):
            (refused,) = at_once(call)
            assert isinstance(refused, BusyError), refused
            with pytest.raises(BusyError, match="masked"):
                call()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(AttnPruneError), masked(model, plan):
        apply_plan(model, plan)
    apply_plan(model, plan)


COLLECTS = """
import gc, threading, types
import torch
from attnprune.nn import attempt

class Cycle:
    def __init__(self):
        self.me, self.local = self, threading.local()  # its end waits for the interpreter's lock of threads

def look(later):
    end = threading.Event()
    others = [threading.Thread(target=end.wait) for _ in range(9)]
    for one in others:
        one.start()
    gc.disable()
    gc.collect()
    Cycle().local.x = 1
    attempt._TURN["thread"] = -1
    gc.set_threshold(gc.get_count()[0] + later, 1, 1)  # it is collected that many allocations later
    gc.enable()
    {call}
    end.set()
    for one in others:
        one.join()

MODEL = torch.nn.Identity()
attempt.time = types.SimpleNamespace(monotonic=float, sleep=lambda _: attempt._TURN.clear())  # the other call ends
gc.freeze()
for later in range(50):
    look(later)
print(gc.isenabled())
gc.enable = gc.disable
look(0)
print(gc.isenabled())
"""


@pytest.mark.parametrize("call", ["attempt._runs_elsewhere(MODEL)", "attempt._take_turn(0)"])
def test_no_garbage_is_collected_while_frames_of_threads_are_read(call: str) -> None:
    """Before Python 3.12 that would never end: a collection waits for a lock that reading frames holds."""
    code = COLLECTS.format(call=call)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("True\nFalse\n", "")
