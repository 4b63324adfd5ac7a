"""What goes, decided but not done: :class:`Plan`, a frozen value with a JSON form."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from . import fields
from .errors import AttnPruneError, PlanFormatError, PlanMismatchError, UnknownUnitError
from .folds import Fold, Shape
from .ratios import RESOURCES, Budget, Ratios
from .spec import KINDS, PROJECTIONS, AttentionSpec, Kind, Projection

FORMAT = "attnprune.plan"
VERSION = 3
_WORDS = ("granularity", "scope", "heads", "scorer", "split", "basis", "compensate")
_SINCE_2: dict[str, Any] = {"basis": "channels", "compensate": "no", "target_error": None}
_SINCE_3: dict[str, Any] = {"match_dims": False, "budget": None}

Channels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Asked:
    """What the user asked for, kept with the plan so that the report can show it beside what was achieved."""

    ratios: Ratios
    granularity: str = "channel"
    scope: str = "global"
    heads: str = "uniform"
    scorer: str = "magnitude"
    split: str = "fixed"
    basis: str = "channels"
    """What was removed: ``"channels"`` as they stand, or directions of a ``"rotated"`` basis."""
    compensate: str = "no"
    """Whether what stays was refitted: ``"yes"`` or ``"no"``."""
    round_to: int = 1
    target_error: float | None = None
    """The share of energy that may be lost, where that was asked for in place of ratios."""
    match_dims: bool = False
    """Whether every head was to keep as many qk as vo channels."""
    budget: Budget | None = None
    """What the whole model may cost, where that was asked for in place of ratios."""

    def then(self, other: Asked) -> Asked:
        """The sum of two requests; settings that differ are joined with a plus sign."""
        ratios = self.ratios.then(other.ratios)
        same = {
            name: "+".join(dict.fromkeys(f"{getattr(self, name)}+{getattr(other, name)}".split("+"))) for name in _WORDS
        }
        errors = [one.target_error for one in (self, other) if one.target_error is not None]
        return Asked(
            ratios,
            round_to=min(self.round_to, other.round_to),
            target_error=max(errors, default=None),
            match_dims=self.match_dims and other.match_dims,
            budget=self.budget.then(other.budget) if self.budget else None,
            **same,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        words = {name: getattr(self, name) for name in _WORDS}
        numbers = {"round_to": self.round_to, "target_error": self.target_error, "match_dims": self.match_dims}
        budget = None if self.budget is None else vars(self.budget)
        return {"ratios": {p: self.ratios.of(p) for p in PROJECTIONS}, **numbers, **words, "budget": budget}

    @classmethod
    def from_dict(cls, raw: object) -> Asked:
        """Reads :meth:`to_dict`'s mapping, trusting nothing."""
        found = fields.mapping("asked", raw, {"ratios", "round_to", "target_error", "match_dims", "budget", *_WORDS})
        ratios = fields.mapping("asked.ratios", found["ratios"], set(PROJECTIONS))
        numbers = {p: fields.number(f"asked.ratios.{p}", ratios[p]) for p in PROJECTIONS}
        words = {name: fields.string(f"asked.{name}", found[name]) for name in _WORDS}
        round_to = fields.integer("asked.round_to", found["round_to"], low=1)
        error = found["target_error"]
        error = None if error is None else fields.positive("asked.target_error", error)
        return cls(
            Ratios(**numbers),
            round_to=round_to,
            target_error=error,
            match_dims=fields.boolean("asked.match_dims", found["match_dims"]),
            budget=None if found["budget"] is None else _budget(found["budget"]),
            **words,
        )


