"""Scorers that add up something about gradients for every batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...calibration.batches import batches, device_of
from ...calibration.losses import LossFn, ProjectionLoss, loss_of
from ...calibration.processes import pooled
from ...calibration.quiet import undisturbed
from ...calibration.sample import counts_in, samples_of
from ...errors import DataError, NonFiniteError, ScorerError
from ...families.base import AttentionView
from ...families.slots import Slot
from ...nn.outputs import OutputFn
from ...values.layout import Projection
from ...values.scores import Scores
from .base import Evidence, FeatureScores, Scorer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Gradients = Mapping[str, Tensor]


def gradients(
    model: nn.Module,
    views: Sequence[AttentionView],
    what: str,
    consume: Callable[[int, Mapping[str, Gradients]], None],
    **evidence: Unpack[Evidence],
) -> int:
    """Gives ``consume`` for every batch its number and, by view and slot, the loss's gradient as ``(channels, ...)``.

    ``.grad`` is neither read nor written, and hooks that run after accumulation (optimizers in the backward pass)
    stay silent. Only attention parameters take part, so the pass costs less than a full backward pass. Gradients of a
    batch are gone before the next one runs. Returns the number of batches.
    """
    slots = {(view.name, key): slot for view in views for key, slot in view.slots.items()}
    parameters = list({id(slot.parameter): slot.parameter for slot in slots.values()}.values())
    reached = dict.fromkeys((view.name for view in views), 0)

    def use(number: int, batch: Any, loss: Tensor) -> None:
        found, names = _batch_gradients(loss, parameters, slots, number)
        for name in names:
            reached[name] += 1
        consume(number, found)

    with undisturbed(model, parameters):
        count = _each_batch(model, what, use, **evidence)
    check_reached(pooled(reached))
    return count


def sample_gradients(
    model: nn.Module,
    taps: Sequence[Tap],
    switch: Tensor,
    what: str,
    together: bool = False,
    **evidence: Unpack[Evidence],
) -> int:
    """Lets every tap hear the gradients of every batch (:func:`listen`), and add what they gave; no weight's is formed.

    Args:
        model: the whole model.
        taps: what listens.
        switch: see there.
        what: the scorer's name.
        together: whether taps can add up a batch whose samples cannot be told apart as if it were one.
        evidence: keywords of :class:`Evidence`.

    Returns:
        The number of samples.
    """
    seen: list[int] = []
    loss_fn = evidence.get("loss_fn")

    def before(batch: Any) -> None:
        counts = counts_in(batch)
        for tap in taps:
            tap.begin(counts)

    def use(number: int, batch: Any, loss: Tensor) -> None:
        reached = torch.autograd.grad(loss, switch, allow_unused=True) if loss.requires_grad else (None,)
        rows = {count for tap in taps for count in tap.rows}
        if reached[0] is None or not rows:
            raise no_gradient(number)
        projects = together and isinstance(loss_fn, ProjectionLoss) and loss_fn.projects(model, batch)
        groups = _groups(rows, counts_in(batch), projects, number)
        samples = max(groups.values()) if max(groups.values()) > 1 else max(counts_in(batch)[:1], default=1)
        for tap in taps:
            tap.finish(number, groups, samples)
        seen.append(samples)

    _each_batch(model, what, use, before, **evidence)
    return sum(seen)


def _groups(rows: Iterable[int], counts: Sequence[int], projects: bool, number: int) -> dict[int, int]:
    """For each number of sequences that attention ran on, of how many samples they are; 1: all of the batch's together.

    Together they are fine where the loss is a random projection: parts of other samples are independent of mean zero,
    so the square of the sum is, on average, the sum of squares.
    """
    groups = {count: samples_of(count, counts) for count in rows}
    if len(groups) == 1:
        return {count: count if samples is None else samples for count, samples in groups.items()}
    if None in groups.values() and not projects:
        raise DataError(
            f"data, batch {number}",
            "as many sequences as samples, or a multiple, in every attention",
            f"{sorted(groups)} sequences, and a batch of {', '.join(map(str, counts)) or 'no tensors'}",
            "give batches whose first dimension are samples and stays first, or use Fisher(per_sample=False)",
        )
    return {count: samples or 1 for count, samples in groups.items()}


def check_reached(reached: Mapping[str, Any]) -> None:
    """Raises DataError if data reached some attention and not other, by name; what they do not reach scores nothing."""
    missed = [name or "the model itself" for name, count in reached.items() if not float(count)]
    if missed:
        names = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        raise DataError(
            "data",
            "batches whose loss, or output, depends on every attention that may lose something",
            f"{len(missed)} of {len(reached)} that it never depends on: {names}",
            "leave them out (exclude=), or give data, loss_fn or output_fn that reach them",
        )


def _each_batch(
    model: nn.Module,
    what: str,
    use: Callable[[int, Any, Tensor], None],
    before: Callable[[Any], None] | None = None,
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    output_fn: OutputFn | None = None,
    progress: bool = True,
) -> int:
    """Gives ``use`` each batch's number, the batch and its loss, whose graph is gone before the next; returns how many
    there were."""
    count = 0
    for batch in batches(data, device_of(model), progress, what):
        if before is not None:
            before(batch)
        use(count, batch, loss_of(model, batch, loss_fn, output_fn))
        count += 1
    return count


def _batch_gradients(
    loss: Tensor, parameters: list[nn.Parameter], slots: Mapping[tuple[str, str], Slot], number: int
) -> tuple[Mapping[str, Gradients], set[str]]:
    """By view and slot the gradients, and the views that the loss depends on."""
    if not loss.requires_grad:
        raise no_gradient(number)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    if all(grad is None for grad in grads):
        raise no_gradient(number)
    by_id = {id(p): grad for p, grad in zip(parameters, grads, strict=True)}
    found: dict[str, dict[str, Tensor]] = {}
    for (name, key), slot in slots.items():
        grad = by_id[id(slot.parameter)]
        found.setdefault(name, {})[key] = slot.cut(torch.zeros_like(slot.parameter) if grad is None else grad)
    return found, {name for (name, _), slot in slots.items() if by_id[id(slot.parameter)] is not None}


def no_gradient(number: int) -> DataError:
    """The error for a batch whose loss does not depend on the attention modules."""
    return DataError(
        f"data, batch {number}",
        "a loss that depends on the attention modules",
        "no gradient",
        "let loss_fn return a loss without detach or no_grad; with checkpointing use use_reentrant=False",
    )


def check_finite(where: str, values: Tensor, number: int) -> Tensor:
    """The values, or an error that says which batch gave NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"{where}, batch {number}", "finite gradients", "NaN or infinite ones", "score in float32 or bfloat16"
        )
    return values


