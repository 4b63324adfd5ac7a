"""What hosts call their parts. Names propose; running the module decides."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from .linears import is_linear

Q, K, V, O = (
    ("q_proj", "query", "q_lin", "to_q", "wq", "q", "query_proj", "linear_q", "q_linear"),
    ("k_proj", "key", "k_lin", "to_k", "wk", "k", "key_proj", "linear_k", "k_linear"),
    ("v_proj", "value", "v_lin", "to_v", "wv", "v", "value_proj", "linear_v", "v_linear"),
    ("o_proj", "out_proj", "out_lin", "to_out", "wo", "o", "proj", "projection", "linear_out", "dense", "c_proj"),
)
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "num_q_heads", "attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads", "num_key_value_head")
SHARES = ("num_key_value_groups", "n_rep", "num_queries_per_kv", "n_kv_groups")
"""Query heads per key head."""
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_head")
SCALE = ("scaling", "scale", "softmax_scale")


def first(names: Sequence[str], among: Collection[str]) -> str | None:
    """The first of the names that is among the others."""
    return next((name for name in names if name in among), None)


def part_of(module: nn.Module, names: Sequence[str]) -> Any:
    """The first child of these names; any module under one, as a wrapper is refused later, by name."""
    children = module._modules
    for name in names if children else ():
        if children.get(name) is not None:
            return children[name]
    return None


def output_of(module: nn.Module) -> Any:
    """O: a child of one of its names, or the Linear in a Sequential of that name."""
    found = part_of(module, O)
    if isinstance(found, (nn.Sequential, nn.ModuleList)):
        inner = [part for part in found if is_linear(part)]
        return inner[0] if len(inner) == 1 else None
    return found
