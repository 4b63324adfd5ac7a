"""Options that go well together, by name: :data:`PRESETS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from .faults import Faults
from .ratios import Ratios

Given = Mapping[str, Any]
"""What the user says, by the option's name."""


@dataclass(frozen=True)
class Part:
    """Options of a preset, and when they apply: always, or where something else was given."""

    options: Mapping[str, Any]
    when: Callable[[Given], bool] = lambda given: True


def _may_share(given: Given) -> bool:
    """Whether scores compare across layers, as they do with data, and shapes are free."""
    has_data = given.get("data") is not None or given.get("calibration") is not None
    return has_data and given.get("stock") is not True


def _may_be_ragged(given: Given) -> bool:
    """The same, where no time is asked for: nobody measured that of ragged heads."""
    return _may_share(given) and given.get("target_latency") is None


def _may_be_timed(given: Given) -> bool:
    """Whether it can be measured if channels or whole heads make this model faster here."""
    free = given.get("stock") is not True and given.get("split") not in ("all", "measured")
    timed = given.get("example_inputs") is not None and given.get("measure") is not False
    return free and timed and given.get("target_error") is None


def _alike(given: Given) -> bool:
    """Whether as many qk as vo channels can be asked for: one ratio for both, or a budget that both share."""
    ratios = given.get("qkvo_ratios")
    if ratios is None or given.get("split") in ("auto", "all", "measured"):
        return True
    found = Faults().attempt(Ratios.parse, ratios)
    return found is not None and len({found.q, found.k, found.v, found.o}) == 1


def _paper(granularity: str, scope: str, scorer: str) -> tuple[Part, ...]:
    """As the authors' public code does it: channels as they stand, no refit, numbers of units rounded up, or down where
    channels of all layers compete."""
    rounding = "down" if (granularity, scope) == ("channel", "global") else "up"
    as_it_stands = {"basis": "channels", "compensate": False, "rounding": rounding}
    return (Part({"granularity": granularity, "scope": scope, "scorer": scorer, **as_it_stands}),)


PRESETS: Mapping[str, tuple[Part, ...]] = {
    "accurate": (Part({"split": "auto"}, _may_share), Part({"heads": "ragged"}, _may_be_ragged)),
    "fast": (
        Part({"round_to": "auto", "heads": "uniform"}),
        Part({"match_dims": True}, _alike),
        Part({"granularity": "auto"}, _may_be_timed),
    ),
    "stock": (Part({"stock": True}),),
    **{
        f"paper:{scheme}-{threshold}-{score}": _paper(granularity, scope, scorer)
        for scheme, granularity in (("PH", "channel"), ("EH", "head"))
        for threshold, scope in (("G", "global"), ("L", "local"))
        for score, scorer in (("FI", "fisher"), ("MAG", "magnitude-l1"))
    },
}
"""``"accurate"`` loses least, ``"fast"`` keeps dims that this device's kernels like, and measures whether channels or
heads are to go, ``"stock"`` gives what plain transformers loads; and the paper's eight ways: scheme, threshold,
score."""


def preset_options(preset: object, given: Given) -> dict[str, Any]:
    """The options that a preset means.

    Args:
        preset: a name, or None: no options.
        given: what else the user says; an option that is in it is the user's.

    Raises:
        OptionError: no preset of this name.

    >>> preset_options("paper:PH-G-FI", {"scope": "local"})["scorer"]
    'fisher'
    """
    if preset is None:
        return {}
    if not isinstance(preset, str) or preset not in PRESETS:
        raise OptionError("preset", f"one of {', '.join(PRESETS)}", repr(preset), "pick one of them")
    found: dict[str, Any] = {}
    for part in PRESETS[preset]:
        if part.when({**found, **given}):
            found |= part.options
    return {key: value for key, value in found.items() if key not in given}
