"""What a user asked for, as a plan keeps it: :class:`Asked`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import fields
from .budget import RESOURCES, Budget
from .layout import PROJECTIONS
from .method import Method
from .ratios import Ratios

_WORDS = ("granularity", "scope", "heads", "scorer", "split", "basis", "compensate")


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
