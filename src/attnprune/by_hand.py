"""Removal of heads and channels that the user names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from operator import index
from typing import Any

from torch import nn

from .api import apply_plan
from .errors import UnknownUnitError
from .families import find_views
from .families.base import AttentionView
from .families.registry import plain
from .nn.kept import ordinary
from .report.report import Report
from .values.layer_plan import Channels, LayerPlan, make_layer
from .values.layout import KINDS, Kind
from .values.plan import Plan


@ordinary
def prune_heads(
    model: nn.Module,
    heads: Mapping[int | str, Iterable[int]],
    *,
    optimizer: Any = None,
    averages: Iterable[nn.Module] = (),
) -> Report:
    """Removes the heads named, as ``model.prune_heads`` did in transformers 4.

    Args:
        model: any module with attention of a known family.
        heads: heads to remove, by layer number (the place in :func:`find_attention`) or by name.
        optimizer, averages: as in :func:`attnprune.apply_plan`.

    Raises:
        UnknownUnitError: no such layer or head, or all heads of a layer.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> prune_heads(model, {0: [1, 3]}).layers[0].after.heads
    2
    """
    model = plain(model)
    views = find_views(model)
    named = _by_view(views, heads)
    layers = []
    for view in views:
        gone = _numbers(f"{view.name}: heads", named.get(view.name, ()))
        nothing: Channels = ((),) * view.spec.kv_heads
        _refuse_all(view.name, gone, view.spec.heads)
        layers.append(make_layer(view.spec, gone, {"qk": nothing, "vo": nothing}))
    return apply_plan(model, Plan(tuple(layers)), optimizer=optimizer, averages=averages)


@ordinary
def prune_channels(
    model: nn.Module,
    channels: Mapping[int | str, Mapping[str, Sequence[Iterable[int]]]],
    *,
    optimizer: Any = None,
    averages: Iterable[nn.Module] = (),
) -> Report:
    """Removes the channels named.

    Args:
        model: any module with attention of a known family.
        channels: by layer number or name, a mapping with ``"qk"`` and ``"vo"`` (either may be missing), each one list
            per head (with grouped queries per key head) of the channels to remove from it.
        optimizer, averages: as in :func:`attnprune.apply_plan`.

    Raises:
        UnknownUnitError: no such layer, head or channel, or all channels of a head.

    >>> import torch
    >>> model = torch.nn.MultiheadAttention(16, 4)
    >>> prune_channels(model, {"": {"vo": [[0], [1], [2], [3]]}}).layers[0].after.vo_dims
    (3, 3, 3, 3)
    """
    model = plain(model)
    views = find_views(model)
    named = _by_view(views, channels)
    layers = []
    for view in views:
        wanted = named.get(view.name, {})
        if not isinstance(wanted, Mapping) or not set(wanted) <= set(KINDS):
            raise UnknownUnitError(
                f"{view.name}: channels", 'a mapping with keys "qk" and "vo"', repr(wanted)[:60], "give lists per head"
            )
        removed: dict[Kind, Channels] = {}
        for kind in KINDS:
            lists: Any = wanted.get(kind, ((),) * view.spec.kv_heads)
            if not isinstance(lists, Sequence) or isinstance(lists, (str, bytes)):
                where, found = f"{view.name}: {kind}", repr(lists)[:60]
                raise UnknownUnitError(where, "a list of channels for every head", found, "write [[0, 3], [], ...]")
            if len(lists) != view.spec.kv_heads:
                word = "key heads" if view.spec.heads > view.spec.kv_heads else "heads"
                expected = f"one list for each of {view.spec.kv_heads} {word}"
                raise UnknownUnitError(f"{view.name}: {kind}", expected, f"{len(lists)} lists", "give empty ones too")
            removed[kind] = tuple(tuple(sorted(_numbers(f"{view.name}: {kind}", one))) for one in lists)
        layers.append(LayerPlan(view.spec, (), removed["qk"], removed["vo"]))
    return apply_plan(model, Plan(tuple(layers)), optimizer=optimizer, averages=averages)


def _by_view(views: Sequence[AttentionView], given: Mapping[int | str, Any]) -> dict[str, Any]:
    """What was given, by the attention's name."""
    if not isinstance(given, Mapping):
        raise UnknownUnitError("layers", "a mapping from layer to units", repr(given)[:60], "write {0: [1, 5]}")
    names = [view.name for view in views]
    found: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(names):
            name = names[key]
        elif isinstance(key, str) and key in names:
            name = key
        else:
            near = get_close_matches(str(key), names, n=3, cutoff=0.0)
            raise UnknownUnitError(
                "layers", f"a number in [0, {len(names)}) or a name", repr(key), f"names here are like {near}"
            )
        if name in found:
            raise UnknownUnitError(name, "each layer once", "both its number and its name", "merge the two")
        found[name] = value
    return found


def _numbers(where: str, units: Any) -> set[int]:
    if isinstance(units, (str, bytes)) or not isinstance(units, Iterable):
        raise UnknownUnitError(where, "a list of numbers", repr(units), "write [0, 3]")
    found = list(units)
    try:
        if any(isinstance(unit, bool) for unit in found):
            raise TypeError("bool")
        return {index(unit) for unit in found}
    except TypeError as error:
        raise UnknownUnitError(where, "whole numbers", repr(found)[:60], "write [0, 3]") from error


def _refuse_all(name: str, gone: set[int], heads: int) -> None:
    if len(gone) >= heads and set(range(heads)) <= gone:
        raise UnknownUnitError(
            f"{name}: heads", f"at most {heads - 1} of {heads} removed", "all", "keep one, or edit the model"
        )
