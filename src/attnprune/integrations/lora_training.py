"""The training loop of :func:`.peft.lora_recover`: a schedule of the learning rate, and the best by validation loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from math import ceil, cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import batches, device_of
from ..calibration.losses import LossFn, loss_of
from ..errors import DataError

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - cos(pi * left)) / 2,
    "none": lambda left: 1.0,
}
"""The learning rate by the fraction of steps that are left after warm-up, as a factor."""


def train(
    model: nn.Module,
    data: Any,
    validation: Any,
    loss_fn: LossFn | None,
    lr: float,
    epochs: int,
    warmup: float,
    decay: Callable[[float], float],
    checks: int,
    never_worse: bool,
    progress: bool,
) -> None:
    """Leaves the best updates in place."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    total, device = epochs * len(data), device_of(model)
    rise = ceil(warmup * total)

    def rate(done: int) -> float:
        return (done + 1) / rise if done < rise else decay((total - done) / max(total - rise, 1))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    at = {ceil(len(data) * (i + 1) / checks) for i in range(checks)}
    best: tuple[float, list[Tensor]] | None = None

    def look() -> None:
        nonlocal best
        if validation is None:
            return
        loss = mean_loss(model, validation, loss_fn)
        if best is None or loss < best[0]:
            best = loss, [p.detach().clone() for p in parameters]

    if never_worse:
        look()
    for epoch in range(epochs):
        model.train()
        for number, batch in enumerate(batches(data, device, progress, f"LoRA, epoch {epoch + 1} of {epochs}"), 1):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, batch, loss_fn)
            if not loss.requires_grad:
                raise DataError("data", "a loss that depends on the model", "no gradient", "return it without detach")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            if number in at:
                look()
                model.train()
    if best is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, best[1], strict=True):
                parameter.copy_(value)


def mean_loss(model: nn.Module, data: Any, loss_fn: LossFn | None) -> float:
    """The mean loss over batches, without dropout."""
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, batch, loss_fn)) for batch in batches(data, device_of(model), False, "loss")]
    return sum(losses) / len(losses)


def sized(data: Any) -> Any:
    """Data that can be counted and read again."""
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Tensor, Mapping)):
        if isinstance(data, Iterator) or not isinstance(data, Sized):
            data = list(data)
        if not len(data):
            raise DataError("data", "at least one batch", "none", "check the data set; was the iterator used up before")
        return data
    raise DataError("data", "an iterable of batches", f"a {type(data).__name__}", "put a single batch in a list")
