"""The surgeon: builds every new tensor first, then swaps them in, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TiedWeightsError
from ..families.base import AttentionView
from ..families.expansion import expand_view, joints, numbers_left
from ..families.proof.verdict import inherit
from ..families.slots import Slot, channels_of
from ..families.ways import Way
from ..nn.attempt import Snapshot
from ..values.layer_plan import LayerPlan
from ..values.layout import SIDES, HeadLayout
from ..values.plan import Plan
from .check import check_expressible, check_fit, check_unmasked, check_views, check_wrappers
from .maps import ChannelMap, Pick, channel_maps, joined, kept_channels, logical_channels


@dataclass(frozen=True, eq=False)
class ParamChange:
    """What became of a parameter: ``new = gain * map(old)``, along one axis.

    Channels that stay as they are were picked, ``new = gain * old.index_select(axis, index)``; those of a plan with
    maps were mixed (:attr:`index` is then None), and O's bias gained a vector.
    """

    old: nn.Parameter
    new: nn.Parameter
    axis: int
    """The dimension that was cut."""
    index: Tensor | None
    """``(kept,)`` int64: places along the axis of the old parameter, in the order of the new one; None if mixed."""
    gain: float = 1.0
    """What the values were multiplied with; 1 unless a softmax scale was folded into Q."""
    map: ChannelMap | None = None
    """How channels change, given those of the slot first; None for O's bias, whose entries are no channels."""
    places: Sequence[int] = ()
    """Where the slot's channels lie along the axis of the old parameter."""

    def carry(self, tensor: Tensor, squared: bool = False) -> Tensor:
        """What a gradient of the old parameter (or a running mean of gradients) is for the new one.

        Exact where channels were picked, or rotated at full rank: the chain rule.

        Args:
            tensor: shaped like the old parameter.
            squared: the tensor holds (running means of) squares; where channels are mixed, they are mixed by the
                squares of the map, as if gradients of different channels did not correlate.

        Returns:
            Shaped like the new one.
        """
        if self.map is None:
            return tensor.clone()
        change = self.map.squared if squared else self.map.dual
        return along(tensor, self.axis, self.places, change) / (self.gain**2 if squared else self.gain)

    def move(self, tensor: Tensor) -> Tensor:
        """What values in the place of the old parameter's (an average of it, say) are in the place of the new one's."""
        if self.map is None:
            return tensor + (self.new - self.old).detach()  # O's bias gained a vector
        return along(tensor, self.axis, self.places, self.map) * self.gain

    def average(self, tensor: Tensor) -> Tensor:
        """The same for sizes of steps: weighted means, as far as channels are mixed, so that they stay positive."""
        if self.map is None:
            return tensor.clone()
        size, whole = (along(x, self.axis, self.places, self.map.squared) for x in (tensor, torch.ones_like(tensor)))
        return size / whole * abs(self.gain)


