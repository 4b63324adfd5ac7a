"""What goes from one attention module, decided but not done: :class:`LayerPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from ..errors import PlanMismatchError, UnknownUnitError
from . import fields
from .channel_maps import ChannelMaps, Shape
from .feature_maps import READERS, FeatureMaps, selection
from .layout import KIND_OF, KINDS, PROJECTIONS, Kind, Projection
from .spec import NOTHING, AttentionSpec, Features

Channels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LayerPlan:
    """What goes from one attention module, in the coordinates of the module that the spec describes."""

    spec: AttentionSpec
    """The module that the plan expects to find."""
    heads: tuple[int, ...] = ()
    """Heads removed whole, ascending."""
    qk: Channels = ()
    """Per key head, the qk channels removed from it, ascending (empty for those that go whole)."""
    vo: Channels = ()
    """Per key head, the vo channels removed from it, ascending."""
    fold: ChannelMaps | None = None
    """Maps that rotate and refit what stays; None where channels go as they stand. With maps, the numbers above count
    the directions of their basis, the one with the most energy first."""
    features: Features = NOTHING
    """Of Q, K and V the input features that they no longer read, of O the output features that it no longer writes,
    ascending; numbers count those of the dense projection."""
    refit: FeatureMaps | None = None
    """What makes up for these; None where the others stay as they stand."""

    def __post_init__(self) -> None:
        none: Channels = ((),) * self.spec.kv_heads
        for kind in KINDS:
            if not getattr(self, kind):
                object.__setattr__(self, kind, none)
        self._check("head", self.heads, self.spec.heads)
        for kind in KINDS:
            removed = self.removed(kind)
            if len(removed) != self.spec.kv_heads:
                raise UnknownUnitError(
                    f"{self.spec.name}: {kind}",
                    f"one list of channels for each of {self.spec.kv_heads} {self._name}s",
                    f"{len(removed)} lists",
                    "Give an empty list for heads that keep all channels",
                )
            for key, (channels, dim) in enumerate(zip(removed, self.spec.dims(kind), strict=True)):
                self._check(f"{kind} channel of {self._name} {key}", channels, dim, gone=key not in self.kept_keys)
                self._check_units(kind, key)
        if self.fold is not None:
            q, k, v, o = self.map_shapes
            self.fold.check(self.spec.name, [*q, *k, *v, o, *([(o[0],)] if self.fold.shift is not None else [])])

        for p, gone in zip(PROJECTIONS, self.features, strict=True):
            self._check_features(p, gone)
        if self.refit is not None:
            self.refit.check(self.spec.name, *self._widths, self.spec.layout.channels("o"))

    def renamed(self, name: str) -> LayerPlan:
        """The same for an attention of another name."""
        return replace(self, spec=replace(self.spec, name=name))

    def same(self, other: LayerPlan) -> bool:
        """Whether another attention loses the same."""
        return self == other.renamed(self.spec.name)

    def _check_features(self, projection: Projection, gone: tuple[int, ...]) -> None:
        present, what = self.spec.present(projection), "input" if projection in "qkv" else "output"
        if gone and (list(gone) != sorted(set(gone)) or not set(gone) <= set(present) or len(gone) == len(present)):
            raise UnknownUnitError(
                f"{self.spec.name}: {what} features of {projection}",
                f"at most {len(present) - 1} of its {len(present)}, ascending, each once",
                f"{gone[:8]}{' and more' if len(gone) > 8 else ''}",
                "Numbers count the dense projection's features; keep one of them",
            )

    @property
    def _widths(self) -> tuple[dict[Projection, int], dict[Projection, int]]:
        """How many features Q, K and V read now, and then."""
        before = {p: self.spec.width(p) for p in READERS}
        return before, {p: before[p] - len(gone) for p, gone in zip(READERS, self.features, strict=False)}

    @property
    def _name(self) -> str:
        return "key head" if self.spec.heads > self.spec.kv_heads else "head"

    def _check_units(self, kind: Kind, key: int) -> None:
        """Rotary pairs go together."""
        gone = set(self.removed(kind)[key])
        half = [unit for unit in self.spec.units(kind, key) if 0 < len(gone & set(unit)) < len(unit)]
        if half and gone:
            raise UnknownUnitError(
                f"{self.spec.name}: {kind} channel of {self._name} {key}",
                f"both or none of {half[0]}, which a rotary embedding rotates together",
                f"{tuple(sorted(gone & set(half[0])))} alone",
                "Remove the other one too",
            )

    def _check(self, what: str, removed: tuple[int, ...], count: int, gone: bool = False) -> None:
        where = f"{self.spec.name}: {what}"
        if gone and removed:
            raise UnknownUnitError(where, "none, as the head goes whole", f"{removed}", "Drop the channels or the head")
        if list(removed) != sorted(set(removed)) or (removed and not 0 <= removed[0] <= removed[-1] < count):
            raise UnknownUnitError(
                where,
                f"ascending numbers in [0, {count}), each once",
                f"{removed}",
                "Numbers count what the module has now; was it pruned before? Compose plans with plan.then(...)",
            )
        if removed and len(removed) == count:
            raise UnknownUnitError(
                where,
                f"at most {count - 1} of {count} removed",
                "all",
                "Keep one; to drop what is left of a head use prune_heads, to drop a layer's attention edit the model",
            )

    def removed(self, kind: Kind) -> Channels:
        """Per key head, the channels removed from it."""
        return self.qk if kind == "qk" else self.vo

    @cached_property
    def kept_heads(self) -> tuple[int, ...]:
        """Heads that stay, ascending."""
        gone = set(self.heads)
        return tuple(head for head in range(self.spec.heads) if head not in gone)

    @cached_property
    def kept_keys(self) -> tuple[int, ...]:
        """Key heads that stay, as a query head of theirs does, ascending."""
        return self.spec.keys_of(self.kept_heads)

    def kept(self, kind: Kind, key: int) -> tuple[int, ...]:
        """Channels of a kept key head that stay, ascending."""
        gone = set(self.removed(kind)[key])
        return tuple(channel for channel in range(self.spec.dims(kind)[key]) if channel not in gone)

    def stays(self, projection: Projection) -> list[tuple[int, tuple[int, ...]]]:
        """Per head of a projection that stays (query heads of Q and O, key heads of K and V), in logical order, its
        number and the channels that stay in it."""
        kind = KIND_OF[projection]
        if projection == "x":
            return [(head, tuple(range(self.spec.q_extra))) for head in self.kept_heads]
        if projection in "kv":
            return [(key, self.kept(kind, key)) for key in self.kept_keys]
        return [(head, self.kept(kind, self.spec.layout.key_of[head])) for head in self.kept_heads]

    @property
    def empty(self) -> bool:
        """Whether nothing goes and nothing is rotated."""
        return not (self.heads or any(self.qk) or any(self.vo) or any(self.features) or self.fold or self.refit)

    def left(self, projection: Projection) -> tuple[int, ...]:
        """The places, among the features that a projection reads or writes now, of those that stay."""
        gone = set(self.features[PROJECTIONS.index("q" if projection == "x" else projection)])
        return tuple(place for place, one in enumerate(self.spec.present(projection)) if one not in gone)

    @property
    def map_shapes(self) -> tuple[list[Shape], list[Shape], list[Shape], tuple[int, int]]:
        """The shapes of the maps: per kept head those of Q, likewise K and V, and that of O."""
        q, k, v = self._shapes("q"), self._shapes("k"), self._shapes("v")
        return q, k, v, (self.spec.layout.channels("o"), self.after.layout.channels("o"))

    def _shapes(self, projection: Projection) -> list[Shape]:
        return [(len(kept), self.spec.layout.sizes(projection)[head]) for head, kept in self.stays(projection)]

    @cached_property
    def maps(self) -> ChannelMaps:
        """Those of :attr:`fold`, or for channels removed as they stand those that pick what stays."""
        if self.fold is not None:
            return self.fold
        layout = self.spec.layout
        q, k, v = (
            tuple(torch.eye(layout.sizes(p)[head], device="cpu")[list(kept)] for head, kept in self.stays(p))
            for p in PROJECTIONS[:3]
        )
        starts = list(accumulate(layout.sizes("o"), initial=0))
        rows = [starts[head] + channel for head, kept in self.stays("o") for channel in kept]
        return ChannelMaps(q, k, v, torch.eye(starts[-1], device="cpu")[:, rows])

    @cached_property
    def after(self) -> AttentionSpec:
        """The spec of the pruned module."""
        dims = {kind: [len(self.kept(kind, key)) for key in self.kept_keys] for kind in KINDS}
        turned = [sum(c < self.spec.rotary_dims[key] for c in self.kept("qk", key)) for key in self.kept_keys]
        left_out = union(self.spec.left_out, self.features)
        return self.spec.keep(self.kept_heads, dims["qk"], dims["vo"], turned, left_out)

    def fraction(self, projection: Projection) -> float:
        """The share of a projection's weights that goes."""
        return 1 - self.after.weights(projection) / self.spec.weights(projection)

    def then(self, other: LayerPlan) -> LayerPlan:
        """This plan and then another, made for what this one leaves; in the coordinates of this one."""
        difference(self.after, other.spec)
        heads = {*self.heads, *(self.kept_heads[head] for head in other.heads)}
        channels: dict[Kind, Channels] = {}
        for kind in KINDS:
            removed = [set(these) for these in self.removed(kind)]
            for key, gone in enumerate(other.removed(kind)):
                kept = self.kept(kind, self.kept_keys[key])
                removed[self.kept_keys[key]] |= {kept[channel] for channel in gone}
            channels[kind] = tuple(map(tuple, removed))
        whole = make_layer(self.spec, heads, channels, union(self.features, other.features))
        if self.fold or other.fold:
            whole = replace(whole, fold=self.maps.then(other.maps, other.kept_heads, other.kept_keys))
        return replace(whole, refit=self._refit_then(other)) if self.refit or other.refit else whole

    def _refit_then(self, other: LayerPlan) -> FeatureMaps:
        """The refit of this plan and then another."""
        first, second = self.refit or FeatureMaps(), other.refit or FeatureMaps()
        reads: dict[Projection, torch.Tensor] = {}
        shifts: dict[Projection, torch.Tensor] = {}
        for p in READERS:
            early, late = (
                maps.reads[p].double() if p in maps.reads else selection(plan.spec.present(p), plan.after.present(p))
                for maps, plan in ((first, self), (second, other))
            )
            if p in first.reads or p in second.reads:
                reads[p] = early @ late
            if p in second.shifts:
                shifts[p] = early @ second.shifts[p].double()
            if p in first.shifts:
                shifts[p] = first.shifts[p].double() + shifts.get(p, 0)
        before: Any = 0 if self.fold is None or self.fold.shift is None else self.fold.shift.double()
        means = [(outputs, self.maps.o.double() @ mean.double() + before) for outputs, mean in second.means]
        dtype = torch.promote_types(*(next((t.dtype for t in one.tensors), torch.float32) for one in (first, second)))
        whole = FeatureMaps(reads, shifts, (*((outputs, mean.double()) for outputs, mean in first.means), *means))
        return whole.to(dtype)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; features and their refit are left out where none go."""
        more: dict[str, Any] = {"features": [list(gone) for gone in self.features]} if any(self.features) else {}
        more |= {"refit": self.refit.to_dict()} if self.refit else {}
        return {
            **more,
            "spec": self.spec.to_dict(),
            "heads": list(self.heads),
            "qk": [list(channels) for channels in self.qk],
            "vo": [list(channels) for channels in self.vo],
            "fold": self.fold.to_dict() if self.fold else None,
        }

    @classmethod
    def from_dict(cls, raw: object, where: str = "layer") -> LayerPlan:
        """Reads :meth:`to_dict`'s mapping, trusting nothing."""
        usual: dict[str, Any] = {"features": [[], [], [], []], "refit": None}
        raw = {**usual, **raw} if isinstance(raw, dict) else raw
        found = fields.mapping(where, raw, {"spec", "heads", "qk", "vo", "fold", *usual})
        spec = AttentionSpec.from_dict(found["spec"], f"{where}.spec")
        channels = {
            kind: tuple(
                fields.integers(f"{where}.{kind}[{head}]", listed)
                for head, listed in enumerate(fields.array(f"{where}.{kind}", found[kind], spec.kv_heads))
            )
            for kind in KINDS
        }
        heads = fields.integers(f"{where}.heads", found["heads"])
        listed = fields.array(f"{where}.features", found["features"], len(PROJECTIONS))
        q, k, v, o = (fields.integers(f"{where}.features.{p}", one) for p, one in zip(PROJECTIONS, listed, strict=True))
        plain = cls(spec, heads, channels["qk"], channels["vo"], features=(q, k, v, o))
        if found["fold"] is not None:
            plain = replace(plain, fold=ChannelMaps.from_dict(found["fold"], f"{where}.fold", *plain.map_shapes))
        if found["refit"] is None:
            return plain
        maps = FeatureMaps.from_dict(found["refit"], f"{where}.refit", *plain._widths, spec.layout.channels("o"))
        return replace(plain, refit=maps)