def _budget(raw: object) -> Budget:
    found = fields.mapping("asked.budget", raw, {"resource", "share", "promised"})
    resource = next((one for one in RESOURCES if one == found["resource"]), None)
    if resource is None:
        fields.fail("asked.budget.resource", f"one of {', '.join(RESOURCES)}", found["resource"])
    promised = found["promised"]
    if promised is not None:
        promised = fields.positive("asked.budget.promised", promised)
    return Budget(resource, fields.positive("asked.budget.share", found["share"]), promised)


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
    fold: Fold | None = None
    """Maps that turn and refit what stays; None where channels go as they stand. With a fold, the numbers above count
    the directions of its basis, the one with the most energy first."""

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
            qk, vo, o = self.fold_shapes
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
        """Whether nothing goes and nothing is turned."""
        return not (self.heads or any(self.qk) or any(self.vo) or self.fold)

    @property
    def fold_shapes(self) -> tuple[list[Shape], list[Shape], tuple[int, int]]:
        """The shapes of a fold's maps: per kept head those of Q and K, per kept head that of V, and that of O."""
        qk, vo = (
            [(len(self.kept(kind, head)), self.spec.dims(kind)[head]) for head in self.kept_heads] for kind in KINDS
        )
        return list(qk), list(vo), (sum(self.spec.vo_dims), sum(self.after.vo_dims))

    @cached_property
    def maps(self) -> Fold:
        """The fold, or for channels removed as they stand the one that picks those that stay."""
        if self.fold is not None:
            return self.fold
        picks = {
            kind: [torch.eye(self.spec.dims(kind)[head])[list(self.kept(kind, head))] for head in self.kept_heads]
            for kind in KINDS
        }
        starts = [sum(self.spec.vo_dims[:head]) for head in range(self.spec.heads)]
        rows = [starts[head] + channel for head in self.kept_heads for channel in self.kept("vo", head)]
        o = torch.eye(sum(self.spec.vo_dims))[:, rows]
        return Fold(tuple(picks["qk"]), tuple(picks["qk"]), tuple(picks["vo"]), o)

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
        fold = self.maps.then(other.maps, other.kept_heads) if self.fold or other.fold else None
        return LayerPlan(self.spec, tuple(heads), channels["qk"], channels["vo"], fold)

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
                fields.integers(f"{where}.{kind}[{head}]", one)
                for head, one in enumerate(fields.array(f"{where}.{kind}", found[kind], spec.heads))
            )
            for kind in KINDS
        }
        plain = cls(spec, fields.integers(f"{where}.heads", found["heads"]), channels["qk"], channels["vo"])
        if found["fold"] is None:
            return plain
        return replace(plain, fold=Fold.from_dict(found["fold"], f"{where}.fold", *plain.fold_shapes))


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


