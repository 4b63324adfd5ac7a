"""How much is to go: by ratios, by an error, or by a budget of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, RatioError
from .budget import RESOURCES, Budget, Ceiling, Limit, read_limit
from .faults import Faults
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
        RatioError: ratios that differ for q and k, or for v and o.
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
    faults = Faults()
    qk, vo = (faults.attempt(getattr, ratios, kind) for kind in ("qk", "vo"))  # unequal ratios inside a pair raise
    faults.throw()
    if qk == vo or rules.split == "auto":
        return
    if rules.stock:
        found, remedy = f"qk={qk:g} and vo={vo:g}", "write one number for all"
        raise OptionError("stock=True with qkvo_ratios", "one ratio for qk and vo", found, remedy)
    if rules.granularity == "head":
        raise OptionError(
            "qkvo_ratios",
            'one ratio for all four with granularity="head", as a head goes from all of them',
            f"qk={qk:g} and vo={vo:g}",
            'use granularity="channel" or "joint" for different ratios',
        )
    if rules.match_dims:
        raise OptionError(
            "match_dims", "one ratio for qk and vo, which lose as many channels", f"qk={qk:g}, vo={vo:g}",
            'give one ratio for both, or use split="auto"',
        )  # fmt: skip
