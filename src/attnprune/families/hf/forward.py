"""Decoupled forwards for attention modules of Hugging Face transformers.

They call the attention function that the host would call (eager, sdpa, flex, flash), with the host's own keyword
arguments, once per bucket of like heads. Nothing here imports transformers: the registry of attention functions and
the eager function are read from the namespace of the host's own forward.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attend import Kernel, attend
from ...nn.caches import check_cache
from ...nn.decoupled import Decoupled, forward_of
from ...nn.frozen import frozen
from ...nn.products import Plain, possible
from ...nn.projection import Projected, project
from ...values.layout import Bucket
from ..calls import CACHES
from ..names import K, O, Q, V, first


class Host(NamedTuple):
    """How a host class names its parts."""

    q: str
    k: str
    v: str
    o: str | None
    """None where O lives in a sibling module."""
    dropout: str | None
    """Attribute with the attention dropout: a probability or an nn.Dropout."""
    eager: Any
    """The host's eager attention function, or None where its forward computes attention itself."""
    functions: Any
    """The registry of attention functions, or None."""
    fused: bool
    """Whether the forward itself calls the fused kernel."""
    cache: str | None
    """The argument with the cache of keys and values, by whatever name."""
    asks: bool
    """Whether attention weights have to be asked for by an argument."""
    steps_aside: bool
    """Whether the fused function makes way for the eager one where they are."""
    opens: bool
    """Whether the attention function gets what the forward has no name for."""


DROPOUT = ("attention_dropout", "dropout_prob", "attention_probs_dropout_prob", "dropout")
EAGER = ("eager_attention_forward", "simple_eager_attention_forward")


def parameters_of(host: type[Any]) -> tuple[str, ...]:
    """The names of what a host's forward takes, but self and what is open."""
    parameters = inspect.signature(forward_of(host)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)[1:]


def describe(host: type[Any]) -> Host:
    """Reads from a host's forward how it names its parts."""
    forward = forward_of(host)
    names, space = forward.__code__.co_names, forward.__globals__
    q, k, v = first(Q, names), first(K, names), first(V, names)
    if q is None or k is None or v is None:
        raise TypeError(f"{host.__name__} is not of this family")
    eager = first(EAGER, names)
    parameters = inspect.signature(forward).parameters.values()
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    asks = "output_attentions" in parameters_of(host) and _reads(forward, "output_attentions")
    return Host(
        q,
        k,
        v,
        first(O, names),
        first(DROPOUT, names),
        space.get(eager),
        space.get("ALL_ATTENTION_FUNCTIONS"),
        "scaled_dot_product_attention" in names,
        first(CACHES, parameters_of(host)),
        asks,
        asks and "sdpa" in forward.__code__.co_consts,
        rest is not None and _reads(forward, rest),
    )


def _reads(forward: Any, argument: str) -> bool:
    """Whether a function's code does anything with an argument."""
    names = [one.argval for one in dis.get_instructions(forward) if one.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))]
    return any(argument in (name if isinstance(name, tuple) else (name,)) for name in names)  # from 3.13 on, pairs


class HFAttention(Decoupled):
    """What the decoupled forwards of this family share."""

    training: bool
    config: Any
    layer_idx: int

    _parts: ClassVar[Host]

    @classmethod
    def facts(cls, host: type[Any]) -> dict[str, Any]:
        return {"_parts": describe(host)}

    def _dropout(self) -> float:
        name = self._parts.dropout
        if name is None or not self.training:
            return 0.0
        value: Any = getattr(self, name)
        return float(value.p if isinstance(value, nn.Dropout) else value)

    def _cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache, taken out of what else the forward was called with; under the name that it had before too."""
        found = args[0] if args else None
        for name in CACHES:
            given = kwargs.pop(name, None)
            found = given if found is None else found
        return found

    def _project(self, x: Tensor, widen: bool = True) -> Projected:
        ready = frozen(self, x, widen)
        if ready is not None:
            return ready
        parts = self._parts
        linears = [getattr(self, name) for name in (parts.q, parts.k, parts.v)]
        return project(linears, x, self.attnprune_state, widen=widen)

    def _attend(self, heads: Projected, mask: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        parts = self._parts
        implementation = self.config._attn_implementation
        asked = kwargs.pop("output_attentions", None) if parts.asks else True
        if parts.steps_aside and asked and implementation == "sdpa":
            implementation = "eager"
        kwargs = kwargs if parts.opens else {}
        function = parts.eager if implementation in (None, "eager") else parts.functions[implementation]
        dropout, state = self._dropout(), self.attnprune_state

        def kernel(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> tuple[Tensor, Tensor | None]:
            rows = self.head_rows(mask, bucket) if isinstance(mask, Tensor) and mask.dim() == 4 else mask
            context, weights = function(self, q, k, v, rows, dropout=dropout, scaling=state.scale, **kwargs)
            return context.transpose(1, 2), weights

        plain = None
        if (
            dropout == 0
            and implementation == "sdpa"
            and (heads.quick or possible(heads.q))
            and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4))
        ):
            plain = self._plain(function, heads.q, mask, kwargs)
        context, weights = self._finish(heads, kernel, plain)
        return context, weights if asked else None

    def _plain(self, function: Any, q: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Plain | None:
        """What transformers' own fused attention function computes for these arguments, where it is nothing else."""
        extra = any(kwargs.get(key) is not None for key in ("position_bias", "cache", "softcap"))
        if extra or getattr(function, "__module__", "") != "transformers.integrations.sdpa_attention":
            return None
        causal = kwargs.get("is_causal")
        causal = getattr(self, "is_causal", True) if causal is None else causal
        return Plain(self.attnprune_state.scale, mask, bool(causal and mask is None and q.shape[1] > 1), self.head_rows)

    def _finish(self, heads: Projected, kernel: Kernel, plain: Plain | None = None) -> tuple[Tensor, Tensor | None]:
        context, weights = attend(*heads[:4], kernel, plain, heads.quick)
        o = self._parts.o
        return heads.output(context, None if o is None or heads.o is not None else getattr(self, o)), weights


