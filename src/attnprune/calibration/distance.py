"""How far what a model says is from what it said before: :class:`Distance`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DataError
from ..nn.attempt import undone
from ..nn.outputs import Output, OutputFn, outputs_of
from .batches import forward
from .losses import LossFn, token_mask
from .processes import pooled
from .quiet import evaluated


class Distance:
    """How far a model's outputs are from those that it had when this was made; a number from 0, the mean over batches.

    Of outputs that are called logits the Kullback-Leibler divergence of their softmax, in nats; of others the square of
    the difference as a share of the square of what was said. Several outputs count together. Tokens that a mapping's
    ``attention_mask`` leaves out do not count. In evaluation mode, without gradients.

    Args:
        model: as it is now; what it says of the batches is kept, on its device: of a language model a number for each
            token and word.
        batches: what it is called with.
        loss_fn: calls it, where it does not take batches itself.
        output_fn: takes what it returns and gives the tensors to compare.

    Raises:
        DataError: ``loss_fn`` does not call the model itself, or what it says is not finite.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> distance = Distance(model, [torch.randn(8, 4)])
    >>> distance()
    0.0
    >>> _ = [torch.nn.init.zeros_(each) for each in model.parameters()]
    >>> round(distance(), 4)
    1.0
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], loss_fn: LossFn | None = None, output_fn: OutputFn | None = None
    ) -> None:
        self.model, self.batches, self.loss_fn, self.output_fn = model, batches, loss_fn, output_fn
        with evaluated(model):
            self.before = [self._said(batch) for batch in batches]

    def __call__(self) -> float:
        with evaluated(self.model):
            pairs = zip(self.batches, self.before, strict=True)
            found = [_apart(self._said(batch), before, token_mask(batch)) for batch, before in pairs]
        total, count = pooled((sum(found), float(len(found))))
        return total / max(count, 1.0)

    def _said(self, batch: Any) -> tuple[Output, ...]:
        if self.loss_fn is None:
            answers = [forward(self.model, batch)]
        else:
            answers = []
            with undone() as undo:
                hook = self.model.register_forward_hook(lambda module, inputs, output: answers.append(output))
                undo.append(hook.remove)
                self.loss_fn(self.model, batch)
        if not answers:
            found, remedy = "one that calls parts of it", 'let it call the model, or pass split="auto"'
            raise DataError("loss_fn", "a loss that calls the model itself", found, remedy)
        return outputs_of(answers[-1], self.output_fn)


def _apart(mine: Sequence[Output], before: Sequence[Output], mask: Tensor | None) -> float:
    total = 0.0
    for one, other in zip(mine, before, strict=True):
        x, y, dim = one.tensor.float(), other.tensor.float(), one.classes
        counts = mask is not None and x.dim() > 1 and mask.shape == x.shape[:2]
        if dim is not None:
            logs = x.log_softmax(dim), y.log_softmax(dim)
            each = nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(dim)
        else:
            each = (x - y).square()
            y = y.square()
        if counts:
            assert mask is not None
            each, y = each[mask != 0], y[mask != 0]
        total += float(each.mean()) if dim is not None else float(each.sum() / y.sum().clamp_min(1e-30))
    if not total < float("inf"):
        raise DataError("data", "finite outputs of the model", "others", "check the batches and the model's weights")
    return max(total, 0.0)
