"""What every decoupled forward shares: attention by buckets of like heads, and classes that carry it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import Bucket, HeadLayout, Kind

Kernel = Callable[[Tensor, Tensor, Tensor, Bucket], tuple[Tensor, Tensor | None]]


class State(NamedTuple):
    """What a decoupled module knows beyond its host's attributes."""

    layout: HeadLayout
    """Channels per head, and where they are stored."""
    scale: float
    """The dense model's softmax scale."""
    dense_heads: int
    """Number of heads before any pruning."""
    kept: tuple[int, ...]
    """For every head, its number before any pruning: picks the rows of masks made for the dense model."""


class Decoupled(nn.Module):
    """Base of the classes that pruned modules get: a forward of ours in front of the host's own class.

    The module object stays the same; ``isinstance`` with the host class stays true; copies and pickles work.
    """

    attnprune_state: State

    @classmethod
    def facts(cls, host: type[Any]) -> dict[str, Any]:
        """Class attributes that the forward needs to know about the host class."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, host = type(self).__bases__
        return _blank, (mixin, host), self.__dict__

    def head_rows(self, mask: Tensor, bucket: Bucket) -> Tensor:
        """The rows of a mask ``(batch, heads, queries, keys)`` that belong to a bucket's heads.

        One row serves all heads; a mask may have a row for every present head or for every head of the dense model.
        """
        state = self.attnprune_state
        rows = mask.shape[1]
        if rows == 1:
            return mask
        if rows == len(state.kept):
            heads = bucket.heads
        elif rows == state.dense_heads:
            heads = tuple(state.kept[head] for head in bucket.heads)
        else:
            raise RuntimeError(
                f"The mask has rows for {rows} heads, but should have 1, {len(state.kept)} (the heads that are left) "
                f"or {state.dense_heads} (the heads before pruning)."
            )
        return mask if heads == tuple(range(rows)) else mask[:, list(heads)]


def _blank(mixin: type[Decoupled], host: type[nn.Module]) -> Any:
    cls: Any = decoupled_class(mixin, host)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def decoupled_class(mixin: type[Decoupled], host: type[nn.Module]) -> type[Any]:
    """The host class with the mixin's forward in front of its own; one and the same for the same two."""
    key = (mixin, host)
    if key not in _CLASSES:
        space = {"__module__": host.__module__, "__doc__": host.__doc__, **mixin.facts(host)}
        _CLASSES[key] = type(f"Pruned{host.__name__}", (mixin, host), space)
    return _CLASSES[key]


def host_class(module: nn.Module) -> type[Any]:
    """The class that a module had before it was pruned."""
    return type(module).__bases__[1] if isinstance(module, Decoupled) else type(module)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
    """Attention over heads of any dims, in as few calls of ``kernel`` as pay off (:func:`arrange`).

    Args:
        q: ``(batch, queries, sum of qk_dims)``, channels in stored order.
        k: ``(batch, keys, sum of qk_dims)``.
        v: ``(batch, keys, sum of vo_dims)``.
        layout: the heads' dims and order.
        kernel: takes q, k ``(batch, heads, tokens, qk_dim)``, v ``(batch, heads, keys, vo_dim)`` and the bucket (of
            several, padded, if they run together); returns context ``(batch, heads, queries, vo_dim)`` and weights
            ``(batch, heads, queries, keys)`` or None.

    Returns:
        Context ``(batch, queries, sum of vo_dims)`` in stored order, ready for O; weights in logical order, or None.

    >>> layout = HeadLayout(qk=(4, 2), vo=(3, 3))
    >>> q, k, v = torch.randn(1, 5, 6), torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    >>> context, _ = attend(q, k, v, layout, lambda q, k, v, _: (F.scaled_dot_product_attention(q, k, v), None))
    >>> context.shape
    torch.Size([1, 5, 6])
    """
    contexts, weights = [], []
    for group in arrange(layout, q, k):
        whole = group.bucket
        qk, vo = slice(whole.qk_start, group.qk_stop), slice(whole.vo_start, group.vo_stop)
        context, weight = kernel(
            _heads(q[..., qk], group, "qk"), _heads(k[..., qk], group, "qk"), _heads(v[..., vo], group, "vo"), whole
        )
        contexts += _cut(context, group)
        weights.append(weight)
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=-1)
    present = [weight for weight in weights if weight is not None]
    if len(present) != len(weights):
        return context, None
    stored = present[0] if len(present) == 1 else torch.cat(present, dim=1)
    return context, stored if layout.uniform else stored[:, list(layout.inverse)]


class Group(NamedTuple):
    """Neighbouring buckets that run as one product, their heads padded with zeros to common dims."""

    parts: tuple[Bucket, ...]
    bucket: Bucket
    """All heads of the parts; its dims are the padded ones."""

    @property
    def qk_stop(self) -> int:
        return self.parts[-1].qk_stop

    @property
    def vo_stop(self) -> int:
        return self.parts[-1].vo_stop


