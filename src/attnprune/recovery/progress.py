"""How far tuning has come (:class:`Progress`), and the file that it goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..values.recovery import Recovery

VERSION = 1


@dataclass
class Progress:
    """What changes while a model is tuned, beside weights and moments."""

    before: float | None = None
    """The loss over what was held out in the beginning; None: nobody looked yet."""
    after: float = float("inf")
    """The least of it since."""
    steps: int = 0
    seconds: float = 0.0
    """Before an interruption."""
    factor: float = 1.0
    """Of the learning rate."""
    next_check: float = 0.1
    """The share of the steps after which what was held out is looked at."""
    alarms: int = 0
    """How often a loss that rose was reason to look."""
    over: bool = False


@dataclass(frozen=True)
class Saved:
    """All that tuning goes on from."""

    progress: Progress
    values: Sequence[Tensor]
    """What the optimizer steps on."""
    best: Sequence[Tensor]
    moments: Mapping[str, Any]
    """The optimizer's state."""


def fingerprint(recovery: Recovery, first: Sequence[Tensor], batches: Sequence[int]) -> str:
    """What two runs must agree in for one to go on where the other stopped: options, weights, numbers of batches."""
    options = asdict(replace(recovery, resume=None, held_out=recovery.held_out if _plain(recovery) else 0.5))
    sums = [(tuple(tensor.shape), float(tensor.double().sum()), float(tensor.double().norm())) for tensor in first]
    return repr((VERSION, sorted(options.items()), _plain(recovery), list(batches), sums))


def save(path: str | os.PathLike[str], mark: str, saved: Saved) -> None:
    """Writes a file beside the old one, and puts it in its place."""
    state = {
        "mark": mark,
        "progress": asdict(saved.progress),
        "values": list(saved.values),
        "best": list(saved.best),
        "moments": dict(saved.moments),
    }
    draft = f"{os.fspath(path)}.new"
    torch.save(state, draft)
    os.replace(draft, path)


def load(path: str | os.PathLike[str], mark: str) -> Saved | None:
    """What a file holds; None where there is none.

    Raises:
        CheckpointError: it is no such file, or one of another model, of other data or options.
    """
    if not os.path.exists(path):
        return None
    where, remedy = os.fspath(path), "name another file, or remove this one to begin anew"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = Saved(Progress(**state["progress"]), state["values"], state["best"], state["moments"])
        theirs = state["mark"]
    except Exception as error:  # torch.load raises many kinds
        found = f"{type(error).__name__}: {str(error)[:60]}"
        raise CheckpointError(where, "a file that recovery wrote", found, remedy) from error
    if theirs != mark:
        expected = "one of the same model as pruned, the same data and options"
        raise CheckpointError(where, expected, "one of others", remedy)
    return saved


def _plain(recovery: Recovery) -> bool:
    """Whether what is held out is a share of the data."""
    return isinstance(recovery.held_out, (int, float))
