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
from ..planning.scorers.gradient import GradientScorer, check_reached
from ..values.layout import PROJECTIONS, Projection
from ..values.request import Request
from ..values.scores import Scores

Sums = tuple[Tensor, ...]
UNITS = 3
"""Sums of qk and vo channels and of heads. Those of features follow, and last, ``(1,)``, in how many readings some
gradient was not zero."""


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


def read(
    scorer: GradientScorer, views: Sequence[AttentionView], scale: float, which: Sequence[Projection] = ()
) -> dict[str, Sums]:
    """What a scorer makes of the gradients that parameters hold, by name: float64, on the CPU.

    Args:
        scorer: says what to sum.
        views: the attention modules.
        scale: what gradients were multiplied with.
        which: projections whose features are scored too.

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
            features = (scorer.reduce_features(view, grads, p) for p in which)
            reached = torch.stack([grad.any() for grad in grads.values()]).any().reshape(1)
            found[view.name] = tuple(part.double().cpu() for part in (*scorer.reduce(view, grads), *features, reached))
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

    def scorer(self, scorer: GradientScorer, which: Sequence[Projection] = ()) -> Scorer:
        """A scorer that gives what the mean of all readings says; of the features of some projections too."""
        return _Observed(scorer, self, which)


class _Observed(Scorer):
    """Scores that a training loop's own gradients gave."""

    def __init__(self, scorer: GradientScorer, seen: Observations, which: Sequence[Projection]) -> None:
        self.scorer, self.seen, self.which = scorer, seen, which

    @property
    def name(self) -> str:
        return self.scorer.name

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> dict[str, Scores]:
        check_reached({view.name: self.seen.sums[view.name][-1] for view in views})
        return {
            view.name: self.scorer.finish(view, *(part / self.seen.count for part in self.seen.sums[view.name][:UNITS]))
            for view in views
        }

    def score_features(
        self, model: nn.Module, views: Sequence[AttentionView], which: Sequence[Projection], **_: Any
    ) -> dict[str, dict[Projection, Tensor]]:
        seen = {view.name: dict(zip(self.which, self.seen.sums[view.name][UNITS:-1], strict=True)) for view in views}
        return {name: {p: own[p] / self.seen.count for p in which} for name, own in seen.items()}
