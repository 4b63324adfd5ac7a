"""Attention with Q, K, V and O as modules of their own, above all in Hugging Face transformers.

A class is proposed by the names of its projections and of its number of heads. What its forward does is not read but
run (:mod:`attnprune.families.proof`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...nn import Decoupled, host_class
from ...nn.decoupled import forward_of
from ...nn.rotary import Turning, of_all, pairs_of
from ...values.spec import AttentionSpec
from ..base import Adapter, AttentionView
from ..linears import is_linear, size_of
from ..names import HEAD_DIM, HEADS, KEY_HEADS, SCALE, SHARES, finite, first, heads_of, output_of, parts_of, tells_heads
from ..states import numbers_known
from .forward import (
    HFClosedSelfAttention,
    HFCrossAttention,
    HFEagerSelfAttention,
    HFLegacySelfAttention,
    HFSelfAttention,
    describe,
    parameters_of,
)
from .staged import HFStaged, HFStagedByPair, HFStagedNormLast, roles_of, shares_keys


class HFEncoderAdapter(Adapter):
    """One module with Q, K, V and O: AST, ViT, DeiT, DINOv2, CLIP, SigLIP, DistilBERT in transformers 5, and others."""

    def matches(self, module: nn.Module) -> bool:
        return _splits(module) and output_of(module) is not None

    def view(self, name: str, module: nn.Module) -> AttentionView:
        return self._of(name, module, output_of(module))

    def _of(self, name: str, module: nn.Module, o: nn.Module | None) -> AttentionView:
        parts = {**parts_of(module), "o": o}
        channels = [size_of(parts[p])[p == "o"] for p in ("q", "o") if is_linear(parts.get(p))]
        return self.of_linears(name, module, heads=heads_of(module, _queries(*channels)), scale=_scale(module), **parts)

    def decoupled_for(self, view: AttentionView) -> Sequence[type[Decoupled]]:
        host = host_class(view.module)
        if view.joint:
            return ()
        try:
            parts, names = describe(host), parameters_of(host)
        except (TypeError, AttributeError, ValueError):  # projections under other names; not written in Python
            return ()
        if parts.functions is None:
            return (HFEagerSelfAttention,)
        roles = roles_of(host)
        if roles.angles or roles.norms or roles.source == "key_value_states" or view.spec.layout.grouped:
            last, pairs = (HFStagedNormLast,) * bool(roles.norms), (HFStagedByPair,) * bool(roles.angles)
            return (HFStaged, *last, *pairs)
        if "encoder_hidden_states" in names:
            return (HFCrossAttention,)
        if "head_mask" in names:
            return (HFLegacySelfAttention,)
        named = (HFStaged,) if len(names) > 1 and names[1] != "attention_mask" else ()  # its order is another
        return (HFSelfAttention, HFClosedSelfAttention, *named)

    def turning(self, view: AttentionView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Turning | None:
        mixin, state = view.mixin, view.state
        if not any(view.spec.rotary_dims) or mixin is None or not issubclass(mixin, HFStaged):
            return None
        roles = roles_of(host_class(view.module))
        if roles.norms and any(getattr(view.module, name, None) is not None for name in roles.norms):
            return None
        given = {**dict(zip(roles.names, args, strict=False)), **kwargs}
        tables = given.get(roles.angles or "")
        if not isinstance(tables, tuple) or len(tables) != 2 or not all(isinstance(x, Tensor) for x in tables):
            return None
        pairs = None if state is None else state.pairs
        if pairs is None:
            numbers = numbers_known(state, view.spec)["qk"]
            pairs = pairs_of(view.spec.rotary, max(view.spec.rotary_dims), view.spec.rotary_dims, numbers)
        cos, sin = (table if table.dim() > 2 else table[None] for table in tables)  # one table for the whole batch
        if roles.last:
            cos, sin = of_all(cos, sin, given[roles.hidden].shape[1])
        return Turning(cos, sin, pairs._replace(by_pair=mixin.by_pair))

    def query_gain(self, view: AttentionView, spec: AttentionSpec) -> float:
        if _scale(view.module) is not None or not self.expresses(view, spec):
            return 1.0
        return float(view.spec.scale * spec.qk_dim**0.5)

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:
        module = view.module
        values = {
            **dict.fromkeys(HEADS, spec.heads),
            **dict.fromkeys(KEY_HEADS, spec.kv_heads),
            **dict.fromkeys(SHARES, spec.groups[0] if shares_keys(spec.layout) else 1),
            **dict.fromkeys(HEAD_DIM, spec.qk_dim),
            **dict.fromkeys(("all_head_size", "inner_dim"), spec.layout.channels("o")),
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
        """The module that splits heads, and O: its sibling's ``dense``, or a sibling itself."""
        if not 2 <= len(module._modules) <= 4:
            return None
        children = list(module.children())
        inner = [child for child in children if _splits(child) and output_of(child) is None]
        outer = [child.dense for child in children if is_linear(getattr(child, "dense", None))]
        outer += [child for child in children if is_linear(child) and child is output_of(module)]
        if len(inner) != 1 or len(outer) != 1:
            return None
        return inner[0], outer[0]  # type: ignore[return-value]


def _queries(first: int = 0, read: int = 0) -> int:
    """Channels of Q, whose projection may also hold a gate of everything that O reads."""
    return read if first == 2 * read else first


def _splits(module: nn.Module) -> bool:
    """Whether a module has projections for queries, keys and values, and a number of heads."""
    return bool(parts_of(module)) and tells_heads(module)


def _scale(module: nn.Module) -> float | None:
    """The host's explicit softmax scale, or None where its forward computes it from the head dim."""
    try:
        used = forward_of(host_class(module)).__code__.co_names
    except AttributeError:  # not written in Python
        used = ()
    name = first(SCALE, used) or first(SCALE, module.__dict__)
    value = None if name is None else getattr(module, name, None)
    return finite(value)
