"""The table of adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from ..errors import AdapterError
from ..nn.attempt import undoing_with
from ..nn.kept import ordinary
from .base import Adapter
from .hf.family import HFEncoderAdapter, HFTwoModuleAdapter
from .mha.family import MultiheadAttentionAdapter
from .named import NamedAdapter, Parts
from .timm.family import FusedQKVAdapter

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ADAPTERS: list[Adapter] = [MultiheadAttentionAdapter(), FusedQKVAdapter(), HFTwoModuleAdapter(), HFEncoderAdapter()]


def adapter_of(module: nn.Module) -> Adapter | None:
    """The first adapter that handles a module; the newest is asked first."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)


def registered(adapter: Adapter) -> bool:
    """Whether a user registered the adapter, which then says what its classes are."""
    return adapter in _ADAPTERS[:-_OWN]


_OWN = len(_ADAPTERS)


@ordinary
def register_adapter(adapter: Adapter | type[nn.Module], **parts: Unpack[Parts]) -> Adapter:
    """Adds an adapter; the newest is asked first, before those that come with attnprune.

    Args:
        adapter: an attention class; or an instance of a subclass of :class:`attnprune.Adapter`.
        parts: for a class, what its projections and its number of heads are called: ``q``, ``k``, ``v`` and ``o``
            (``qkv``, ``kv`` or ``qk`` for one that holds several), ``heads``, and where they are needed ``kv_heads``,
            ``scale`` and ``order``.

    Returns:
        The adapter, for :func:`unregister_adapter`.

    Raises:
        AdapterError: neither a module class nor an Adapter, or parts are missing.

    >>> class MyAttention(nn.Module):
    ...     def __init__(self, width, heads):
    ...         super().__init__()
    ...         self.heads, self.ask, self.merge = heads, nn.Linear(width, width), nn.Linear(width, width)
    ...         self.offer = nn.Linear(width, 2 * width)
    ...
    ...     def forward(self, x):
    ...         q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    ...                    for y in (self.ask(x), *self.offer(x).chunk(2, -1)))
    ...         return self.merge((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
    >>> mine = register_adapter(MyAttention, q="ask", kv="offer", o="merge", heads="heads")
    >>> import attnprune
    >>> model = MyAttention(16, 2)
    >>> report = attnprune.prune_attention(model, 0.5)
    >>> model.offer
    PrunedLinear(in_features=16, out_features=16, bias=True, expanded to 32)
    >>> unregister_adapter(mine)
    """
    if isinstance(adapter, type) and issubclass(adapter, nn.Module):
        adapter = NamedAdapter.of(adapter, parts)
    elif parts or not isinstance(adapter, Adapter):
        found = f"{adapter!r} with {', '.join(parts)}" if parts else repr(adapter)
        remedy = "write class Mine(attnprune.Adapter), or pass the class itself with the names of its parts"
        raise AdapterError("register_adapter", "an attention class, or an instance of attnprune.Adapter", found, remedy)
    undoing_with(partial(_ADAPTERS.__setitem__, slice(None), [*_ADAPTERS]))
    _ADAPTERS.insert(0, adapter)
    return adapter


@ordinary
def unregister_adapter(adapter: Adapter) -> None:
    """Removes an adapter again.

    Raises:
        AdapterError: it is not registered.
    """
    if adapter not in _ADAPTERS:
        raise AdapterError("unregister_adapter", "a registered adapter", repr(adapter), "pass what was registered")
    undoing_with(partial(_ADAPTERS.__setitem__, slice(None), [*_ADAPTERS]))
    _ADAPTERS.remove(adapter)
