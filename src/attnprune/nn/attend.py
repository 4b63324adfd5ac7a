"""Attention over heads of any dims, in the layout that the hardware runs best."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.layout import Bucket, HeadLayout, Kind
from .kept import kept
from .kernels import available, heads_attention
from .policy import ALIGNED, Group, arrange, at_run_time, forced
from .products import Plain, at_once, pays, products

Kernel = Callable[[Tensor, Tensor, Tensor, Bucket], tuple[Tensor, Tensor | None]]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: HeadLayout,
    kernel: Kernel,
    plain: Plain | None = None,
    quick: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over heads of any dims, in as few calls of ``kernel`` as pay off, or by plain matrix products.

    Args:
        q: ``(batch, queries, sum of qk_dims)``, channels in stored order.
        k: ``(batch, keys, sum of qk_dims)``.
        v: ``(batch, keys, sum of vo_dims)``.
        layout: the heads' dims and order.
        kernel: takes q, k ``(batch, heads, tokens, qk_dim)``, v ``(batch, heads, keys, vo_dim)`` and the bucket (of
            several, padded, if they run together); returns context ``(batch, heads, queries, vo_dim)`` and weights
            ``(batch, heads, queries, keys)`` or None.
        plain: what ``kernel`` computes, if it is plain scaled dot-product attention without dropout or weights;
            matrix products may then take its place.
        quick: whether it is known that this is eager inference on a CPU, in float32 or float64.

    Returns:
        Context ``(batch, queries, sum of vo_dims)`` in stored order, ready for O; weights in logical order, or None.

    >>> layout = HeadLayout(qk=(4, 2), vo=(3, 3))
    >>> q, k, v = torch.randn(1, 5, 6), torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    >>> context, _ = attend(q, k, v, layout, lambda q, k, v, _: (F.scaled_dot_product_attention(q, k, v), None))
    >>> context.shape
    torch.Size([1, 5, 6])
    """
    if plain is not None and quick and (found := at_once(q, k, v, layout, plain)) is not None:
        return found, None
    if plain is not None and ours(q):
        mask = plain.mask
        if mask is not None and mask.shape[1] > 1:
            mask = plain.rows(mask, Bucket(tuple(range(layout.heads)), 0, 0, 0, 0))
        return heads_attention(q, k, v, layout, scale=plain.scale, mask=mask, causal=plain.causal), None
    if plain is not None and at_run_time(layout, q, k):
        return _operator(q, k, v, layout, plain), None
    if plain is not None and pays(layout, q, k, v):
        return products(q, k, v, layout, plain), None
    groups = arrange(layout, q, k)
    if len(groups) == 1 and groups[0].whole:
        all_heads = groups[0].bucket
        count, qk, vo = len(all_heads.heads), all_heads.qk_dim, all_heads.vo_dim
        context, weight = kernel(_apart(q, count, qk), _apart(k, count, qk), _apart(v, count, vo), all_heads)
        return context.transpose(1, 2).flatten(2), weight
    contexts, weights = {}, []
    for one in groups:
        context, weight = kernel(_heads(q, one, "qk"), _heads(k, one, "qk"), _heads(v, one, "vo"), one.bucket)
        contexts.update(_cut(context, one, whole=len(groups) == 1))
        weights.append(weight)
    stored = [contexts[start] for start in sorted(contexts)]
    context = stored[0] if len(stored) == 1 else torch.cat(stored, dim=-1)
    present = [weight for weight in weights if weight is not None]
    if len(present) != len(weights):
        return context, None
    order = [head for one in groups for head in one.bucket.heads]
    rows = present[0] if len(present) == 1 else torch.cat(present, dim=1)
    return context, rows if order == sorted(order) else rows[:, sorted(range(len(order)), key=order.__getitem__)]


def ours(q: Tensor) -> bool:
    """Whether plain attention of these queries is asked to run by our kernel, and can."""
    return forced() == "kernel" and available(q.device)


def _operator(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, plain: Plain) -> Tensor:
    """One node of a compiled graph, which arranges heads when it runs."""
    dims = [size for part in layout.buckets for _ in part.heads for size in (part.qk_dim, part.vo_dim)]
    mask = plain.mask
    if mask is not None and mask.shape[1] > 1:
        mask = torch.cat([plain.rows(mask, bucket) for bucket in layout.buckets], dim=1)
    context: Tensor = _attention(q, k, v, dims, mask, plain.causal, plain.scale)
    return context


