"""An interrupt at any line of a pruner's step leaves the old state of everything, or the new one; never a mixture."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

import attnprune
from attnprune import AttentionPruner

from .conformance import fresh
from .selection import ALL
from .test_pruner import train

OURS = str(Path(attnprune.__file__).parent)
UNDOING = {"undo", "restore"}  # an interrupt while things are put back is another one


def state(model: Any, optimizer: Any, average: Any, pruner: Any) -> Any:
    moments = [
        {key: value.tolist() for key, value in optimizer.state[p].items()} for p in model.parameters()
    ]  # by parameter, so that an optimizer of other parameters shows
    held = [
        p is q for group in optimizer.param_groups for p, q in zip(group["params"], model.parameters(), strict=True)
    ]
    weights = [{key: value.tolist() for key, value in one.state_dict().items()} for one in (model, average)]
    own = {key: value for key, value in pruner.state_dict().items() if key != "seen"}
    return weights, moments, held, own, {key: [x.tolist() for x in part] for key, part in pruner._seen.sums.items()}


def interrupted(pruner: Any, optimizer: Any, average: Any, at: int) -> tuple[bool, int]:
    """Takes a step with an interrupt before its line number ``at``; whether it came, and the lines seen."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS) or frame.f_code.co_name in UNDOING:
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        pruner.step(optimizer, averages=[average])
    except KeyboardInterrupt:
        return True, count
    finally:
        sys.settrace(None)
        torch.set_grad_enabled(True)
    return False, count


def test_a_step_is_taken_whole_or_not_at_all() -> None:
    model = fresh("MHA", 0)
    average = AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters())
    pruner = AttentionPruner(model, 0.5, steps=2, scope="local", scorer="fisher")
    train("MHA", model, optimizer, range(2))
    pruner.observe()
    everything = (model, optimizer, average, pruner)
    before = state(*everything)
    taken = copy.deepcopy(everything)
    _, lines = interrupted(taken[3], taken[1], taken[2], 0)
    after = state(*taken)
    assert before[3]["steps_done"] == 0
    assert after[3]["steps_done"] == 1
    often, seldom = (2, 41) if ALL else (7, 197)
    places = sorted({*range(1, lines, seldom), *range(lines - 120, lines + 1, often)})
    found = []
    for at in places:
        tried = copy.deepcopy(everything)
        came, _ = interrupted(tried[3], tried[1], tried[2], at)
        now = state(*tried)
        assert came or now == after  # what is cached takes fewer lines the second time
        assert now in (before, after), f"a mixture after an interrupt at line {at} of {lines}"
        found.append(now == after)
    assert 0 < sum(found) < len(found)  # both are met
