"""What shape every attention of a saved model has, and the plan that gives it to a dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..families.base import AttentionView
from ..families.expansion import rescale
from ..families.registry import all_views
from ..families.ways import Verdict
from ..nn.decoupled import mixin_class
from ..values import fields
from ..values.layer_plan import Channels, LayerPlan, make_layer
from ..values.layout import KINDS, PROJECTIONS, Kind
from ..values.plan import Plan
from ..values.spec import AttentionSpec, Features
from .folder import OTHER_SHAPE, reading, refuse
from .seen import Seen, seen_of

_ORDER = "save the model again, or, where it was not saved by this version, prune it again from the dense one"
_OTHER = "pass a dense model of the class that was saved"


class Saved(NamedTuple):
    """One attention of a saved model."""

    spec: AttentionSpec
    kept: tuple[int, ...]
    """For every query head, its number before any pruning."""
    channels: Mapping[Kind, tuple[tuple[int, ...], ...]] | None = None
    """Per key head, the dense numbers of its channels, where the host's own forward tells them apart as it runs
    expanded; None where it is of no matter which ones were kept."""
    way: str = ""
    """How it runs (:func:`way_of`), where nothing but a run of the user's model can show how it may."""
    seen: Seen | None = None
    """What else such a run showed."""


class _Written(NamedTuple):
    """What every file says of an attention."""

    spec: AttentionSpec
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """The attention modules of a model as they are, in model order: all that loading needs beside a dense model.

    >>> model = nn.MultiheadAttention(16, 4)
    >>> record = Record.of(all_views(model))
    >>> Record.from_list(record.to_list(), "here") == record
    True
    """

    attention: tuple[Saved, ...]

    @classmethod
    def of(cls, views: Sequence[AttentionView]) -> Record:
        return cls(
            tuple(
                Saved(
                    view.spec, _kept(view), view.numbers if view.tells_channels else None, way_of(view), seen_of(view)
                )
                for view in views
            )
        )

    def to_list(self) -> list[dict[str, Any]]:
        """A JSON-ready list."""
        return [
            fields.to_dict(_Written(one.spec, one.kept))
            | ({} if one.channels is None else {"channels": {kind: [*map(list, one.channels[kind])] for kind in KINDS}})
            | ({"way": one.way} if one.way else {})
            | ({} if one.seen is None else {"seen": one.seen.to_dict()})
            for one in self.attention
        ]

    @classmethod
    def from_list(cls, raw: object, where: str) -> Record:
        """Reads :meth:`to_list`'s list, trusting nothing.

        Raises:
            CheckpointError: a missing, unknown or malformed field.
        """
        saved = []
        with reading(where):
            for i, each in enumerate(fields.array("attention", raw)):
                here, known = f"attention[{i}]", dict(each) if isinstance(each, dict) else each
                numbers, way, seen = (
                    known.pop(key, None) if isinstance(known, dict) else None for key in ("channels", "way", "seen")
                )
                one = Saved(*fields.read(_Written, known, here))
                if numbers is not None:
                    one = one._replace(channels=_channels(f"{here}.channels", numbers, one.spec))
                if way is not None:
                    one = one._replace(way=fields.string(f"{here}.way", way))
                if seen is not None:
                    one = one._replace(seen=Seen.read(f"{here}.seen", seen))
                if len(one.kept) != one.spec.heads or list(one.kept) != sorted(set(one.kept)):
                    fields.fail(f"attention[{i}].kept", f"{one.spec.heads} ascending numbers", list(one.kept))
                saved.append(one)
        if len({one.spec.name for one in saved}) != len(saved):
            refuse(where, "each attention once", "one twice")
        return cls(tuple(saved))

    def inside(self, model: nn.Module) -> Record:
        """The same for a base model of transformers without the head that it was saved with, or with a head on top."""
        prefix = f"{getattr(model, 'base_model_prefix', '') or ' '}."
        inner = [one for one in self.attention if one.spec.name.startswith(prefix)]
        if bool(inner) == hasattr(model, prefix[:-1]):
            return self
        if inner:
            return self.below(prefix)
        return Record(tuple(_renamed(one, prefix + one.spec.name) for one in self.attention))

    def below(self, prefix: str) -> Record:
        """The attention modules whose names begin so, by the rest of their names."""
        inner = [one for one in self.attention if one.spec.name.startswith(prefix)]
        return Record(tuple(_renamed(one, one.spec.name[len(prefix) :]) for one in inner))

    def plan(self, views: Sequence[AttentionView], where: str) -> Plan:
        """What gives attention modules the shapes of the record; which channels go is of no matter.

        Raises:
            CheckpointError: the modules are others, or have fewer heads or channels than the record.
        """
        by_name = {view.name: view for view in views}
        return Plan(tuple(_shrink(one, by_name, where) for one in self.attention))

    def settle(self, model: nn.Module, where: str) -> None:
        """Checks modules that have taken the shapes, and gives them their softmax scales.

        Raises:
            CheckpointError: a module is not what the record says in some other way (widths, biases, scale).
        """
        by_name = {one.spec.name: one for one in self.attention}
        for view in all_views(model, by_name):
            state, scale = view.state, by_name[view.name].spec.scale
            if state is not None and state.expanded is not None:
                rescale(view, scale)
            elif state is not None:
                view.module.attnprune_state = state._replace(scale=scale)  # type: ignore[assignment]
        for view in all_views(model, by_name):
            saved = by_name[view.name]
            if view.tells_channels and saved.channels is None:
                refuse(
                    f"{where}: {view.name}",
                    "a class whose heads run by themselves, as where it was saved",
                    "one that runs expanded here, by a forward that tells its channels apart",
                    _OTHER,
                )
            if view.spec != saved.spec:
                found, expected = view.spec.to_dict(), saved.spec.to_dict()
                differ = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
                shown = [str({key: one.get(key) for key in differ})[:120] for one in (expected, found)]
                refuse(f"{where}: {view.name}", shown[0], shown[1], OTHER_SHAPE)


