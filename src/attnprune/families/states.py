"""What a pruned module will know of itself: :func:`next_state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..nn.decoupled import State
from ..nn.rotary import pairs_of
from ..values.layout import KINDS, Kind
from ..values.spec import AttentionSpec

Numbers = Mapping[Kind, tuple[tuple[int, ...], ...]]
"""Of each kind, per key head, the dense numbers of its channels."""


def numbers_known(state: State | None, spec: AttentionSpec) -> Numbers:
    """The dense numbers of a module's channels, as far as it tells them apart; of others those that it has."""
    if state is not None and state.expanded is not None:
        found: Numbers = state.expanded.numbers
        return found
    if state is not None and state.numbers is not None:
        known: Numbers = state.numbers
        return known
    return {kind: tuple(tuple(range(dim)) for dim in spec.dims(kind)) for kind in KINDS}


def next_state(
    before: State | None,
    spec: AttentionSpec,
    after: AttentionSpec,
    kept: Sequence[int] | None,
    *,
    stock: bool,
    fixed: Mapping[Kind, str],
    heads: Sequence[str],
) -> State:
    """What a module will know once it has another shape.

    Args:
        before: what it knows now; None if it was never pruned.
        spec: its shape now.
        after: the other shape.
        kept: query heads that are left; None: all.
        stock: whether its host's own forward may run shapes that its attributes can say.
        fixed: kinds whose channels may not be mixed, and why.
        heads: ways to run in which whole heads may go.
    """
    numbers = before.kept if before else tuple(range(spec.heads))
    return State(
        after.layout,
        after.scale,
        dense_heads=before.dense_heads if before else spec.heads,
        kept=numbers if kept is None else tuple(numbers[head] for head in kept),
        stock=stock,
        fixed=fixed,
        heads=tuple(sorted(heads)),
        groups=before.groups if before else spec.groups[0],
    )


def telling(state: State, before: State | None, spec: AttentionSpec, after: AttentionSpec, numbers: Numbers) -> State:
    """The state of a module whose forward tells channels apart; arguments as for :func:`next_state`."""
    width = before.pairs.width if before and before.pairs else max(spec.rotary_dims)
    turned = after.rotary != "none"
    pairs = pairs_of(after.rotary, width, after.rotary_dims, numbers["qk"]) if turned else None
    dense = before.dense_qk if before and before.dense_qk else spec.qk_dim
    return state._replace(numbers=dict(numbers), pairs=pairs, dense_qk=dense)