class HFSelfAttention(HFAttention):
    """Self-attention: AST, ViT, DeiT, DINOv2, CLIP, SigLIP, BERT, RoBERTa and the like in transformers 5."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        cache = self._cache(args, kwargs)
        heads = self._project(hidden_states, widen=cache is None)
        if cache is not None:
            # one "head" as wide as all heads together: caches take any width, and need not know about ragged heads
            cache = getattr(cache, "self_attention_cache", cache)
            more = {"kwargs": kwargs} if self._parts.cache == "cache" else {}
            check_cache(cache, heads.k, self.layer_idx)
            k, v = cache.update(heads.k.unsqueeze(1), heads.v.unsqueeze(1), self.layer_idx, **more)
            heads = heads._replace(k=k.squeeze(1), v=v.squeeze(1))
        return self._attend(heads, attention_mask, **kwargs)


class HFClosedSelfAttention(HFSelfAttention):
    """The same where the host takes further arguments and does not hand them on: SigLIP's encoder in transformers 5."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden_states, attention_mask, self._cache(args, kwargs))


class HFCrossAttention(HFAttention):
    """Cross-attention: the decoder halves of BERT and RoBERTa in transformers 5."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        past_key_values = self._cache(args, kwargs)
        if encoder_hidden_states is None and past_key_values is None:
            encoder_hidden_states = hidden_states  # hosts without a cache attend to themselves then
        parts = self._parts
        q = getattr(self, parts.q)(hidden_states)
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            k, v = layer.keys.squeeze(1), layer.values.squeeze(1)
        else:
            k, v = getattr(self, parts.k)(encoder_hidden_states), getattr(self, parts.v)(encoder_hidden_states)
            if past_key_values is not None:
                cache = past_key_values.cross_attention_cache
                k, v = (x.squeeze(1) for x in cache.update(k.unsqueeze(1), v.unsqueeze(1), self.layer_idx))
                past_key_values.is_updated[self.layer_idx] = True
        layout = self.attnprune_state.layout
        return self._attend(Projected(q, k, v, layout, layout), attention_mask, **kwargs)


class HFLegacySelfAttention(HFAttention):
    """AST and ViT in transformers 4.50 to 4.57: a head mask in place of an attention mask."""

    def forward(
        self, hidden_states: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor | None, ...]:
        found = self._attend(self._project(hidden_states), head_mask, output_attentions=output_attentions)
        return found if output_attentions or not self._parts.asks else found[:1]


class HFEagerSelfAttention(HFAttention):
    """AST and ViT in transformers 4.48 and 4.49, whose forward computes attention itself."""

    def forward(
        self, hidden_states: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor | None, ...]:
        heads = self._project(hidden_states)
        dropout, scale = self._dropout(), self.attnprune_state.scale
        fused = self._parts.fused and head_mask is None and not output_attentions

        def kernel(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> tuple[Tensor, Tensor | None]:
            if fused:
                return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale), None
            weights = F.dropout((q @ k.transpose(-1, -2) * scale).softmax(-1), p=dropout, training=self.training)
            if head_mask is not None:
                weights = weights * self.head_rows(head_mask, bucket)
            return weights @ v, weights

        plain = Plain(scale, None, False, self.head_rows) if fused and dropout == 0 else None
        context, weights = self._finish(heads, kernel, plain)
        return (context, weights) if output_attentions or fused else (context,)