def _renamed(saved: Saved, name: str) -> Saved:
    return saved._replace(spec=replace(saved.spec, name=name))


def _channels(where: str, raw: object, spec: AttentionSpec) -> dict[Kind, tuple[tuple[int, ...], ...]]:
    """Dense numbers of channels from a file, per head ascending."""
    found = fields.mapping(where, raw, set(KINDS))
    read: dict[Kind, tuple[tuple[int, ...], ...]] = {}
    for kind in KINDS:
        rows = fields.array(f"{where}.{kind}", found[kind], spec.kv_heads)
        read[kind] = tuple(fields.integers(f"{where}.{kind}[{head}]", row) for head, row in enumerate(rows))
        for head, (row, dim) in enumerate(zip(read[kind], spec.dims(kind), strict=True)):
            if len(row) != dim or list(row) != sorted(set(row)):
                fields.fail(f"{where}.{kind}[{head}]", f"{dim} ascending numbers", list(row))
    return read


def way_of(view: AttentionView) -> str:
    """How an attention runs that nothing but a run of the user's model can show: ``"stock"``, ``"expanded"``,
    ``"read"`` (expanded, of a host that reads weights) or the name of a forward of ours; empty for others."""
    if view.state is None:
        return "stock" if view.verdict is not None and view.verdict.recorded else ""
    if not view.state.recorded:
        return ""
    if view.runs_expanded:
        return "read" if view.read else "expanded"
    mixin = mixin_class(view.module)
    return "" if mixin is None else mixin.__name__


def told(view: AttentionView, saved: Saved, where: str) -> AttentionView:
    """A view that runs as :func:`way_of` said, where running it shows nothing.

    Raises:
        CheckpointError: it has no such way to run, or its projections may lie in several orders, and which one is not
            said.
    """
    way, seen = saved.way, saved.seen or Seen()
    if not way or view.verdict is None or view.verdict.ran:
        return view
    if len(view.orders) > 1 and seen.order not in view.orders and way != "stock":
        refuse(f"{where}: {view.name}", f"one of the orders {list(view.orders)}", repr(seen.order)[:60], _ORDER)
    own = {"stock": Verdict(stock=True), "expanded": Verdict(expanded=True), "read": Verdict(expanded=True, read=True)}
    ours = {one.__name__: Verdict(decoupled=one) for one in view.adapter.decoupled_for(view)}
    if way not in own | ours:
        refuse(f"{where}: {view.name}", "a way to run that its class has", repr(way)[:60], _OTHER)
    found = replace(
        (own | ours)[way], fixed=seen.fixed, heads=frozenset(seen.heads), order=seen.order, rotary=seen.rotary,
        rotary_dim=seen.rotary_dim, recorded=True, ran=False,
    )  # fmt: skip  # a run may still show more
    return replace(view.lying(seen.order), verdict=found, spec=found.told(view.spec))


