"""What closing a channel does to the model's output: :class:`Gate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...calibration.batches import device_of
from ...calibration.losses import projection_loss
from ...calibration.processes import pooled
from ...calibration.quiet import undisturbed
from ...calibration.sample import spread
from ...errors import OptionError
from ...families.base import AttentionView
from ...surgery import as_called
from ...values.layout import HeadLayout, Kind, Projection
from ...values.scores import Scores
from .base import Evidence, FeatureScores, Scorer
from .feature_gates import FeatureGates, Side, added, by_sample
from .gradient import check_finite, check_reached, listen, sample_gradients, sequences

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...calibration.bases import HeadBases


class Gate(Scorer):
    """Mean square of the loss's derivative with respect to a gate on a unit: what closing it does, to second order.

    A gate is a factor of 1 on a channel of Q (and so on its product with K), or on a channel's deviation from its mean
    in the context (as removal leaves the mean to O's bias); a head's gate is on its whole context, a feature's on what
    one projection reads, or O writes. The score of a unit
    is the mean over samples of the squared derivative: the diagonal of the Gauss-Newton matrix, which makes qk and vo,
    layers, heads and channels comparable.

    Without ``loss_fn`` the loss is a random projection of the model's output, ``v . output``
    (:func:`attnprune.scorers.projection_loss`), so no labels are needed, and their noise does no harm.

    Args:
        samples: at most about this many samples, spread evenly over the data; None for all. Scores settle fast.
        metric: ``"output"``, ``"kl"`` or ``"auto"``, see :func:`attnprune.scorers.projection_loss`.
        seed: for the projections.
        centred: whether vo gates act on deviations from the mean, which O's bias keeps; where O has none they do not.
        bases: by name, a basis for every head (:class:`attnprune.calibration.bases.HeadBases`) whose directions to
            score instead of the channels.
    """

    needs_data = True

    def __init__(
        self,
        samples: int | None = None,
        metric: str = "auto",
        seed: int = 0,
        centred: bool = True,
        bases: Mapping[str, HeadBases] | None = None,
    ) -> None:
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise OptionError("Gate: samples", "a whole number of at least 1, or None", repr(samples), "use None")
        projection_loss(seed, metric)  # checks the metric
        self.samples, self.metric, self.seed, self.centred, self.bases = samples, metric, seed, centred, bases or {}

    @property
    def name(self) -> str:
        return "gate"

    def score(
        self, model: nn.Module, views: Sequence[AttentionView], **evidence: Unpack[Evidence]
    ) -> dict[str, Scores]:
        loss_fn = evidence.get("loss_fn") or projection_loss(self.seed, self.metric, evidence.get("output_fn"))
        evidence = {**evidence, "data": self._some(evidence.get("data")), "loss_fn": loss_fn}
        with as_called(views) as tapped, undisturbed(model, ()), ExitStack() as hooks:
            switch = torch.zeros((), device=device_of(model), requires_grad=True)
            taps = [_Gates(view, switch, self.bases.get(view.name)) for view in tapped]
            for tap in taps:
                tap.listen(hooks)
            count = sample_gradients(model, taps, switch, self.name, together=True, **evidence)
        count = pooled(count)
        for tap in taps:
            tap.share()
        check_reached({tap.view.name: tap.heard for tap in taps})
        return {tap.view.name: tap.scores(count, self.centred) for tap in taps}

    def score_features(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **evidence: Unpack[Evidence],
    ) -> FeatureScores:
        loss_fn = evidence.get("loss_fn") or projection_loss(self.seed, self.metric, evidence.get("output_fn"))
        evidence = {**evidence, "data": self._some(evidence.get("data")), "loss_fn": loss_fn}
        with as_called(views) as tapped, undisturbed(model, ()), ExitStack() as hooks:
            switch = torch.zeros((), device=device_of(model), requires_grad=True)
            taps = {(view.name, p): FeatureGates(view, p, switch) for view in tapped for p in which}
            for tap in taps.values():
                tap.listen(hooks)
            count = sample_gradients(model, list(taps.values()), switch, self.name, together=True, **evidence)
        count = pooled(count)
        for tap in taps.values():
            tap.share()
        return {view.name: {p: taps[view.name, p].scores(count, self.centred) for p in which} for view in views}

    def _some(self, data: Iterable[Any] | None) -> Iterable[Any] | None:
        """Batches spread evenly over the data, about ``samples`` samples together."""
        if self.samples is None or isinstance(data, (str, bytes, Tensor, Mapping)) or not isinstance(data, Iterable):
            return data
        return spread(data, self.samples)


_SUMS = (
    "heard", "qk", "products", "crossed", "plain", "total", "tokens", "head_products", "head_crossed", "head_plain",
)  # fmt: skip


class _Gates:
    """The gates of one attention: listens to Q's output and O's input."""

    def __init__(self, view: AttentionView, switch: Tensor, bases: HeadBases | None) -> None:
        self.view, self.switch = view, switch
        self.maps: dict[Kind, list[tuple[Tensor, Tensor]]] = {} if bases is None else _maps(bases, switch.device)
        spec = view.spec
        self.qk = torch.zeros(sum(spec.qk_dims), device="cpu", dtype=torch.float64)
        vo, heads = spec.layout.channels("o"), spec.heads
        self.total = torch.zeros(vo, device="cpu", dtype=torch.float64)
        self.tokens = 0
        # a channel of V is gated for all query heads that share it: sums over pairs of them
        self.index = _of_groups(spec.layout)
        size = (*self.index.shape, self.index.shape[1])
        self.products, self.crossed, self.plain = (
            torch.zeros(size, device="cpu", dtype=torch.float64) for _ in range(3)
        )
        # per sample a = sum of c g, b = sum of g for every channel: the gate on c - m has the derivative a - m b
        self.head_products = torch.zeros(heads, device="cpu", dtype=torch.float64)
        self.head_crossed = torch.zeros(vo, device="cpu", dtype=torch.float64)
        self.head_plain = [torch.zeros(dim, dim, device="cpu", dtype=torch.float64) for dim in spec.layout.sizes("o")]
        self.heard = 0
        self.rows: set[int] = set()
        self.q: list[Tensor] = []
        self.c: list[tuple[Tensor, Tensor]] = []

    def begin(self, counts: Sequence[int]) -> None:
        self.rows, self.q, self.c = set(), [], []

    def listen(self, hooks: ExitStack) -> None:
        gates = {"q": Side(self._queries), "o": Side(self._contexts)}

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return listen(output, self.switch, output.detach(), gates["q"])

        def before(module: nn.Module, inputs: tuple[Tensor, ...], own: Tensor) -> Tensor:
            context = own.detach()
            self.total += context.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
            self.tokens += context[..., 0].numel()
            return listen(own, self.switch, context, gates["o"])

        hooks.callback(self.view.port("q").listen(after).remove)
        hooks.callback(self.view.port("o").listen(before).remove)

    def _queries(self, x: Tensor, grad: Tensor) -> None:
        exact = torch.promote_types(x.dtype, torch.float32)
        x, grad = self._rotated("qk", x.to(exact), grad.to(exact))
        self.rows.add(sequences(x))
        self.q.append((x * grad).reshape(sequences(x), -1, x.shape[-1]).sum(1).double().cpu())

    def _contexts(self, x: Tensor, grad: Tensor) -> None:
        exact = torch.promote_types(x.dtype, torch.float32)
        x, grad = self._rotated("vo", x.to(exact), grad.to(exact))
        self.rows.add(sequences(x))
        x, grad = (part.reshape(sequences(part), -1, part.shape[-1]) for part in (x, grad))
        self.c.append(((x * grad).sum(1).double().cpu(), grad.sum(1).double().cpu()))

    def _rotated(self, kind: Kind, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Channels (last dimension) and their gradients in the basis of every head: ``x' = A x``, ``g' = A^-T g``."""
        if kind not in self.maps:
            return x, grad
        return _by_head(x, self.maps[kind], 0), _by_head(grad, self.maps[kind], 1)

    def finish(self, number: int, groups: Mapping[int, int], samples: int) -> None:
        if not self.q or not self.c:
            return
        self.heard += 1
        queries = [by_sample(one, groups, samples) for one in self.q]
        contexts = [[by_sample(one, groups, samples) for one in pair] for pair in self.c]
        q = self.view.shared(added(queries), "q")
        a, b = (added(parts) for parts in zip(*contexts, strict=True))
        self.q, self.c = [], []
        check_finite(self.view.name, q.sum() + a.sum() + b.sum(), number)
        self.qk += q.square().sum(0)
        first, second = (self._of_groups(x) for x in (a, b))
        self.products += torch.einsum("sci,scj->cij", first, first)
        self.crossed += torch.einsum("sci,scj->cij", first, second)
        self.plain += torch.einsum("sci,scj->cij", second, second)
        for head, span in enumerate(self.view.spans("o")):
            rows = slice(*span)
            whole = a[:, rows].sum(1)
            self.head_products[head] += whole.square().sum()
            self.head_crossed[rows] += whole @ b[:, rows]
            self.head_plain[head] += b[:, rows].T @ b[:, rows]

    def _of_groups(self, x: Tensor) -> Tensor:
        """``(..., channels of V, query heads of a group)`` from ``(..., channels of O)``."""
        return nn.functional.pad(x, (0, 1))[..., self.index]

    def share(self) -> None:
        """Adds what other processes saw."""
        self.__dict__.update(pooled({name: getattr(self, name) for name in _SUMS}))

    def scores(self, count: int, centred: bool) -> Scores:
        kept = centred and self.view.spec.bias[3]  # without a bias of O, the mean goes with the channel
        m = self.total / max(self.tokens, 1) if kept else torch.zeros_like(self.total)
        m, _ = self._rotated("vo", m, m)
        mean = self._of_groups(m)
        both = mean[:, :, None] * mean[:, None, :] * self.plain
        vo = (self.products - 2 * mean[:, None, :] * self.crossed + both).sum((1, 2)).clamp_min(0) / count
        heads = []
        for head, span in enumerate(self.view.spans("o")):
            mean = m[slice(*span)]
            cross = mean @ self.head_crossed[slice(*span)]
            heads.append(self.head_products[head] - 2 * cross + mean @ self.head_plain[head] @ mean)
        of: dict[Kind, Tensor] = {"qk": self.view.by_head(self.qk / count, "qk"), "vo": self.view.by_head(vo, "vo")}
        return Scores(of["qk"], of["vo"], torch.stack(heads).clamp_min(0) / count)


def _maps(bases: HeadBases, device: torch.device) -> dict[Kind, list[tuple[Tensor, Tensor]]]:
    """Per kind the two maps of every query head, in stored order."""
    layout = bases.spec.layout
    order = [layout.key_of[head] for head in layout.order]
    return {
        kind: [(by_key[key].first.to(device), by_key[key].second.to(device)) for key in order]
        for kind, by_key in bases.by_kind.items()
    }


def _of_groups(layout: HeadLayout) -> Tensor:
    """``(channels of V, query heads of a group)``: places in O's channels; past them for heads that a group lacks."""
    most, none = max(layout.groups), layout.channels("o")
    rows = []
    for key in layout.key_order:
        starts = [layout.span("o", head)[0] for head in layout.queries(key)]
        for channel in range(layout.vo[key]):
            rows.append([start + channel for start in starts] + [none] * (most - len(starts)))
    return torch.tensor(rows, device="cpu")


def _by_head(x: Tensor, maps: Sequence[tuple[Tensor, Tensor]], side: int) -> Tensor:
    """Every head's channels (last dimension) times its map."""
    parts = torch.split(x, [len(pair[side]) for pair in maps], dim=-1)
    return torch.cat([part @ pair[side].to(x).T for part, pair in zip(parts, maps, strict=True)], dim=-1)
