"""A decoupled forward made of stages, for attention of Hugging Face transformers that does more than encoders do.

project (self or cross) -> norm -> rotate -> cache -> attention function -> output. Which stages a host has is proposed
by its argument names and parts; that they do what the host does is proven by running both.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.attend import Kernel, ours
from ...nn.caches import check_cache
from ...nn.decoupled import forward_of
from ...nn.norms import normed
from ...nn.products import Plain
from ...nn.projection import Projected
from ...nn.rotary import of_all, rotated
from ...values.layout import HeadLayout, Projection
from ..calls import ANGLES, CACHES, MASKS, SOURCES
from ..names import first
from .forward import HFAttention, describe, parameters_of

NORMS = (
    ("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"),
    ("norm_q", "norm_k"), ("query_norm", "key_norm"),
)  # fmt: skip
"""What hosts call norms of queries and keys."""
PASSED = {
    "sliding_window": ("sliding_window",),
    "softcap": ("attn_logit_softcapping", "logit_softcapping", "softcap"),
}
"""What hosts hand to the attention function, and the attributes that they take it from."""


class Roles(NamedTuple):
    """What a host's arguments are, by name; None for what it does not take."""

    names: tuple[str, ...]
    """All of them, in order."""
    hidden: str
    source: str | None
    angles: str | None
    mask: str | None
    cache: str | None
    norms: tuple[str, str] | None
    """Attributes with the norms of queries and keys."""
    passed: tuple[tuple[str, str], ...]
    """Keywords of the attention function, and the attributes with their values."""
    upcasts: bool
    """Whether queries and keys are rotated in float32."""
    last: bool
    """Whether rotary tables may be of the last tokens alone."""
    hands_on: bool
    """Whether the attention function is told whether weights are asked for, and its answer is handed on."""


def roles_of(host: type[Any]) -> Roles:
    """Reads them from the host's forward."""
    names, code = parameters_of(host), forward_of(host).__code__
    words = {word for constant in code.co_consts if isinstance(constant, tuple) for word in constant}
    passed = ((key, first(attributes, code.co_names)) for key, attributes in PASSED.items() if key in words)
    return Roles(
        names,
        names[0],
        first(SOURCES, names),
        first(ANGLES, names),
        first(("attention_mask", *MASKS), names),
        first(CACHES, names),
        next((pair for pair in NORMS if pair[0] in code.co_names and pair[1] in code.co_names), None),
        tuple((key, name) for key, name in passed if name is not None),
        any("float" in used for used in _rotary_code(forward_of(host))),
        any("split" in used for used in _rotary_code(forward_of(host))),
        "output_attentions" in words,
    )


def _rotary_code(forward: Any) -> Iterator[tuple[str, ...]]:
    """The names that the rotary functions of a forward's module use."""
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if "rotary" in name and isinstance(function, FunctionType):
            yield function.__code__.co_names


def shares_keys(layout: HeadLayout) -> bool:
    """Whether an attention function can share keys among query heads by itself: equal heads in groups of one size."""
    return layout.uniform and len(set(layout.groups)) == 1


