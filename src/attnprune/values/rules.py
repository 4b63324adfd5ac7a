"""How to allocate: :class:`Rules`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import OptionError
from .faults import Faults

Granularity = Literal["head", "channel", "joint", "auto"]
Scope = Literal["local", "global"]
Heads = Literal["uniform", "ragged"]
Split = Literal["fixed", "auto", "all", "measured"]
RoundTo = int | Literal["auto"]
Rounding = Literal["nearest", "up", "down"]
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "granularity": ("head", "channel", "joint", "auto"),
    "scope": ("local", "global"),
    "heads": ("uniform", "ragged"),
    "split": ("fixed", "auto", "all", "measured"),
    "rounding": ("nearest", "up", "down"),
}


@dataclass(frozen=True)
class Rules:
    """How to allocate: the options of :func:`attnprune.prune_attention` of the same names (:class:`attnprune.Options`).

    >>> Rules(stock=True).scope
    'local'

    Raises:
        OptionError: a value that an option cannot take, or (with ``stock``) two that contradict each other; all faults.
    """

    granularity: Granularity = "channel"
    scope: Scope = "global"
    heads: Heads = "uniform"
    split: Split = "fixed"
    round_to: RoundTo = 1
    rounding: Rounding = "nearest"
    min_heads: int = 1
    min_channels: int = 1
    match_dims: bool = False
    stock: bool = False
    """Implies ``scope="local"`` and, for channels, ``match_dims``."""

    def __post_init__(self) -> None:
        faults = Faults()
        for key, allowed in OPTIONS.items():
            if getattr(self, key) not in allowed:
                error = OptionError(key, f"one of {', '.join(allowed)}", repr(getattr(self, key)), "pick one of them")
                faults.add(error)
        faults.attempt(check_rounding, self.round_to)
        for key in ("min_heads", "min_channels"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                faults.add(OptionError(key, "a whole number of at least 1", repr(value), "use 1 for no constraint"))
        for key in ("match_dims", "stock"):
            if not isinstance(getattr(self, key), bool):
                faults.add(OptionError(key, "True or False", repr(getattr(self, key)), "pick one of them"))
        if self.split == "all" and not faults and not self.stock:
            for key, (fine, only) in {
                "granularity": (self.granularity == "channel", '"channel"'),
                "scope": (self.scope == "global", '"global"'),
                "match_dims": (not self.match_dims, "False"),
            }.items():
                if not fine:
                    remedy = 'or split="auto", which shares the budget among channels alone'
                    faults.add(OptionError(f'{key} with split="all"', only, repr(getattr(self, key)), remedy))
        if self.split == "measured" and self.granularity != "channel":
            remedy = 'or split="auto", where whole heads compete by their scores'
            faults.add(OptionError('granularity with split="measured"', '"channel"', repr(self.granularity), remedy))
        if self.stock is True and not faults:
            self._imply(faults)
        faults.throw()

    def _imply(self, faults: Faults) -> None:
        """Sets what ``stock`` implies, and refuses what contradicts it."""
        others = {
            "granularity": (self.granularity in ("channel", "head"), '"channel" or "head"'),
            "heads": (self.heads == "uniform", '"uniform"'),
            "split": (self.split == "fixed", '"fixed"'),
        }
        for key, (fine, expected) in others.items():
            if not fine:
                faults.add(stock_fault(key, expected, getattr(self, key)))
        object.__setattr__(self, "scope", "local")
        object.__setattr__(self, "match_dims", self.granularity == "channel")

    @property
    def together(self) -> bool:
        """Whether all four projections share one budget."""
        return self.split != "fixed"

    @property
    def step(self) -> int:
        """``round_to`` as a number.

        Raises:
            OptionError: it is ``"auto"``, which only the device of a model can say.
        """
        if self.round_to == "auto":
            remedy = "take what attnprune.cost.rounding.rounding says"
            raise OptionError("round_to", "a whole number, where there is no model", '"auto"', remedy)
        return self.round_to


def check_rounding(round_to: object) -> None:
    """Raises OptionError unless it is a whole number from 1, or ``"auto"``."""
    number = isinstance(round_to, int) and not isinstance(round_to, bool) and round_to >= 1
    if not number and not (isinstance(round_to, str) and round_to == "auto"):
        expected = 'a whole number of at least 1, or "auto"'
        raise OptionError("round_to", expected, repr(round_to), "use 1 for no constraint")


def stock_fault(key: str, expected: str, found: str) -> OptionError:
    """The error of an option that ``stock=True`` does not go with."""
    remedy = "leave stock off, or this option as it is by default"
    return OptionError(f"stock=True with {key}", expected, found, remedy)
