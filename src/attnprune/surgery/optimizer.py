"""What an optimizer knows about parameters follows them through surgery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import OptimizerStateError
from ..nn.attempt import undoing_with
from ..nn.nested import tensors_in
from .changes import ParamChange, ParamMap
from .optimizer_state import carried


class Step(Protocol):
    """Something that is done after everything is prepared, and can be undone, also before it was done."""

    def commit(self) -> Any: ...

    def undo(self) -> None: ...


def commit_all(steps: Sequence[Step]) -> None:
    """All steps, of a call that undoes them, the latest first, where it fails (``nn/attempt.py``)."""
    for step in steps:
        undoing_with(step.undo)
        step.commit()


class Assignment:
    """Gives an object new attributes, all in one step."""

    def __init__(self, owner: Any, **values: Any) -> None:
        self.owner, self.values = owner, values
        self.before = {name: getattr(owner, name) for name in values}

    def commit(self) -> None:
        self.owner.__dict__.update(self.values)

    def undo(self) -> None:
        self.owner.__dict__.update(self.before)


class OptimizerPatch:
    """Puts new parameters in the place of old ones in an optimizer, with all that it knows about them.

    State is cut like its parameter, or carried over where heads were rotated (:func:`.optimizer_state.carried`). Groups
    keep their settings and order, and names of parameters follow. State of another shape (Adafactor's factors, say)
    raises before anything changes.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or a wrapper that has one as ``.optimizer``.
        changes: what became of the model's parameters: a surgeon's ``changes``.
        model: the model; groups that follow the order of its parameters, beside those of other modules, still do
            afterwards.

    Raises:
        OptimizerStateError: not an optimizer, or state that cannot be cut along.
    """

    def __init__(self, optimizer: Any, changes: ParamMap, model: nn.Module) -> None:
        self.optimizer, self.model = _plain(optimizer), model
        self._before: tuple[list[tuple[list[nn.Parameter], list[str]]], dict[Any, Any], Any] | None = None
        successors: dict[int, list[ParamChange]] = {}
        for change in changes:
            successors.setdefault(id(change.old), []).append(change)
        rank = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups: list[tuple[list[nn.Parameter], list[tuple[str, str]], bool]] = []
        """New parameters; for each the old one's name in the optimizer, and in the model; whether in the model's order.
        """
        self._gone: list[nn.Parameter] = []
        self._state: list[tuple[nn.Parameter, dict[str, Any]]] = []
        for group in self.optimizer.param_groups:
            old: list[nn.Parameter] = group["params"]
            places = [rank[id(parameter)] for parameter in old if id(parameter) in rank]
            new: list[nn.Parameter] = []
            names: list[tuple[str, str]] = []
            for parameter, name in zip(old, _names(group) or [""] * len(old), strict=True):
                found = successors.get(id(parameter))
                new += [parameter] if found is None else [change.new for change in found]
                names += [(name, own.get(id(parameter), ""))] * (len(new) - len(names))
                for change in found or ():
                    if change.old in self.optimizer.state:
                        self._state.append((change.new, carried(change, self.optimizer.state[change.old])))
                if found is not None:
                    self._gone.append(parameter)
            self._groups.append((new, names, places == sorted(places)))
        if self._gone:
            self._check_whole()

    def _check_whole(self) -> None:
        """Raises where the optimizer keeps all of its parameters in one vector, as LBFGS does."""
        total = sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])
        for parameter, state in self.optimizer.state.items():
            shape = getattr(parameter, "shape", None)
            for key, value in state.items() if isinstance(state, dict) else ():
                if any(one.shape != shape and one.numel() == total for one in tensors_in(value)):
                    raise OptimizerStateError(
                        f"optimizer.state[...][{key!r}]", "state of each parameter by itself",
                        f"one vector of all {total} numbers", "make the optimizer anew after pruning",
                    )  # fmt: skip

    def commit(self) -> None:
        """Changes the optimizer; comes after the model's own commit."""
        optimizer = self.optimizer
        groups = [(list(group["params"]), list(_names(group))) for group in optimizer.param_groups]
        self._before = groups, dict(optimizer.state), getattr(optimizer, _SIZE, None)
        rank = {id(parameter): i for i, parameter in enumerate(self.model.parameters())}
        own = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group, (parameters, names, ordered) in zip(optimizer.param_groups, self._groups, strict=True):
            entries = [
                (parameter, _renamed(*name, own.get(id(parameter), "")))
                for parameter, name in zip(parameters, names, strict=True)
            ]
            if ordered:
                mine = iter(sorted((one for one in entries if id(one[0]) in rank), key=lambda one: rank[id(one[0])]))
                entries = [next(mine) if id(one[0]) in rank else one for one in entries]
            group["params"][:] = [parameter for parameter, _ in entries]
            if _names(group):
                group["param_names"][:] = [name for _, name in entries]
        if self._gone and hasattr(optimizer, _SIZE):
            setattr(optimizer, _SIZE, None)
        for parameter in self._gone:
            optimizer.state.pop(parameter, None)
        for parameter, state in self._state:
            optimizer.state[parameter] = state

    def undo(self) -> None:
        """The optimizer as it was before :meth:`commit`."""
        if self._before is None:
            return
        groups, state, size = self._before
        for group, (parameters, names) in zip(self.optimizer.param_groups, groups, strict=True):
            group["params"][:] = parameters
            if names:
                group["param_names"][:] = names
        if hasattr(self.optimizer, _SIZE):
            setattr(self.optimizer, _SIZE, size)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)


