"""How to allocate: :class:`Rules`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import OptionError

Granularity = Literal["head", "channel", "joint"]
Scope = Literal["local", "global"]
Heads = Literal["uniform", "ragged"]
Split = Literal["fixed", "auto"]
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "granularity": ("head", "channel", "joint"),
    "scope": ("local", "global"),
    "heads": ("uniform", "ragged"),
    "split": ("fixed", "auto"),
}


@dataclass(frozen=True)
class Rules:
    """How to allocate: the options of :func:`attnprune.prune_attention` of the same names."""

    granularity: Granularity = "channel"
    scope: Scope = "global"
    heads: Heads = "uniform"
    split: Split = "fixed"
    round_to: int = 1
    min_heads: int = 1
    min_channels: int = 1
    match_dims: bool = False

    def __post_init__(self) -> None:
        for key, allowed in OPTIONS.items():
            if getattr(self, key) not in allowed:
                raise OptionError(key, f"one of {', '.join(allowed)}", repr(getattr(self, key)), "pick one of them")
        for key in ("round_to", "min_heads", "min_channels"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(key, "a whole number of at least 1", repr(value), "use 1 for no constraint")
        if not isinstance(self.match_dims, bool):
            raise OptionError("match_dims", "True or False", repr(self.match_dims), "pick one of them")
