"""Two models in turns, so that a busy machine slows both alike: :func:`compare`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.batches import device_of
from ..cost.latency.timing import paired, ratios

WARM_UP = 3
MOST, FEW = 60, 5
"""Rounds: where time alone would end them, and fewer than which tell nothing."""
NOISE = 0.1
"""How far apart half of the ratios may lie, as a share of the median."""


class Times(NamedTuple):
    """Seconds of two models, medians, and the ratio of the first to the second within each round."""

    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int

    @property
    def doubt(self) -> str:
        """Why the figures are not to be believed, and what to do; empty where nothing speaks against them."""
        low, high = self.quartiles
        if self.rounds < FEW:
            return (
                f"{self.rounds} rounds are too few to tell how far off this is: give it more with --seconds or --rounds"
            )
        if high - low <= NOISE * self.ratio:
            return ""
        return (
            f"this machine is too noisy to believe the ratio: half of the rounds lie between {low:.3f} and {high:.3f}; "
            "stop what else runs on it, or take a larger --batch-size or more --seconds"
        )


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Mapping[str, Tensor],
    rounds: int | None,
    threads: int,
    seconds: float | None = None,
) -> Times:
    """Times both on the same inputs, in turns; who goes first changes every round.

    Args:
        ours: a model.
        theirs: another.
        inputs: keywords for both.
        rounds: how often each runs; None: as ``seconds`` allow, at most :data:`MOST`.
        threads: of PyTorch, meanwhile.
        seconds: when to stop, where ``rounds`` is None.
    """

    def pass_of(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model(**inputs)

        return run

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            passes = {"ours": pass_of(ours), "theirs": pass_of(theirs)}
            limit = seconds if rounds is None else None
            times = paired(passes, rounds or MOST, WARM_UP, device_of(ours), progress=True, seconds=limit)
    finally:
        torch.set_num_threads(before)
    each = ratios(times, "ours", "theirs")
    cuts = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else [each[0]] * 3
    mine, other = (statistics.median(times[name]) for name in ("ours", "theirs"))
    return Times(mine, other, statistics.median(each), (cuts[0], cuts[2]), len(each))
