"""Losses of batches, with labels and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, OptionError
from .batches import forward

LossFn = Callable[[nn.Module, Any], Tensor]


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