class HFStaged(HFAttention):
    """LLaMA, Qwen, Mistral, Gemma and other decoders; Whisper, BART, Wav2Vec2 and the like."""

    norm_first: ClassVar[bool] = True
    """Whether queries and keys are normalised before they are rotated."""
    by_pair: ClassVar[bool] = False
    """Whether rotary tables have an angle for each pair of neighbours in their first half."""
    _roles: ClassVar[Roles]

    @classmethod
    def facts(cls, host: type[Any]) -> dict[str, Any]:
        parts, roles = describe(host), roles_of(host)
        return {"_parts": parts._replace(asks=parts.asks and not roles.hands_on), "_roles": roles}

    @classmethod
    def tells_channels(cls, host: type[Any]) -> bool:
        roles = roles_of(host)
        return roles.angles is not None or roles.norms is not None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        roles = self._roles
        given = {**dict(zip(roles.names, args, strict=False)), **kwargs}
        x = given.pop(roles.hidden)
        source = given.pop(roles.source, None) if roles.source else None
        angles = given.pop(roles.angles, None) if roles.angles else None
        mask = given.pop(roles.mask, None) if roles.mask else None
        heads = self._keys_and_values(x, source, angles, self._cache((), given), given)
        for key, name in roles.passed:
            given[key] = getattr(self, name, None)
        return self._attend(self._repeated(heads), mask, **given)

    # stages

    def _keys_and_values(self, x: Tensor, source: Tensor | None, angles: Any, cache: Any, given: Any) -> Projected:
        """Queries, keys and values, from a cache too."""
        own, layer = cache, given.get("layer_idx", self.__dict__.get("layer_idx"))  # Zamba says where it runs
        paired = cache is not None and hasattr(cache, "cross_attention_cache")
        if paired:
            own = cache.self_attention_cache if source is None else cache.cross_attention_cache
        if source is not None and paired and cache.is_updated.get(layer):
            known = own.layers[layer]
            k, v = known.keys.squeeze(1), known.values.squeeze(1)
            return self._turned(self._projected(getattr(self, self._parts.q)(x), k, v), angles, keys=False)
        if source is None:
            heads = self._project(x, widen=False)
        else:
            parts = self._parts
            k, v = getattr(self, parts.k)(source), getattr(self, parts.v)(source)
            heads = self._projected(getattr(self, parts.q)(x), k, v)
        heads = self._turned(heads, angles)
        if own is None:
            return heads
        # one "head" as wide as all heads together: caches take any width, and need not know about ragged heads
        check_cache(own, heads.k, layer)
        k, v = own.update(heads.k.unsqueeze(1), heads.v.unsqueeze(1), layer, **self._told(given))
        if source is not None and paired:
            cache.is_updated[layer] = True
        return heads._replace(k=k.squeeze(1), v=v.squeeze(1))

    def _told(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a cache is told beside keys and values, in this version of transformers."""
        if self._roles.cache == "cache":
            return {"kwargs": given}
        return {"cache_kwargs": {"cache_position": given["cache_position"]}} if "cache_position" in given else {}

    def _projected(self, q: Tensor, k: Tensor, v: Tensor) -> Projected:
        layout = self.attnprune_state.layout
        return Projected(q, k, v, layout, layout)

    def _turned(self, heads: Projected, angles: Any, keys: bool = True) -> Projected:
        """Queries and keys, normalised and rotated."""
        if self.norm_first:
            heads = self._normed(heads, keys)
        if angles is not None:
            cos, sin = angles
            if self._roles.last:
                cos, sin = of_all(cos, sin, heads.q.shape[1])
            pairs = self.attnprune_state.pairs
            pairs = pairs._replace(by_pair=True) if self.by_pair else pairs
            q, k = (x.float() if self._roles.upcasts else x for x in (heads.q, heads.k))
            q, k = (x.to(heads.q.dtype) for x in rotated(q, k, cos, sin, heads.layout, pairs))
            heads = heads._replace(q=q, k=k) if keys else heads._replace(q=q)
        return heads if self.norm_first else self._normed(heads, keys)

    def _normed(self, heads: Projected, keys: bool) -> Projected:
        names, state = self._roles.norms, self.attnprune_state
        norms: list[Any] = [] if names is None else [getattr(self, name, None) for name in names]
        if not norms or None in norms:
            return heads
        channels = state.numbers["qk"]
        own = tuple(dict.fromkeys(head // state.groups for head in state.kept))
        found = []
        sides: tuple[tuple[Projection, Tensor, tuple[int, ...]], ...] = (
            ("q", heads.q, state.kept), ("k", heads.k, own)
        )  # fmt: skip
        for (side, x, numbers), norm in zip(sides, norms, strict=True):
            if side == "k" and not keys:
                found.append(x)
                continue
            found.append(normed(x, norm, heads.layout, side, (channels, numbers, state.dense_qk)))
        return heads._replace(q=found[0], k=found[1])

    def _finish(self, heads: Projected, kernel: Kernel, plain: Plain | None = None) -> tuple[Tensor, Tensor | None]:
        layout = heads.layout
        if not layout.grouped or (plain is not None and ours(heads.q)):
            return super()._finish(heads, kernel, plain)
        qk, vo = layout.qk[0], layout.vo[0]
        wide = max(qk, vo)  # fused kernels want equal dims: zeros change no product
        q, k, v = (
            F.pad(x.view(*x.shape[:-1], -1, dim), (0, wide - dim)).transpose(1, 2)
            for x, dim in ((heads.q, qk), (heads.k, qk), (heads.v, vo))
        )
        context, weights = kernel(q, k, v, layout.buckets[0])
        o = self._parts.o
        context = context[..., :vo].transpose(1, 2).flatten(2)
        return heads.output(context, None if o is None or heads.o is not None else getattr(self, o)), weights

    def _repeated(self, heads: Projected) -> Projected:
        """Keys and values of every query head, where the attention function cannot share them."""
        layout = heads.layout
        if not layout.grouped or shares_keys(layout):
            return heads
        key_of = layout.key_of
        flat = HeadLayout(tuple([layout.qk[key] for key in key_of]), tuple([layout.vo[key] for key in key_of]))
        k, v = _of_queries(heads.k, layout, "k"), _of_queries(heads.v, layout, "v")
        return heads._replace(k=k, v=v, layout=flat, own=flat)


class HFStagedNormLast(HFStaged):
    """The same where queries and keys are rotated first, then normalised."""

    norm_first = False


class HFStagedByPair(HFStaged):
    """The same where neighbours are rotated by tables that have an angle for each pair: GLM."""

    by_pair = True


def _of_queries(x: Tensor, layout: HeadLayout, side: Projection) -> Tensor:
    """``(batch, tokens, channels)`` of key heads, repeated for every query head, in stored order."""
    if layout.uniform and len(set(layout.groups)) == 1:
        dim = layout.sizes(side)[0]
        apart = x.view(*x.shape[:-1], len(layout.qk), 1, dim)
        return apart.expand(*apart.shape[:3], layout.groups[0], dim).flatten(2)
    parts = [x[..., slice(*layout.span(side, layout.key_of[head]))] for head in layout.order]
    return torch.cat(parts, dim=-1)
