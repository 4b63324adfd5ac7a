"""Scores without a plan: :func:`score_attention`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..calibration.moments import Calibration
from ..calibration.processes import agree
from ..families.registry import find_views, plain
from ..surgery import check_views
from ..values.rules import Rules, Split
from ..values.scores import Scores
from .decide import Basis, Method, scored
from .scorers import LossFn, Scorer


def score_attention(
    model: nn.Module,
    scorer: str | Scorer | Any = "auto",
    *,
    basis: Basis = "auto",
    split: Split = "fixed",
    data: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    loss_fn: LossFn | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Scores]:
    """How much every channel and every head matters: what :func:`attnprune.make_plan` with the same arguments goes by.

    :func:`attnprune.plots.scores` draws them. Those of ``basis="channels"`` may be given to :func:`attnprune.allocate`.

    Args:
        model: any module with attention of a known family; left exactly as found.
        scorer: as in :func:`attnprune.prune_attention`.
        basis: as there. Where heads are turned, channels are directions, the one with the most energy first.
        split: as there; with ``"auto"``, gates look at all data instead of 32 samples.
        data: an iterable of batches, for scorers and bases that need them.
        calibration: what :func:`attnprune.calibrate` gave, in place of its pass over ``data``.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar; None for the model's own loss.
        include: glob patterns of names; only these attention modules are scored.
        exclude: glob patterns of names to leave out.
        seed: for ``scorer="random"`` and projections of the output.
        progress: whether to show a progress bar over ``data``.

    Returns:
        Scores by the attention's name, in the order of the model.

    Raises:
        AttnPruneError: one of its kinds.

    >>> import torch
    >>> scores = score_attention(torch.nn.MultiheadAttention(16, 4), "magnitude")
    >>> scores[""].qk.shape, scores[""].head.shape
    (torch.Size([4, 4]), torch.Size([4]))
    """
    rules = Rules(split=split)
    has_data = data is not None or calibration is not None
    method = Method.resolve(basis, "auto", False, rules, has_data=has_data)
    model = plain(model)

    def found() -> dict[str, Scores]:
        views = find_views(model, include, exclude)
        check_views(model, views, shards=not has_data)
        return scored(
            model, views, rules, method, scorer=scorer, data=data, calibration=calibration, loss_fn=loss_fn, seed=seed,
            progress=progress,
        )  # fmt: skip

    return agree(found)
