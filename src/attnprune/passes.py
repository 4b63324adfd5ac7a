"""Passes over data that leave no trace on the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from .errors import DataError, OptionError

LossFn = Callable[[nn.Module, Any], Tensor]


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


def projection_loss(seed: int = 0, metric: str = "output") -> LossFn:
    """A loss without labels: ``v . output`` with v standard normal, its mean over samples.

    The mean square of its derivatives is the diagonal of the Gauss-Newton matrix of the output's own distortion.
    Takes batches as :func:`forward` does; the output is a tensor, or carries ``logits`` or ``last_hidden_state``.
    Tokens that a mapping's ``attention_mask`` (batch, tokens) leaves out do not count.

    Args:
        seed: for the directions.
        metric: how distortion is measured: ``"output"`` by the square of the difference; ``"kl"`` by the
            Kullback-Leibler divergence between the softmax of the outputs (last dimension), whose Gauss-Newton matrix
            is the Fisher information; ``"auto"``: ``"kl"`` for outputs that carry ``logits`` of two or more classes.
    """
    if metric not in ("output", "kl", "auto"):
        raise OptionError("metric", 'one of "output", "kl", "auto"', repr(metric), "pick one of them")
    generator = torch.Generator("cpu").manual_seed(seed)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = forward(model, batch)
        logits = getattr(found, "logits", None)
        kl = metric == "kl" or (metric == "auto" and isinstance(logits, Tensor) and logits.shape[-1] > 1)
        for key in ("logits", "last_hidden_state"):
            found = getattr(found, key, found)
        if not isinstance(found, Tensor):
            raise DataError("data", "a model that returns a tensor", f"a {type(found).__name__}", "pass loss_fn")
        direction = torch.randn(found.shape, generator=generator, device="cpu").to(
            device=found.device, dtype=found.dtype
        )
        if kl:
            chances = found.detach().float().softmax(-1)
            direction = chances.sqrt() * direction.float()
            direction = (direction - chances * direction.sum(-1, keepdim=True)).to(found.dtype)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and found.dim() == 3 and mask.shape == found.shape[:2]:
            direction = direction * (mask != 0)[..., None]
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
    """Evaluation mode, gradients on and for ``trainable`` alone; modes, flags and random state restored afterwards.

    PyTorch's fused inference paths, which go around the modules that a pass listens to, are off meanwhile.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in trainable}
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for module, _ in modes:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def device_named(device: str | torch.device, where: str = "device", *, here: bool = True) -> torch.device:
    """A device, of this machine unless ``here`` is False.

    Raises:
        OptionError: there is no such device.

    >>> device_named("cpu")
    device(type='cpu')
    """
    try:
        place = torch.device(device)
        if here:
            torch.empty(0, device=place)
    except Exception as error:  # torch raises four kinds, by the kind of device
        expected = "a device of this machine" if here else "a device"
        found = f"{device!r} ({str(error).partition(chr(10))[0][:80]})"
        raise OptionError(where, expected, found, 'write "cpu", or "cuda" where there is one') from error
    return place
