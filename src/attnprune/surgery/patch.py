"""The surgeon: builds every new tensor first, then swaps them in, all or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TiedWeightsError
from ..plan import LayerPlan, Plan
from ..spec import Kind
from ..views import AttentionView, Slot
from .check import check_expressible, check_fit, check_views


@dataclass(frozen=True, eq=False)
class ParamChange:
    """What became of a parameter: ``new = gain * old.index_select(axis, index)``."""

    old: nn.Parameter
    new: nn.Parameter
    axis: int
    """The dimension that was cut."""
    index: Tensor
    """``(kept,)`` int64: places along the axis of the old parameter, in the order of the new one."""
    gain: float = 1.0
    """What the values were multiplied with; 1 unless a softmax scale was folded into Q."""


@dataclass(frozen=True, eq=False)
class ParamMap:
    """Old parameters and what became of them; parameters that did not change are not listed.

    A packed parameter has several entries, one for each projection that it held.
    """

    changes: tuple[ParamChange, ...]

    def __iter__(self) -> Iterator[ParamChange]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


def kept_channels(view: AttentionView, layer: LayerPlan, kind: Kind) -> list[int]:
    """The stored channels that stay, in the order in which they will be stored."""
    layout, back = view.spec.layout, layer.kept_heads
    rows: list[int] = []
    for position in layer.after.layout.order:
        head = back[position]
        start, _ = layout.span(kind, head)
        rows += [start + channel for channel in layer.kept(kind, head)]
    return rows


class _Tensors:
    """Builds new parameters; what was one parameter in two places stays one."""

    def __init__(self) -> None:
        self.changes: dict[int, list[tuple[ParamChange, Slot]]] = {}
        self.users: dict[int, set[tuple[int, str]]] = {}

    def cut(self, where: str, slot: Slot, rows: list[int], gain: float) -> nn.Parameter:
        old = slot.parameter
        self.users.setdefault(id(old), set()).add((id(slot.owner), slot.name))
        index = torch.tensor([slot.start + row for row in rows], device=old.device)
        for change, other in self.changes.get(id(old), []):
            same = (slot.axis, slot.start, slot.size) == (other.axis, other.start, other.size)
            if same and change.gain == gain and torch.equal(change.index, index):
                return change.new
            if same or max(slot.start, other.start) < min(slot.start + slot.size, other.start + other.size):
                raise TiedWeightsError(
                    where,
                    "projections that share a parameter to lose the same channels",
                    "a plan that takes others from each",
                    "untie the weights, or prune by hand with equal channels (prune_channels)",
                )
        if slot.whole and rows == list(range(slot.size)) and gain == 1.0:
            new = old
        else:
            new = _parameter(old, lambda x: x.index_select(slot.axis, index), gain)
        self.changes.setdefault(id(old), []).append((ParamChange(old, new, slot.axis, index, gain), slot))
        return new

    def check_ties(self, model: nn.Module) -> None:
        """Raises if a parameter that changes is also used where nothing changes."""
        changed = {
            id(change.old): change.old
            for entries in self.changes.values()
            for change, _ in entries
            if change.new is not change.old
        }
        storage = {p.data_ptr(): key for key, p in changed.items()}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                old = storage.get(parameter.data_ptr()) if parameter.numel() else None
                if old is None or (id(module), key) in self.users[old]:
                    continue
                if id(parameter) != old and id(parameter) in self.changes:
                    found = "another parameter with the same storage"
                else:
                    found = f"{name}.{key} using it too"
                raise TiedWeightsError(
                    f"{name}.{key}",
                    "a parameter that is pruned to be used by that attention only",
                    found,
                    "untie the weights (assign a clone), or exclude the layer that shares them",
                )

    @property
    def map(self) -> ParamMap:
        entries = [change for entries in self.changes.values() for change, _ in entries]
        return ParamMap(tuple(change for change in entries if change.new is not change.old))


def _parameter(old: nn.Parameter, cut: Any, gain: float) -> nn.Parameter:
    """A part of a parameter with its own storage; gradient, hooks, flags and attributes come along."""
    with torch.no_grad():
        data = cut(old.detach())
        new = nn.Parameter(data.mul_(gain) if gain != 1.0 else data, requires_grad=old.requires_grad)
        if old.grad is not None:
            grad = cut(old.grad.detach())
            new.grad = grad.div_(gain) if gain != 1.0 else grad
    for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, key, None):
            setattr(new, key, getattr(old, key))
    new.__dict__.update(old.__dict__)
    return new


class _Operation(NamedTuple):
    view: AttentionView
    layer: LayerPlan
    tensors: Mapping[str, nn.Parameter]

    def run(self) -> None:
        self.view.adapter.commit(self.view, self.tensors, self.layer.after)
        self.view.adapter.recast(self.view, self.layer.after, self.layer.kept_heads)


class Surgeon:
    """Applies a plan: :meth:`prepare` builds every new tensor and changes nothing, :meth:`commit` swaps them in."""

    def __init__(self, operations: Sequence[_Operation], parameters: ParamMap) -> None:
        self._operations, self._parameters = operations, parameters

    @classmethod
    def prepare(cls, model: nn.Module, views: Sequence[AttentionView], plan: Plan) -> Surgeon:
        """Checks everything and builds the new tensors.

        Raises:
            PlanMismatchError: the plan was made for another model.
            NotExpressibleError: an adapter has no forward for the shape that the plan gives.
            WrappedModelError: (and its kinds) a projection cannot be pruned as it is.
        """
        check_fit(model, views, plan)
        by_name = {view.name: view for view in views}
        work = [(by_name[layer.spec.name], layer) for layer in plan if not layer.empty]
        check_views(model, [view for view, _ in work])
        check_expressible(views, plan)
        tensors, operations = _Tensors(), []
        for view, layer in work:
            rows = {kind: kept_channels(view, layer, kind) for kind in ("qk", "vo")}
            gain = view.adapter.query_gain(view, layer.after)
            new = {
                key: tensors.cut(f"{view.name}: {key}", slot, rows[view.kinds[key]], gain if key[0] == "q" else 1.0)
                for key, slot in view.slots.items()
            }
            operations.append(_Operation(view, layer, new))
        tensors.check_ties(model)
        return cls(operations, tensors.map)

    def commit(self) -> ParamMap:
        """Swaps the new tensors in. If anything fails midway, everything is put back bitwise and the error goes on."""
        before = _Snapshot(operation.view for operation in self._operations)
        try:
            for operation in self._operations:
                operation.run()
            return self._parameters
        except BaseException:
            before.restore()
            raise


class _Snapshot:
    """Class and attributes of every module below some views, to put back."""

    def __init__(self, views: Iterable[AttentionView]) -> None:
        modules = {id(module): module for view in views for top in view.modules for module in top.modules()}
        self._saved = [(module, type(module), _shallow(module.__dict__)) for module in modules.values()]

    def restore(self) -> None:
        for module, kind, state in self._saved:
            object.__setattr__(module, "__class__", kind)
            module.__dict__.clear()
            module.__dict__.update({key: value for key, (value, _) in state.items()})
            for value, content in state.values():
                if content is not None:
                    value.clear()
                    value.update(content)


def _shallow(state: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """Every attribute, and for the dicts of a module also what they hold."""
    return {key: (value, dict(value) if isinstance(value, dict) else None) for key, value in state.items()}


@contextmanager
def as_linears(views: Sequence[AttentionView]) -> Iterator[list[AttentionView]]:
    """For a while, every attention runs by four Linears whose weights are views of its own; nothing is copied.

    Packed modules get their decoupled form; the rest stay as they are. Yields views in the same order.
    """
    packed = [view for view in views if view.linears is None]
    before = _Snapshot(packed)
    try:
        for view in packed:
            tensors = {key: _alias(slot) for key, slot in view.slots.items()}
            _Operation(view, LayerPlan(view.spec), tensors).run()
        yield [view.adapter.view(view.name, view.module) if view in packed else view for view in views]
    finally:
        before.restore()


def _alias(slot: Slot) -> nn.Parameter:
    part = slot.parameter.detach().narrow(slot.axis, slot.start, slot.size)
    return nn.Parameter(part, requires_grad=slot.parameter.requires_grad)
