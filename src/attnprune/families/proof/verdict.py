"""What running a module shows of how it may be pruned: :func:`verdict_of`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..base import AttentionView
from ..calls import Call
from ..ways import Verdict
from .key import key_of
from .runs import plainly, short
from .stand_in import StandIn
from .trial import Trial

_KNOWN: dict[Any, Verdict] = {}
_BY_LAYER = object()


def verdict_of(view: AttentionView, recorded: Sequence[Call] = ()) -> Verdict:
    """How a module that was never pruned may run; found once for a host class, its code and its plain attributes.

    Args:
        view: what its family says it is.
        recorded: calls of the user's own model, for hosts whose arguments have names that tell nothing.
    """
    host = view.top
    key: Any = (view.adapter, view.spec.scale, key_of(host))
    found = _KNOWN.get(key)
    if found is _BY_LAYER:
        key = (key, getattr(view.module, "layer_idx", None))
        found = _KNOWN.get(key)
    if found is None or (recorded and not found.ran):
        found, tells = _prove(view, recorded)
        if tells and not isinstance(key[0], tuple):
            _KNOWN[key] = _BY_LAYER  # type: ignore[assignment]
            key = (key, getattr(view.module, "layer_idx", None))
        if found.ran or not recorded:
            _KNOWN[key] = found
    return found


def inherit(view: AttentionView, verdict: Verdict) -> None:
    """Remembers what was proven of a module that keeps its own forward in another shape."""
    host = view.top
    scale = view.adapter.view(view.name, host).spec.scale  # which a host may make from its head dim
    _KNOWN.setdefault((view.adapter, scale, key_of(host)), verdict)


def _prove(view: AttentionView, recorded: Sequence[Call]) -> tuple[Verdict, bool]:
    problem = ""
    with plainly():
        for small, dtype in ((True, torch.float64), (False, torch.float64), (False, torch.float32)):
            again = partial(StandIn, view, dtype, small)
            try:
                stand_in = again()
            except Exception as error:  # whatever a class of the user's raises when it is copied
                return _unknown(f"it cannot be copied ({short(error)})"), False
            calls = list(recorded or view.adapter.calls(stand_in.view))
            if not calls:
                names = "its arguments have names that tell nothing: pass example_inputs=, so that it is seen in a call"
                return _unknown(names), False
            trial = Trial(again, stand_in, calls, dtype)
            if trial.calls:
                return replace(trial.verdict(), recorded=bool(recorded)), stand_in.tells
            problem = trial.problem  # another size or dtype may do
    return _unknown(f"it could not be run ({problem}): pass example_inputs=, so that it is seen in a call"), False


def _unknown(why: str) -> Verdict:
    return Verdict(reasons={"run": why}, attends=False, ran=False)
