"""What hosts call their parts. Names propose; running the module decides."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from .linears import is_linear

Q, K, V, O = (
    ("q_proj", "query", "q_lin", "to_q", "wq", "q", "query_proj", "linear_q", "q_linear", "to_query", "project_q", "Wq",
     "w_q", "W_q", "q_head", "q_attn", "projection_query", "queries", "q_b_proj", "q_gate_proj"),
    ("k_proj", "key", "k_lin", "to_k", "wk", "k", "key_proj", "linear_k", "k_linear", "to_key", "project_k", "Wk",
     "w_k", "W_k", "k_head", "projection_key"),
    ("v_proj", "value", "v_lin", "to_v", "wv", "v", "value_proj", "linear_v", "v_linear", "project_v", "Wv", "w_v",
     "W_v", "v_head", "projection_value"),
    ("o_proj", "out_proj", "out_lin", "to_out", "wo", "o", "proj", "projection", "linear_out", "dense", "c_proj", "Wo",
     "W_o", "w_o", "proj_out", "output_proj", "projection_layer", "attention_out", "linear_o", "post_proj", "post",
     "output", "out"),
)  # fmt: skip
QKV = ("qkv", "to_qkv", "Wqkv", "qkv_proj", "qkv_linear", "query_key_value", "c_attn", "in_proj", "in_proj_qkv",
       "att_proj", "linear_qkv", "w_qkv", "queries_keys_values")  # fmt: skip
KV = ("kv", "to_kv", "kv_proj", "Wkv", "wkv", "linear_kv", "kv_linear", "key_value", "c_attn", "kv_b_proj",
      "keys_values")  # fmt: skip
QK = ("qk", "to_qk", "qk_proj", "query_key")
"""What holds several of them in one."""
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "num_q_heads", "attention_heads", "num_head",
         "nhead", "no_heads", "h", "groups")  # fmt: skip
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads", "num_key_value_head")
SHARES = ("num_key_value_groups", "n_rep", "num_queries_per_kv", "n_kv_groups")
"""Query heads per key head."""
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_head", "head_size", "head_width",
            "hidden_size_per_attention_head")  # fmt: skip
SCALE = ("scaling", "scale", "softmax_scale")


def first(names: Sequence[str], among: Collection[str]) -> str | None:
    """The first of the names that is among the others."""
    return next((name for name in names if name in among), None)


def part_of(module: nn.Module, names: Sequence[str]) -> Any:
    """The first child of these names; any module under one, as a wrapper is refused later, by name."""
    children = module._modules
    return next((_inside(children[name]) for name in names if children.get(name) is not None), None)


def _inside(part: Any) -> Any:
    """The one Linear of a module that does more with it: clips what comes and goes, norms over the batch."""
    if is_linear(part):
        return part
    inner = [module for module in part.modules() if is_linear(module)]
    return inner[0] if len(inner) == 1 else part


def parts_of(module: nn.Module) -> dict[str, Any]:
    """The projections for queries, keys and values by the letters of what they hold; empty where some are missing."""
    for names in ({"q": Q, "k": K, "v": V}, {"q": Q, "kv": KV}, {"qk": QK, "v": V}, {"qkv": QKV}):
        found = {letters: part_of(module, among) for letters, among in names.items()}
        if None not in found.values() and (len(found) == 3 or all(map(is_linear, found.values()))):
            return found
    return {}


def tells_heads(module: nn.Module) -> bool:
    """Whether a module, or its config, says how many heads it has."""
    return first(HEADS + HEAD_DIM, module.__dict__) is not None or _of_config(module) is not None


def heads_of(module: nn.Module, channels: int) -> int:
    """The number of heads that a module says, itself or by their dim in so many channels, or its config; 1 if none."""
    own = (_number(module.__dict__.get(name)) for name in HEADS)
    found = next((number for number in own if number is not None), None)
    if found is None:
        dims = (_number(module.__dict__.get(name)) for name in HEAD_DIM)
        dim = next((number for number in dims if number), None)
        found = channels // dim if dim else _of_config(module)
    return found or 1


def finite(value: Any) -> float | None:
    """A value as a number; None if it is none, or not finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _number(value: Any) -> int | None:
    """A value as a whole number; None if it is none."""
    if isinstance(value, (list, tuple, dict)):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a module, several numbers, a word, infinity
        return None


def _of_config(module: nn.Module) -> int | None:
    config = module.__dict__.get("config")
    found = (getattr(config, name, None) for name in HEADS)
    return next((value for value in found if isinstance(value, int)), None)


def output_of(module: nn.Module) -> Any:
    """O: a child of one of its names, or the Linear in a Sequential of that name."""
    found = part_of(module, O)
    if isinstance(found, (nn.Sequential, nn.ModuleList)):
        inner = [part for part in map(_inside, found) if is_linear(part)]
        return inner[0] if len(inner) == 1 else None
    return found
