"""Checkpoints that plain transformers loads, without attnprune installed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.registry import all_views, plain
from ..errors import NotExpressibleError
from ..nn import host_class
from ..spec import AttentionSpec
from .record import ENTRY, is_pretrained

_STOCK = "plan with stock=True, or use save_pruned"


def export_stock(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes a checkpoint that plain transformers loads, without attnprune installed.

    Possible where every attention has the same heads and dims, qk equals vo, and the model's class reads the head dim
    from its config (AST, ViT, DeiT, DINOv2 and others in transformers 5): ``config.num_attention_heads`` and
    ``config.head_dim`` are set, and the softmax scale's ratio is folded into Q. ``make_plan(..., stock=True)`` gives
    plans that can be exported.

    Args:
        model: a pruned model of transformers; left as it is.
        directory: where ``config.json`` and the weights go, by ``save_pretrained``.

    Raises:
        NotExpressibleError: no stock config gives this shape; says which layer stands in the way, and which options
            give plans that can be exported.
    """
    model = plain(model)
    views = all_views(model)
    config = stock_config(model, [view.spec for view in views])
    try:
        stock: Any = host_class(model)(config)
    except Exception as error:
        raise NotExpressibleError("config", "head_dim to be free", str(error)[:80], "use save_pruned") from error
    state, theirs = model.state_dict(), {view.name: view for view in all_views(stock)}
    _check_shapes(stock.state_dict(keep_vars=True), state)
    stock.to(next(model.parameters()).dtype)
    stock.load_state_dict(state)
    with torch.no_grad():
        for view in views:
            gain = view.spec.scale / theirs[view.name].spec.scale
            for key, slot in theirs[view.name].slots.items():
                if key.startswith("q."):
                    slot.cut(slot.parameter.detach()).mul_(gain)
    stock.save_pretrained(directory)
    return Path(directory)


def check_stock(model: nn.Module, specs: Sequence[AttentionSpec], after: Sequence[AttentionSpec]) -> None:
    """Raises unless a model whose attention takes these shapes could be exported; no tensor has data here.

    Args:
        model: the model as it is.
        specs: its attention modules now.
        after: what a plan leaves of them.
    """
    config = stock_config(model, after)
    try:
        with torch.device("meta"):
            stock: nn.Module = host_class(model)(config)
    except Exception as error:
        raise NotExpressibleError("config", "head_dim to be free", str(error)[:80], "use save_pruned") from error
    found = {view.name: view.spec for view in all_views(stock)}
    for spec in after:
        other = found.get(spec.name)
        if other is None or (other.qk_dims, other.vo_dims) != (spec.qk_dims, spec.vo_dims):
            shown = "none" if other is None else other.describe()
            raise NotExpressibleError(
                spec.name,
                f"{spec.describe()}, from its config",
                f"{shown}, all that its class can have",
                "use save_pruned",
            )


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
    if hasattr(config, ENTRY):
        delattr(config, ENTRY)
    if specs:
        config.num_attention_heads, config.head_dim = specs[0].heads, specs[0].qk_dim
    config.architectures = [host_class(model).__name__]
    return config


def _check_alike(spec: AttentionSpec, first: AttentionSpec) -> None:
    """Says what stands in the way, and the option that would remove it."""
    if spec.ragged:
        expected, option = "heads of equal dims", 'heads="uniform"'
    elif spec.qk_dim != spec.vo_dim:
        expected = "as many qk as vo channels"
        option = 'equal ratios for qk and vo, scope="local", and a round_to that divides both'
    elif (spec.heads, spec.qk_dim) != (first.heads, first.qk_dim):
        expected = f"{first.heads} heads of {first.qk_dim}, as {first.name or 'the first layer'}"
        option = 'scope="local", and a round_to that gives all layers the same'
    else:
        return
    raise NotExpressibleError(spec.name, expected, spec.describe(), f"use {option}: {_STOCK}")


def _check_shapes(stock: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    for key, tensor in stock.items():
        if key not in state or state[key].shape != tensor.shape:
            found = "none" if key not in state else str(tuple(state[key].shape))
            expected = f"shape {tuple(tensor.shape)}, all that the class can have"
            raise NotExpressibleError(
                key, expected, found, "use save_pruned: the class takes no head_dim from its config"
            )
