"""How units are scored, and in which basis they go: :class:`Method`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

from ..errors import OptionError, ScorerError
from .faults import Faults

Basis = Literal["auto", "channels", "rotated"]
Compensate = Literal["auto"] | bool
BASES: tuple[Basis, ...] = ("auto", "channels", "rotated")
SCORERS = ("magnitude", "taylor", "fisher", "gate", "random", "magnitude-l1")
"""Names of scorers."""
_ALLOWED: dict[str, tuple[object, ...]] = {
    "basis": BASES,
    "compensate": ("auto", True, False),
    "sequential": (True, False),
}


@dataclass(frozen=True)
class Method:
    """How units are scored, in which basis they go, and whether what stays is refitted.

    The fields are the options of :func:`attnprune.prune_attention` of the same names (:class:`attnprune.Options`).

    >>> Method().decided(has_data=True, whole_heads=False).basis
    'rotated'
    >>> Method("fisher").decided(has_data=True, whole_heads=False).basis
    'channels'

    Raises:
        OptionError: a value that an option cannot take; all of them.
        ScorerError: no scorer is meant.
    """

    scorer: Any = "auto"
    basis: Basis = "auto"
    compensate: Compensate = "auto"
    sequential: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        faults = Faults()
        for key, allowed in _ALLOWED.items():
            faults.attempt(check_one_of, key, getattr(self, key), allowed)
        if not _may_score(self.scorer):
            faults.add(unknown_scorer(self.scorer))
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            faults.add(OptionError("seed", "a whole number", repr(self.seed), "write 0"))
        faults.throw()

    @property
    def named(self) -> bool:
        """Whether the user says which scorer it is."""
        return not (isinstance(self.scorer, str) and self.scorer == "auto")

    def decided(self, *, has_data: bool, whole_heads: bool) -> Method:
        """With ``"auto"`` decided: without data, or with a scorer that the user names, channels stay as they stand.

        Args:
            has_data: whether there are data, or a calibration.
            whole_heads: whether only whole heads are to go, which need no basis of their own.
        """
        best = has_data and not self.named
        basis: Basis = ("rotated" if best and not whole_heads else "channels") if self.basis == "auto" else self.basis
        return replace(self, basis=basis, compensate=best if self.compensate == "auto" else self.compensate)

    @property
    def rotated(self) -> bool:
        """Whether heads are rotated into another basis."""
        return self.basis == "rotated"

    @property
    def refits(self) -> bool:
        """Whether what stays is refitted."""
        return self.compensate is True

    @property
    def needs_maps(self) -> bool:
        """Whether the plan holds maps: something is rotated or refitted."""
        return self.rotated or self.refits


def check_one_of(option: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises OptionError unless a value is one of these; 1 is not True."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
        raise OptionError(option, f"one of {', '.join(map(repr, allowed))}", repr(value), "pick one of them")


def unknown_scorer(scorer: object) -> ScorerError:
    """The error of a ``scorer=`` that means none."""
    return ScorerError(
        "scorer",
        f"one of {', '.join(SCORERS)}, auto, a Scorer, or a Torch-Pruning importance",
        repr(scorer),
        "for an importance of Torch-Pruning pass an instance, for example GroupMagnitudeImportance()",
    )


def _may_score(scorer: object) -> bool:
    """Whether it is a known name, or has what a Scorer or an importance has; instances are checked where they score."""
    if isinstance(scorer, (str, type)):
        return isinstance(scorer, str) and scorer in ("auto", *SCORERS)
    return callable(scorer) or callable(getattr(scorer, "score", None))
