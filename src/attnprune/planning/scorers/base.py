"""What a scorer is: the :class:`Scorer` interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from torch import nn

from ...calibration.losses import LossFn
from ...families.base import AttentionView
from ...nn.outputs import OutputFn
from ...values.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