def _kept(view: AttentionView) -> tuple[int, ...]:
    """For every head of a module, its number before any pruning, as far as the module knows."""
    state = getattr(view.module, "attnprune_state", None)
    return tuple(state.kept) if state is not None else tuple(range(view.spec.heads))


def _shrink(saved: Saved, views: Mapping[str, AttentionView], where: str) -> LayerPlan:
    view = views.get(saved.spec.name)
    if view is None:
        found = f"an attention module of this name (the model has {list(views)[:4]})"
        refuse(f"{where}: {saved.spec.name[:80]}", found, "none", _OTHER)
    return layer_between(view.spec, _kept(view), saved, where, view.numbers)


def layer_between(
    spec: AttentionSpec,
    present: Sequence[int],
    saved: Saved,
    where: str,
    numbers: Mapping[Kind, tuple[tuple[int, ...], ...]] | None = None,
) -> LayerPlan:
    """What gives an attention module the shape of a saved one.

    Args:
        spec: the module before.
        present: for every head of it, its number before any pruning.
        saved: what it becomes.
        where: the file that says so, for messages.
        numbers: per head of the module, the dense numbers of its channels; None: it is dense.

    Raises:
        CheckpointError: it has fewer heads or channels than that.
    """
    where = f"{where}: {saved.spec.name[:80]}"
    features = _features(spec, saved.spec, where)
    same = spec.layout == saved.spec.layout
    if same and (saved.channels is None or numbers is None or dict(saved.channels) == dict(numbers)):
        return LayerPlan(spec, features=features)
    if not set(saved.kept) <= set(present):
        refuse(where, f"heads of {list(present)[:16]}", str(list(saved.kept))[:80], _OTHER)
    heads = [present.index(number) for number in saved.kept]
    places = spec.keys_of(heads)
    if spec.keep(heads, saved.spec.qk_dims, saved.spec.vo_dims).groups != saved.spec.groups:
        refuse(where, f"query heads in groups of {list(spec.groups)[:16]}", str(list(saved.spec.groups))[:80], _OTHER)
    channels: dict[Kind, Channels] = {}
    for kind in KINDS:
        removed: list[tuple[int, ...]] = [()] * spec.kv_heads
        for place, dim in zip(places, saved.spec.dims(kind), strict=True):
            if dim > spec.dims(kind)[place]:
                refuse(where, f"at most {spec.dims(kind)[place]} {kind} channels", str(dim), _OTHER)
            flat = [channel for unit in spec.units(kind, place) for channel in unit]
            removed[place] = tuple(sorted(flat[dim:]))
        if saved.channels is not None:
            for place, wanted in zip(places, saved.channels[kind], strict=True):
                known = numbers[kind][place] if numbers is not None else range(spec.dims(kind)[place])
                if not set(wanted) <= set(known):
                    refuse(where, f"{kind} channels of {list(known)[:16]}", str(list(wanted))[:80], _OTHER)
                removed[place] = tuple(i for i, number in enumerate(known) if number not in set(wanted))
        channels[kind] = tuple(removed)
    return make_layer(spec, set(range(spec.heads)) - set(heads), channels, features)


def _features(spec: AttentionSpec, saved: AttentionSpec, where: str) -> Features:
    """The features that go besides those that an attention leaves out already."""
    found: list[tuple[int, ...]] = []
    for p in PROJECTIONS:
        has, goes = set(spec.missing(p)), set(saved.missing(p))
        if not has <= goes or not goes < set(range(spec.features(p))):
            what = f"features of {p} among {spec.width(p)} of {spec.features(p)}"
            refuse(where, what, str(sorted(goes))[:80], _OTHER)
        found.append(tuple(sorted(goes - has)))
    q, k, v, o = found
    return q, k, v, o
