"""How long attention takes in other shapes, measured on this machine: :func:`measure`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product
from math import fsum, lcm
from statistics import median
from time import monotonic
from typing import Any
from warnings import warn

from torch import nn

from ...bars import bar
from ...errors import AttnPruneWarning, LatencyError, OptionError
from ...families.base import AttentionView
from ...families.registry import find_views, plain
from ...surgery import Surgeon, check_views
from ...values.choices import Choices
from ...values.layer_plan import Channels, LayerPlan, make_layer
from ...values.layout import Kind
from ...values.plan import Plan
from ...values.rules import Granularity, check_rounding
from ...values.spec import AttentionSpec
from ..rounding import auto_rounding
from .cache import fingerprint, read_cache, write_cache
from .table import Grid, LatencyTable
from .timing import Stopwatch, shapes_seen

LEVELS = {"channel": (1, 5), "head": (12, 1), "joint": (4, 5)}
"""By granularity, how many numbers of heads and of channels of each kind are measured at most."""


def measure(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Granularity = "channel",
    round_to: int | str = "auto",
    include: Choices | None = None,
    exclude: Choices | None = None,
    seconds: float = 60.0,
    cache: bool | str = True,
    progress: bool = True,
) -> LatencyTable:
    """Times attention in a grid of shapes, inside forward passes of this model on this machine.

    Layers of one kind stand in for one another: in every pass each has another shape of the grid, so a model of 12
    layers times 12 shapes at once, with the inputs, the memory traffic and the caches that they have in use. The shapes
    are pruned copies, committed and undone bitwise between passes. Before or after each pass comes one of the dense
    model, and every time is taken as a share of that, so a busy machine slows both; the table has medians of shares.

    Args:
        model: any module with attention of a known family; left as found. Runs in evaluation mode, without gradients.
        example_inputs: a tensor, tuple or mapping, of the size that latency matters for.
        granularity: what plans will remove: ``"channel"`` (shapes with all heads, at most 5 x 5), ``"head"`` (at most
            12 numbers of heads) or ``"joint"`` (at most 4 x 5 x 5).
        round_to: channels of measured shapes are multiples of this; ``"auto"`` as in
            :func:`attnprune.prune_attention`.
        include: glob patterns of names, classes, or functions of name and module; only these.
        exclude: what to leave out.
        seconds: about how long to measure; three rounds of all shapes at least.
        cache: True keeps the table in the user's cache directory and reads it from there where machine, versions,
            model and inputs are the same; a path is a directory to use instead; False measures anew.
        progress: whether to show a progress bar.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    >>> table = measure(model, torch.randn(1, 9, 64), seconds=0.1, cache=False)
    >>> table.grid("self_attn").qk, table.layers
    ((4, 8, 12, 16), (('self_attn', 0),))
    """
    if granularity not in LEVELS:
        raise OptionError("granularity", "head, channel or joint", repr(granularity), "pick one of them")
    check_rounding(round_to)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise OptionError("seconds", "a number above 0", repr(seconds), "leave it out for 60")
    model = plain(model)
    views = find_views(model, include, exclude)
    check_views(model, views)
    for view in views:
        if view.spec.ragged:
            raise LatencyError(view.name, "equal heads", view.spec.describe(), "measure the model before pruning")
    step = auto_rounding(views, granularity) if isinstance(round_to, str) else round_to
    seen = shapes_seen(model, views, example_inputs)
    kinds: dict[Any, int] = {}
    layers = []
    grids: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
    for view in views:
        kind = (type(view.module), replace(view.spec, name=""), seen[view.name])
        if kind not in kinds:
            kinds[kind] = len(grids)
            grids.append(_axes(view.spec, granularity, step))
        layers.append((view.name, kinds[kind]))
    machine = fingerprint(model, example_inputs, {"layers": repr(layers), "grids": repr(grids)})
    if cache is not False:
        text = read_cache(machine, cache)
        table = None if text is None else _trusted(text, machine, layers, grids)
        if table is not None:
            return table
    table = _measured(model, views, example_inputs, machine, layers, grids, step, seconds, progress)
    if cache is not False:
        write_cache(machine, cache, table.to_json())
    return table


def _trusted(text: str, machine: Mapping[str, str], layers: Any, grids: Any) -> LatencyTable | None:
    """The table in a cache file, if it is one and of this machine and model."""
    try:
        table = LatencyTable.from_json(text)
        axes = [(one.heads, one.qk, one.vo) for one in table.grids]
        if (dict(table.machine), list(table.layers), axes) == (dict(machine), list(layers), list(grids)):
            return table
        reason = "it is of another machine or model"
    except LatencyError as error:
        reason = str(error)
    warn(f"A cached latency table is not used, and measured anew: {reason}", AttnPruneWarning, stacklevel=3)
    return None


def _axes(
    spec: AttentionSpec, granularity: Granularity, step: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Numbers of heads, qk and vo channels to measure, from the least to the dense one."""
    few, fine = LEVELS[granularity]
    heads = _thinned(list(accumulate(map(len, spec.head_units))), few)
    pair = lcm(step, 2) if any(spec.rotary_dims) else step
    qk, vo = (_thinned([*range(by, dim, by), dim], fine) for dim, by in ((spec.qk_dim, pair), (spec.vo_dim, step)))
    return heads, qk, vo


