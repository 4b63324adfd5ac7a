"""What was asked and what was achieved: :class:`Report`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .nn import execution
from .plan import LayerPlan, Plan
from .spec import PROJECTIONS, Projection


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

    @property
    def asked(self) -> dict[Projection, float] | None:
        """The fraction of each projection's weights that was to go; None for plans made by hand."""
        if self.plan.asked is None:
            return None
        return {p: self.plan.asked.ratios.of(p) for p in PROJECTIONS}

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
        return {
            "asked": self.asked,
            "achieved": self.achieved,
            "attention_parameters": list(self.attention_parameters),
            "model_parameters": list(self.model_parameters),
            "macs": None if self.macs is None else list(self.macs),
            "notes": list(self.notes),
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

    def _rows(self) -> list[list[str]]:
        rows = [["attention", "heads", "qk", "vo", *PROJECTIONS]]
        for layer in self.layers:
            before, after = layer.spec, layer.after
            rows.append([
                before.name or "(model)",
                _arrow(str(before.heads), str(after.heads)),
                _arrow(_dims(before.qk_dims), _dims(after.qk_dims)),
                _arrow(_dims(before.vo_dims), _dims(after.vo_dims)),
                *(f"-{layer.fraction(p):.1%}" for p in PROJECTIONS),
            ])  # fmt: skip
        rows.append(["achieved", "", "", "", *(f"-{share:.1%}" for share in self.achieved.values())])
        asked = self.plan.asked
        if asked is not None:
            rows.append(["asked", "", "", "", *(f"-{asked.ratios.of(p):.1%}" for p in PROJECTIONS)])
        return rows

    def _totals(self) -> list[str]:
        totals = {"attention parameters": self.attention_parameters, "model parameters": self.model_parameters}
        if self.macs is not None:
            totals["multiply-adds"] = self.macs
        lines = [f"{name}: {a:,} -> {b:,} (x {b / a if a else 1:.3f})" for name, (a, b) in totals.items()]
        asked = self.plan.asked
        if asked is not None:
            how = [asked.granularity, asked.scope, f"{asked.heads} heads", asked.scorer, f"{asked.split} split"]
            how += [f"{asked.basis} basis"] * (asked.basis != "channels") + ["refitted"] * (asked.compensate != "no")
            how += [f"rounded to {asked.round_to}"] * (asked.round_to > 1) + ["matched dims"] * asked.match_dims
            if asked.target_error is not None:
                how.append(f"losing at most {asked.target_error:.2%} of energy")
            lines.append(f"how: {', '.join(how)}")
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        tail = 2 if self.plan.asked is None else 3
        cut = len(lines) - (tail - 1)
        return "\n".join([lines[0], rule, *lines[1:cut], rule, *lines[cut:], *self._totals()])

    def _repr_html_(self) -> str:
        import html  # costs 2 ms, and only notebooks need it

        header, *body = self._rows()
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        totals = "<br>".join(html.escape(line) for line in self._totals())
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table><p>{totals}</p>"


def _dims(dims: tuple[int, ...]) -> str:
    return str(dims[0]) if len(set(dims)) == 1 else f"{min(dims)}..{max(dims)}"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-adds of one forward pass, half of what ``torch.utils.flop_counter`` counts.

    Zeros that a decoupled forward pads heads with for a kernel's sake are not counted.

    Args:
        model: any module; run in evaluation mode without gradients, and left as found.
        example_inputs: a mapping (keywords), a tuple or list (positional), or a tensor.
    """
    modes = [(module, module.training) for module in model.modules()]
    counter = FlopCounterMode(display=False)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), _countable(), counter:
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            elif isinstance(example_inputs, (tuple, list)):
                model(*example_inputs)
            else:
                model(example_inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    return int(counter.get_total_flops()) // 2


@contextmanager
def _countable() -> Iterator[None]:
    """Plain matrix products instead of fused kernels, which the counter does not know on every device; no padding."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        kernel = torch.nn.attention
        with (
            execution("separate"),
            kernel.sdpa_kernel(kernel.SDPBackend.MATH) if hasattr(kernel, "sdpa_kernel") else nullcontext(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
