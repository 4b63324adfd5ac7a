"""What units of a product cost that go one after the other while queries are refitted: :func:`refitted_losses`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REFIT_RIDGE = 1e-3
"""Of a covariance's mean variance: larger than for bases, as refits must also hold for other data."""


def refitted_losses(left: Tensor, covariance: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """``(dim,)``: what the product loses with each channel, units going one after the other, the least loss first.

    Queries are refitted to what stays (:func:`attnprune.calibration.refit.refit_one`); channels of a unit share its
    loss.

    Removing unit u from those that stay, with ``P`` the inverse of their covariance and ``W`` the map of Q, loses
    ``tr(P_uu^-1 W_u L W_u^T)`` more.

    Args:
        left: ``(dim, dim)``, L: mean outer products of queries.
        covariance: ``(dim, dim)`` of keys.
        units: channels that go together.
    """
    dim = len(covariance)
    level = float(covariance.diagonal().mean())
    if not level > 0:
        return torch.zeros(dim, device="cpu", dtype=torch.float64)
    lifted = covariance + REFIT_RIDGE * level * torch.eye(dim, device="cpu", dtype=torch.float64)
    inverse, maps = torch.linalg.inv(lifted), torch.eye(dim, device="cpu", dtype=torch.float64)
    losses = torch.zeros(dim, device="cpu", dtype=torch.float64)
    rest, total = [torch.tensor(unit, device="cpu") for unit in units], 0.0
    while rest:
        weighed = maps @ left
        found = []
        for unit in rest:
            gram = maps[unit] @ weighed[unit].T
            found.append(float(torch.linalg.solve(inverse[unit][:, unit], gram).diagonal().sum()))
        least = min(range(len(rest)), key=found.__getitem__)
        unit, total = rest.pop(least), max(total, found[least])
        losses[unit] = total / len(unit)  # rises: who goes later costs no less
        share = torch.linalg.solve(inverse[unit][:, unit], torch.cat([inverse[unit], maps[unit]], 1))
        step = inverse[:, unit] @ share
        inverse, maps = inverse - step[:, :dim], maps - step[:, dim:]
    return losses
