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
from .layout import KIND_OF, KINDS, PROJECTIONS, Kind, Projection
from .spec import AttentionSpec

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
        return not (self.heads or any(self.qk) or any(self.vo) or self.fold)

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
        return self.spec.keep(self.kept_heads, dims["qk"], dims["vo"], turned)

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
        whole = make_layer(self.spec, heads, channels)
        if not (self.fold or other.fold):
            return whole
        return replace(whole, fold=self.maps.then(other.maps, other.kept_heads, other.kept_keys))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "spec": self.spec.to_dict(),
            "heads": list(self.heads),
            "qk": [list(channels) for channels in self.qk],
            "vo": [list(channels) for channels in self.vo],
            "fold": self.fold.to_dict() if self.fold else None,
        }

    @classmethod
    def from_dict(cls, raw: object, where: str = "layer") -> LayerPlan:
        """Reads :meth:`to_dict`'s mapping, trusting nothing."""
        found = fields.mapping(where, raw, {"spec", "heads", "qk", "vo", "fold"})
        spec = AttentionSpec.from_dict(found["spec"], f"{where}.spec")
        channels = {
            kind: tuple(
                fields.integers(f"{where}.{kind}[{head}]", listed)
                for head, listed in enumerate(fields.array(f"{where}.{kind}", found[kind], spec.kv_heads))
            )
            for kind in KINDS
        }
        plain = cls(spec, fields.integers(f"{where}.heads", found["heads"]), channels["qk"], channels["vo"])
        if found["fold"] is None:
            return plain
        return replace(plain, fold=ChannelMaps.from_dict(found["fold"], f"{where}.fold", *plain.map_shapes))


def difference(expected: AttentionSpec, found: AttentionSpec) -> None:
    """Raises PlanMismatchError unless a plan for ``expected`` fits ``found`` (packing and scale do not count)."""
    sizes = ("qk_dims", "vo_dims", "groups", "d_model", "q_in", "k_in", "v_in", "q_extra")
    for key in ("name", *sizes, "bias", "bias_kv", "gated"):
        if getattr(expected, key) != getattr(found, key):
            detail = f" ({key}: {getattr(expected, key)} against {getattr(found, key)})"
            short = key not in ("qk_dims", "vo_dims")
            raise PlanMismatchError(
                expected.name,
                f"{expected.describe()}, as the plan says",
                found.describe() + (detail if short else ""),
                "Was it pruned before? Compose plans with plan.then(...), or make the plan anew on this model",
            )


def make_layer(spec: AttentionSpec, heads: set[int], channels: Mapping[Kind, Channels]) -> LayerPlan:
    """A layer plan from sets: sorts, and leaves out the channels of heads that go whole."""
    left = spec.keys_of([head for head in range(spec.heads) if head not in heads])
    tidy = {
        kind: tuple(tuple(sorted(gone)) if key in left else () for key, gone in enumerate(channels[kind]))
        for kind in KINDS
    }
    return LayerPlan(spec, tuple(sorted(heads)), tidy["qk"], tidy["vo"])
