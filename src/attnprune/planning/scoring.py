"""Scores without a plan: :func:`score_attention`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..calibration.processes import agree
from ..calibration.sample import Sample
from ..families.registry import find_views, plain
from ..nn.kept import ordinary
from ..surgery import check_views
from ..values.choices import Choices
from ..values.faults import Faults
from ..values.options import ScoreOptions
from ..values.request import Request
from ..values.scores import Scores
from .decide import scored
from .scorers import Scorer

if TYPE_CHECKING:
    from typing import Unpack


@ordinary
def score_attention(
    model: nn.Module,
    scorer: str | Scorer | Any = "auto",
    *,
    data: Iterable[Any] | None = None,
    include: Choices | None = None,
    exclude: Choices | None = None,
    **options: Unpack[ScoreOptions],
) -> dict[str, Scores]:
    """How much every channel and every head matters: what :func:`attnprune.make_plan` with the same arguments goes by.

    :func:`attnprune.plots.scores` draws them. Those of ``basis="channels"`` may be given to :func:`attnprune.allocate`.

    Args:
        model: any module with attention of a known family; left exactly as found.
        scorer: as in :func:`attnprune.prune_attention`.
        data: an iterable of batches, for scorers and bases that need them.
        include: glob patterns of names, classes, or functions of name and module; only these are scored.
        exclude: what to leave out.
        options: of :class:`attnprune.values.options.ScoreOptions`: ``basis`` (where heads are rotated, channels are
            directions, the one with the most energy first), ``split`` (with ``"auto"``, gates look at all data instead
            of 32 samples), ``calibration``, ``loss_fn``, ``output_fn``, ``seed`` and ``progress``.

    Returns:
        Scores by the attention's name, in the order of the model.

    Raises:
        AttnPruneError: one of its kinds.

    >>> import torch
    >>> scores = score_attention(torch.nn.MultiheadAttention(16, 4), "magnitude")
    >>> scores[""].qk.shape, scores[""].head.shape
    (torch.Size([4, 4]), torch.Size([4]))
    """
    faults = Faults()
    known = faults.known("score_attention", options, ScoreOptions.__optional_keys__)
    parsed = faults.attempt(Request.parse, 0.0, data=data, include=include, exclude=exclude, scorer=scorer, **known)
    faults.throw()
    assert parsed is not None
    request, whole, evidence = parsed, plain(model), parsed.evidence
    sample = Sample(None, evidence.data, evidence.loss_fn, evidence.output_fn)

    def found() -> dict[str, Scores]:
        views = find_views(whole, request.include, request.exclude, run=lambda: sample.quietly(whole))
        check_views(whole, views, shards=not evidence.has_data)
        return scored(whole, views, replace(request, evidence=replace(evidence, data=sample.data)))

    return agree(found)
