"""What multiples of channels save, measured on this machine: :func:`measure_multiples`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm, sqrt
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

from torch import nn

from ...bars import bar
from ...families.base import AttentionView
from ...families.tied import tied_to
from ...surgery import Surgeon
from ...values.layer_plan import Channels, LayerPlan, make_layer
from ...values.layout import KINDS, Kind
from ...values.plan import Plan
from ...values.spec import AttentionSpec
from .timing import Stopwatch

ROUNDS = (5, 60)
"""How often every multiple is measured: before it is known how much times vary, and at most."""


class Share(NamedTuple):
    """A share of time, as measured."""

    median: float
    error: float
    """The standard error of it."""


def measure_multiples(
    model: nn.Module,
    views: Sequence[AttentionView],
    example_inputs: Any,
    multiples: Sequence[int],
    against: int,
    kept: Mapping[Kind, float],
    ragged: bool = False,
    sure: float = 0.015,
    seconds: float = 30.0,
    progress: bool = True,
) -> dict[int, Share]:
    """What the model takes where heads keep multiples of 1, of 2 and so on, and as much in all.

    Of a multiple, one layer keeps that many channels per head more than a share, the next as many fewer (with ragged
    heads so do the heads of a layer), and then the other way round: odd multiples of it, but always the same number of
    channels in all. So a multiple takes less only where the device likes it more. Shapes run in turns; the model is in
    the end bitwise as it was.

    Args:
        model: any module with these attentions. Runs in evaluation mode, without gradients.
        views: the attentions.
        example_inputs: a tensor, tuple or mapping.
        multiples: powers of two, ascending; the smallest head holds four of the last.
        against: the multiple whose time the others are a share of.
        kept: the share of qk and of vo channels that stays; 1 leaves all.
        ragged: whether heads of a layer may differ.
        sure: the standard error of shares that is enough.
        seconds: how long to measure at most, beyond one round; given up as soon as it is seen not to be enough.
        progress: whether to show a progress bar.

    Returns:
        By multiple, the share of time and how sure it is: an infinite error after fewer than five rounds.
    """
    times: dict[int, list[float]] = {multiple: [] for multiple in multiples}
    tied, turns = tied_to(views), {view.name: i for i, view in enumerate(views)}  # which of two neighbours a layer is
    turns |= {name: turns[first] for name, first in tied.items()}

    def seconds_of(watch: Stopwatch, multiple: int) -> float:
        both = 0.0
        for side in (0, 1):
            turned = [(view.spec, turns[view.name] + side) for view in views]
            layers = [around(spec, multiple, multiples[-1], kept, turn, ragged) for spec, turn in turned]
            both += watch.pruned(Surgeon.prepare(model, views, Plan(tuple(layers))))[0]
        return both

    with Stopwatch(model, (), example_inputs) as watch:
        started, rounds, done, found = monotonic(), 0, False, dict[int, Share]()
        shown = bar(what="multiples", shown=progress)
        while not done and rounds < ROUNDS[1]:
            shift = rounds % len(multiples)
            for multiple in (*multiples[shift:], *multiples[:shift]):
                times[multiple].append(seconds_of(watch, multiple))
            rounds += 1
            shown.update()
            found = {multiple: _share(times[multiple], times[against]) for multiple in multiples}
            worst = max(share.error for share in found.values())
            wanted = rounds * (worst / sure) ** 2 if rounds >= ROUNDS[0] else ROUNDS[0]  # errors fall with the root
            done = worst <= sure or (monotonic() - started) / rounds * wanted > seconds
        shown.close()
    return found


def _share(times: Sequence[float], others: Sequence[float]) -> Share:
    """Of what was measured in the same rounds."""
    shares = [one / other for one, other in zip(times, others, strict=True)]
    middle = median(shares)
    if len(shares) < ROUNDS[0]:
        return Share(middle, float("inf"))
    spread = 1.4826 * median(abs(share - middle) for share in shares)  # of a normal distribution, by what is usual
    return Share(middle, 1.2533 * spread / sqrt(len(shares)))


def around(
    spec: AttentionSpec, multiple: int, coarsest: int, kept: Mapping[Kind, float], turn: int, ragged: bool = False
) -> LayerPlan:
    """A plan that leaves a share of channels, more or fewer by a multiple: for its shape alone.

    >>> spec = AttentionSpec.of("attention", heads=2, head_dim=64, d_model=128)
    >>> [around(spec, by, 16, {"qk": 0.5, "vo": 0.75}, turn).after.qk_dim for by in (16, 4) for turn in (0, 1)]
    [32, 32, 36, 28]
    """
    removed: dict[Kind, Channels] = {}
    for kind in KINDS:
        heads = []
        for key, dim in enumerate(spec.dims(kind)):
            some = min(max(round(dim * kept[kind] / coarsest), 1), dim // coarsest - 1) * coarsest
            middle = dim if kept[kind] == 1 else some
            by = lcm(multiple, 2) if kind == "qk" and spec.rotary_dims[key] else multiple
            if by < middle < dim and multiple < coarsest:
                middle += by if (turn + (key if ragged else 0)) % 2 == 0 else -by
            channels = [channel for unit in spec.units(kind, key) for channel in unit]
            heads.append(tuple(channels[middle:]))
        removed[kind] = tuple(heads)
    return make_layer(spec, set(), removed)
