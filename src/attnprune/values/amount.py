"""How much is to go: by ratios, by an error, or by a budget of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, RatioError
from .budget import RESOURCES, Budget, Ceiling, Limit, read_limit
from .ratios import Ratios
from .rules import Rules, stock_fault

TARGETS = "target_error", *(f"target_{resource}" for resource in RESOURCES)
WAYS = "qkvo_ratios", *TARGETS


@dataclass(frozen=True)
class MaxError:
    """The share of the energy of logits (qk) and outputs (vo) that every layer may lose, in place of ratios.

    >>> MaxError(0.01).share
    0.01
    """

    share: float
    """In (0, 1)."""

    def __post_init__(self) -> None:
        value = self.share
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            expected = "a number in (0, 1): the share of energy that may be lost"
            raise OptionError("target_error", expected, repr(value), "try 0.01")
        object.__setattr__(self, "share", float(value))


Amount = Ratios | Limit | MaxError


def parse_amount(qkvo_ratios: Any, targets: Mapping[str, Any]) -> Amount:
    """What was asked for.

    Args:
        qkvo_ratios: as in :func:`attnprune.prune_attention`, or None.
        targets: ``target_error`` and the like; missing ones and None are not asked for.

    Raises:
        OptionError: several ways to ask, or a share outside (0, 1).
        RatioError: (an OptionError) none of them, or ratios that are none.

    >>> parse_amount(None, {"target_params": 0.8})
    Budget(resource='params', share=0.8, promised=None)
    """
    given = {"qkvo_ratios": qkvo_ratios, **targets}
    used = [way for way in WAYS if given.get(way) is not None]
    if not used:
        expected = f"a number in [0, 1), or one of {', '.join(TARGETS)}"
        raise RatioError("qkvo_ratios", expected, "none of them", "write 0.5 for half of the attention weights")
    if len(used) > 1:
        found = " and ".join(f"{way}={given[way]!r}"[:40] for way in used)
        raise OptionError(used[-1], f"one of {', '.join(WAYS)}", found, "give one of them")
    if used == ["qkvo_ratios"]:
        return Ratios.parse(qkvo_ratios)
    if used == ["target_error"]:
        return MaxError(given["target_error"])
    resource = next(one for one in RESOURCES if used == [f"target_{one}"])
    return read_limit(resource, given[used[0]])


def check_amount(amount: Amount, rules: Rules) -> None:
    """Raises where an amount and rules contradict each other.

    Raises:
        OptionError: rules under which the amount cannot be asked for.
    """
    if isinstance(amount, Ratios):
        _check_ratios(amount, rules)
    elif rules.stock:
        raise stock_fault("qkvo_ratios", "ratios", "another way to ask, which gives each layer its own shape")
    elif isinstance(amount, MaxError) and rules.granularity != "channel":
        found = f'granularity="{rules.granularity}"'
        raise OptionError("target_error", 'granularity="channel"', found, "heads have no rank to lose")
    elif isinstance(amount, (Budget, Ceiling)) and amount.resource == "latency" and rules.heads == "ragged":
        remedy = "the time of ragged heads is not that of any measured shape; use target_macs with ragged heads"
        raise OptionError("target_latency", 'heads="uniform"', 'heads="ragged"', remedy)


def _check_ratios(ratios: Ratios, rules: Rules) -> None:
    values = [ratios.q, ratios.k, ratios.v, ratios.o]
    if rules.stock and len(set(values)) > 1:
        found = ", ".join(f"{p}={value:g}" for p, value in zip("qkvo", values, strict=True))
        raise OptionError("stock=True with qkvo_ratios", "one ratio for all four", found, "write one number for all")


def shared(ratios: Ratios, rules: Rules) -> Ratios:
    """What goes in units that projections share: channels of a pair, or heads (and matched dims) of all four."""
    if rules.together:
        return ratios  # all four go into one budget
    qk, vo = ratios.qk, ratios.vo
    if rules.granularity == "head" or rules.match_dims:
        qk = vo = min(qk, vo)
    return Ratios(qk, qk, vo, vo)
