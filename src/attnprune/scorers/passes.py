"""Passes over data that leave no trace on the model, and the scorers that add up something for every batch."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..errors import DataError, NonFiniteError
from ..scores import Scores
from ..spec import Kind
from ..views import AttentionView, Slot
from .base import LossFn, Scorer

Gradients = Mapping[str, Tensor]


def forward(model: nn.Module, batch: Any) -> Any:
    """Calls the model with a batch: a mapping as keywords, a pair's first, a tensor as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise DataError(
        "data",
        "batches that are a mapping, a pair (inputs, targets) or a tensor",
        f"a {type(batch).__name__}",
        "pass loss_fn, which then takes batches of any form",
    )


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The scalar loss of a batch: ``loss_fn``'s, the model's own, or that of a pair's targets.

    For a pair without ``loss_fn``, integer targets mean cross entropy over the last dimension, and floating-point
    targets mean square error; outputs may be a tensor, or carry ``logits``.
    """
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        output = forward(model, batch)
        loss = getattr(output, "loss", None) if isinstance(batch, Mapping) else _pair_loss(output, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise DataError(
            "data",
            "a scalar loss",
            found,
            "pass loss_fn(model, batch) that returns one, or mappings with labels, or pairs (inputs, targets)",
        )
    if not bool(loss.detach().isfinite()):
        raise DataError("data", "a finite loss", str(float(loss.detach())), "check the batch and the model's weights")
    return loss.reshape(())


def _pair_loss(output: Any, batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return None
    logits, targets = getattr(output, "logits", output), batch[1]
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        return F.mse_loss(logits, targets)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def labelled(batch: Any) -> bool:
    """Whether a loss can be computed for a batch without ``loss_fn``: a pair, or a mapping with labels."""
    if isinstance(batch, Mapping):
        return any("label" in str(key) for key in batch)
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def projection_loss(seed: int = 0) -> LossFn:
    """A loss without labels: ``v . output`` with v standard normal, its mean over samples.

    The mean square of its derivatives is the diagonal of the Gauss-Newton matrix of the output's own distortion.
    Takes batches as :func:`forward` does; the output is a tensor, or carries ``logits`` or ``last_hidden_state``.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = forward(model, batch)
        for key in ("logits", "last_hidden_state"):
            found = getattr(found, key, found)
        if not isinstance(found, Tensor):
            raise DataError("data", "a model that returns a tensor", f"a {type(found).__name__}", "pass loss_fn")
        direction = torch.randn(found.shape, generator=generator).to(device=found.device, dtype=found.dtype)
        return (found * direction).sum() / len(found)

    return loss


def loss_with_or_without_labels(seed: int = 0) -> LossFn:
    """The loss of batches that have labels, :func:`projection_loss` for those that have none."""
    without = projection_loss(seed)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch, None if labelled(batch) else without)

    return loss


def batches(data: Iterable[Any] | None, device: torch.device, progress: bool, what: str) -> Iterator[Any]:
    """The batches of ``data`` on the model's device, with a progress bar; an empty iterable raises."""
    if data is None or isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            "data",
            f"an iterable of batches, which {what} scores need",
            repr(data),
            "pass data=, for example a DataLoader",
        )
    if isinstance(data, (Tensor, Mapping)):
        raise DataError("data", "an iterable of batches", "a single batch", "put it in a list: data=[batch]")
    count = 0
    for batch in tqdm(data, desc=f"attnprune: {what}", disable=not progress or not sys.stderr.isatty(), leave=False):
        count += 1
        yield to_device(batch, device)
    if count == 0:
        raise DataError("data", "at least one batch", "none", "check the data set; was the iterator used up before")


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; mappings, tuples and lists are followed."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch) if type(batch) in (tuple, list) else batch
    return batch


@contextmanager
def undisturbed(model: nn.Module, trainable: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients on and for ``trainable`` alone; modes, flags and random state restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in trainable}
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for module, _ in modes:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def gradients(
    model: nn.Module,
    views: Sequence[AttentionView],
    data: Iterable[Any] | None,
    loss_fn: LossFn | None,
    progress: bool,
    what: str,
    consume: Callable[[int, Mapping[str, Gradients]], None],
) -> int:
    """Gives ``consume`` for every batch its number and, by view and slot, the loss's gradient as ``(channels, ...)``.

    ``.grad`` is neither read nor written, and hooks that run after accumulation (optimizers in the backward pass)
    stay silent. Only attention parameters take part, so the pass costs less than a full backward pass. Gradients of a
    batch are gone before the next one runs. Returns the number of batches.
    """
    slots = {(view.name, key): slot for view in views for key, slot in view.slots.items()}
    parameters = list({id(slot.parameter): slot.parameter for slot in slots.values()}.values())
    count = 0
    with undisturbed(model, parameters):
        for batch in batches(data, device_of(model), progress, what):
            consume(count, _batch_gradients(loss_of(model, batch, loss_fn), parameters, slots, count))
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
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        *,
        data: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        progress: bool = True,
    ) -> dict[str, Scores]:
        totals: dict[str, tuple[Tensor, ...]] = {}

        def add(number: int, found: Mapping[str, Gradients]) -> None:
            for view in views:
                parts = self.reduce(view, found[view.name])
                check_finite(view.name, parts[0].sum() + parts[1].sum(), number)
                old = totals.get(view.name)
                totals[view.name] = parts if old is None else tuple(a + b for a, b in zip(old, parts, strict=True))

        count = gradients(model, views, data, loss_fn, progress, self.name, add)
        return {view.name: self.finish(view, *(total / count for total in totals[view.name])) for view in views}

    @abstractmethod
    def reduce(self, view: AttentionView, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """For one batch: qk ``(channels,)`` and vo ``(channels,)`` in stored order, head ``(heads,)``; float64."""

    def finish(self, view: AttentionView, qk: Tensor, vo: Tensor, head: Tensor) -> Scores:
        return Scores(view.by_head(qk, "qk").cpu(), view.by_head(vo, "vo").cpu(), head.cpu())


def head_sums(view: AttentionView, kind: Kind, values: Tensor) -> Tensor:
    """``(heads,)`` sums over each head's channels of ``(channels,)`` in stored order."""
    return torch.stack([values[slice(*span)].sum() for span in view.spans(kind)])