def _thinned(levels: Sequence[int], count: int) -> tuple[int, ...]:
    """At most ``count`` of ascending levels, evenly spread, the last among them."""
    if len(levels) <= count:
        return tuple(levels)
    if count == 1:
        return (levels[-1],)
    return tuple(levels[round(i * (len(levels) - 1) / (count - 1))] for i in range(count))


def shaped(spec: AttentionSpec, heads: int, qk: int, vo: int) -> LayerPlan:
    """A plan that leaves the first heads and channels: for its shape alone."""
    sizes: dict[Kind, int] = {"qk": qk, "vo": vo}
    removed: dict[Kind, Channels] = {}
    for kind, size in sizes.items():
        flat = [[channel for unit in spec.units(kind, key) for channel in unit] for key in range(spec.kv_heads)]
        removed[kind] = tuple(tuple(channels[size:]) for channels in flat)
    return make_layer(spec, set(range(heads, spec.heads)), removed)


def _measured(
    model: nn.Module,
    views: Sequence[AttentionView],
    example_inputs: Any,
    machine: Mapping[str, str],
    layers: Sequence[tuple[str, int]],
    grids: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
    step: int,
    seconds: float,
    progress: bool,
) -> LatencyTable:
    points = [list(product(*axes)) for axes in grids]
    members = [[i for i, (_, number) in enumerate(layers) if number == g] for g in range(len(grids))]
    shares: list[list[list[float]]] = [[[] for _ in each] for each in points]
    rests: list[float] = []
    totals: list[float] = []
    passes = max(-(-len(each) // len(group)) for each, group in zip(points, members, strict=True))
    with Stopwatch(model, views, example_inputs) as watch:
        started, rounds = monotonic(), 0
        shown = bar(what="latency", shown=progress)
        while rounds < 3 or (monotonic() - started < seconds and rounds < 100):
            for turn in range(passes):
                places = {i: (turn * len(group) + j + 5 * rounds) % len(points[g])
                          for g, group in enumerate(members) for j, i in enumerate(group)}  # fmt: skip
                plans = [shaped(views[i].spec, *points[layers[i][1]][place]) for i, place in sorted(places.items())]
                surgeon = Surgeon.prepare(model, views, Plan(tuple(plans)))
                dense, (whole, parts) = watch.pair(surgeon, dense_first=bool((rounds + turn) % 2))
                totals.append(dense)
                rests.append((whole - fsum(parts)) / dense)
                for i, place in places.items():
                    shares[layers[i][1]][place].append(parts[i] / dense)
            rounds += 1
            shown.update()
        shown.close()
    found = tuple(Grid(*axes, tuple(median(one) for one in each)) for axes, each in zip(grids, shares, strict=True))
    return LatencyTable(machine, median(totals), median(rests), tuple(layers), found, step, rounds)


def measure_plan(
    model: nn.Module, surgeon: Surgeon, example_inputs: Any, seconds: float = 20.0
) -> tuple[float, tuple[float, float], int]:
    """Dense and pruned forward passes in turns: the surgeon's commit, and its undo, between them.

    All else is common to both, and the model is in the end bitwise as it was.

    Returns:
        The median of the pairs' ratios, the medians of seconds before and after, and the number of pairs.
    """
    pairs: list[tuple[float, float]] = []
    with Stopwatch(model, (), example_inputs) as watch:
        started = monotonic()
        while len(pairs) < 5 or (monotonic() - started < seconds and len(pairs) < 60):
            dense, (whole, _) = watch.pair(surgeon, dense_first=len(pairs) % 2 == 0)
            pairs.append((dense, whole))
    ratio = median(after / before for before, after in pairs)
    before, after = (median(column) for column in zip(*pairs, strict=True))
    return ratio, (before, after), len(pairs)


def slower_because(plan: Plan, seconds: float) -> Iterator[str]:
    """What may make a pruned model slower than the dense one."""
    ragged = sum(one.ragged for one in plan.after)
    apart = sum(not one.ragged and one.qk_dim != one.vo_dim for one in plan.after)
    if ragged:
        yield f'{ragged} layers have heads of several sizes (heads="uniform" runs them as one product)'
    if apart:
        yield f"{apart} layers have qk unlike vo, which fused kernels do not take (match_dims=True keeps them equal)"
    odd = sum(any(dim % 8 for dim in (*one.qk_dims, *one.vo_dims)) for one in plan.after)
    if odd:
        yield f'{odd} layers have dims that are no multiples of 8 (round_to="auto" picks what the device likes)'
    if seconds < 0.02 or not (ragged or apart or odd):
        yield "the inputs are so small that calls, not products, take the time (a larger batch shows what was saved)"