@dataclass(frozen=True)
class Plan:
    """What goes, by name, in the coordinates of the model it was made for. Frozen, hashable, JSON.

    >>> spec = AttentionSpec.of("attn", heads=2, head_dim=4, d_model=8)
    >>> plan = Plan((LayerPlan(spec, qk=((0,), (3,))),))
    >>> Plan.from_json(plan.to_json()) == plan, plan["attn"].after.qk_dims, plan.empty
    (True, (3, 3), False)
    """

    layers: tuple[LayerPlan, ...]
    """One for every attention considered, in model order, also where nothing goes."""
    asked: Asked | None = None
    """What was asked for; None for plans made by hand."""

    def __post_init__(self) -> None:
        counts = Counter(layer.spec.name for layer in self.layers)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise PlanFormatError("plan", "each attention once", f"{twice} more than once", "Merge them with then")

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.spec.name == name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def empty(self) -> bool:
        """Whether nothing goes anywhere."""
        return all(layer.empty for layer in self.layers)

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """The specs that the plan expects."""
        return tuple(layer.spec for layer in self.layers)

    @property
    def after(self) -> tuple[AttentionSpec, ...]:
        """The specs that the plan leaves."""
        return tuple(layer.after for layer in self.layers)

    def fraction(self, projection: Projection) -> float:
        """The share of a projection's weights that goes, over all layers of the plan."""
        before, after = (sum(s.weights(projection) for s in specs) for specs in (self.specs, self.after))
        return 1 - after / before if before else 0.0

    def then(self, other: Plan) -> Plan:
        """One plan that does what this plan and then ``other`` do.

        Raises:
            PlanMismatchError: ``other`` was not made for the model that this plan leaves.
        """
        mine, theirs = ({layer.spec.name: layer for layer in plan} for plan in (self, other))
        joint = [layer.then(theirs[name]) if name in theirs else layer for name, layer in mine.items()]
        joint += [layer for name, layer in theirs.items() if name not in mine]
        if self.asked and other.asked:
            return Plan(tuple(joint), self.asked.then(other.asked))
        if self.empty and other.empty:
            asked = self.asked or other.asked
        else:
            asked = self.asked if other.empty else other.asked if self.empty else None
        return Plan(tuple(joint), asked)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON form: equal plans have equal digests on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """One line of JSON, keys sorted; the same bytes for equal plans."""
        asked = self.asked.to_dict() if self.asked else None
        layers = [layer.to_dict() for layer in self.layers]
        whole = {"format": FORMAT, "version": VERSION, "asked": asked, "layers": layers}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Reads :meth:`to_json`'s text, checking every field; nothing is trusted.

        Raises:
            PlanFormatError: not JSON, another format or version, a missing, unknown or malformed field.
        """
        found = fields.mapping("file", fields.load(text), {"format", "version", "asked", "layers"})
        if found["format"] != FORMAT:
            fields.fail("format", repr(FORMAT), found["format"])
        version = fields.integer("version", found["version"], low=1)
        if version > VERSION:
            raise PlanFormatError(
                "plan: version", f"at most {VERSION}, the newest that this attnprune reads", str(version),
                "update attnprune",
            )  # fmt: skip
        if version < VERSION:
            _from_older(found, version)
        try:
            layers = fields.array("layers", found["layers"])
            asked = None if found["asked"] is None else Asked.from_dict(found["asked"])
            read = []
            for i, one in enumerate(layers):
                layers[i] = None  # maps may be large: their text goes as soon as it is read
                read.append(LayerPlan.from_dict(one, f"layers[{i}]"))
            return cls(tuple(read), asked)
        except PlanFormatError as error:
            if len(str(error)) < 1000:
                raise
            raise _brief(error.where, error) from error
        except AttnPruneError as error:  # the values' own checks: unknown units, impossible ratios or sizes
            raise _brief(f"plan: {error.where}", error) from error

    def __repr__(self) -> str:
        layers = sum(not layer.empty for layer in self.layers)
        share = ", ".join(f"{p} {self.fraction(p):.1%}" for p in PROJECTIONS) if self.layers else "nothing"
        return f"Plan({layers} of {len(self.layers)} attention modules change: {share}; digest {self.digest[:12]})"


def _brief(where: str, error: AttnPruneError) -> PlanFormatError:
    """An error about names and numbers in a file, which may be of any length."""
    return PlanFormatError(where[:200], error.expected[:200], error.found[:200], error.remedy)


def _from_older(found: dict[str, Any], version: int) -> None:
    """Adds to a file of an older version what later versions say."""
    if isinstance(found["asked"], dict):
        found["asked"] = {**(_SINCE_2 if version < 2 else {}), **_SINCE_3, **found["asked"]}
    for layer in found["layers"] if isinstance(found["layers"], list) else ():
        if isinstance(layer, dict) and version < 2:
            layer.setdefault("fold", None)


def make_layer(spec: AttentionSpec, heads: set[int], channels: Mapping[Kind, Channels]) -> LayerPlan:
    """A layer plan from sets: sorts, and leaves out the channels of heads that go whole."""
    tidy = {
        kind: tuple(() if head in heads else tuple(sorted(gone)) for head, gone in enumerate(channels[kind]))
        for kind in KINDS
    }
    return LayerPlan(spec, tuple(sorted(heads)), tidy["qk"], tidy["vo"])
