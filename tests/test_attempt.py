"""What a call puts back where it fails, and whom it lets wait: :mod:`attnprune.nn.attempt` by itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprune.errors import BusyError
from attnprune.nn import attempt
from attnprune.nn.attempt import Attempt, Snapshot, ending_with, undoing_with, undone
from attnprune.nn.kept import ordinary

from .test_threads import at_once


def fails(call: Callable[[], object]) -> None:
    with pytest.raises(KeyboardInterrupt):
        call()


# modules


def test_a_snapshot_puts_back_tables_flags_and_gradients() -> None:
    model = nn.BatchNorm1d(3)
    weight, bias = model.weight, model.bias
    weight.grad = grad = torch.ones(3)
    held, ours = weight.data, grad.data
    before = Snapshot([model])
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("more", torch.zeros(1))
    model._buffers["running_mean"] = None
    weight.data, grad.data, weight.grad = torch.zeros(1), torch.zeros(1), None
    bias.grad = torch.zeros(3)
    bias.requires_grad_(False)
    model.training, model.other = False, 3
    model.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    before.restore()
    assert type(model) is nn.BatchNorm1d
    assert model.training
    assert "other" not in model.__dict__
    assert model.weight is weight
    assert "more" not in model._buffers
    assert model.running_mean is not None
    assert (weight.data_ptr(), weight.shape) == (held.data_ptr(), held.shape)
    assert weight.grad is grad
    assert (grad.data_ptr(), grad.shape) == (ours.data_ptr(), ours.shape)
    assert bias.grad is None
    assert bias.requires_grad


def test_a_snapshot_puts_back_the_order_of_tables() -> None:
    """Names of state dicts, and optimizers made of ``model.parameters()``, go by it."""
    model = nn.Linear(2, 2)
    before = Snapshot([model])
    weight = model._parameters.pop("weight")
    model._parameters["weight"] = weight
    assert [name for name, _ in model.named_parameters()] == ["bias", "weight"]
    before.restore()
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]


def test_a_snapshot_puts_back_strides() -> None:
    model = nn.Linear(2, 2)
    held = model.weight.data
    before = Snapshot([model])
    model.weight.data = held.t()
    before.restore()
    assert model.weight.stride() == (2, 1)


def test_values_of_other_kinds_of_tensors_are_left_alone() -> None:
    class Wrapped(Tensor):
        """Whose data nobody may ask for, as of tensors that are sharded or quantised."""

        @property
        def data(self) -> Any:
            raise RuntimeError("not to be asked for")

    model = nn.Module()
    model.register_buffer("held", torch.zeros(2).as_subclass(Wrapped))
    before = Snapshot([model])
    kept = model.held
    model.held = torch.ones(1)
    before.restore()
    assert model.held is kept


# calls


@ordinary
def within(model: nn.Module, call: Callable[[], object]) -> None:
    call()


def test_what_a_call_did_is_undone_where_the_call_around_it_fails() -> None:
    seen: list[str] = []
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)

    def inner() -> None:
        undoing_with(lambda: seen.append("undone"))
        ending_with(lambda: seen.append("ended"))
        other.eval()

    def outer(problem: bool) -> None:
        within(other, inner)
        assert not other.training
        assert not seen, "the call around it is still running"
        if problem:
            raise KeyboardInterrupt

    fails(lambda: within(model, lambda: outer(True)))
    assert seen == ["undone"]
    assert other.training, "with modules of its own"
    seen.clear()
    within(model, lambda: outer(False))
    assert seen == ["ended"]
    ending_with(lambda: seen.append("at once"))
    assert seen == ["ended", "at once"], "where no call is running"


def test_attributes_of_the_object_are_put_back() -> None:
    class Owner:
        def __init__(self) -> None:
            self.count = 0

        @ordinary
        def add(self, problem: bool) -> None:
            self.count, self.more = self.count + 1, True
            if problem:
                raise KeyboardInterrupt

    owner = Owner()
    fails(lambda: owner.add(True))
    assert vars(owner) == {"count": 0}
    owner.add(False)
    assert vars(owner) == {"count": 1, "more": True}


def test_modes_that_a_call_left_on_are_off() -> None:
    seen = []

    def leave() -> None:
        undoing_with(lambda: seen.append((torch.is_grad_enabled(), torch._C._len_torch_function_stack())))
        torch.set_grad_enabled(False)
        torch.overrides.BaseTorchFunctionMode().__enter__()
        raise KeyboardInterrupt

    fails(lambda: within(nn.Linear(2, 2), leave))
    assert seen == [(True, 0)], "before anything is undone"
    assert torch.is_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0


def test_what_is_interrupted_while_it_is_undone_is_undone_again() -> None:
    seen: list[str] = []

    def once() -> None:
        seen.append("tried")
        if len(seen) == 1:
            raise KeyboardInterrupt

    def block() -> None:
        with undone() as undo:
            undo.append(once)

    fails(block)
    assert seen == ["tried", "tried"]


# threads


def test_a_model_inside_a_compiled_one_is_what_a_call_is_about() -> None:
    inside, compiled = nn.Linear(2, 2), nn.Module()
    compiled._orig_mod = inside
    assert Attempt(compiled).model is inside


def test_forwards_of_a_model_that_is_worked_on_are_refused_elsewhere_alone() -> None:
    """In the thread that works on it they run; after the call everywhere; also of a second model inside a call."""
    outer, inner, bystander = (nn.Linear(2, 2) for _ in range(3))
    x = torch.zeros(1, 2)

    def look() -> None:
        for model in (outer, inner, bystander):
            model(x)
        for model in (outer, inner):
            (found,) = at_once(lambda model=model: model(x))  # type: ignore[misc]
            assert isinstance(found, BusyError), found
        assert isinstance(at_once(lambda: bystander(x))[0], Tensor)

    within(outer, lambda: within(inner, look))
    for model in (outer, inner):
        assert isinstance(at_once(lambda model=model: model(x))[0], Tensor)  # type: ignore[misc]
        assert not model._forward_pre_hooks


def test_a_call_waits_for_forwards_of_its_own_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "PATIENCE", 0.02)
    going, done = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            going.set()
            done.wait(10)
            return x

    slow, other = Slow(), nn.Linear(2, 2)
    thread = threading.Thread(target=lambda: slow(torch.zeros(1)))
    thread.start()
    try:
        assert going.wait(10)
        within(other, lambda: None)
        with pytest.raises(BusyError, match="a forward pass in another one"):
            within(slow, lambda: None)
    finally:
        done.set()
        thread.join()
    within(slow, lambda: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside the threads of others
def test_a_process_that_is_forked_in_a_call_has_its_own_turn() -> None:
    model = nn.Linear(2, 2)

    def fork() -> None:
        child = os.fork()
        if not child:
            try:
                model(torch.zeros(1, 2))  # nobody works on it here
                os._exit(len(attempt._TURN))
            finally:
                os._exit(3)
        assert os.waitpid(child, 0)[1] == 0
        assert len(attempt._TURN) == 1

    within(model, fork)
