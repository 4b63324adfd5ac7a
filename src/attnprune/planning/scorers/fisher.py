"""Diagonal Fisher information of a unit's weights, per batch as in the paper or per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...calibration.batches import device_of
from ...calibration.processes import pooled
from ...calibration.quiet import undisturbed
from ...calibration.sample import samples_of
from ...errors import DataError, OptionError
from ...families.base import AttentionView
from ...surgery import as_called
from ...values.layout import PROJECTIONS, Projection
from ...values.scores import Scores
from .base import Evidence, FeatureScores
from .gradient import (
    Gradients,
    GradientScorer,
    check_finite,
    check_reached,
    columns,
    head_sums,
    listen,
    sample_gradients,
    sequences,
    unit_sums,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Sums = dict[str, dict[Projection, Tensor]]


class Fisher(GradientScorer):
    """``FI`` of the paper: diagonal empirical Fisher information, summed over a unit's weights.

    Per weight, the squared gradient of the loss averaged over batches, plus a damping; a qk channel sums over its rows
    of Q and K, a vo channel over its row of V and column of O, a head over all four. Biases do not count.

    With ``per_sample=True`` the gradient of every sample's own loss is squared, which is what Fisher information
    means: squaring the mean gradient of a batch, as the paper does, lets samples cancel out and gives numbers that
    depend on the batch size. The batch's loss must then be a mean over its samples (first dimension), as losses are
    by default. It costs less than a plain backward pass, as no weight's gradient is ever formed: the squared norm of
    a row's gradient ``sum_t g_t x_t`` is ``g^T (x x^T) g``.

    Args:
        per_sample: square per sample instead of per batch.
        damping: added to the mean square of every weight; the paper's is 1e-6.
    """

    def __init__(self, per_sample: bool = False, damping: float = 1e-6) -> None:
        if not 0 <= damping < float("inf"):
            raise OptionError(
                "Fisher: damping", "a finite number of at least 0", repr(damping), "use 1e-6, the paper's"
            )
        self.per_sample, self.damping = per_sample, damping

    @property
    def name(self) -> str:
        return "fisher-per-sample" if self.per_sample else "fisher"

    def score(
        self, model: nn.Module, views: Sequence[AttentionView], **evidence: Unpack[Evidence]
    ) -> dict[str, Scores]:
        if not self.per_sample:
            return super().score(model, views, **evidence)
        sums, count = squared_gradients(model, views, PROJECTIONS, **evidence)
        return {
            view.name: self.finish(view, *self._units(view, {p: sums[view.name][p] / count for p in PROJECTIONS}))
            for view in views
        }

    def score_features(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **evidence: Unpack[Evidence],
    ) -> FeatureScores:
        if not self.per_sample:
            return super().score_features(model, views, which, **evidence)
        sums, count = squared_gradients(model, views, which, features=True, **evidence)
        return {
            view.name: {
                p: (sums[view.name][p] / count + self.damping * view.spec.layout.channels(p)).cpu() for p in which
            }
            for view in views
        }

    def reduce_features(self, view: AttentionView, grads: Gradients, projection: Projection) -> Tensor:
        own = columns(view, grads, projection)
        squares: Tensor = torch.linalg.vector_norm(own, dim=0).double().square()
        return squares + self.damping * len(own)

    def reduce(self, view: AttentionView, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        squares: dict[Projection, Tensor] = {
            p: torch.linalg.vector_norm(grads[f"{p}.weight"], dim=1).double().square() for p in PROJECTIONS
        }
        return self._units(view, squares)

    def _units(self, view: AttentionView, squares: Mapping[Projection, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        damped = {p: value + self.damping * view.spec.width(p) for p, value in squares.items()}
        return (*unit_sums(view, damped), head_sums(view, damped))


def squared_gradients(
    model: nn.Module,
    views: Sequence[AttentionView],
    which: Sequence[Projection],
    features: bool = False,
    **evidence: Unpack[Evidence],
) -> tuple[Sums, int]:
    """Per view and projection ``(channels,)``: the sum over samples of the channel's squared weight gradients; or
    ``(features,)``, of the feature's.

    Also returns the number of samples. Packed modules run by Linears meanwhile, so that every projection has an input
    and an output to tap; the sample is the first dimension of both.
    """
    with as_called(views) as tapped, undisturbed(model, ()):
        # every tap's output depends on the switch, so asking for its gradient makes every tap see its own
        switch = torch.zeros((), device=device_of(model), requires_grad=True)
        taps = {(view.name, p): _Tap(view, p, switch, features) for view in tapped for p in which}
        try:
            count = sample_gradients(model, list(taps.values()), switch, "fisher-per-sample", **evidence)
        finally:
            for tap in taps.values():
                tap.handle.remove()
    check_reached(pooled({view.name: sum(taps[view.name, p].heard for p in which) for view in views}))
    return pooled(({view.name: {p: taps[view.name, p].total for p in which} for view in views}, count))


class _Tap:
    """Listens to one Linear: keeps its inputs until the gradients of its outputs come.

    A Linear may run several times in a forward pass; the weight's gradient is then the sum over its runs.
    """

    def __init__(self, view: AttentionView, projection: Projection, switch: Tensor, features: bool) -> None:
        self.where, self.projection, self.switch = f"{view.name}: {projection}", projection, switch
        self.features, self.present = (
            features,
            None if not view.spec.missing(projection) else [*view.spec.present(projection)],
        )
        units = view.spec.width(projection) if features else len(view.weight(projection))
        self.total = torch.zeros(units, dtype=torch.float64, device=switch.device)
        self.runs = self.heard = 0
        self.counts: Sequence[int] = ()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.squares: Tensor | None = None
        self.rows: set[int] = set()
        port = view.port(projection)
        self.own = port.own if projection == "o" else None
        self.handle = port.owner.register_forward_hook(self._forward) if self.own else port.listen(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.runs += 1
        read = inputs[0].detach()
        return listen(output, self.switch, read if self.own is None else self.own(read), self)

    def begin(self, counts: Sequence[int]) -> None:
        self.counts, self.runs, self.rows = counts, 0, set()

    def receive(self, x: Tensor, grad: Tensor) -> None:
        rows = sequences(x)
        self.rows.add(rows)
        samples = samples_of(rows, self.counts) or rows
        # the loss is a mean over samples, so a sample's own gradient is that many times larger
        self.seen.append((x.reshape(samples, -1, x.shape[-1]), grad.reshape(samples, -1, grad.shape[-1]) * samples))
        if len(self.seen) == self.runs:
            self._add()

    def _add(self) -> None:
        sizes = sorted({len(x) for x, _ in self.seen})
        if len(sizes) > 1:
            remedy = "use Fisher(per_sample=False)"
            raise DataError(self.where, "runs on the same number of samples in a batch", str(sizes), remedy)
        x, grad = (torch.cat(parts, dim=1) for parts in zip(*self.seen, strict=True))
        if self.present is not None:  # what a projection leaves out has no weights
            x, grad = (x, grad[..., self.present]) if self.projection == "o" else (x[..., self.present], grad)
        outer, inner = (grad, x) if (self.projection == "o") != self.features else (x, grad)
        exact = torch.promote_types(grad.dtype, torch.float32)
        self.squares = row_squares(outer.to(exact), inner.to(exact)).double().sum(0)
        self.seen = []

    def finish(self, number: int, groups: Mapping[int, int], samples: int) -> None:
        if self.seen:  # some runs do not reach the loss
            self._add()
        if self.squares is not None:
            share = samples / max(groups[rows] for rows in self.rows)  # towers may have other numbers of samples
            self.total += check_finite(self.where, self.squares, number) * share
            self.heard += 1
        self.squares = None


def row_squares(outer: Tensor, inner: Tensor) -> Tensor:
    """``(samples, channels)``: for every sample, the squared norms of the columns of ``outer^T inner``.

    Args:
        outer: ``(samples, tokens, width)``.
        inner: ``(samples, tokens, channels)``.
    """
    tokens, width = outer.shape[1:]
    if tokens * (width + inner.shape[2]) < width * inner.shape[2]:
        gram = outer @ outer.transpose(1, 2)
        return ((gram @ inner) * inner).sum(1).clamp_min(0)
    return torch.stack([(o.transpose(0, 1) @ i).square().sum(0) for o, i in zip(outer, inner, strict=True)])
