"""Asking for an error instead of a ratio, and the curves to choose by: how much energy is lost by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, lcm

import torch
from torch import Tensor, nn

from ..calibration.bases import Basis, HeadBases, head_bases, white_moments
from ..calibration.moments import Calibration
from ..calibration.taps import check_calibration
from ..errors import OptionError
from ..families.registry import find_views, plain
from ..values.amount import MaxError
from ..values.choices import Choices
from ..values.layer_plan import make_layer
from ..values.layout import KINDS, Kind
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.request import Request
from ..values.rules import Rules
from ..values.spec import AttentionSpec
from .allocate import unmatched
from .units import ranked, step_of


def lost_energy(energy: Tensor) -> Tensor:
    """``(dim + 1,)``: the share of energy lost when 0, 1, ... dim directions stay; 0 where there is none to lose.

    >>> lost_energy(torch.tensor([6.0, 3.0, 1.0])).tolist()
    [1.0, 0.4, 0.1, 0.0]
    """
    ordered = energy.double().sort(descending=True).values
    tails = torch.cat([ordered.flip(0).cumsum(0).flip(0), ordered.new_zeros(1)])
    return tails / tails[0] if tails[0] > 0 else torch.zeros_like(tails)


def energy_curves(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    basis: str = "rotated",
    include: Choices | None = None,
    exclude: Choices | None = None,
) -> dict[str, dict[Kind, list[Tensor]]]:
    """How much of its energy every head loses when 0, 1, ... of its directions stay: curves to choose ratios by.

    Energy is the mean square of the logits (qk) and of the head's output (vo). :func:`attnprune.plots.energy` draws
    them.

    Args:
        model: any module with attention of a known family.
        calibration: what :func:`attnprune.calibrate` gave for it; None for what weights alone tell (white inputs).
        basis: ``"rotated"``, or ``"channels"`` as they stand (each channel's own energy).
        include: glob patterns of names, classes, or functions of name and module; only these.
        exclude: what to leave out.

    Returns:
        By name and kind, per head ``(dim + 1,)`` float64, from 1 (nothing stays) to 0 (all stay).

    >>> curves = energy_curves(nn.MultiheadAttention(16, 4))
    >>> [len(curve) for curve in curves[""]["qk"]], float(curves[""]["vo"][0][0])
    ([5, 5, 5, 5], 1.0)
    """
    if basis not in ("rotated", "channels"):
        raise OptionError("basis", "'rotated' or 'channels'", repr(basis), "pick one of them")
    views = find_views(plain(model), include, exclude)
    if calibration is not None:
        check_calibration(calibration, views, False)
    curves: dict[str, dict[Kind, list[Tensor]]] = {}
    for view in views:
        moments = white_moments(view) if calibration is None else calibration[view.name]
        by_kind = head_bases(view, moments, basis == "rotated").by_kind
        curves[view.name] = {kind: [lost_energy(head.energy) for head in by_kind[kind]] for kind in KINDS}
    return curves


def allocate_error(
    specs: Sequence[AttentionSpec], bases: Mapping[str, HeadBases], target_error: float, rules: Rules
) -> Plan:
    """Every head (ragged) or every layer (uniform) keeps as few directions as lose at most this share of its energy.

    qk counts energy of the logits, vo that of the attention's output; both are held to the target. Floors and
    ``round_to`` raise what is kept.
    """
    layers = []
    for spec in specs:
        if rules.match_dims and spec.qk_dims != spec.vo_dims:
            raise unmatched(spec)
        removed: dict[Kind, tuple[tuple[int, ...], ...]] = {}
        counts: dict[Kind, list[int]] = {}
        for kind in KINDS:
            energies = [basis.energy for basis in bases[spec.name].by_kind[kind]]
            if rules.heads == "ragged":
                keep = [_enough(lost_energy(energy), target_error) for energy in energies]
            else:
                if len({len(energy) for energy in energies}) > 1:
                    raise OptionError(
                        spec.name, 'heads="ragged", as its heads differ already', 'heads="uniform"', "exclude it, or so"
                    )
                together = torch.stack([energy.double().sort(descending=True).values for energy in energies]).sum(0)
                keep = [_enough(lost_energy(together), target_error)] * spec.kv_heads
            step = lcm(rules.step, step_of(spec, kind))
            counts[kind] = [
                _rounded(count, len(energy), rules, step) for energy, count in zip(energies, keep, strict=True)
            ]
        if rules.match_dims:
            counts = {kind: list(map(max, *counts.values())) for kind in KINDS}
        for kind in KINDS:
            own = zip(bases[spec.name].by_kind[kind], counts[kind], strict=True)
            removed[kind] = tuple(_cheapest(spec, kind, key, *one) for key, one in enumerate(own))
        layers.append(make_layer(spec, set(), removed))
    plan = Plan(tuple(layers))
    ratios = Ratios(*(max(plan.fraction(p), 0.0) for p in ("q", "k", "v", "o")))
    request = Request(MaxError(target_error), replace(rules, scope="local", split="auto"))
    return Plan(plan.layers, request.asked("energy", ratios))


def _enough(lost: Tensor, target: float) -> int:
    """The least number of directions that loses at most the target."""
    return max(int((lost > target + 1e-12).sum()), 1)


def _rounded(count: int, dim: int, rules: Rules, step: int) -> int:
    return min(max(ceil(max(count, rules.min_channels) / step) * step, 1), dim)


def _cheapest(spec: AttentionSpec, kind: Kind, key: int, basis: Basis, keep: int) -> tuple[int, ...]:
    """The directions with the least energy, all but ``keep``; of equal ones the last go first; rotary pairs as one."""
    energy = basis.energy
    if step_of(spec, kind) > 1:
        return tuple(sorted(ranked(spec, kind, key, energy.tolist())[0][: len(energy) - keep]))
    order = sorted(range(len(energy)), key=lambda i: (-float(energy[i]), i))
    return tuple(sorted(order[keep:]))