def _stored(
    q: Tensor, k: Tensor, v: Tensor, dims: list[int], mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """:func:`attend` without a host: dims of stored heads, qk and vo in turns; a mask's rows are stored heads' too."""
    layout = HeadLayout(tuple(dims[::2]), tuple(dims[1::2]))

    def rows(mask: Tensor, bucket: Bucket) -> Tensor:
        return mask if mask.shape[1] == 1 else mask[:, bucket.heads[0] : bucket.heads[-1] + 1]

    def kernel(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> tuple[Tensor, None]:
        some = None if mask is None else rows(mask, bucket)
        return F.scaled_dot_product_attention(q, k, v, some, is_causal=causal, scale=scale), None

    return attend(q, k, v, layout, kernel, Plain(scale, mask, causal, rows))[0]


_attention = torch.library.custom_op(
    "attnprune::attention",
    _stored,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] dims, Tensor? mask, bool causal, float scale) -> Tensor",
)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


FEW = 512
"""Tokens of a batch up to which heads of several dims are padded by one gather instead of part by part."""

Dims = tuple[tuple[int, int, int], ...]


def _heads(x: Tensor, group: Group, kind: Kind) -> Tensor:
    """``(batch, heads, tokens, padded dim)`` from ``(batch, tokens, channels)``; a view where nothing is padded."""
    dims = group.dims(kind)
    padded = group.bucket.qk_dim if kind == "qk" else group.bucket.vo_dim
    if len(dims) > 1 and _gathers(x):
        index = _places(dims, padded, x.shape[-1], x.device)[0]
        wide = F.pad(x, (0, 1)).index_select(-1, index)  # the last channel is the zero that padding takes
        return wide.view(*x.shape[:-1], -1, padded).transpose(1, 2)
    found = []
    for start, heads, dim in dims:
        part = x[..., start : start + heads * dim].view(*x.shape[:-1], heads, dim)
        part = part if dim == padded else F.pad(part, (0, padded - dim))
        found.append(_aligned(part.transpose(1, 2), 0 if dim < padded else start))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _apart(x: Tensor, heads: int, dim: int) -> Tensor:
    """``(batch, heads, tokens, dim)`` from ``(batch, tokens, heads x dim)``."""
    return _aligned(x.view(*x.shape[:-1], heads, dim).transpose(1, 2), 0)


def _aligned(part: Tensor, start: int) -> Tensor:
    """A view as it is, or a copy where a kernel of CUDA would read across borders of 16 bytes, and fail."""
    border = ALIGNED.get(part.device.type)
    if border is None:
        return part
    _, heads, tokens, _ = part.stride()
    size = part.dtype.itemsize
    off = not torch.compiler.is_compiling() and part.data_ptr() % border
    return (
        part.contiguous() if off or start * size % border or heads * size % border or tokens * size % border else part
    )


def _cut(context: Tensor, group: Group, whole: bool) -> dict[int, Tensor]:
    """``(batch, tokens, channels)`` without padding, of every part by where it starts; of all together if whole."""
    dims = group.dims("vo")
    if whole and len(dims) > 1 and _gathers(context.transpose(1, 2)):
        flat = context.transpose(1, 2).flatten(2)
        return {0: flat.index_select(-1, _places(dims, group.bucket.vo_dim, 0, context.device)[1])}
    parts = torch.split(context, [heads for _, heads, _ in dims], dim=1)
    return {start: x[..., :dim].transpose(1, 2).flatten(2) for x, (start, _, dim) in zip(parts, dims, strict=True)}


def _gathers(x: Tensor) -> bool:
    """Whether calls cost more than what they move: for few tokens ``(batch, tokens, ...)``, and where one call has
    all heads on CUDA."""
    few = x.device.type == "cuda" or x.shape[0] * x.shape[1] <= FEW
    return not torch.compiler.is_compiling() and few


@kept
def _places(dims: Dims, padded: int, zero: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where padded channels come from (``zero`` for zeros), and where the real ones are among them."""
    to: list[int] = []
    back: list[int] = []
    for start, heads, dim in dims:
        for first in range(start, start + heads * dim, dim):
            back += range(len(to), len(to) + dim)
            to += [*range(first, first + dim), *[zero] * (padded - dim)]
    return torch.tensor(to, device=device), torch.tensor(back, device=device)
