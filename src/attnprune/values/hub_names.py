"""Names of models on the Hugging Face Hub."""

from __future__ import annotations

import os
import re

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""An owner and a model."""


def is_hub_name(directory: str | os.PathLike[str]) -> bool:
    """Whether a text names a model of the Hub: an owner and a model, and nothing of this name lies here.

    >>> is_hub_name("openai/whisper-tiny"), is_hub_name("whisper"), is_hub_name("../whisper"), is_hub_name("a/b/c")
    (True, False, False, False)
    """
    return isinstance(directory, str) and bool(HUB_NAME.fullmatch(directory)) and not os.path.lexists(directory)