def along(tensor: Tensor, axis: int, places: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Channels of a tensor, changed; owned and contiguous."""
    return change(channels_of(tensor, axis, places)).movedim(0, axis).contiguous()


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


class _Tensors:
    """Builds new parameters; what was one parameter in two places stays one."""

    def __init__(self) -> None:
        self.changes: dict[int, list[tuple[ParamChange, Slot]]] = {}
        self.users: dict[int, set[tuple[int, str]]] = {}
        self.first: dict[int, str] = {}
        """Which projection asked for a parameter first."""

    def cut(self, where: str, slot: Slot, change: ChannelMap, gain: float = 1.0) -> nn.Parameter:
        """The successor of the channels of a slot."""
        old = slot.parameter
        self.users.setdefault(id(old), set()).add((id(slot.owner), slot.name))
        self.first.setdefault(id(old), where)
        for known, other in self.changes.get(id(old), []):
            same = (slot.axis, [*slot.places]) == (other.axis, [*other.places])
            if same and known.gain == gain and known.map is not None and change.same(known.map):
                return known.new
            if same or not {*slot.places}.isdisjoint(other.places):
                raise TiedWeightsError(
                    where,
                    "projections that share a parameter to lose the same channels",
                    "a plan that takes others from each",
                    "untie the weights, or prune by hand with equal channels (prune_channels)",
                )
        index = None
        if isinstance(change, Pick):
            index = torch.tensor([slot.places[row] for row in change.rows], device=old.device)
        if slot.whole and gain == 1.0 and isinstance(change, Pick) and change.rows == tuple(range(slot.size)):
            new = old
        else:
            new = successor(
                old,
                along(old.detach(), slot.axis, slot.places, change),
                lambda grad: along(grad, slot.axis, slot.places, change.dual),
                gain,
            )
        found = ParamChange(old, new, slot.axis, index, gain, change, slot.places)
        self.changes.setdefault(id(old), []).append((found, slot))
        return new

    def shift(self, where: str, view: AttentionView, shift: Tensor) -> nn.Parameter:
        """The successor of O's bias: it gains ``O s``."""
        owner = view.owner("o")
        old = owner._parameters["bias"]
        assert old is not None, "the plan's spec says that O has a bias"
        if id(old) in self.changes:
            raise TiedWeightsError(
                where, "a bias of its own", "one that another projection uses too", "untie the biases (assign a clone)"
            )
        self.users.setdefault(id(old), set()).add((id(owner), "bias"))
        self.first.setdefault(id(old), where)
        gained = mean_output(view, shift)
        new = successor(old, (old.detach().double() + gained).to(old.dtype), torch.clone, 1.0)
        slot = Slot(owner, "bias", len(old))
        self.changes[id(old)] = [(ParamChange(old, new, 0, None, places=range(len(old))), slot)]
        return new

    def check_ties(self, model: nn.Module) -> None:
        """Raises if a parameter that changes is also used where nothing changes."""
        changed = {
            id(change.old): change.old
            for entries in self.changes.values()
            for change, _ in entries
            if change.new is not change.old
        }
        storage = {_address(p): key for key, p in changed.items()}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                old = storage.get(_address(parameter)) if parameter.numel() else None
                if old is None or (id(module), key) in self.users[old]:
                    continue
                named = f"{name}.{key}" if name else key
                if id(parameter) != old and id(parameter) in self.changes:
                    found = f"{named}, another parameter with the same storage"
                else:
                    found = f"{named} using it too"
                raise TiedWeightsError(
                    self.first[old],
                    "a parameter that is pruned to be used by that attention only",
                    found,
                    "untie the weights (assign a clone), or exclude the layer that shares them",
                )

    @property
    def map(self) -> ParamMap:
        entries = [change for entries in self.changes.values() for change, _ in entries]
        return ParamMap(tuple(change for change in entries if change.new is not change.old))


def _address(parameter: nn.Parameter) -> int:
    """Where a parameter's values begin; those without data share nothing but themselves."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def mean_output(view: AttentionView, shift: Tensor) -> Tensor:
    """``(d_model,)`` float64: what O makes of a constant context, (channels of O,) in logical order of heads."""
    return mean_of(view.weight("o"), view.spec.layout, shift)


def mean_of(weight: Tensor, layout: HeadLayout, shift: Tensor) -> Tensor:
    """The same from O's columns ``(channels, d_model)`` in stored order."""
    stored = shift[logical_channels(layout, "o")]
    return stored.to(weight.device, torch.float64) @ weight.double()


def successor(old: nn.Parameter, data: Tensor, cut: Callable[[Tensor], Tensor], gain: float) -> nn.Parameter:
    """A parameter with other values and storage of its own; gradient, hooks, flags and attributes come along."""
    with torch.no_grad():
        new = nn.Parameter(data.mul_(gain) if gain != 1.0 else data, requires_grad=old.requires_grad)
        if old.grad is not None:
            grad = cut(old.grad.detach())
            new.grad = grad.div_(gain) if gain != 1.0 else grad
    for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, key, None):
            setattr(new, key, getattr(old, key))
    new.__dict__.update(old.__dict__)
    return new


