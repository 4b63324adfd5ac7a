"""What an optimizer knows about parameters follows them through surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptimizerStateError
from .patch import ParamChange, ParamMap

SQUARES = ("sum", "acc_delta")  # beside names that contain "sq" (exp_avg_sq, max_exp_avg_sq, square_avg)


class Step(Protocol):
    """Something that is done after everything is prepared, and can be undone."""

    def commit(self) -> Any: ...

    def undo(self) -> None: ...


def commit_all(steps: Sequence[Step]) -> None:
    """All steps, or none: if one fails, those before it are undone and the error goes on."""
    done: list[Step] = []
    try:
        for step in steps:
            done.append(step)
            step.commit()
    except BaseException:
        for step in reversed(done):
            step.undo()
        raise


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

    Running means of gradients (momentum, Adam's moments) are cut like their parameters, or carried over by the chain
    rule where heads were rotated; running means of squares by the squares of that map. Groups keep their settings and
    order. State of another shape (Adafactor's factors, say) raises before anything changes.

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
        self._before: tuple[list[list[nn.Parameter]], dict[Any, Any]] | None = None
        successors: dict[int, list[ParamChange]] = {}
        for change in changes:
            known = successors.setdefault(id(change.old), [])
            if all(change.new is not other.new for other in known):
                known.append(change)
        rank = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        self._groups: list[tuple[list[nn.Parameter], bool]] = []
        self._gone: list[nn.Parameter] = []
        self._state: list[tuple[nn.Parameter, dict[str, Any]]] = []
        for group in self.optimizer.param_groups:
            old: list[nn.Parameter] = group["params"]
            places = [rank[id(parameter)] for parameter in old if id(parameter) in rank]
            new: list[nn.Parameter] = []
            for parameter in old:
                found = successors.get(id(parameter))
                new += [parameter] if found is None else [change.new for change in found]
                for change in found or ():
                    if change.old in self.optimizer.state:
                        self._state.append((change.new, _carried(change, self.optimizer.state[change.old])))
                if found is not None:
                    self._gone.append(parameter)
            self._groups.append((new, places == sorted(places)))

    def commit(self) -> None:
        """Changes the optimizer; comes after the model's own commit."""
        optimizer = self.optimizer
        self._before = ([list(group["params"]) for group in optimizer.param_groups], dict(optimizer.state))
        rank = {id(parameter): i for i, parameter in enumerate(self.model.parameters())}
        for group, (parameters, ordered) in zip(optimizer.param_groups, self._groups, strict=True):
            if ordered:
                own = iter(sorted((p for p in parameters if id(p) in rank), key=lambda p: rank[id(p)]))
                parameters = [next(own) if id(p) in rank else p for p in parameters]
            group["params"][:] = parameters
        for parameter in self._gone:
            optimizer.state.pop(parameter, None)
        for parameter, state in self._state:
            optimizer.state[parameter] = state

    def undo(self) -> None:
        """The optimizer as it was before :meth:`commit`."""
        if self._before is None:
            return
        groups, state = self._before
        for group, parameters in zip(self.optimizer.param_groups, groups, strict=True):
            group["params"][:] = parameters
        self.optimizer.state.clear()
        self.optimizer.state.update(state)


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
    """The optimizers given, and those of learning rate schedulers, each once.

    Args:
        optimizer: one, several in a list, or None; wrappers count as what they wrap.
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
    return list({id(one): one for one in found}.values())


def _carried(change: ParamChange, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the state of an old parameter is for the new one."""
    return {key: _value(change, key, value) for key, value in state.items()}


def _value(change: ParamChange, key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == change.old.shape:
        exact = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        if key == "exp_inf":  # Adamax: a maximum of absolute values
            found = change.carry(exact.square(), squared=True).sqrt()
        else:
            found = change.carry(exact, squared="sq" in key or key in SQUARES)
        return found.to(value.dtype)
    if value.dim() == 0 or value.numel() == 1:
        return value.clone()
    raise OptimizerStateError(
        f"optimizer.state[...][{key!r}]",
        f"state of the parameter's shape {tuple(change.old.shape)}, or a single number",
        f"shape {tuple(value.shape)}",
        "make the optimizer anew after pruning",
    )
