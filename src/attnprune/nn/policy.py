"""How heads of different dims run: which layouts there are, and which heads share a call of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ..errors import OptionError
from ..values.layout import PROJECTIONS, Bucket, HeadLayout, Kind
from .attempt import undone
from .kept import kept

Execution = Literal["auto", "separate", "buckets", "groups", "padded", "products", "kernel"]
"""Ways to run heads of any dims.

``"separate"``: a kernel call per head shape, dims as they are. ``"buckets"``: the same, the smaller of qk, vo padded.
``"groups"``: heads of like dims share a padded call. ``"padded"``: all heads in one call. ``"products"``: plain matrix
products, every head at its own dims (:mod:`attnprune.nn.products`). ``"kernel"``: one launch of our kernel for all
heads at their own dims (:mod:`attnprune.nn.kernels`), on CUDA with Triton; ``"groups"`` where it does not run.
``"auto"``: what pays for the shapes; never ``"kernel"``, which was not yet timed on a GPU.
"""

CALL = {"cpu": 3_000_000, "other": 1_000_000_000}
"""Multiply-adds that one more call of an attention kernel is worth: what its overhead takes, by kind of device."""
SMALL_CALL = 1_000_000
"""The same for a bucket of heads by plain products on a CPU."""
TILE = 64
"""Channels that kernels of CUDA work on at once: fewer take as long."""
BUSY = 1 << 24
"""Pairs of tokens (batch x queries x keys) from which on a number of tiles is worth a call of its own on CUDA."""
ALIGNED = {"cuda": 16}
"""Bytes of which a padded head's row is a multiple, by kind of device (1 elsewhere): 8 channels in half precision, 4 in
float32. Other rows are padded by the flash kernel itself, in copies, and leave the memory-efficient one, which takes
masks, for plain products."""
NOMINAL = 512 * 512
"""Pairs of tokens that compiled and exported models are arranged for, so that their number may vary."""
KNOWN = torch.__version__ >= "2.10"
"""Whether compiled code may ask for a number of tokens without fixing it."""

_FORCED: ContextVar[Execution] = ContextVar("attnprune.execution", default="auto")
_LATEST: list[Execution] = ["auto"]
"""What any thread forced last: a compiler can watch this, and makes code anew when it changes."""

Function = TypeVar("Function", bound=Callable[..., Any])


def asked_once(function: Function) -> Function:
    """Marks a function that a compiler calls while it compiles, and takes the result for a constant.

    What ``torch.compiler.assume_constant_result`` does; that loads the compiler, which plain eager code never needs.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def execution(how: Execution) -> Iterator[None]:
    """Inside the block, decoupled modules run in this layout instead of the one that shapes suggest.

    Every layout computes the same. ``"products"`` and ``"kernel"`` are for what is plain scaled dot-product attention;
    where attention weights are asked for, or a mask of another kind, modules run as with ``"auto"``.

    >>> from torch import nn
    >>> import attnprune
    >>> model, x = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    >>> report = attnprune.prune_attention(model, {"qk": 0.5})
    >>> with execution("products"):
    ...     y = model(x)
    >>> torch.allclose(y, model(x), atol=1e-6)
    True

    Raises:
        OptionError: no such layout.
    """
    if how not in get_args(Execution):
        raise OptionError("execution", f"one of {', '.join(get_args(Execution))}", repr(how), "pick one of them")
    with undone() as undo:
        undo.append(partial(_force, _FORCED.get()))
        _force(how)
        yield


def _force(how: Execution) -> None:
    _FORCED.set(how)
    _LATEST[0] = how


def forced() -> Execution:
    """The layout of the innermost :func:`execution` around this thread or task."""
    return _forced(_LATEST[0])


@asked_once
def _forced(latest: Execution) -> Execution:
    return _FORCED.get()


class Group(NamedTuple):
    """Buckets that run as one product, their heads padded with zeros to common dims."""

    parts: tuple[Bucket, ...]
    """In stored order."""
    bucket: Bucket
    """All heads of the parts; its dims are the padded ones."""

    @property
    def whole(self) -> bool:
        """Whether it is one bucket, and nothing is padded."""
        return len(self.parts) == 1 and self.parts[0][1:3] == self.bucket[1:3]

    def dims(self, kind: Kind) -> tuple[tuple[int, int, int], ...]:
        """Of every part: where its channels start, its number of heads, and their dim."""
        if kind == "qk":
            return tuple((part.qk_start, len(part.heads), part.qk_dim) for part in self.parts)
        return tuple((part.vo_start, len(part.heads), part.vo_dim) for part in self.parts)


