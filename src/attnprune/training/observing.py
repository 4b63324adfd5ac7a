"""Scores from the gradients that a training loop computes anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.processes import exchange, pooled, sharing
from ..errors import DataError, OptionError
from ..families.base import AttentionView
from ..families.slots import gathered
from ..planning.scorers import Fisher, Scorer, Taylor
from ..planning.scorers.gradient import GradientScorer
from ..values.layout import PROJECTIONS
from ..values.request import Request
from ..values.scores import Scores

Sums = tuple[Tensor, ...]


def observer(request: Request) -> GradientScorer:
    """The scorer that can use gradients as they come.

    Raises:
        OptionError: scores that this request means need data of their own.
    """
    scorer = request.method.scorer
    if request.evidence.data is not None:
        raise OptionError("observe", "a pruner without data", "data", "give one of the two")
    if request.method.rotated:
        found = 'basis="rotated"'
        raise OptionError("observe", 'basis="channels"', found, "bases are found from data=")
    if isinstance(scorer, str) and scorer in ("auto", "fisher"):
        return Fisher()
    if isinstance(scorer, str) and scorer == "taylor":
        return Taylor()
    if isinstance(scorer, GradientScorer) and not getattr(scorer, "per_sample", False):
        return scorer
    raise OptionError("observe", 'scorer="taylor" or "fisher"', repr(scorer), "scores of other scorers need data=")


def read(scorer: GradientScorer, views: Sequence[AttentionView], scale: float) -> dict[str, Sums]:
    """What a scorer makes of the gradients that parameters hold, by name: float64, on the CPU.

    Args:
        scorer: says what to sum.
        views: the attention modules.
        scale: what gradients were multiplied with.

    Raises:
        DataError: a weight has no gradient.
    """
    found: dict[str, Sums] = {}
    for view in views:
        grads = {}
        for key, slot in view.slots.items():
            grad = slot.parameter.grad
            if grad is not None:
                exact = torch.promote_types(grad.dtype, torch.float32)
                grads[key] = slot.cut(gathered(grad.detach())).to(exact) / scale
        missing = [p for p in PROJECTIONS if f"{p}.weight" not in grads]
        if missing:
            raise DataError(
                f"{view.name}: {missing[0]}.weight.grad", "a gradient", "None",
                "call observe after loss.backward() and before zero_grad; attention weights must require gradients",
            )  # fmt: skip
        with torch.no_grad():
            found[view.name] = tuple(part.double().cpu() for part in scorer.reduce(view, grads))
    return found


@dataclass(frozen=True)
class Observations:
    """Sums of what was read, and how often; a value."""

    sums: Mapping[str, Sums] = field(default_factory=dict)
    count: int = 0

    def plus(self, found: Mapping[str, Sums]) -> Observations:
        """With one more reading."""
        sums = {
            name: parts if name not in self.sums else tuple(a + b for a, b in zip(self.sums[name], parts, strict=True))
            for name, parts in found.items()
        }
        return Observations(sums, self.count + 1)

    def pooled(self) -> Observations:
        """With the readings of all processes, where they share (:func:`attnprune.across_processes`)."""
        if not sharing():
            return self
        known: Mapping[str, Sums] = next((sums for sums in exchange(self.zeros) if sums), {})
        sums, count = pooled(({**known, **self.sums}, self.count))
        return Observations(sums, count)

    @property
    def zeros(self) -> dict[str, Sums]:
        """Sums of these shapes, of nothing."""
        return {name: tuple(torch.zeros_like(part) for part in parts) for name, parts in self.sums.items()}

    def scorer(self, scorer: GradientScorer) -> Scorer:
        """A scorer that gives what the mean of all readings says."""
        return _Observed(scorer, self)


class _Observed(Scorer):
    """Scores that a training loop's own gradients gave."""

    def __init__(self, scorer: GradientScorer, seen: Observations) -> None:
        self.scorer, self.seen = scorer, seen

    @property
    def name(self) -> str:
        return self.scorer.name

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> dict[str, Scores]:
        return {
            view.name: self.scorer.finish(view, *(part / self.seen.count for part in self.seen.sums[view.name]))
            for view in views
        }
