"""The table of adapters."""

from __future__ import annotations

from torch import nn

from ..errors import AdapterError
from .base import Adapter
from .hf.family import HFEncoderAdapter, HFTwoModuleAdapter
from .mha.family import MultiheadAttentionAdapter
from .timm.family import FusedQKVAdapter

_ADAPTERS: list[Adapter] = [MultiheadAttentionAdapter(), FusedQKVAdapter(), HFTwoModuleAdapter(), HFEncoderAdapter()]


def adapter_of(module: nn.Module) -> Adapter | None:
    """The first adapter that handles a module; the newest is asked first."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)


def registered(adapter: Adapter) -> bool:
    """Whether a user registered the adapter, which then says what its classes are."""
    return adapter in _ADAPTERS[:-_OWN]


_OWN = len(_ADAPTERS)


def register_adapter(adapter: Adapter) -> Adapter:
    """Adds an adapter; the newest is asked first, before those that come with attnprune.

    Args:
        adapter: an instance of a subclass of :class:`attnprune.Adapter`.

    Returns:
        The adapter, for :func:`unregister_adapter`.

    Raises:
        AdapterError: not an instance of Adapter.
    """
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            "register_adapter", "an instance of attnprune.Adapter", repr(adapter), "write class Mine(attnprune.Adapter)"
        )
    _ADAPTERS.insert(0, adapter)
    return adapter


def unregister_adapter(adapter: Adapter) -> None:
    """Removes an adapter again.

    Raises:
        AdapterError: it is not registered.
    """
    if adapter not in _ADAPTERS:
        raise AdapterError("unregister_adapter", "a registered adapter", repr(adapter), "pass what was registered")
    _ADAPTERS.remove(adapter)
