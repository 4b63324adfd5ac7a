"""Losses of batches, with labels and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, OptionError
from ..nn.outputs import Output, OutputFn, outputs_of
from .batches import call_of, described, forward, of_one_dtype

LossFn = Callable[[nn.Module, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None, output_fn: OutputFn | None = None) -> Tensor:
    """The scalar loss of a batch (:func:`scalar_of`), if it is finite.

    Raises:
        DataError: there is no such loss, or it is not finite.
    """
    loss = scalar_of(model, batch, loss_fn, output_fn)
    if not bool(loss.detach().isfinite()):
        raise DataError("data", "a finite loss", str(float(loss.detach())), "check the batch and the model's weights")
    return loss


def scalar_of(model: nn.Module, batch: Any, loss_fn: LossFn | None, output_fn: OutputFn | None = None) -> Tensor:
    """The scalar loss of a batch: ``loss_fn``'s, the model's own, or that of a pair's targets.

    For a pair without ``loss_fn``, integer targets mean cross entropy over the last dimension (or over dimension 1, as
    pixels have it), and floating-point targets mean square error; outputs may be a tensor, or carry ``logits``.

    Raises:
        DataError: there is no such loss.
    """
    loss: Any
    if loss_fn is not None:
        with of_one_dtype(model, batch):
            loss = loss_fn(model, batch)
    else:
        call = call_of(model, batch)
        output = call.run(model, batch)
        if call.targets is not None:
            loss = _loss_of_targets(output, call.targets, output_fn)
        else:
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and loss_fn is None:
        raise DataError(
            "data",
            "labels, of which a scalar loss is made",
            f"none in {described(batch)}",
            "add them: a key of the mapping (labels, mostly; a tensor of that name in a file), or pairs (inputs, "
            "targets); or pass loss_fn(model, batch), or a way that needs no labels",
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise DataError("data", "a scalar loss", found, "return one from loss_fn(model, batch), or give labels")
    return loss.reshape(())


def _loss_of_targets(output: Any, targets: Any, output_fn: OutputFn | None) -> Tensor:
    found = outputs_of(output, output_fn)
    named = [one for one in found if one.name == "logits"]
    if (len(found) > 1 and not named) or not isinstance(targets, Tensor):
        what = f"{len(found)} outputs ({', '.join(one.name for one in found[:4])}) and a {type(targets).__name__}"
        raise _no_loss("one output and a tensor of targets", what)
    x = (named or found)[0].tensor
    shapes = f"outputs {tuple(x.shape)} and {targets.dtype} targets {tuple(targets.shape)}"
    if targets.is_floating_point():
        if x.shape != targets.shape:
            raise _no_loss("targets of the outputs' shape", shapes)
        return F.mse_loss(x, targets)
    last, pixels = x.shape[:-1] == targets.shape, (*x.shape[:1], *x.shape[2:]) == tuple(targets.shape)
    classes = x.shape[-1] if last else x.shape[1] if pixels and x.dim() > 1 else 1
    known = targets[targets != -100] if targets.dtype != torch.bool else None
    if classes < 2 or known is None or not bool(((known >= 0) & (known < classes)).all()):
        raise _no_loss("logits of two or more classes, and a class in their range for each", shapes)
    return F.cross_entropy(x.flatten(0, -2), targets.flatten()) if last else F.cross_entropy(x, targets)


def _no_loss(expected: str, found: str) -> DataError:
    return DataError("data", expected, found, "pass loss_fn, which computes the loss of such a batch")


def labelled(model: nn.Module, batch: Any) -> bool:
    """Whether a loss can be computed for a batch without ``loss_fn``: it has targets, or is a mapping with labels."""
    if isinstance(batch, Mapping):
        return any("label" in str(key) for key in batch)
    return call_of(model, batch).targets is not None


class ProjectionLoss:
    """What :func:`projection_loss` gives: ``loss(model, batch)``.

    Args:
        seed: for the directions.
        metric: see there.
        output_fn: see there.
        labels: whether batches that have labels have a loss by them instead.
    """

    def __init__(
        self, seed: int = 0, metric: str = "output", output_fn: OutputFn | None = None, labels: bool = False
    ) -> None:
        if metric not in ("output", "kl", "auto"):
            raise OptionError("metric", 'one of "output", "kl", "auto"', repr(metric), "pick one of them")
        self.metric, self.output_fn, self.labels = metric, output_fn, labels
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def projects(self, model: nn.Module, batch: Any) -> bool:
        """Whether the loss of a batch is a random projection, whose parts of different samples are independent."""
        return not (self.labels and labelled(model, batch))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not self.projects(model, batch):
            return loss_of(model, batch, None, self.output_fn)
        found = outputs_of(forward(model, batch), self.output_fn)
        told = [one for one in found if one.tensor.requires_grad] or found
        return torch.stack([self._projection(one, batch, told).to(told[0].tensor) for one in told]).sum()

    def _projection(self, output: Output, batch: Any, others: Sequence[Output]) -> Tensor:
        """``v . output``, its mean over samples."""
        x = output.tensor
        direction = torch.randn(x.shape, generator=self._generator, device="cpu").to(device=x.device, dtype=x.dtype)
        dim = output.classes if self.metric != "output" else None
        if self.metric == "kl" and all(one.classes is None for one in others):
            dim = x.dim() - 1
        if dim is not None:
            chances = x.detach().float().softmax(dim)
            direction = chances.sqrt() * direction.float()
            direction = (direction - chances * direction.sum(dim, keepdim=True)).to(x.dtype)
        mask = token_mask(batch)
        if mask is not None:
            if x.dim() == 3 and mask.shape == x.shape[:2]:
                direction = direction * (mask != 0)[..., None]
            elif output.name in ("start_logits", "end_logits") and mask.shape == x.shape:
                direction = direction * (mask != 0)
        return (x * direction).sum() / (len(x) if x.dim() else 1)


def token_mask(batch: Any) -> Tensor | None:
    """``(batch, tokens)``: 0 or False for tokens of the output that do not count, as a mapping's ``attention_mask``
    says (``decoder_attention_mask``, where a decoder has inputs of its own)."""
    if not isinstance(batch, Mapping):
        return None
    decoder = any(str(key).startswith("decoder_") for key in batch)
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def projection_loss(seed: int = 0, metric: str = "output", output_fn: OutputFn | None = None) -> ProjectionLoss:
    """A loss without labels: ``v . output`` with v standard normal, its mean over samples.

    The mean square of its derivatives is the diagonal of the Gauss-Newton matrix of the output's own distortion.
    Takes batches as :func:`attnprune.prune_attention` does. Of a model that returns several tensors each is projected
    (:func:`attnprune.scorers.outputs_of`), those that depend on no weight of attention left out.
    Tokens that a mapping's ``attention_mask`` (batch, tokens) leaves out do not count.

    Args:
        seed: for the directions.
        metric: how distortion is measured: ``"output"`` by the square of the difference; ``"kl"`` by the
            Kullback-Leibler divergence between the softmax of the outputs (last dimension; of several outputs those
            that are called logits, if there are any), whose Gauss-Newton matrix is the Fisher information;
            ``"auto"``: ``"kl"`` for outputs that are called logits and have two or more classes.
        output_fn: takes the model's output, and gives the tensor, or a tuple or mapping of tensors, to project.
    """
    return ProjectionLoss(seed, metric, output_fn)


def loss_with_or_without_labels(seed: int = 0, output_fn: OutputFn | None = None) -> LossFn:
    """The loss of batches that have labels, :func:`projection_loss` for those that have none."""
    return ProjectionLoss(seed, output_fn=output_fn, labels=True)
