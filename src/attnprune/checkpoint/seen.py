"""What nothing but a run of the user's model can show of an attention, as files keep it: :class:`Seen`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from ..families.base import AttentionView
from ..families.ways import EVERY
from ..values import fields
from ..values.layout import KINDS, Kind
from ..values.spec import Rotary


class Seen(NamedTuple):
    """What a run of the user's model showed of an attention, beside how it may run."""

    order: str = ""
    """In which several projections lay in one; empty where they lay apart."""
    fixed: Mapping[Kind, str] = {}
    """Kinds whose channels may not be mixed, and why."""
    heads: tuple[str, ...] = tuple(sorted(EVERY))
    """Ways to run in which whole heads may go."""
    rotary: Rotary = "none"
    """Which channels a rotary embedding rotates together."""
    rotary_dim: int = 0
    """How many channels of a dense head it rotates."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**self._asdict(), "fixed": dict(self.fixed), "heads": list(self.heads)}

    @classmethod
    def read(cls, where: str, raw: object) -> Seen:
        """Reads :meth:`to_dict`'s mapping, trusting nothing."""
        found = fields.mapping(where, raw, set(cls._fields))
        known: set[str] = {kind for kind in KINDS if isinstance(found["fixed"], dict) and kind in found["fixed"]}
        fixed = fields.mapping(f"{where}.fixed", found["fixed"], known)
        heads = tuple(fields.string(f"{where}.heads", one) for one in fields.array(f"{where}.heads", found["heads"]))
        if not set(heads) <= EVERY:
            fields.fail(f"{where}.heads", f"some of {', '.join(sorted(EVERY))}", list(heads))
        reasons = {kind: fields.string(f"{where}.fixed.{kind}", fixed[kind]) for kind in KINDS if kind in fixed}
        rotary, dim = found["rotary"], found["rotary_dim"]
        if rotary not in get_args(Rotary):
            fields.fail(f"{where}.rotary", f"one of {', '.join(get_args(Rotary))}", rotary)
        (dim,) = fields.integers(f"{where}.rotary_dim", [dim])
        return cls(fields.string(f"{where}.order", found["order"]), reasons, heads, rotary, dim)


def seen_of(view: AttentionView) -> Seen | None:
    """What nothing but a run of the user's model can show of a pruned attention beside its way."""
    state = view.state
    if state is None or not state.recorded:
        return None
    return Seen(state.order, view.fixed, tuple(state.heads), view.spec.rotary, state.rotary_dim)
