"""Scorers that add up something about gradients for every batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...calibration.batches import batches, device_of
from ...calibration.losses import LossFn, loss_of
from ...calibration.processes import pooled
from ...calibration.quiet import undisturbed
from ...errors import DataError, NonFiniteError
from ...families.base import AttentionView
from ...families.slots import Slot
from ...values.layout import Projection
from ...values.scores import Scores
from .base import Evidence, Scorer

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

    def use(number: int, loss: Tensor) -> None:
        consume(number, _batch_gradients(loss, parameters, slots, number))

    with undisturbed(model, parameters):
        return _each_batch(model, what, use, **evidence)


def sample_gradients(
    model: nn.Module, taps: Sequence[Tap], switch: Tensor, what: str, **evidence: Unpack[Evidence]
) -> int:
    """Lets every tap hear the gradients of every batch (:func:`listen`), and add what they gave; no weight's is formed.

    Returns the number of samples, which are the first dimension of what taps hear.
    """
    seen: list[int] = []

    def use(number: int, loss: Tensor) -> None:
        reached = torch.autograd.grad(loss, switch, allow_unused=True) if loss.requires_grad else (None,)
        samples = {count for tap in taps for count in tap.finish(number)}
        if reached[0] is None or not samples:
            raise no_gradient(number)
        if len(samples) != 1:
            raise DataError(
                f"data, batch {number}",
                "the same number of samples, first, in every attention",
                str(sorted(samples)),
                "where samples are cut into windows, take scores that ask for no samples: "
                'scorer="magnitude" with basis="rotated" and compensate=True, or scorer="fisher" with a loss_fn',
            )
        seen.extend(samples)

    _each_batch(model, what, use, **evidence)
    return sum(seen)


def _each_batch(
    model: nn.Module,
    what: str,
    use: Callable[[int, Tensor], None],
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    progress: bool = True,
) -> int:
    """Gives ``use`` each batch's number and loss, whose graph is gone before the next; returns how many there were."""
    count = 0
    for batch in batches(data, device_of(model), progress, what):
        use(count, loss_of(model, batch, loss_fn))
        count += 1
    return count


def _batch_gradients(
    loss: Tensor, parameters: list[nn.Parameter], slots: Mapping[tuple[str, str], Slot], number: int
) -> Mapping[str, Gradients]:
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
    return found


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
        totals: dict[str, tuple[Tensor, ...]] = {}

        def add(number: int, found: Mapping[str, Gradients]) -> None:
            for view in views:
                parts = self.reduce(view, found[view.name])
                check_finite(view.name, parts[0].sum() + parts[1].sum(), number)
                old = totals.get(view.name)
                totals[view.name] = parts if old is None else tuple(a + b for a, b in zip(old, parts, strict=True))

        count = gradients(model, views, self.name, add, **evidence)
        totals, count = pooled((totals, count))
        return {view.name: self.finish(view, *(total / count for total in totals[view.name])) for view in views}

    @abstractmethod
    def reduce(self, view: AttentionView, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """For one batch: qk ``(channels of K,)`` and vo ``(channels of V,)`` in stored order, head ``(heads,)``;
        float64."""

    def finish(self, view: AttentionView, qk: Tensor, vo: Tensor, head: Tensor) -> Scores:
        return Scores(view.by_head(qk, "qk").cpu(), view.by_head(vo, "vo").cpu(), head.cpu())


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


class Receiver(Protocol):
    """What :func:`listen` tells."""

    def receive(self, x: Tensor, grad: Tensor) -> None: ...


class Tap(Protocol):
    """What adds up something about the gradients that it was told."""

    def finish(self, number: int) -> Iterable[int]:
        """Adds what a batch gave; the numbers of samples in it, none where the loss does not depend on this."""


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
