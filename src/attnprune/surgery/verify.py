"""The result of surgery against the masked model, by running both: :class:`Verification`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError, VerificationError
from ..families.base import AttentionView
from ..nn.attempt import MACHINE
from ..nn.exactly import Exactly
from ..values.plan import Plan
from .mask import masked_views

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By dtype of an output, the share of its size by which rounding may change it."""


class Verified(NamedTuple):
    """What running a pruned model beside the masked one showed."""

    error: float
    """The difference of outputs as a share of their size, both root mean squares; of several outputs the largest."""
    samples: int
    """How many samples were run."""


class Verification:
    """A step of :func:`attnprune.surgery.commit_all`: raises where the model no longer computes what it should.

    What it should compute is what the dense model does with removed rows and columns at zero, or with a plan's maps in
    their places. It takes two forward passes, one of them before anything moves.

    Args:
        model: the model.
        views: its attention modules.
        plan: what is about to be done to it.
        run: runs the model on a few inputs, without a trace, and gives the tensors of its output.
        samples: how many inputs these are.
        needed: whether inputs that the model cannot take are an error.
    """

    def __init__(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        plan: Plan,
        run: Callable[[nn.Module], Sequence[Tensor]],
        samples: int,
        needed: bool = False,
    ) -> None:
        self.model, self.run, self.samples = model, run, samples
        self.found: Verified | None = None
        self.why_not = ""
        """Why nothing was compared."""
        self.expected: list[Tensor] = []
        try:
            with masked_views(model, views, plan):
                self.expected = [tensor.clone() for tensor in run(model)]
        except MACHINE:
            raise
        except Exception as error:  # whatever a model raises about inputs
            self.why_not = f"the model could not be run ({type(error).__name__}: {str(error)[:80]})"
            if needed:
                remedy = "pass example_inputs= that the model takes, or verify=False"
                raise DataError("verify", "inputs that the model takes", self.why_not, remedy) from error

    def commit(self) -> None:
        """Runs the pruned model and compares."""
        if self.why_not:
            return
        error = 0.0
        for before, after in zip(self.expected, self._found(), strict=False):
            if before.shape != after.shape:  # attention weights: of the heads that are left
                continue
            share = difference(after, before)
            error = max(error, share)
            allowed = ROUNDING.get(before.dtype, max(ROUNDING.values()))
            if not share <= allowed and not share <= self._noise():
                raise VerificationError(
                    "verify",
                    "the pruned model to compute what the masked one does",
                    f"outputs that differ by {share:.2g} of their size",
                    "the model is as it was; is an adapter of yours wrong? else exclude= layers, one after another, "
                    "to find which it is, and report it",
                )
        self.found = Verified(error, self.samples)
        self.expected = []

    def _found(self) -> Sequence[Tensor]:
        try:
            return self.run(self.model)
        except MACHINE:
            raise
        except Exception as error:  # whatever a model raises, which ran before
            raise VerificationError(
                "verify",
                "the pruned model to run, as the masked one does",
                f"{type(error).__name__}: {str(error)[:120]}",
                "the model is as it was; where it makes masks for a fixed number of heads, keep all heads "
                '(granularity="channel"), else exclude= layers to find which it is',
            ) from error

    def _noise(self) -> float:
        """By how much outputs in float64 may differ where the model itself rounds to float32; asked for only where they
        differ by more than rounding in float64, as it takes two passes more."""
        if not any(tensor.dtype == torch.float64 for tensor in self.expected):
            return 0.0
        plain = [tensor.clone() for tensor in self.run(self.model)]
        with Exactly():
            exact = self.run(self.model)
        return min(100 * max(map(difference, exact, plain), default=0.0), ROUNDING[torch.float32])

    def undo(self) -> None:
        """Nothing to put back."""


def difference(found: Tensor, expected: Tensor) -> float:
    """The size of a difference as a share of the second tensor's size; infinite where one alone is not finite.

    >>> difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    real = expected.isfinite()
    if not bool((real == found.isfinite()).all()):
        return float("inf")
    left, right = found[real].double(), expected[real].double()
    return float((left - right).norm()) / (float(right.norm()) or 1.0)
