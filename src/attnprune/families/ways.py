"""The ways in which a pruned module runs, and what was found out about them: :class:`Verdict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ..nn import Decoupled
from ..values.layout import Kind
from ..values.spec import AttentionSpec, Rotary

Way = Literal["stock", "decoupled", "expanded"]
"""How a pruned module runs: by the host's own forward, by one of ours, or by the host's on dense dims."""


EVERY: frozenset[str] = frozenset(get_args(Way))


@dataclass(frozen=True)
class Verdict:
    """How a module may run, found by running it (:mod:`attnprune.families.proof`)."""

    stock: bool = False
    """Whether the host's own forward runs smaller shapes, its attributes saying them."""
    decoupled: type[Decoupled] | None = None
    """The forward of ours that computes what the host computes; None if there is none."""
    expanded: bool = False
    """Whether projections can be compact inside the host as it is."""
    read: bool = False
    """Whether that is so with a host that reads weights, instead of calling projections."""
    heads: frozenset[str] = EVERY
    """Ways in which whole heads may go."""
    attends: bool = True
    """Whether a softmax was seen."""
    fixed: Mapping[Kind, str] = field(default_factory=dict)
    """Kinds whose channels may not be mixed, and why."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """By way, why it is not allowed."""
    ran: bool = True
    """Whether the host could be run at all."""
    rotary: Rotary = "none"
    """Which channels a rotary embedding rotates together."""
    rotary_dim: int = 0
    """How many channels of every head it rotates."""

    order: str = ""
    """The order of the view's in which channels lie."""
    recorded: bool = False
    """Whether that was found by calls of the user's own model, as its arguments' names tell too little."""
    stock_heads: bool = False
    """Whether it runs fewer heads of its own dims, where it runs no others: rotary tables, norms of a head."""

    def told(self, spec: AttentionSpec) -> AttentionSpec:
        """A spec that says so."""
        if self.rotary == "none":
            return spec
        return replace(spec, rotary=self.rotary, rotary_dims=(self.rotary_dim,) * spec.kv_heads)

    @property
    def prunable(self) -> bool:
        """Whether there is a way to run."""
        return self.attends and (self.stock or self.decoupled is not None or self.expanded)

    @property
    def why(self) -> str:
        """Why the module is not prunable, in words; empty if it is."""
        if self.prunable:
            return ""
        if self.ran and not self.attends:
            return "no softmax over keys was seen in its forward"
        return "; ".join(dict.fromkeys(why for way, why in self.reasons.items() if way != "read"))
