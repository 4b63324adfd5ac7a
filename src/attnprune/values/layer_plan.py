"""What goes from one attention module, decided but not done: :class:`LayerPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..errors import PlanMismatchError, UnknownUnitError
from . import fields
from .channel_maps import ChannelMaps, Shape
from .layout import KINDS, Kind, Projection
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
    """Per head, the qk channels removed from it, ascending (empty for heads that go whole)."""
    vo: Channels = ()
    """Per head, the vo channels removed from it, ascending."""
    fold: ChannelMaps | None = None
    """Maps that rotate and refit what stays; None where channels go as they stand. With maps, the numbers above count
    the directions of their basis, the one with the most energy first."""

    def __post_init__(self) -> None:
        none: Channels = ((),) * self.spec.heads
        for kind in KINDS:
            if not getattr(self, kind):
                object.__setattr__(self, kind, none)
        self._check("head", self.heads, self.spec.heads)
        for kind in KINDS:
            removed = self.removed(kind)
            if len(removed) != self.spec.heads:
                raise UnknownUnitError(
                    f"{self.spec.name}: {kind}",
                    f"one list of channels for each of {self.spec.heads} heads",
                    f"{len(removed)} lists",
                    "Give an empty list for heads that keep all channels",
                )
            for head, (channels, dim) in enumerate(zip(removed, self.spec.dims(kind), strict=True)):
                self._check(f"{kind} channel of head {head}", channels, dim, gone=head in self.heads)
        if self.fold is not None:
            qk, vo, o = self.map_shapes
            self.fold.check(self.spec.name, [*qk, *qk, *vo, o, *([(o[0],)] if self.fold.shift is not None else [])])

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
        """Per head, the channels removed from it."""
        return self.qk if kind == "qk" else self.vo

    @cached_property
    def kept_heads(self) -> tuple[int, ...]:
        """Heads that stay, ascending."""
        gone = set(self.heads)
        return tuple(head for head in range(self.spec.heads) if head not in gone)

    def kept(self, kind: Kind, head: int) -> tuple[int, ...]:
        """Channels of a kept head that stay, ascending."""
        gone = set(self.removed(kind)[head])
        return tuple(channel for channel in range(self.spec.dims(kind)[head]) if channel not in gone)

    @property
    def empty(self) -> bool:
        """Whether nothing goes and nothing is rotated."""
        return not (self.heads or any(self.qk) or any(self.vo) or self.fold)

    @property
    def map_shapes(self) -> tuple[list[Shape], list[Shape], tuple[int, int]]:
        """The shapes of the maps: per kept head those of Q and K, per kept head that of V, and that of O."""
        qk, vo = (
            [(len(self.kept(kind, head)), self.spec.dims(kind)[head]) for head in self.kept_heads] for kind in KINDS
        )
        return list(qk), list(vo), (sum(self.spec.vo_dims), sum(self.after.vo_dims))

    @cached_property
    def maps(self) -> ChannelMaps:
        """Those of :attr:`fold`, or for channels removed as they stand those that pick what stays."""
        if self.fold is not None:
            return self.fold
        picks = {
            kind: [
                torch.eye(self.spec.dims(kind)[head], device="cpu")[list(self.kept(kind, head))]
                for head in self.kept_heads
            ]
            for kind in KINDS
        }
        starts = [sum(self.spec.vo_dims[:head]) for head in range(self.spec.heads)]
        rows = [starts[head] + channel for head in self.kept_heads for channel in self.kept("vo", head)]
        o = torch.eye(sum(self.spec.vo_dims), device="cpu")[:, rows]
        return ChannelMaps(tuple(picks["qk"]), tuple(picks["qk"]), tuple(picks["vo"]), o)

    @cached_property
    def after(self) -> AttentionSpec:
        """The spec of the pruned module."""
        dims = {
            kind: [self.spec.dims(kind)[head] - len(self.removed(kind)[head]) for head in self.kept_heads]
            for kind in KINDS
        }
        return self.spec.keep(self.kept_heads, dims["qk"], dims["vo"])

    def fraction(self, projection: Projection) -> float:
        """The share of a projection's weights that goes."""
        return 1 - self.after.weights(projection) / self.spec.weights(projection)

    def then(self, other: LayerPlan) -> LayerPlan:
        """This plan and then another, made for what this one leaves; in the coordinates of this one."""
        difference(self.after, other.spec)
        back = self.kept_heads
        heads = sorted({*self.heads, *(back[head] for head in other.heads)})
        channels: dict[str, Channels] = {}
        for kind in KINDS:
            removed = [set(these) for these in self.removed(kind)]
            for head, gone in enumerate(other.removed(kind)):
                kept = self.kept(kind, back[head])
                removed[back[head]] |= {kept[channel] for channel in gone}
            channels[kind] = tuple(() if head in heads else tuple(sorted(these)) for head, these in enumerate(removed))
        maps = self.maps.then(other.maps, other.kept_heads) if self.fold or other.fold else None
        return LayerPlan(self.spec, tuple(heads), channels["qk"], channels["vo"], maps)

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
                for head, listed in enumerate(fields.array(f"{where}.{kind}", found[kind], spec.heads))
            )
            for kind in KINDS
        }
        plain = cls(spec, fields.integers(f"{where}.heads", found["heads"]), channels["qk"], channels["vo"])
        if found["fold"] is None:
            return plain
        return replace(plain, fold=ChannelMaps.from_dict(found["fold"], f"{where}.fold", *plain.map_shapes))


def difference(expected: AttentionSpec, found: AttentionSpec) -> None:
    """Raises PlanMismatchError unless a plan for ``expected`` fits ``found`` (packing and scale do not count)."""
    for key in ("name", "qk_dims", "vo_dims", "d_model", "q_in", "k_in", "v_in", "bias", "bias_kv"):
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
    tidy = {
        kind: tuple(() if head in heads else tuple(sorted(gone)) for head, gone in enumerate(channels[kind]))
        for kind in KINDS
    }
    return LayerPlan(spec, tuple(sorted(heads)), tidy["qk"], tidy["vo"])