def difference(expected: AttentionSpec, found: AttentionSpec) -> None:
    """Raises PlanMismatchError unless a plan for ``expected`` fits ``found`` (packing and scale do not count)."""
    sizes = ("qk_dims", "vo_dims", "groups", "d_model", "q_in", "k_in", "v_in", "q_extra")
    for key in ("name", *sizes, "bias", "bias_kv", "gated", "left_out"):
        if getattr(expected, key) != getattr(found, key):
            detail = f" ({key}: {getattr(expected, key)} against {getattr(found, key)})"
            short = key not in ("qk_dims", "vo_dims", "left_out")
            raise PlanMismatchError(
                expected.name,
                f"{expected.describe()}, as the plan says",
                found.describe() + (detail if short else ""),
                "Was it pruned before? Compose plans with plan.then(...), or make the plan anew on this model",
            )


def union(first: Features, second: Features) -> Features:
    """Features of both."""
    q, k, v, o = (tuple(sorted({*one, *other})) for one, other in zip(first, second, strict=True))
    return q, k, v, o


def make_layer(
    spec: AttentionSpec, heads: set[int], channels: Mapping[Kind, Channels], features: Features = NOTHING
) -> LayerPlan:
    """A layer plan from sets: sorts, and leaves out the channels of heads that go whole."""
    left = spec.keys_of([head for head in range(spec.heads) if head not in heads])
    tidy = {
        kind: tuple(tuple(sorted(gone)) if key in left else () for key, gone in enumerate(channels[kind]))
        for kind in KINDS
    }
    return LayerPlan(spec, tuple(sorted(heads)), tidy["qk"], tidy["vo"], features=features)
