"""The table of adapters, and the walk through a model that asks them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from ..errors import AdapterError, AttnPruneError, NoAttentionError, OptionError
from .base import Adapter
from .hf.family import HFEncoderAdapter, HFTwoModuleAdapter
from .mha.family import MultiheadAttentionAdapter
from .timm.family import FusedQKVAdapter
from .views import AttentionView

_ADAPTERS: list[Adapter] = [MultiheadAttentionAdapter(), FusedQKVAdapter(), HFTwoModuleAdapter(), HFEncoderAdapter()]


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


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Every attention of a model, in the order of ``named_modules``; a module that is used twice comes once."""
    inside: set[nn.Module] = set()  # parts of an attention already found
    for name, module in model.named_modules():
        if module in inside:
            continue
        adapter = next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
        if adapter is not None:
            inside.update(module.modules())
            yield name, module, adapter


def attention_names(model: nn.Module) -> list[str]:
    """The names of the attention modules of a model."""
    return [name for name, _, _ in _walk(model)]


def all_views(model: nn.Module, names: Collection[str] | None = None) -> list[AttentionView]:
    """The attention modules of a model, or those of these names; none is not an error."""
    found = _walk(model)
    return [adapter.view(name, module) for name, module, adapter in found if names is None or name in names]


def sound_views(model: nn.Module) -> list[AttentionView]:
    """The attention modules of a model, without those that something wraps."""
    found = []
    for name, module, adapter in _walk(model):
        with suppress(AttnPruneError):
            found.append(adapter.view(name, module))
    return found


def find_views(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> list[AttentionView]:
    """The attention modules of a model whose names match.

    Args:
        model: any module.
        include: glob patterns (``"encoder.*"``); a name must match one of them. None: all.
        exclude: glob patterns; a name must match none of them.

    Raises:
        NoAttentionError: none found, or none left; lists modules that look like attention.
        OptionError: a pattern matches no attention.
    """
    found = list(_walk(model))
    if not found:
        raise NoAttentionError(
            type(model).__name__,
            "at least one attention module of a known family",
            f"none; modules that look like one: {_candidates(model) or 'none'}",
            "register an adapter for it (attnprune.register_adapter)",
        )
    names = [name for name, _, _ in found]
    wanted, unwanted = _patterns("include", include, names), _patterns("exclude", exclude, names)
    left = [
        (name, module, adapter)
        for name, module, adapter in found
        if (wanted is None or _any(name, wanted)) and not (unwanted and _any(name, unwanted))
    ]
    if not left:
        raise NoAttentionError(
            "include and exclude", f"at least one of {_shorten(names)}", "none", "loosen the patterns"
        )
    return [adapter.view(name, module) for name, module, adapter in left]


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(option: str, given: str | Sequence[str] | None, names: Sequence[str]) -> Sequence[str] | None:
    if given is None:
        return None
    if not isinstance(given, (str, Sequence)):
        raise OptionError(option, "a glob pattern or a list of them", repr(given), 'write "encoder.*"')
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(str(pattern), names, n=3, cutoff=0.0)
            raise OptionError(
                option, "patterns that match an attention module", repr(pattern), f"names here are like {near}"
            )
    return patterns


def _candidates(model: nn.Module) -> str:
    """Modules whose class or children have the names of attention."""
    found = []
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}
        named = "attention" in type(module).__name__.lower()
        if named or children & {
            "q_proj",
            "query",
            "to_q",
            "qkv",
            "Wqkv",
            "c_attn",
        }:
            found.append(f"{name or 'the model itself'} ({type(module).__name__})")
    return _shorten(found)


def _shorten(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plain(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile returned, or the model itself."""
    if not isinstance(model, nn.Module):
        raise OptionError("model", "a torch.nn.Module", f"a {type(model).__name__}", "pass the model itself")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
