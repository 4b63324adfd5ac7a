"""How far what a model says is from what it said before: :class:`Distance`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..nn.outputs import Output, OutputFn, outputs_of
from .batches import answers, forward
from .losses import LossFn, token_mask
from .processes import pooled
from .quiet import evaluated

ROOM = 2**28
"""Bytes of outputs that are kept."""


class Distance:
    """How far a model's outputs are from those that it had when this was made; a number from 0, the mean over batches.

    Of outputs that are called logits the Kullback-Leibler divergence of their softmax, in nats; of others the square of
    the difference as a share of the square of what was said. Several outputs count together. Tokens that a mapping's
    ``attention_mask`` leaves out do not count. In evaluation mode, without gradients.

    Args:
        model: as it is now; what it says of the batches is kept, on its device: at most :data:`ROOM` bytes; of more,
            tokens evenly spread.
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
        self._room = ROOM // max(len(batches), 1)
        with evaluated(model):
            self.before = [[one.kept() for one in self._said(batch)] for batch in batches]

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(one.rows.nbytes for said in self.before for one in said)

    def __call__(self) -> float:
        with evaluated(self.model):
            pairs = zip(self.batches, self.before, strict=True)
            found = [_apart(self._said(batch), before) for batch, before in pairs]
        total, count = pooled((sum(found), float(len(found))))
        return total / max(count, 1.0)

    def _said(self, batch: Any) -> list[_Said]:
        with answers(self.model) as found:
            if self.loss_fn is None:
                forward(self.model, batch)
            else:
                self.loss_fn(self.model, batch)
        if not found:
            said, remedy = "one that calls parts of it", 'let it call the model, or pass split="auto"'
            raise DataError("loss_fn", "a loss that calls the model itself", said, remedy)
        outputs = outputs_of(found[-1], self.output_fn)
        return [_Said.of(one, token_mask(batch), self._room // len(outputs)) for one in outputs]


class _Said(NamedTuple):
    """What counts of one output."""

    rows: Tensor
    """``(tokens, numbers)``"""
    logits: bool

    @classmethod
    def of(cls, output: Output, mask: Tensor | None, room: int) -> _Said:
        """The rows of an output that the mask lets count; where they take more than ``room`` bytes, as many of them,
        evenly spread, as do not."""
        x = output.tensor if output.classes is None else output.tensor.movedim(output.classes, -1)
        counts = mask is not None and x.dim() > 1 and mask.shape == x.shape[:2]
        x = x.unsqueeze(-1) if x.dim() < 2 or (counts and x.dim() == 2) else x
        rows = x.reshape(-1, x.shape[-1])
        places = torch.arange(len(rows), device=x.device)
        if counts:
            assert mask is not None
            places = places[(mask != 0).reshape(*mask.shape, *[1] * (x.dim() - 3)).expand(x.shape[:-1]).flatten()]
        most = max(room // (rows.shape[1] * rows.element_size()), 1)
        if len(places) > most:
            places = places[torch.linspace(0, len(places) - 1, most, device=x.device).long()]
        return cls(rows if len(places) == len(rows) else rows[places], output.classes is not None)

    def kept(self) -> _Said:
        """The same in memory of its own, so that the whole output may go."""
        return self._replace(rows=self.rows.clone())


def _apart(mine: Sequence[_Said], before: Sequence[_Said]) -> float:
    total = 0.0
    for one, other in zip(mine, before, strict=True):
        x, y = one.rows.float(), other.rows.float()
        if one.logits:
            each = nn.functional.kl_div(x.log_softmax(1), y.log_softmax(1), reduction="none", log_target=True)
            total += float(each.sum() / max(len(x), 1))
        else:
            total += float((x - y).square().sum() / y.square().sum().clamp_min(1e-30))
    if not total < float("inf"):
        raise DataError("data", "finite outputs of the model", "others", "check the batches and the model's weights")
    return max(total, 0.0)
