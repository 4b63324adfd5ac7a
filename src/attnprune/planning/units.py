"""Which channels of a head go together, and in which order: rotary pairs are one unit, their scores added."""

from __future__ import annotations

from collections.abc import Sequence

from ..values.layout import Kind
from ..values.spec import AttentionSpec


def step_of(spec: AttentionSpec, kind: Kind) -> int:
    """How many channels go at a time: 2 where a rotary embedding rotates pairs, else 1."""
    return 2 if kind == "qk" and any(spec.rotary_dims) else 1


def ranked(spec: AttentionSpec, kind: Kind, key: int, scores: Sequence[float]) -> tuple[list[int], list[float]]:
    """The channels of a key head, the one that goes first first, and what each costs.

    Channels that only go together follow one another and share their cost, so that a cut at a multiple of
    :func:`step_of` never parts them. Where some channels of a head are rotated and others are not, the others go two by
    two as well, in the order of their scores.

    >>> spec = AttentionSpec.of("a", heads=1, head_dim=6, d_model=8, rotary="half", rotary_dims=(4,))
    >>> ranked(spec, "qk", 0, [5.0, 1.0, 5.0, 1.0, 4.0, 2.0])
    ([1, 3, 5, 4, 0, 2], [1.0, 1.0, 3.0, 3.0, 5.0, 5.0])

    Args:
        spec: the attention.
        kind: whose channels.
        key: the key head.
        scores: one for every channel; more (of wider heads) are not read.
    """
    units = spec.units(kind, key)
    alone = sorted((unit for unit in units if len(unit) == 1), key=lambda unit: scores[unit[0]])
    if step_of(spec, kind) == 1:
        order = [channel for (channel,) in alone]
        return order, [scores[channel] for channel in order]
    pairs = [(*first, *second) for first, second in zip(alone[::2], alone[1::2], strict=False)]
    last = alone[len(pairs) * 2 :]  # one without a partner stays longest
    both = sorted([unit for unit in units if len(unit) == 2] + pairs, key=lambda unit: sum(scores[c] for c in unit))
    found = [*both, *last]
    costs = [sum(scores[channel] for channel in unit) / len(unit) for unit in found for _ in unit]
    return [channel for unit in found for channel in unit], costs