def group(parts: Sequence[Bucket], multiple: int = 1, even: bool = True) -> Group:
    """Buckets padded to the widest of their dims, up to a multiple; to that of qk and vo together if even."""
    stored = tuple(sorted(parts, key=lambda part: part.qk_start))
    qk, vo = widths(stored, multiple, even)
    heads = tuple(head for part in stored for head in part.heads)
    return Group(stored, Bucket(heads, qk, vo, stored[0].qk_start, stored[0].vo_start))


def widths(parts: Sequence[Bucket], multiple: int, even: bool) -> tuple[int, int]:
    """The qk and vo dims of :func:`group`."""
    qk, vo = (-(-max(dims) // multiple) * multiple for dims in zip(*(part[1:3] for part in parts), strict=True))
    return (max(qk, vo),) * 2 if even else (qk, vo)


def _width(part: Bucket, multiple: int) -> int:
    return -(-max(part.qk_dim, part.vo_dim) // multiple) * multiple


def arrange(layout: HeadLayout, q: Tensor, k: Tensor) -> list[Group]:
    """Which buckets of heads share a call of a fused kernel, and padded to what.

    Zeros in queries and keys add nothing to a logit, and zeros in values give zeros that are cut off again, so every
    choice computes the same. The smaller of qk and vo is padded to the larger where fused kernels want equal dims, and
    both to :data:`ALIGNED` rows. Buckets share a call where that saves more than padding costs; on CUDA all heads of as
    many tiles do (:data:`TILE`). Compiled and exported models choose without regard to numbers of tokens that may vary;
    see also :func:`at_run_time`.
    """
    buckets, how, cuda = layout.buckets, forced(), q.device.type == "cuda"
    multiple = _multiple(q.device.type, q.dtype)
    if cuda and how in ("auto", "padded"):
        once = together if torch.compiler.is_compiling() else _together_once
        return once(layout, how == "auto" and _busy(q, k), multiple, not takes_unequal(q.dtype))
    if how == "padded":
        return [group(buckets, multiple)]
    apart = [bucket for bucket in buckets if how == "separate" or (how == "auto" and _apart(bucket, q, k))]
    rest = [bucket for bucket in buckets if bucket not in apart]
    found = [Group((bucket,), bucket) for bucket in apart]
    if how == "buckets" or len(rest) == 1:
        return found + [group((bucket,), multiple) for bucket in rest]
    pairs = NOMINAL if torch.compiler.is_compiling() else q.shape[0] * q.shape[1] * k.shape[1]
    return found + partition(rest, pairs, CALL.get(q.device.type, CALL["other"]), multiple)


def together(layout: HeadLayout, busy: bool, multiple: int, even: bool) -> list[Group]:
    """All heads in one call, or those of every number of tiles."""
    tiles: dict[int, list[Bucket]] = {}
    for bucket in layout.buckets:
        tiles.setdefault(-(-max(bucket[1:3]) // TILE) if busy else 1, []).append(bucket)
    return [group(parts, multiple, even) for parts in tiles.values()]


class Layouts(NamedTuple):
    """The layouts that weights of an attention are arranged for, once and for all."""

    few: HeadLayout
    """Where calls cost more than what padding adds."""
    many: HeadLayout
    """Elsewhere."""
    per_pair: int
    """Of a call, ``tokens * (length * per_pair + per_token) <= limit`` says that tokens are few."""
    per_token: int
    limit: int


def layouts_of(layout: HeadLayout, kind: str, dtype: torch.dtype, width: int) -> Layouts:
    """How heads may be padded by weights that are padded once: on CUDA to what kernels take, on a CPU all alike.

    Args:
        layout: the module's own.
        kind: of device.
        dtype: of the weights.
        width: channels that Q, K and V read, and O writes.
    """
    if kind == "cuda":
        multiple, even = _multiple(kind, dtype), not takes_unequal(dtype)
        few, many = (_widened(layout, busy, multiple, even) or layout for busy in (False, True))
        return Layouts(few, many, 1, 0, BUSY - 1)
    few = layout if layout.uniform else _widened(layout, False, 1, False) or layout
    more = [few.channels(p) - layout.channels(p) for p in PROJECTIONS]
    calls = (len(layout.buckets) - 1) * SMALL_CALL
    return Layouts(few, layout, more[0] + more[3], width * sum(more), calls)


def autocasts(x: Tensor) -> bool:
    """Whether products with a tensor are cast; on a device that knows of no autocast, meta for one, none are."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def widened(layout: HeadLayout, x: Tensor) -> HeadLayout | None:
    """The dims that heads of a self-attention of ``x`` are to have by padded weights; None if they keep their own.

    On CUDA: dims that kernels take, the same for all heads of a call.
    """
    how, kind, dtype = forced(), x.device.type, x.dtype
    if not (how == "padded" or (how == "auto" and kind == "cuda")):
        return None
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    once = _widened if torch.compiler.is_compiling() else _widened_once
    even = kind != "cuda" or not takes_unequal(dtype)
    return once(layout, how == "auto" and _busy(x, x), _multiple(kind, dtype), even)


def _widened(layout: HeadLayout, busy: bool, multiple: int, even: bool) -> HeadLayout | None:
    dims: dict[int, tuple[int, int]] = {}
    for one in together(layout, busy, multiple, even):
        dims |= dict.fromkeys(one.bucket.heads, one.bucket[1:3])
    qk, vo = zip(*(dims[layout.queries(key)[0]] for key in range(len(layout.qk))), strict=True)
    return None if (qk, vo) == (layout.qk, layout.vo) else HeadLayout(qk, vo, layout.groups)


_together_once, _widened_once = lru_cache(maxsize=4096)(together), lru_cache(maxsize=4096)(_widened)


def _multiple(kind: str, dtype: torch.dtype) -> int:
    """Channels of which a padded head's dims are multiples, by kind of device."""
    return max(1, ALIGNED.get(kind, 1) // dtype.itemsize)


def _busy(q: Tensor, k: Tensor) -> bool:
    """Whether there is certainly so much to do that a call costs nothing beside it."""
    if not torch.compiler.is_compiling():
        return q.shape[0] * q.shape[1] * k.shape[1] >= BUSY
    return known(q.shape[0] * q.shape[1] * k.shape[1] >= BUSY)


@asked_once
@kept
def takes_unequal(dtype: torch.dtype) -> bool:
    """Whether the kernel that CUDA has for equal qk and vo dims takes unequal ones: cuDNN's and the memory-efficient
    do, the flash kernel does not."""

    def kernel(vo: int) -> int:
        q, v = (torch.empty(1, 1, 64, dim, dtype=dtype, device="cuda") for dim in (32, vo))
        return int(torch._fused_sdp_choice(q, q, v))

    try:
        return kernel(48) == kernel(32)
    except (AttributeError, AssertionError, RuntimeError):  # another PyTorch; no GPU
        return False


def at_run_time(layout: HeadLayout, q: Tensor, k: Tensor) -> bool:
    """Whether compiled code leaves it to one operator, when it runs, to arrange heads as eager code does.

    On a CPU for inference, as plain products beat there what a compiler makes of kernels for unequal dims; where
    tokens are few and fixed, it makes as much of heads that run by themselves.
    """
    if not KNOWN or not _compiled_inference(q) or autocasts(q):
        return False
    how, first = forced(), layout.buckets[0]
    even = layout.uniform and first.qk_dim == first.vo_dim
    return how == "products" or (how == "auto" and not even and not _few(q, k))


def _apart(bucket: Bucket, q: Tensor, k: Tensor) -> bool:
    """Whether heads run by themselves, dims as they are: compiled (not exported) on a CPU, for inference.

    A single head always does; several that share their dims where the number of tokens is fixed, and small.
    """
    return _compiled_inference(q) and (len(bucket.heads) == 1 or _few(q, k))


def _compiled_inference(q: Tensor) -> bool:
    """Whether code is compiled (not exported) for inference on a CPU, in a dtype that products are fast in there."""
    return (
        torch.compiler.is_dynamo_compiling()
        and not (KNOWN and torch.compiler.is_exporting())
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
    )


def _few(q: Tensor, k: Tensor) -> bool:
    """Whether compiled code may rely on few pairs of tokens, whatever sizes come later."""
    return known(q.shape[0] * q.shape[1] * k.shape[1] <= NOMINAL)


def known(what: bool) -> bool:
    """Whether something about sizes is true whatever sizes come later."""
    return KNOWN and bool(torch.fx.experimental.symbolic_shapes.statically_known_true(what))


def partition(buckets: Sequence[Bucket], pairs: int, call: int, multiple: int = 1) -> list[Group]:
    """The groups of least cost: ``call`` for each, and the padded multiply-adds of ``pairs`` of tokens.

    Sorted by width, groups of an optimum are runs; the best first run is found for every rest, from the end
    (quadratic in the number of buckets).
    """
    ordered = sorted(buckets, key=lambda part: (_width(part, multiple), part.qk_start))
    count = len(ordered)
    best: list[tuple[int, int]] = [(0, count)] * (count + 1)  # cost of what starts here, and where its first run ends
    for start in range(count - 1, -1, -1):
        heads, found = 0, []
        for stop in range(start + 1, count + 1):
            heads += len(ordered[stop - 1].heads)
            found.append((call + 2 * heads * _width(ordered[stop - 1], multiple) * pairs + best[stop][0], stop))
        best[start] = min(found)
    groups, start = [], 0
    while start < count:
        stop = best[start][1]
        groups.append(group(ordered[start:stop], multiple))
        start = stop
    return groups
