"""How much to remove: parsing of ``qkvo_ratios``, and budgets in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import RatioError
from .budget import LEAST
from .faults import Faults
from .layout import PROJECTIONS, Projection


def _checked(key: str, value: Any) -> float:
    # ``not 0 <= value < 1`` also catches NaN
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:  # type: ignore[operator]
        raise RatioError(
            f"qkvo_ratios[{key}]",
            "a number in [0, 1): the fraction of the projection's weights to remove",
            repr(value),
            "Write 0.5 for half; 1 would remove the attention itself",
        )
    return float(value) + 0.0  # never -0.0


def _all_checked(values: Mapping[str, Any]) -> dict[str, float]:
    faults = Faults()
    found = {key: faults.attempt(_checked, key, value) or 0.0 for key, value in values.items()}
    faults.throw()
    return found


@dataclass(frozen=True)
class Ratios:
    """The fraction of each projection's weights to remove, in [0, 1).

    Q and K share the channels of their product, V and O those of the context. Where one of a pair is to lose more than
    the other, the rest of it goes from its own outer side: features that Q, K or V no longer read, or that O no longer
    writes.

    >>> Ratios.parse(0.5)
    Ratios(q=0.5, k=0.5, v=0.5, o=0.5)
    >>> Ratios.parse({"qk": 0.75, "v": 0.25, "o": 0.25})
    Ratios(q=0.75, k=0.75, v=0.25, o=0.25)
    >>> Ratios.parse([0.1, 0.1, 0.2, 0.2]).vo
    0.2
    """

    q: float = 0.0
    k: float = 0.0
    v: float = 0.0
    o: float = 0.0

    def __post_init__(self) -> None:
        for key in PROJECTIONS:
            object.__setattr__(self, key, _checked(key, getattr(self, key)))

    @classmethod
    def parse(cls, ratios: RatiosLike) -> Ratios:
        """One number for all four, a mapping with keys of ``q k v o qk vo``, or a sequence in the order q, k, v, o.

        Raises:
            RatioError: a value outside [0, 1), an unknown key, a key given twice, or not four values.
        """
        if isinstance(ratios, Ratios):
            return ratios
        if isinstance(ratios, Mapping):
            return cls(**cls._from_mapping(ratios))
        if isinstance(ratios, Sequence) and not isinstance(ratios, (str, bytes)):
            if len(ratios) != len(PROJECTIONS):
                raise RatioError(
                    "qkvo_ratios", "four values in the order q, k, v, o", f"{len(ratios)} values", "Give all four"
                )
            return cls(**_all_checked(dict(zip(PROJECTIONS, ratios, strict=True))))
        value = _checked("all", ratios)
        return cls(value, value, value, value)

    @staticmethod
    def _from_mapping(ratios: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        faults = Faults()
        for key in ratios:
            names = list(key) if key in ("qk", "vo") else [key]
            if not isinstance(key, str) or not set(names) <= set(PROJECTIONS):
                faults.add(
                    RatioError("qkvo_ratios", "keys of q, k, v, o, qk, vo", repr(key), "Missing keys count as 0")
                )
                continue
            for name in names:
                if name in found:
                    faults.add(RatioError("qkvo_ratios", f"one ratio for {name}", "two", f"Drop {name!r} or {key!r}"))
                found[name] = faults.attempt(_checked, key, ratios[key]) or 0.0
        faults.throw()
        return found

    def of(self, projection: Projection) -> float:
        """The ratio of one projection."""
        return float(getattr(self, projection))

    @property
    def qk(self) -> float:
        """What Q and K lose together, in channels of their product: the smaller of their ratios."""
        return min(self.q, self.k)

    @property
    def vo(self) -> float:
        """What V and O lose together, in channels of the context: the smaller of their ratios."""
        return min(self.v, self.o)

    def then(self, other: Ratios) -> Ratios:
        """The fraction removed by two rounds, the second of what the first left."""
        left = ((1 - self.of(p)) * (1 - other.of(p)) for p in PROJECTIONS)
        return Ratios(*(1 - max(share, LEAST) for share in left))


RatiosLike = float | Mapping[str, float] | Sequence[float] | Ratios
