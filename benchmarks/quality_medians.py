"""Medians of what ``quality.py`` measured, for its page, the README and the test that compares them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

LESS_IS_BETTER = ("llama", "whisper")
"""Tasks whose measure is a loss; of the others it is a score."""


def medians(found: Mapping[str, Any], task: str, ratio: float, steps: int = 0) -> dict[str, float]:
    """By way, the median over draws of a task's first measure, of ways that removed the share asked for.

    Args:
        found: what ``results/quality.json`` holds.
        task: its name.
        ratio: the share asked for; ways that removed another by more than half a per cent are left out.
        steps: of recovery.
    """
    values: dict[str, list[float]] = {}
    for one in found["runs"]:
        asked = (one["task"], one["ratio"], one["steps"]) == (task, ratio, steps)
        if asked and one["measured"] and abs(one["removed"] - ratio) <= 0.005:
            values.setdefault(one["way"], []).append(one["measured"][0])
    return {way: statistics.median(draws) for way, draws in values.items()}
