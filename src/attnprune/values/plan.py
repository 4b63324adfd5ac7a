"""What goes, decided but not done: :class:`Plan`, a frozen value with a JSON form."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import AttnPruneError, PlanFormatError
from . import fields
from .asked import Asked
from .layer_plan import LayerPlan
from .layout import KINDS, PROJECTIONS, Projection
from .spec import AttentionSpec
from .tables import arrow, dims, html_table

FORMAT = "attnprune.plan"
VERSION = 6
_NEW = {
    4: "grouped queries or rotary pairs",
    5: "more in Q than in K, or gates",
    6: "projections that leave features out",
}
"""By version, what it brought."""
_SINCE_2: dict[str, Any] = {"basis": "channels", "compensate": "no", "target_error": None}
_SINCE_3: dict[str, Any] = {"match_dims": False, "budget": None}


@dataclass(frozen=True)
class Plan:
    """What goes, by name, in the coordinates of the model it was made for. Frozen, hashable, JSON.

    Notebooks show a table of it.

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

    def table(self, total: str = "removes") -> list[list[str]]:
        """Rows of text: a heading, one for every attention, one for all of them, and what was asked where ratios were.

        Args:
            total: what the row for all of them is called.

        >>> Plan((LayerPlan(AttentionSpec.of("attn", heads=2, head_dim=4, d_model=8), heads=(1,)),)).table()[1]
        ['attn', '2 -> 1', '4', '4', '-50.0%', '-50.0%', '-50.0%', '-50.0%']
        """
        rows = [["attention", "heads", "qk", "vo", *PROJECTIONS]]
        for layer in self.layers:
            before, after = layer.spec, layer.after
            sizes = [arrow(dims(before.dims(kind)), dims(after.dims(kind))) for kind in KINDS]
            shares = [f"-{layer.fraction(p):.1%}" for p in PROJECTIONS]
            rows.append([before.name or "(model)", arrow(before.heads, after.heads), *sizes, *shares])
        rows.append([total, "", "", "", *(f"-{self.fraction(p):.1%}" for p in PROJECTIONS)])
        asked = {} if self.asked is None else self.asked.shares(self.specs)
        if asked.keys() == set(PROJECTIONS):
            rows.append(["asked", "", "", "", *(f"-{share:.1%}" for share in asked.values())])
        return rows

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
        whole = {"format": FORMAT, "version": self._version, "asked": asked, "layers": layers}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def _version(self) -> int:
        """The lowest version that says all: 4 brought grouped queries and rotary pairs, 5 more channels in Q than in K,
        or gates, 6 features that projections leave out; most plans have none of them."""
        if any(layer.refit or any(layer.after.left_out) for layer in self.layers):
            return 6
        if any(spec.q_extra or spec.gated for spec in self.specs):
            return 5
        return 4 if any(spec.heads > spec.kv_heads or spec.rotary != "none" for spec in self.specs) else 3

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
        if version < 3:
            _from_older(found, version)
        try:
            layers = fields.array("layers", found["layers"])
            asked = None if found["asked"] is None else Asked.from_dict(found["asked"])
            read = []
            for i, one in enumerate(layers):
                layers[i] = None  # maps may be large: their text goes as soon as it is read
                read.append(LayerPlan.from_dict(one, f"layers[{i}]"))
            plan = cls(tuple(read), asked)
            if version < plan._version and plan._version > 3:
                fields.fail("version", f"{plan._version}, as attention has {_NEW[plan._version]}", version)
            return plan
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

    def _repr_html_(self) -> str:
        header, *rows = self.table()
        before, after = (sum(spec.parameters for spec in specs) for specs in (self.specs, self.after))
        share = f" (x {after / before:.3f})" if before else ""
        told = [f"attention parameters: {before:,} -> {after:,}{share}"]
        return html_table(header, rows, [*told, *(self.asked.lines(self.specs) if self.asked else ())])


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