class GradientScorer(Scorer):
    """Adds up one number per unit and batch: memory is O(heads x channels), whatever the number of batches."""

    needs_data = True

    def score(
        self, model: nn.Module, views: Sequence[AttentionView], **evidence: Unpack[Evidence]
    ) -> dict[str, Scores]:
        means = self._means(model, views, self.reduce, **evidence)
        return {view.name: self.finish(view, *means[view.name]) for view in views}

    def score_features(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **evidence: Unpack[Evidence],
    ) -> FeatureScores:
        def reduce(view: AttentionView, grads: Gradients) -> tuple[Tensor, ...]:
            return tuple(self.reduce_features(view, grads, p) for p in which)

        means = self._means(model, views, reduce, **evidence)
        return {name: {p: one.cpu() for p, one in zip(which, parts, strict=True)} for name, parts in means.items()}

    def _means(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        reduce: Callable[[AttentionView, Gradients], tuple[Tensor, ...]],
        **evidence: Unpack[Evidence],
    ) -> dict[str, tuple[Tensor, ...]]:
        """By view the means over batches of what ``reduce`` makes of a batch's gradients."""
        totals: dict[str, tuple[Tensor, ...]] = {}

        def add(number: int, found: Mapping[str, Gradients]) -> None:
            for view in views:
                parts = reduce(view, found[view.name])
                check_finite(view.name, torch.stack([part.sum() for part in parts[:2]]), number)
                old = totals.get(view.name)
                totals[view.name] = parts if old is None else tuple(a + b for a, b in zip(old, parts, strict=True))

        count = gradients(model, views, self.name, add, **evidence)
        totals, count = pooled((totals, count))
        return {name: tuple(total / count for total in parts) for name, parts in totals.items()}

    @abstractmethod
    def reduce(self, view: AttentionView, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """For one batch: qk ``(channels of K,)`` and vo ``(channels of V,)`` in stored order, head ``(heads,)``;
        float64."""

    def reduce_features(self, view: AttentionView, grads: Gradients, projection: Projection) -> Tensor:
        """For one batch ``(features,)`` of a projection; float64."""
        raise ScorerError(
            f"scorer {self.name}", "reduce_features, to score features", "none", "write it, or use another scorer"
        )

    def finish(self, view: AttentionView, qk: Tensor, vo: Tensor, head: Tensor) -> Scores:
        return Scores(view.by_head(qk, "qk").cpu(), view.by_head(vo, "vo").cpu(), head.cpu())


def columns(view: AttentionView, values: Mapping[str, Tensor], projection: Projection) -> Tensor:
    """``(channels, features)``: what slots hold that share a projection's features (:func:`.base.weights_of`)."""
    sides = ("q", "x", "g") if projection == "q" else (projection,)
    return torch.cat([values[f"{side}.weight"] for side in sides if f"{side}.weight" in view.slots])


def head_sums(view: AttentionView, values: Mapping[Projection, Tensor]) -> Tensor:
    """``(heads,)``: per query head the sum over its channels in all four projections, each ``(channels,)`` in stored
    order."""
    key_of, total = list(view.spec.layout.key_of), None
    for p, each in values.items():
        heads = torch.stack([each[slice(*span)].sum() for span in view.spans(p)])
        heads = heads[key_of] if p in "kv" else heads
        total = heads if total is None else total + heads
    assert total is not None
    return total


def unit_sums(view: AttentionView, values: Mapping[Projection, Tensor]) -> tuple[Tensor, Tensor]:
    """``(channels of K,)`` and ``(channels of V,)``: the sums over what a qk and a vo channel hold."""
    qk = view.shared(values["q"], "q") + values["k"]
    return qk, values["v"] + view.shared(values["o"], "o")


def sequences(x: Tensor) -> int:
    """On how many sequences an attention runs whose projections read or write ``(sequences, ..., channels)``; tokens
    without a batch are one."""
    return len(x) if x.dim() > 2 else 1


class Receiver(Protocol):
    """What :func:`listen` tells."""

    def receive(self, x: Tensor, grad: Tensor) -> None: ...


class Tap(Protocol):
    """What adds up something about the gradients that it was told."""

    rows: set[int]
    """On how many sequences the attention ran in this batch, where the loss depends on it."""

    def begin(self, counts: Sequence[int]) -> None:
        """Comes before every batch, with its numbers of samples."""

    def finish(self, number: int, groups: Mapping[int, int], samples: int) -> None:
        """Adds what a batch gave.

        Args:
            number: the batch's.
            groups: for the numbers of sequences, of how many samples they are.
            samples: how many the batch counts.
        """


def listen(output: Tensor, switch: Tensor, x: Tensor, tap: Receiver) -> Tensor:
    """The output itself; on the way back ``tap.receive(x, gradient of the output)`` is called.

    The result depends on ``switch``, a scalar that requires a gradient: asking for the switch's gradient makes every
    tap see its own, and no gradient of a weight is ever formed.
    """
    tapped: Tensor = _Listen.apply(output, switch, x, tap)  # type: ignore[no-untyped-call]
    return tapped


class _Listen(torch.autograd.Function):
    """The identity; on the way back it tells its tap the gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, switch: Tensor, x: Tensor, tap: Receiver) -> Tensor:
        ctx.x, ctx.tap = x, tap
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.tap.receive(ctx.x, grad)
        ctx.x = None  # the graph may outlive this pass; what it listened to need not
        return grad, grad.new_zeros(()), None, None