_SIZE = "_numel_cache"  # where LBFGS remembers how many numbers its parameters have


def _names(group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters, if it was made with them."""
    found: list[str] = group.get("param_names") or []
    return found


def _renamed(name: str, before: str, after: str) -> str:
    """A parameter's name in an optimizer, given its names in the model; what stands before them stays."""
    if not name or before == after or not after:
        return name
    return name.removesuffix(before) + after if before and name.endswith(before) else after


def check_held(optimizers: Sequence[torch.optim.Optimizer], changes: ParamMap, model: nn.Module) -> None:
    """Raises unless the optimizers given, if any, hold every parameter that changes and is trained.

    Another optimizer would go on with parameters that the model no longer has.

    Raises:
        OptimizerStateError: names what none of them holds.
    """
    held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    changed = {id(change.old) for change in changes if change.old.requires_grad}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in changed - held]
    if optimizers and names:
        raise OptimizerStateError(
            "optimizer",
            "every parameter that is pruned and trained to be in an optimizer given",
            f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''} in none of them",
            "pass all optimizers of the model as a list, each with the parameters that the model has now; "
            "parameters that are not trained need requires_grad_(False)",
        )


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper (accelerate's, say)."""
    inner = optimizer
    while not isinstance(inner, torch.optim.Optimizer):
        found = getattr(inner, "optimizer", None)
        if found is None or found is inner:
            raise OptimizerStateError(
                "optimizer", "a torch.optim.Optimizer", f"a {type(optimizer).__name__}", "pass the optimizer itself"
            )
        inner = found
    return inner


def optimizers_of(optimizer: Any, scheduler: Any = None) -> list[torch.optim.Optimizer]:
    """The optimizers given, and those of learning rate schedulers, each once; and what they hold as an inner optimizer.

    Args:
        optimizer: one, several in a list, or None; wrappers count as what they wrap. Those that are optimizers
            themselves (SAM, Lookahead) count beside what they wrap.
        scheduler: one, several in a list, or None; also accelerate's wrapper around one.

    Raises:
        OptimizerStateError: something else.
    """
    given, schedulers = (
        [] if one is None else list(one) if isinstance(one, (list, tuple)) else [one] for one in (optimizer, scheduler)
    )
    found = [_plain(one) for one in given]
    for one in schedulers:
        held = getattr(getattr(one, "scheduler", one), "optimizer", None)
        if held is None or isinstance(one, torch.optim.Optimizer):
            remedy = "pass a scheduler of torch.optim.lr_scheduler"
            raise OptimizerStateError("scheduler", "one with an optimizer", f"a {type(one).__name__}", remedy)
        found.append(_plain(held))
    return list({id(one.state): one for each in found for one in _inside(each)}.values())


def _inside(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """An optimizer, and those among its attributes, at any depth."""
    known: dict[int, torch.optim.Optimizer] = {}
    pending = [optimizer]
    while pending:
        one = pending.pop()
        if id(one) not in known:
            known[id(one)] = one
            values = vars(one).values()
            pending += [value for value in values if isinstance(value, torch.optim.Optimizer)]
    yield from known.values()
