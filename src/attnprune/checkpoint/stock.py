"""Checkpoints that plain transformers loads, without attnprune installed."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import NotExpressibleError, OptionError
from ..families.base import AttentionView
from ..families.registry import all_views, plain
from ..families.tied import tied_to
from ..nn import host_class
from ..nn.attempt import MACHINE
from ..nn.kept import ordinary
from ..values.spec import AttentionSpec
from .card import CARD, is_free
from .entry import ENTRY, is_pretrained
from .folder import Folder
from .manifest import BY_DIGEST, MANIFEST
from .shapes import smaller_than

_STALE = re.compile(
    rf"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|{BY_DIGEST.pattern}|{re.escape(MANIFEST)}"
)
_STOCK = "plan with stock=True, or use save_pruned"


@ordinary
def export_stock(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes a checkpoint that plain transformers loads, without attnprune installed.

    Possible where every attention has the same heads and dims, qk equals vo, and the model's class reads the head dim
    from its config (AST, ViT, DeiT, DINOv2 and others in transformers 5): ``config.num_attention_heads`` and
    ``config.head_dim`` are set, and the softmax scale's ratio is folded into Q. ``make_plan(..., stock=True)`` gives
    plans that can be exported.

    Args:
        model: a pruned model of transformers; left as it is.
        directory: where ``config.json`` and the weights go, by ``save_pretrained``; in place of a model that is there.

    Raises:
        NotExpressibleError: no stock config gives this shape; says which layer stands in the way, and which options
            give plans that can be exported.
    """
    model = plain(model)
    views = all_views(model)
    theirs = check_stock(model, [view.spec for view in views])
    for view in views:
        _check_runs(view, view.spec)
    stock: Any = copy.deepcopy(model)
    config = stock_config(model, [view.spec for view in views])
    for module in stock.modules():
        if hasattr(module, "config"):
            module.config = config
    with torch.no_grad():
        own = all_views(stock)
        tied = tied_to(own)
        for view in (view for view in own if view.name not in tied):  # what several share changes once
            gain = view.spec.scale / theirs[view.name].scale
            for key, slot in view.slots.items():
                if key.startswith("q."):
                    slot.write(slot.cut(slot.parameter.detach()) * gain)
    folder = Folder.make(directory)
    folder.alone()
    drafts = folder.drafts()
    stock.save_pretrained(drafts)
    folder.receive(drafts, _STALE)
    if is_free(folder):  # what save_pruned wrote of another model
        folder.remove(CARD)
    return folder.path


def _check_runs(view: AttentionView, spec: AttentionSpec) -> None:
    """Raises unless the host's own forward computes the same in this shape, as was proven."""
    state = view.state
    if state is None and spec is view.spec:
        return  # it runs by its host's own forward
    if state is not None and (state.dense or (state.stock and not view.runs_expanded and view.expresses(spec))):
        return
    if state is None and view.way(spec) == "stock":
        return
    reasons = view.verdict.reasons if view.verdict is not None else {}
    found = reasons.get("stock") or f"{spec.describe()}, by a forward of attnprune"
    remedy = f'use granularity="head" where only channels stand in the way, or save_pruned: {_STOCK}'
    raise NotExpressibleError(view.name, "a shape in which its own forward computes the same", found, remedy)


def check_possible(model: nn.Module, views: Sequence[AttentionView], granularity: str) -> None:
    """Raises unless some smaller shape of a model could be exported.

    Args:
        model: the model as it is.
        views: the attention modules that are to be pruned.
        granularity: whether heads or channels are to go.
    """
    names = {view.name for view in views}
    left = [view.name for view in all_views(model) if view.name not in names]
    if left:
        found = f"{len(left)} left out, {left[0]} among them"
        raise OptionError("stock=True", "all attention modules to be pruned alike", found, "drop include and exclude")
    for view in views:
        _check_alike(view.spec, views[0].spec)
    half = []
    for view in views:
        spec = view.spec
        units, dim = spec.head_units, spec.qk_dim
        if granularity == "head":
            units = units[: max(len(units) // 2, 1)]
        else:
            dim = max(dim // 4 * 2, 1) if any(spec.rotary_dims) else max(dim // 2, 1)
        heads = [head for unit in units for head in unit]
        dims = [dim] * len(spec.keys_of(heads))
        half.append(spec.keep(heads, dims, dims))
    check_stock(model, half)
    for view, spec in zip(views, half, strict=True):
        _check_runs(view, spec)


def check_stock(model: nn.Module, after: Sequence[AttentionSpec]) -> dict[str, AttentionSpec]:
    """What attention a plain model of these shapes has, by name; no tensor has data here.

    Raises:
        NotExpressibleError: there is no such model.
    """
    config = stock_config(model, after)
    try:
        with torch.device("meta"):
            stock: nn.Module = host_class(model)(config)
    except MACHINE:
        raise
    except Exception as error:
        raise NotExpressibleError("config", "head_dim to be free", str(error)[:80], "use save_pruned") from error
    theirs = {view.name: view.spec for view in all_views(stock)}
    for spec in after:
        other = theirs.get(spec.name)
        if other is None or other.layout != spec.layout:
            shown = "none" if other is None else other.describe()
            found, remedy = f"{shown}, all that its class can have", "use save_pruned"
            raise NotExpressibleError(spec.name, f"{spec.describe()}, from its config", found, remedy)
    for name, size in smaller_than(stock, model, all_views(model)).items():
        inside = any(name.startswith(f"{spec.name}.") for spec in after)
        why = "which pruning attention does not cut" if inside else "as another tool left it"
        found, remedy = f"{size}, {why}", "use save_pruned"
        raise NotExpressibleError(name, "the size that its config says", found, remedy)
    return theirs


def stock_config(model: nn.Module, specs: Sequence[AttentionSpec]) -> Any:
    """The config of a plain model with attention of these shapes.

    Raises:
        NotExpressibleError: not a model of transformers, or shapes that no config can say.
    """
    config: Any = getattr(model, "config", None)
    if not is_pretrained(model) or config is None:
        raise NotExpressibleError("model", "a model of transformers", f"a {type(model).__name__}", "use save_pruned")
    for spec in specs:
        _check_alike(spec, specs[0])
    config = copy.deepcopy(config)
    for name in (ENTRY, "attn_implementation"):
        vars(config).pop(name, None)
    if specs:
        config.num_attention_heads, config.head_dim = specs[0].heads, specs[0].qk_dim
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = specs[0].kv_heads
    config.architectures = [host_class(model).__name__]
    return config


def _check_alike(spec: AttentionSpec, first: AttentionSpec) -> None:
    """Says what stands in the way, and the option that would remove it."""
    if spec.ragged:
        expected, option = "heads of equal dims", 'heads="uniform"'
    elif spec.qk_dim != spec.vo_dim:
        expected = "as many qk as vo channels"
        option = 'equal ratios for qk and vo, scope="local", and a round_to that divides both'
    elif spec.layout != first.layout or len(set(spec.groups)) > 1:
        shared = f" on {first.kv_heads} key heads" if first.heads > first.kv_heads else ""
        expected = f"{first.heads} heads{shared} of {first.qk_dim}, as {first.name or 'the first layer'}"
        option = 'scope="local", and a round_to that gives all layers the same'
    else:
        return
    raise NotExpressibleError(spec.name, expected, spec.describe(), f"use {option}: {_STOCK}")
