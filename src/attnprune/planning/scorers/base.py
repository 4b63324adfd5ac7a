"""What a scorer is: the :class:`Scorer` interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from ...calibration.losses import LossFn
from ...errors import ScorerError
from ...families.base import AttentionView
from ...nn.outputs import OutputFn
from ...values.layout import Projection
from ...values.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import Unpack


FeatureScores = dict[str, dict[Projection, Tensor]]
"""By the attention's name and projection ``(features,)``, of those that it reads or writes, ascending."""


class Evidence(TypedDict, total=False):
    """What a scorer may learn from: keywords of :meth:`Scorer.score`."""

    data: Iterable[Any] | None
    """Batches, for scorers that need them; default None."""
    loss_fn: LossFn | None
    """``loss_fn(model, batch)`` gives a scalar; None, the default, for the model's own loss."""
    output_fn: OutputFn | None
    """Takes the model's output and gives what of it losses without ``loss_fn`` are about; given where a user has one.
    """
    progress: bool
    """Whether a progress bar may be shown; default True."""


class Scorer(ABC):
    """Says how much each channel and each head of an attention module matters.

    A scorer of your own subclasses this and may be passed wherever a scorer's name may.

    >>> import torch, attnprune
    >>> class LastFirst(attnprune.Scorer):
    ...     '''Removes the last channels first.'''
    ...     def score(self, model, views, **_):
    ...         def ramp(heads, dim):
    ...             return -torch.arange(dim).expand(heads, dim)
    ...         return {v.name: attnprune.Scores(ramp(s.kv_heads, s.qk_dim), ramp(s.kv_heads, s.vo_dim),
    ...                                          -torch.arange(s.heads)) for v in views for s in [v.spec]}
    >>> model = torch.nn.MultiheadAttention(16, 4)
    >>> plan = attnprune.make_plan(model, 0.5, scorer=LastFirst())
    >>> plan[""].qk[0]
    (2, 3)
    """

    needs_data: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What plans and reports call it."""
        return type(self).__name__.lower()

    @abstractmethod
    def score(
        self, model: nn.Module, views: Sequence[AttentionView], **evidence: Unpack[Evidence]
    ) -> dict[str, Scores]:
        """Scores for every view, by name; leaves the model exactly as found.

        Args:
            model: the whole model, for scorers that run it.
            views: the attention modules to score.
            evidence: keywords of :class:`Evidence`.
        """

    def score_features(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **evidence: Unpack[Evidence],
    ) -> FeatureScores:
        """Scores for the features of some projections: of Q, K and V what they read, of O what it writes. Asked for
        where one of a pair is to lose more than the other.

        Args:
            model, views, evidence: as for :meth:`score`.
            which: the projections.

        Returns:
            By the attention's name and projection ``(features,)``, of those that it reads or writes, ascending.

        Raises:
            ScorerError: the scorer has no such scores.
        """
        raise ScorerError(
            f"scorer {self.name}",
            f"score_features, as {', '.join(which)} are to lose more than the projections beside them",
            "a scorer of channels and heads alone",
            "write score_features, give q and k (v and o) one ratio, or use another scorer",
        )


class WeightScorer(Scorer):
    """A scorer that looks at one attention's weights at a time; ``model`` may be None, and nothing is learned."""

    @torch.no_grad()
    def score(
        self, model: nn.Module | None, views: Sequence[AttentionView], **_: Unpack[Evidence]
    ) -> dict[str, Scores]:
        return {view.name: self.units(view) for view in views}

    @torch.no_grad()
    def score_features(
        self,
        model: nn.Module | None,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **_: Unpack[Evidence],
    ) -> FeatureScores:
        return {view.name: {p: self.features(view, p) for p in which} for view in views}

    @abstractmethod
    def units(self, view: AttentionView) -> Scores:
        """Of one attention."""

    @abstractmethod
    def features(self, view: AttentionView, projection: Projection) -> Tensor:
        """``(features,)`` of one projection, float64, on the CPU."""


def weights_of(view: AttentionView, projection: Projection) -> Tensor:
    """``(channels, features)``: the weights whose features are those of a projection, detached: its own, and what lies
    beside Q in its Linear."""
    sides = [side for side in ("q", "x", "g") if f"{side}.weight" in view.slots] if projection == "q" else [projection]
    parts = [(slot := view.slots[f"{side}.weight"]).cut(slot.values) for side in sides]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
