"""What a user asked for, as a plan keeps it: :class:`Asked`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import Any

from . import fields
from .budget import RESOURCES, Budget
from .layout import PROJECTIONS
from .method import Method
from .ratios import Ratios
from .spec import AttentionSpec

_WORDS = ("granularity", "scope", "heads", "scorer", "split", "basis", "compensate")
_RESOURCES = {"latency": "latency", "macs": "multiply-adds", "params": "model parameters"}


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
    rounding: str = "nearest"
    """Which way numbers of units were rounded."""
    target_error: float | None = None
    """The share of energy that may be lost, where that was asked for in place of ratios."""
    match_dims: bool = False
    """Whether every head was to keep as many qk as vo channels."""
    budget: Budget | None = None
    """What the whole model may cost, where that was asked for in place of ratios."""

    @property
    def refits(self) -> bool:
        """Whether what stays was refitted, in any part of the plan."""
        return self.compensate != "no"

    def by(self, method: Method) -> Asked:
        """The same request, carried out by a method whose ``"auto"`` is decided."""
        return replace(
            self,
            basis="rotated" if method.rotated else "channels",
            compensate="yes" if method.refits else "no",
        )

    def then(self, other: Asked) -> Asked:
        """The sum of two requests; settings that differ are joined with a plus sign."""
        ratios = self.ratios.then(other.ratios)
        same = {
            name: "+".join(dict.fromkeys(f"{getattr(self, name)}+{getattr(other, name)}".split("+"))) for name in _WORDS
        }
        errors = [asked.target_error for asked in (self, other) if asked.target_error is not None]
        return Asked(
            ratios,
            round_to=min(self.round_to, other.round_to),
            rounding="+".join(dict.fromkeys(f"{self.rounding}+{other.rounding}".split("+"))),
            target_error=max(errors, default=None),
            match_dims=self.match_dims and other.match_dims,
            budget=self.budget.then(other.budget) if self.budget else None,
            **same,
        )

    def shares(self, specs: Sequence[AttentionSpec]) -> dict[str, float]:
        """What was to go, or to be left; :attr:`attnprune.Report.asked` says which.

        Args:
            specs: the attention modules that were considered.
        """
        if self.budget is not None:
            return {self.budget.resource: self.budget.share}
        if self.target_error is not None:
            return {"error": self.target_error}
        if not {"auto", "all"} & set(self.split.split("+")):
            return {p: self.ratios.of(p) for p in PROJECTIONS}
        sizes = {p: sum(spec.weights(p) for spec in specs) for p in PROJECTIONS}
        return {"qkvo": fsum(self.ratios.of(p) * size for p, size in sizes.items()) / (sum(sizes.values()) or 1)}

    def lines(self, specs: Sequence[AttentionSpec]) -> list[str]:
        """Lines of text: what was asked, where no row of :meth:`attnprune.Plan.table` has it, and how."""
        lines, shares = [], self.shares(specs)
        if "qkvo" in shares:
            lines.append(f"asked: -{shares['qkvo']:.1%} of q, k, v and o together, wherever it costs least")
        if self.budget is not None:
            verb, promised = "predicted" if self.budget.resource == "latency" else "counted", self.budget.promised
            got = "" if promised is None else f", {verb} x {promised:.3f}"
            lines.append(f"budget: {_RESOURCES[self.budget.resource]} x {self.budget.share:.3f}{got}")
        how = [self.granularity, self.scope, f"{self.heads} heads", self.scorer, f"{self.split} split"]
        how += [f"{self.basis} basis"] * (self.basis != "channels") + ["refitted"] * self.refits
        how += [f"rounded {self.rounding}"] * (self.rounding != "nearest")
        how += [f"rounded to {self.round_to}"] * (self.round_to > 1) + ["matched dims"] * self.match_dims
        if self.target_error is not None:
            how.append(f"losing at most {self.target_error:.2%} of energy")
        return [*lines, f"how: {', '.join(how)}"]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; rounding to the nearest number of units, as usual, is left out."""
        words = {name: getattr(self, name) for name in _WORDS}
        words |= {"rounding": self.rounding} if self.rounding != "nearest" else {}
        numbers = {"round_to": self.round_to, "target_error": self.target_error, "match_dims": self.match_dims}
        budget = None if self.budget is None else vars(self.budget)
        return {"ratios": {p: self.ratios.of(p) for p in PROJECTIONS}, **numbers, **words, "budget": budget}

    @classmethod
    def from_dict(cls, raw: object) -> Asked:
        """Reads :meth:`to_dict`'s mapping, trusting nothing."""
        raw = {"rounding": "nearest", **raw} if isinstance(raw, dict) else raw
        names = {"ratios", "round_to", "rounding", "target_error", "match_dims", "budget", *_WORDS}
        found = fields.mapping("asked", raw, names)
        ratios = fields.mapping("asked.ratios", found["ratios"], set(PROJECTIONS))
        numbers = {p: fields.number(f"asked.ratios.{p}", ratios[p]) for p in PROJECTIONS}
        words = {name: fields.string(f"asked.{name}", found[name]) for name in _WORDS}
        round_to = fields.integer("asked.round_to", found["round_to"], low=1)
        error = found["target_error"]
        error = None if error is None else fields.positive("asked.target_error", error)
        return cls(
            Ratios(**numbers),
            round_to=round_to,
            rounding=fields.string("asked.rounding", found["rounding"]),
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