CALL = 3_000_000
"""Multiply-adds that one more call of an attention kernel is worth: what its overhead takes on a CPU core or two."""
FEW = 512
"""Tokens of a batch up to which heads of several dims are padded by one gather instead of part by part."""


def arrange(layout: HeadLayout, q: Tensor, k: Tensor) -> list[Group]:
    """How to run heads of different dims: which buckets together, and padded to what.

    Zeros in queries and keys add nothing to a logit, and zeros in values give zeros that are cut off again, so every
    choice computes the same. The smaller of qk and vo is padded to the larger, as fused kernels want equal dims. Heads
    of different dims run in one call, unless that would do much more work than a call for each bucket. Compiled and
    exported models choose without regard to the number of tokens, so that it may vary.
    """
    buckets = layout.buckets
    if not _PADS[-1]:
        return [Group((bucket,), bucket) for bucket in buckets]
    if len(buckets) == 1 and buckets[0].qk_dim == buckets[0].vo_dim:
        return [Group(buckets, buckets[0])]
    if len(buckets) > 1:
        heads = len(layout.qk)
        own = sum(layout.qk) + sum(layout.vo)
        extra = 2 * heads * max(*layout.qk, *layout.vo) - own
        few = not torch.compiler.is_compiling() and q.shape[0] * q.shape[1] * k.shape[1] * extra <= CALL * len(buckets)
        if few or extra <= own / 2:
            return [_group(buckets)]
    return [_group((bucket,)) for bucket in buckets]


_PADS = [True]


@contextmanager
def unpadded() -> Iterator[None]:
    """Inside the block nothing is padded: what runs is what the shapes ask for, for counting it."""
    _PADS.append(False)
    try:
        yield
    finally:
        _PADS.pop()


def _group(parts: tuple[Bucket, ...]) -> Group:
    dim = max(max(part.qk_dim, part.vo_dim) for part in parts)
    heads = tuple(head for part in parts for head in part.heads)
    return Group(parts, Bucket(heads, dim, dim, parts[0].qk_start, parts[0].vo_start))


def _dims(group: Group, kind: Kind) -> tuple[tuple[int, int], ...]:
    """Number of heads and dim of every part."""
    return tuple((len(part.heads), part.qk_dim if kind == "qk" else part.vo_dim) for part in group.parts)


def _heads(x: Tensor, group: Group, kind: Kind) -> Tensor:
    """``(batch, heads, tokens, padded dim)`` from ``(batch, tokens, channels)``; a view where nothing is padded."""
    dims = _dims(group, kind)
    padded = group.bucket.qk_dim if kind == "qk" else group.bucket.vo_dim
    if len(dims) > 1 and _gathers(x):
        index = _places(dims, padded, x.device)[0]
        wide = F.pad(x, (0, 1)).index_select(-1, index)  # the last channel is the zero that padding takes
        return wide.view(*x.shape[:-1], -1, padded).transpose(1, 2)
    found, start = [], 0
    for heads, dim in dims:
        stop = start + heads * dim
        part = x[..., start:stop].view(*x.shape[:-1], heads, dim).transpose(1, 2)
        found.append(part if dim == padded else F.pad(part, (0, padded - dim)))
        start = stop
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _cut(context: Tensor, group: Group) -> list[Tensor]:
    """``(batch, tokens, channels)`` of every part, or of all together, without the padding."""
    dims = _dims(group, "vo")
    if len(dims) > 1 and _gathers(context.transpose(1, 2)):
        return [
            context.transpose(1, 2).flatten(2).index_select(-1, _places(dims, group.bucket.vo_dim, context.device)[1])
        ]
    parts = torch.split(context, [heads for heads, _ in dims], dim=1)
    return [x[..., :dim].transpose(1, 2).flatten(2) for x, (_, dim) in zip(parts, dims, strict=True)]


def _gathers(x: Tensor) -> bool:
    """Whether so few tokens ``(batch, tokens, ...)`` are there that calls cost more than what they move."""
    return not torch.compiler.is_compiling() and x.shape[0] * x.shape[1] <= FEW


@lru_cache(maxsize=4096)
def _places(dims: tuple[tuple[int, int], ...], padded: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where padded channels come from (one past the last for zeros), and where the real ones are among them."""
    total = sum(heads * dim for heads, dim in dims)
    to: list[int] = []
    back: list[int] = []
    start = 0
    for heads, dim in dims:
        for _ in range(heads):
            back += range(len(to), len(to) + dim)
            to += [*range(start, start + dim), *[total] * (padded - dim)]
            start += dim
    with torch.inference_mode(False):
        return torch.tensor(to, device=device), torch.tensor(back, device=device)
