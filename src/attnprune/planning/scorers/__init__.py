"""Scorers: how much each unit of attention matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ...calibration.losses import LossFn, loss_with_or_without_labels, projection_loss
from ...nn.outputs import outputs_of
from ...values.method import unknown_scorer
from .base import Scorer
from .fisher import Fisher
from .gate import Gate
from .magnitude import Magnitude
from .random import Random
from .taylor import Taylor
from .torch_pruning import TorchPruning, is_importance

__all__ = [
    "Fisher",
    "Gate",
    "LossFn",
    "Magnitude",
    "Random",
    "Scorer",
    "Taylor",
    "TorchPruning",
    "loss_with_or_without_labels",
    "outputs_of",
    "projection_loss",
    "resolve",
]

NAMED: Mapping[str, Callable[[], Scorer]] = {
    "magnitude": Magnitude,
    "taylor": Taylor,
    "fisher": Fisher,
    "gate": Gate,
    "random": Random,
    "magnitude-l1": partial(Magnitude, 1),
}


def resolve(scorer: Any, *, has_data: bool, seed: int = 0) -> Scorer:
    """The scorer that a ``scorer=`` argument means.

    Args:
        scorer: a name, a :class:`Scorer`, an importance of Torch-Pruning, or ``"auto"``: per-sample Fisher where there
            are data, magnitude where there are none.
        has_data: whether data were given.
        seed: for ``"random"``.

    Raises:
        ScorerError: none of these.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if is_importance(scorer):
        return TorchPruning(scorer)
    if scorer == "auto":
        return Fisher(per_sample=True) if has_data else Magnitude()
    if scorer == "random":
        return Random(seed)
    if isinstance(scorer, str) and scorer in NAMED:
        return NAMED[scorer]()
    raise unknown_scorer(scorer)
