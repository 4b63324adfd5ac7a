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


class Times(NamedTuple):
    """Seconds of two models, medians, and the ratio of the first to the second within each round."""

    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]


def compare(ours: nn.Module, theirs: nn.Module, inputs: Mapping[str, Tensor], rounds: int, threads: int) -> Times:
    """Times both on the same inputs, in turns; who goes first changes every round."""

    def pass_of(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model(**inputs)

        return run

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            passes = {"ours": pass_of(ours), "theirs": pass_of(theirs)}
            times = paired(passes, rounds, WARM_UP, device_of(ours), progress=True)
    finally:
        torch.set_num_threads(before)
    each = ratios(times, "ours", "theirs")
    cuts = statistics.quantiles(each, n=4, method="inclusive") if rounds > 1 else [each[0]] * 3
    mine, other = (statistics.median(times[name]) for name in ("ours", "theirs"))
    return Times(mine, other, statistics.median(each), (cuts[0], cuts[2]))
