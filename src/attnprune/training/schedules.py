"""How much is gone after how many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import OptionError
from ..values.layout import KIND_OF, PROJECTIONS, Projection
from ..values.ratios import Ratios
from ..values.spec import AttentionSpec

Schedule = str | Callable[[float], float]
SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "one-shot": lambda share, t: share,
    "linear": lambda share, t: share * t,
    "cubic": lambda share, t: share * (1 - (1 - t) ** 3),
    "geometric": lambda share, t: 1 - (1 - share) ** t,
}
"""By name: the share removed when the fraction t of all steps is done, for a final share."""
MOST = 1 - 1e-9
"""The largest share that may go."""


def check_schedule(schedule: object, steps: object) -> None:
    """Raises OptionError unless it is a known name or a function, and steps are a whole number of at least 1."""
    if not callable(schedule) and schedule not in SCHEDULES:
        expected = f"one of {', '.join(SCHEDULES)}, or a function"
        raise OptionError("schedule", expected, repr(schedule), "pick one of them")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError("steps", "a whole number of at least 1", repr(steps), "use 1 for one-shot pruning")


def gone(schedule: Schedule, share: float, t: float) -> float:
    """Of a final share that goes, what is gone when the fraction ``t`` of all steps is done.

    >>> gone("geometric", 0.75, 0.5), gone("linear", 0.75, 0.5), gone(lambda t: t**3, 0.5, 1.0)
    (0.5, 0.375, 0.5)

    Raises:
        OptionError: a function of the user's gives no number in [0, 1].
    """
    if not callable(schedule):
        return SCHEDULES[schedule](share, t)
    fraction = schedule(t)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise OptionError("schedule", "a function that gives numbers in [0, 1]", repr(fraction), "check it")
    return share * fraction


def of_what_is_left(
    gone: Mapping[Projection, float], dense: Sequence[AttentionSpec], now: Sequence[AttentionSpec], together: bool
) -> Ratios:
    """Shares of what is left, from shares of the dense model that are to be gone.

    Args:
        gone: by projection, the share of the dense model's weights.
        dense: the modules as they were in the beginning.
        now: as they are.
        together: whether qk and vo share one budget.
    """

    def weights(specs: Sequence[AttentionSpec], p: Projection) -> int:
        return sum(spec.weights(p) for spec in specs)

    left: dict[Projection, float] = {}
    for p in PROJECTIONS:
        pool = PROJECTIONS if together else tuple(one for one in PROJECTIONS if KIND_OF[one] == KIND_OF[p])
        if not together and len({gone[one] for one in pool}) > 1:
            pool = (p,)  # each loses its own share
        wanted = sum((1 - gone[one]) * weights(dense, one) for one in pool)
        share = 1 - wanted / sum(weights(now, one) for one in pool)
        left[p] = min(max(share, 0.0), MOST)
    return Ratios(**left)
