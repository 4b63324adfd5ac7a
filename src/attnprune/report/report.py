"""What was asked and what was achieved: :class:`Report`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..families.looks import Skipped
from ..surgery.verify import Verified
from ..values.budget import Budget
from ..values.layer_plan import LayerPlan
from ..values.layout import PROJECTIONS, Projection
from ..values.plan import Plan
from ..values.recovery import Recovered
from ..values.tables import aligned, html_table


@dataclass(frozen=True)
class Measured:
    """Latency of a model before and after a plan, measured in turns."""

    ratio: float
    """Median of the pairs' ratios, after over before."""
    seconds: tuple[float, float]
    """Medians, before and after."""
    pairs: int
    """How many pairs of forward passes were timed."""


@dataclass(frozen=True)
class Report:
    """What a plan asked for and what it achieved. Ratios count weights; parameter counts include biases.

    ``str(report)`` is a table, notebooks show one, :meth:`to_dict` is JSON-ready.

    >>> import torch, attnprune
    >>> report = attnprune.prune_attention(torch.nn.MultiheadAttention(16, 4), 0.5)
    >>> report.achieved["q"], report.attention_parameters
    (0.5, (1088, 552))
    """

    plan: Plan
    """What was done."""
    model_parameters: tuple[int, int]
    """Parameters of the whole model, before and after."""
    macs: tuple[int, int] | None = None
    """Multiply-adds of one forward pass over ``example_inputs``, before and after; None where none were given."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was done."""
    latency: Measured | None = None
    """Latency after over before, measured; None where it was not."""
    skipped: tuple[Skipped, ...] = ()
    """Modules that look like attention and were not pruned, with reasons."""
    ways: Mapping[str, str] = field(default_factory=dict)
    """By name, how each attention runs now: ``"stock"`` by the host's own forward, ``"decoupled"`` by one of ours,
    ``"expanded"`` by the host's on dense dims (parameters and projections shrink, its kernel and cache do not), with
    the reason."""
    cache_bytes: tuple[int, int] | None = None
    """Bytes of keys and values that a cache keeps for every token, before and after; None where nothing is cached."""
    verified: Verified | None = None
    """How far the model is from the masked dense model; None where nothing was run."""
    recovered: Recovered | None = None
    """What tuning towards the dense model gave (:func:`attnprune.recover`); None where that was not asked for."""

    @property
    def asked(self) -> dict[str, float] | None:
        """What was to go; None for plans made by hand.

        The fraction of each projection's weights (``q k v o``). With ``split="auto"`` one number for all of them
        together (``qkvo``), as the method decides who bears it. Of a budget, the share of the whole model's
        ``latency``, ``macs`` or ``params`` that may be left; of a ``target_error`` that ``error``.
        """
        asked = self.plan.asked
        return None if asked is None else asked.shares(self.plan.specs)

    @property
    def achieved(self) -> dict[Projection, float]:
        """The fraction of each projection's weights that went."""
        return {p: self.plan.fraction(p) for p in PROJECTIONS}

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Per attention: its spec before and after, and what went."""
        return self.plan.layers

    @property
    def attention_parameters(self) -> tuple[int, int]:
        """Parameters of the attention modules in the plan, before and after."""
        return sum(s.parameters for s in self.plan.specs), sum(s.parameters for s in self.plan.after)

    @property
    def removed_parameters(self) -> int:
        """By how much the model's parameter count fell."""
        return self.model_parameters[0] - self.model_parameters[1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        how = self.plan.asked
        return {
            "asked": self.asked,
            "how": None if how is None else how.to_dict(),
            "achieved": self.achieved,
            "attention_parameters": list(self.attention_parameters),
            "model_parameters": list(self.model_parameters),
            "macs": None if self.macs is None else list(self.macs),
            "latency": self._latency(),
            "cache_bytes": None if self.cache_bytes is None else list(self.cache_bytes),
            "notes": list(self.notes),
            "skipped": [one._asdict() for one in self.skipped],
            "ways": dict(self.ways),
            "verified": None if self.verified is None else self.verified._asdict(),
            "recovered": None if self.recovered is None else self.recovered._asdict(),
            "plan": self.plan.digest,
            "layers": [
                {
                    "name": layer.spec.name,
                    "heads": [layer.spec.heads, layer.after.heads],
                    "qk_dims": [list(layer.spec.qk_dims), list(layer.after.qk_dims)],
                    "vo_dims": [list(layer.spec.vo_dims), list(layer.after.vo_dims)],
                    "achieved": {p: layer.fraction(p) for p in PROJECTIONS},
                }
                for layer in self.layers
            ],
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A picture: qk and vo channels kept by layer and head, and the share that each layer lost. Needs matplotlib.

        Args:
            path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The ``matplotlib.figure.Figure``.
        """
        from . import plots

        return plots.kept(self.plan, path=path)

    @property
    def _promised(self) -> Budget | None:
        return None if self.plan.asked is None else self.plan.asked.budget

    def _latency(self) -> dict[str, Any] | None:
        budget, found = self._promised, self.latency
        promised = budget.promised if budget is not None and budget.resource == "latency" else None
        if promised is None and found is None:
            return None
        measured = None if found is None else found.ratio
        seconds = None if found is None else list(found.seconds)
        return {"promised": promised, "measured": measured, "seconds": seconds}

    def _totals(self) -> list[str]:
        totals = {"attention parameters": self.attention_parameters, "model parameters": self.model_parameters}
        if self.macs is not None:
            totals["multiply-adds"] = self.macs
        lines = [f"{name}: {a:,} -> {b:,} (x {b / a if a else 1:.3f})" for name, (a, b) in totals.items()]
        if self.cache_bytes is not None:
            old, new = self.cache_bytes
            lines.append(f"cache: {old:,} -> {new:,} bytes a token (x {new / old:.3f})")
        if self.latency is not None:
            a, b = (seconds * 1000 for seconds in self.latency.seconds)
            lines.append(f"latency, measured: {a:,.1f} ms -> {b:,.1f} ms (x {self.latency.ratio:.3f})")
        if self.plan.asked is not None:
            lines += self.plan.asked.lines(self.plan.specs)
        if self.ways:
            counts = Counter(self.ways.values())
            lines.append(f"runs: {', '.join(f'{count} {way}' for way, count in counts.items())}")
        if self.verified is not None:
            many = "s" * (self.verified.samples != 1)
            lines.append(f"verified: {self.verified.error:.0e} over {self.verified.samples} sample{many}")
        if self.recovered is not None:
            lines.append(f"recovered: {self.recovered}")
        for name, kind, why in self.skipped:
            lines.append(f"skipped: {name or 'the model itself'} ({kind}): {why}")
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        head, *lines = aligned(self.plan.table("achieved"))
        rule, count = "-" * len(head), len(self.layers)
        return "\n".join([head, rule, *lines[:count], rule, *lines[count:], *self._totals()])

    def _repr_html_(self) -> str:
        header, *rows = self.plan.table("achieved")
        return html_table(header, rows, self._totals())