class Operation(NamedTuple):
    """What gives one attention its new shape; assigns alone."""

    view: AttentionView
    layer: LayerPlan
    way: Way
    tensors: Mapping[str, nn.Parameter]
    """By slot; of an attention that runs expanded by the first slot of each parameter."""
    bias: nn.Parameter | None = None
    """O's bias, where it changes."""

    def run(self) -> None:
        view, after, kept = self.view, self.layer.after, self.layer.kept_heads
        if self.way == "expanded":
            rows = {p: kept_channels(view, self.layer, p) for p in SIDES}
            parameters = {(id(joint.owner), joint.name): self.tensors[joint.keys[0]] for joint in joints(view)}
            expand_view(view, parameters, after, kept, rows, read=view.read)
        else:
            view.commit(self.tensors, after)
        if self.bias is not None:
            view.owner("o").bias = self.bias
        if self.way == "decoupled":
            assert view.mixin is not None, "surgery checks this before anything moves"
            rows = {p: kept_channels(view, self.layer, p) for p in SIDES}
            view.decouple(view.mixin, after, kept, numbers=numbers_left(view, after, kept, rows))
        if self.way == "stock":
            view.recast()
            if view.verdict is not None:
                inherit(view, view.verdict)


def _built(work: Sequence[tuple[AttentionView, LayerPlan]]) -> tuple[list[Operation], _Tensors]:
    """What gives attention modules their new shapes, and every new tensor."""
    tensors, operations = _Tensors(), []
    for view, layer in work:
        maps, way = channel_maps(view, layer), view.way(layer.after)
        assert way is not None, "check_expressible found one"
        if way == "expanded":
            new = {
                joint.keys[0]: tensors.cut(f"{view.name}: {joint.keys[0]}", joint.slot, joined(view, joint, maps))
                for joint in joints(view)
            }
        else:
            gain = view.query_gain(layer.after) if way == "stock" else 1.0  # forwards of ours know the scale
            new = {
                key: tensors.cut(f"{view.name}: {key}", slot, maps[key], gain if key[0] in "qx" else 1.0)
                for key, slot in view.slots.items()
            }
        bias = None
        if layer.fold is not None and layer.fold.shift is not None:
            bias = tensors.shift(f"{view.name}: o.bias", view, layer.fold.shift)
        operations.append(Operation(view, layer, way, new, bias))
    return operations, tensors


class Surgeon:
    """Applies a plan: :meth:`prepare` builds every new tensor and changes nothing, :meth:`commit` swaps them in."""

    def __init__(self, operations: Sequence[Operation], parameters: ParamMap) -> None:
        self._operations, self.changes = operations, parameters
        self._before: Snapshot | None = None

    @classmethod
    def prepare(cls, model: nn.Module, views: Sequence[AttentionView], plan: Plan, *, blank: bool = False) -> Surgeon:
        """Checks everything and builds the new tensors.

        Args:
            model: the model to change.
            views: its attention modules, at least those that the plan names.
            plan: what goes.
            blank: parameters may be on the meta device; new ones then are too.

        Raises:
            PlanMismatchError: the plan was made for another model.
            NotExpressibleError: an adapter has no forward for the shape that the plan gives.
            WrappedModelError: (and its kinds) a projection cannot be pruned as it is.
        """
        check_wrappers(model)
        check_fit(model, views, plan)
        by_name = {view.name: view for view in views}
        work = [(by_name[layer.spec.name], layer) for layer in plan if not layer.empty]
        check_views(model, [view for view, _ in work], blank=blank)
        check_unmasked(view for view, _ in work)
        check_expressible(views, plan)
        with torch.inference_mode(False), torch.no_grad():  # parameters are ordinary ones, whatever mode is on
            operations, tensors = _built(work)
        tensors.check_ties(model)
        return cls(operations, tensors.map)

    def commit(self) -> ParamMap:
        """Swaps the new tensors in. If anything fails midway, everything is put back bitwise and the error goes on."""
        self._before = snapshot_of(operation.view for operation in self._operations)
        try:
            for operation in self._operations:
                operation.run()
            return self.changes
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """The model as it was before :meth:`commit`."""
        if self._before is not None:
            self._before.restore()


def snapshot_of(views: Iterable[AttentionView]) -> Snapshot:
    """Of all modules of some views."""
    return Snapshot(module for view in views for top in view.modules for module in top.modules())
