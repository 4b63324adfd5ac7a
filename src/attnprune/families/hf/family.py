"""Attention of Hugging Face encoders, recognised by the shape of their class, not by its name.

A class belongs here if its forward reads three input projections, splits heads by the usual attributes and calls the
attention functions of transformers, and does nothing else: every global and attribute that its code names is among
those below. A forward that also rotates, normalises or gates is not taken for one that does not.
"""

from __future__ import annotations

import dis
import inspect
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

from ...nn import Decoupled, host_class
from ...nn.decoupled import forward_of
from ...values.spec import AttentionSpec
from ..base import Adapter
from ..views import AttentionView
from .forward import (
    DROPOUT,
    EAGER,
    HFCrossAttention,
    HFEagerSelfAttention,
    HFLegacySelfAttention,
    HFSelfAttention,
    K,
    O,
    Q,
    V,
    describe,
    first,
)

HEADS = ("num_attention_heads", "num_heads", "n_heads")
HEAD_DIM = ("head_dim", "attention_head_size")
SCALE = ("scaling", "scale")
SIGNATURES: tuple[tuple[tuple[str, ...], type[Decoupled]], ...] = (
    (("hidden_states", "attention_mask", "past_key_values"), HFSelfAttention),
    (("hidden_states", "encoder_hidden_states", "attention_mask", "past_key_values"), HFCrossAttention),
    (("hidden_states", "head_mask", "output_attentions"), HFLegacySelfAttention),
)
"""Parameters in order; a host may lack the last ones."""
KNOWN = {
    *Q, *K, *V, *O, *HEADS, *HEAD_DIM, *SCALE, *DROPOUT, *EAGER,
    # choosing and calling the attention function
    "ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation", "is_causal", "training", "p",
    "isinstance", "logger", "warning_once", "super", "forward",
    # shapes
    "shape", "size", "view", "reshape", "transpose", "permute", "contiguous", "all_head_size", "transpose_for_scores",
    # caches
    "EncoderDecoderCache", "self_attention_cache", "cross_attention_cache", "update", "layer_idx", "is_updated", "get",
    "layers", "keys", "values",
    # attention written out
    "torch", "nn", "functional", "F", "matmul", "math", "sqrt", "softmax", "scaled_dot_product_attention", "__class__",
}  # fmt: skip


_FORWARDS: dict[type[Any], type[Decoupled] | None] = {}


def decoupled_forward(host: type[Any]) -> type[Decoupled] | None:
    """The forward of ours that stands in for a host's, or None if the host is not of this family."""
    if host not in _FORWARDS:
        _FORWARDS[host] = _recognise(host)
    return _FORWARDS[host]


def _recognise(host: type[Any]) -> type[Decoupled] | None:
    try:
        forward = forward_of(host)
        code, parameters = forward.__code__, inspect.signature(forward).parameters
    except (AttributeError, ValueError, TypeError):  # not written in Python
        return None
    names = set(code.co_names)
    if not all(first(part, names) for part in (Q, K, V)) or not names | set(code.co_freevars) <= KNOWN:
        return None
    arguments = tuple(
        name for name, p in parameters.items() if name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD
    )
    mixin = next((mixin for known, mixin in SIGNATURES if arguments and arguments == known[: len(arguments)]), None)
    if mixin is HFLegacySelfAttention:
        return mixin if "ALL_ATTENTION_FUNCTIONS" in names else HFEagerSelfAttention
    return mixin if "ALL_ATTENTION_FUNCTIONS" in names and _returns_pair(code) else None


def _returns_pair(code: CodeType) -> bool:
    """Whether every return statement returns a tuple that is written there: the output and the weights."""
    steps = [step.opname for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP")]
    ends = [before for before, step in pairwise(steps) if step.startswith("RETURN")]
    return bool(ends) and all(before == "BUILD_TUPLE" for before in ends)


def _splits(module: nn.Module) -> bool:
    """Whether the module's own forward projects and splits heads as this family does, as many keys as queries."""
    host = host_class(module)
    if decoupled_forward(host) is None:
        return False
    parts = describe(host)
    q, k, v = (getattr(module, name, None) for name in (parts.q, parts.k, parts.v))
    if not all(isinstance(p, nn.Module) for p in (q, k, v)) or not first(HEADS + HEAD_DIM, module.__dict__):
        return False
    widths = {getattr(p, "out_features", None) for p in (q, k)} - {None}  # a wrapper may lack them; it is refused later
    return len(widths) <= 1


class HFEncoderAdapter(Adapter):
    """One module with Q, K, V and O: AST, ViT, DeiT, DINOv2, CLIP, SigLIP, DistilBERT in transformers 5."""

    def matches(self, module: nn.Module) -> bool:
        return _splits(module) and describe(host_class(module)).o is not None

    def view(self, name: str, module: nn.Module) -> AttentionView:
        o = describe(host_class(module)).o
        assert o is not None
        return self._of(name, module, getattr(module, o))

    def _of(self, name: str, module: nn.Module, o: nn.Module) -> AttentionView:
        parts = describe(host_class(module))
        q, k, v = (getattr(module, part) for part in (parts.q, parts.k, parts.v))
        return self.of_linears(name, module, q=q, k=k, v=v, o=o, heads=_heads(module, q), scale=_scale(module))

    def decoupled_for(self, view: AttentionView) -> type[Decoupled] | None:
        return decoupled_forward(host_class(view.module))

    def query_gain(self, view: AttentionView, spec: AttentionSpec) -> float:
        if _scale(view.module) is not None or not self.expresses(view, spec):
            return 1.0
        return float(view.spec.scale * spec.qk_dim**0.5)

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:
        module = view.module
        values = {
            **dict.fromkeys(HEADS, spec.heads),
            **dict.fromkeys(HEAD_DIM, spec.qk_dim),
            "all_head_size": sum(spec.vo_dims),
        }
        for name in values.keys() & module.__dict__.keys():
            setattr(module, name, values[name])


class HFTwoModuleAdapter(HFEncoderAdapter):
    """Q, K and V in one module, O in its sibling: BERT, RoBERTa and ELECTRA in transformers 5; AST and ViT in 4."""

    def matches(self, module: nn.Module) -> bool:
        return self._halves(module) is not None

    def view(self, name: str, module: nn.Module) -> AttentionView:
        halves = self._halves(module)
        assert halves is not None
        return self._of(name, *halves)

    @staticmethod
    def _halves(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The module that splits heads and its sibling's ``dense``."""
        children = list(module.children())
        inner = [child for child in children if _splits(child) and describe(host_class(child)).o is None]
        outer = [child.dense for child in children if isinstance(getattr(child, "dense", None), nn.Module)]
        if len(children) != 2 or len(inner) != 1 or len(outer) != 1:
            return None
        return inner[0], outer[0]  # type: ignore[return-value]


def _heads(module: nn.Module, q: nn.Module) -> int:
    name = first(HEADS, module.__dict__)
    if name is not None:
        return int(getattr(module, name))
    dim = first(HEAD_DIM, module.__dict__)
    assert dim is not None
    return int(q.out_features) // int(getattr(module, dim))  # type: ignore[arg-type]


def _scale(module: nn.Module) -> float | None:
    """The host's explicit softmax scale, or None where its forward computes it from the head dim."""
    name = first(SCALE, forward_of(host_class(module)).__code__.co_names)
    name = name or first(SCALE, module.__dict__)
    return None if name is None else float(getattr(module, name))
