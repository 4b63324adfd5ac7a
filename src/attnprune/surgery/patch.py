"""The surgeon: builds every new tensor first, then swaps them in, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TiedWeightsError
from ..families.base import AttentionView
from ..families.expansion import REST, expand_view, joints, numbers_left
from ..families.proof.verdict import inherit
from ..families.slots import Slot
from ..families.tied import tied_to
from ..families.ways import Way
from ..nn.attempt import Snapshot
from ..nn.expanded import ExpandedApart
from ..nn.selected import select
from ..values.layer_plan import LayerPlan
from ..values.layout import PROJECTIONS, SIDES
from ..values.plan import Plan
from .changes import Gain, OutputGain, ParamChange, ParamMap, bias_gain, gains, joint_gain
from .check import check_expressible, check_fit, check_unmasked, check_views, check_wrappers
from .maps import ChannelMap, FeatureChange, Pick, channel_maps, feature_changes, joined, kept_channels


class _Tensors:
    """Builds new parameters; what was one parameter in two places stays one."""

    def __init__(self) -> None:
        self.changes: dict[int, list[tuple[ParamChange, Slot]]] = {}
        self.users: dict[int, set[tuple[int, str]]] = {}
        self.first: dict[int, str] = {}
        """Which projection asked for a parameter first."""

    def cut(
        self,
        where: str,
        slot: Slot,
        change: ChannelMap,
        gain: float = 1.0,
        features: FeatureChange | None = None,
        gained: Gain | None = None,
    ) -> nn.Parameter:
        """The successor of the channels of a slot; arguments as the attributes of :class:`ParamChange`."""
        old = slot.parameter
        self.users.setdefault(id(old), set()).add((id(slot.owner), slot.name))
        self.first.setdefault(id(old), where)
        for known, other in self.changes.get(id(old), []):
            same = (slot.axis, [*slot.places]) == (other.axis, [*other.places])
            alike = known.features is None if features is None else features.same(known.features)
            alike &= gained is None and known.gained is None
            if same and alike and known.gain == gain and known.map is not None and change.same(known.map):
                return known.new
            if same or not {*slot.places}.isdisjoint(other.places):
                raise TiedWeightsError(
                    where,
                    "projections that share a parameter to lose the same channels and features",
                    "a plan that takes others from each",
                    "untie the weights, or prune by hand with equal channels (prune_channels)",
                )
        index = None
        if isinstance(change, Pick):
            index = torch.tensor([slot.places[row] for row in change.rows], device=old.device)
        found = ParamChange(old, old, slot.axis, index, gain, change, slot.places, features, gained)
        kept = isinstance(change, Pick) and change.rows == tuple(range(slot.size))
        if not (slot.whole and gain == 1.0 and kept and features is None and gained is None):
            new = successor(old, found.values(old.detach()), lambda grad: found._along(grad, change.dual), gain)
            found = replace(found, new=new)
        self.changes.setdefault(id(old), []).append((found, slot))
        return found.new

    def shift(self, where: str, view: AttentionView, layer: LayerPlan) -> nn.Parameter:
        """The successor of O's bias: it gains ``O s``, or ``O m`` where O no longer writes."""
        owner = view.owner("o")
        old = owner._parameters["bias"]
        assert old is not None, "the plan's spec says that O has a bias"
        if id(old) in self.changes:
            raise TiedWeightsError(
                where, "a bias of its own", "one that another projection uses too", "untie the biases (assign a clone)"
            )
        self.users.setdefault(id(old), set()).add((id(owner), "bias"))
        self.first.setdefault(id(old), where)
        slot = view.slots["o.weight"]
        gained = OutputGain(slot, slot.parameter, layer)
        found = ParamChange(old, old, 0, None, places=range(len(old)), gained=gained)
        found = replace(found, new=successor(old, found.values(old.detach()), torch.clone, 1.0))
        self.changes[id(old)] = [(found, Slot(owner, "bias", len(old)))]
        return found.new

    def share(self, view: AttentionView) -> None:
        """Another attention that has all of these parameters gets their successors too."""
        for slot in (*view.slots.values(), Slot(view.owner("o"), "bias", 0)):
            old = slot.owner._parameters.get(slot.name)
            if id(old) in self.users:
                self.users[id(old)].add((id(slot.owner), slot.name))

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
            parameters = {}
            for joint in joints(view):
                owner = id(joint.owner)
                parameters[owner, joint.name] = self.tensors[joint.keys[0]]
                if joint.name == "weight" and joint.apart(view, after):
                    parameters |= {(owner, key): self.tensors[key] for key in joint.keys}
                    if joint.rest(view):
                        parameters[owner, REST] = self.tensors[f"{joint.keys[0]} {REST}"]
            expand_view(view, parameters, after, kept, rows, read=view.read)
        else:
            view.commit(self.tensors, after)
        self._select()
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

    def _select(self) -> None:
        """Projections take the features that are left."""
        holders = {id(p): one for one in self.view.top.modules() for p in one._parameters.values() if p is not None}
        holders |= {id(one._parameters["weight"]): one for one in self.view.modules if "weight" in one._parameters}
        for projection, gone in zip(PROJECTIONS, self.layer.features, strict=True):
            expanded, after = self.way == "expanded", self.layer.after
            if not gone or (expanded and isinstance(self.view.owner(projection), ExpandedApart)):
                continue
            owner = self.view.owner(projection) if expanded else holders[id(self.tensors[f"{projection}.weight"])]
            select(owner, after.present(projection), after.features(projection), outputs=projection == "o")


def _built(work: Sequence[tuple[AttentionView, LayerPlan]]) -> tuple[list[Operation], _Tensors]:
    """What gives attention modules their new shapes, and every new tensor."""
    tensors, operations = _Tensors(), []
    tied = tied_to([view for view, _ in work])
    done: dict[str, Operation] = {}
    for view, layer in work:
        first = done.get(tied[view.name]) if view.name in tied else None
        if first is not None and view.way(layer.after) == first.way and layer.same(first.layer):
            operations.append(first._replace(view=view, layer=layer))
            tensors.share(view)
            continue
        maps, features, way = channel_maps(view, layer), feature_changes(view, layer), view.way(layer.after)
        assert way is not None, "check_expressible found one"
        if way == "expanded":
            new = {}
            for joint in joints(view):
                where = f"{view.name}: {joint.keys[0]}"
                if joint.name == "weight" and joint.apart(view, layer.after):
                    for key in joint.keys:
                        new[key] = tensors.cut(where, view.slots[key], maps[key], features=features.get(key))
                    if rest := joint.rest(view):
                        slot = replace(joint.slot, size=len(rest), apart=tuple(rest))
                        new[f"{joint.keys[0]} {REST}"] = tensors.cut(where, slot, Pick(tuple(range(len(rest)))))
                    continue
                new[joint.keys[0]] = tensors.cut(
                    where, joint.slot, joined(view, joint, maps),
                    features=features.get(joint.keys[0]), gained=joint_gain(view, joint, layer),
                )  # fmt: skip
        else:
            gain = view.query_gain(layer.after) if way == "stock" else 1.0  # forwards of ours know the scale
            new = {
                key: tensors.cut(
                    f"{view.name}: {key}", slot, maps[key], gain if key[0] in "qx" else 1.0,
                    features.get(key), bias_gain(view, key, layer),
                )
                for key, slot in view.slots.items()
            }  # fmt: skip
        bias = None
        if gains(layer):
            bias = tensors.shift(f"{view.name}: o.bias", view, layer)
        operations.append(Operation(view, layer, way, new, bias))
        done[view.name] = operations[-1]
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
