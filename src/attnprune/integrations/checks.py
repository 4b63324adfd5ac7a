"""What callbacks of every framework ask of their arguments."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from ..training.pruner import AttentionPruner


def check_when(pruner: Any, every: Any, unit: Any) -> None:
    """Checks the arguments of a callback.

    Raises:
        OptionError: not a pruner, ``every`` below 1, or an unknown unit.
    """
    if not isinstance(pruner, AttentionPruner):
        found = f"a {type(pruner).__name__}"
        raise OptionError("pruner", "an AttentionPruner", found, "make it for the Trainer's model")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise OptionError("every", "a whole number of at least 1", repr(every), "use 1 for every epoch")
    if unit not in ("epochs", "steps"):
        raise OptionError("unit", '"epochs" or "steps"', repr(unit), "pick one of them")
