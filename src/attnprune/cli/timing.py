"""Paired timing: two models in turns, so that a busy machine slows both alike."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

WARM_UP = 3


class Times(NamedTuple):
    """Seconds of two models, medians, and the ratio of the first to the second within each round."""

    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]


def compare(ours: nn.Module, theirs: nn.Module, inputs: Mapping[str, Tensor], rounds: int, threads: int) -> Times:
    """Times both on the same inputs, in turns; who goes first changes every round."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = _rounds(ours, theirs, inputs, rounds)
    finally:
        torch.set_num_threads(before)
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    cuts = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else [ratios[0]] * 3
    return Times(
        statistics.median(times[True]), statistics.median(times[False]), statistics.median(ratios), (cuts[0], cuts[2])
    )


def _rounds(ours: nn.Module, theirs: nn.Module, inputs: Mapping[str, Tensor], rounds: int) -> dict[bool, list[float]]:
    """Seconds of ours (True) and theirs (False) by round."""
    times: dict[bool, list[float]] = {True: [], False: []}
    quiet = not sys.stderr.isatty()
    for number in tqdm(range(-WARM_UP, rounds), desc="attnprune: rounds", disable=quiet, leave=False):
        for first in (True, False):
            mine = first is (number % 2 == 0)
            seconds = _seconds(ours if mine else theirs, inputs)
            if number >= 0:
                times[mine].append(seconds)
    return times


@torch.inference_mode()
def _seconds(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait(inputs)
        start = time.perf_counter()
        model(**inputs)
        _wait(inputs)
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait(inputs: Mapping[str, Tensor]) -> None:
    """For what runs beside the CPU."""
    if any(value.is_cuda for value in inputs.values()):
        torch.cuda.synchronize()
