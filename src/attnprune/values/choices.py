"""Which modules a user means: by the name, the class, or a function of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..errors import OptionError

Choice = str | type[Any] | Callable[[str, Any], object]
"""A glob pattern of names, a class of modules, or a function of a name and a module that says whether it is meant."""
Choices = Choice | Sequence[Choice]


def read_choices(option: str, given: object) -> tuple[Choice, ...] | None:
    """What was given as a tuple; None: nothing was.

    Raises:
        OptionError: something else.
    """
    if given is None:
        return None
    one = isinstance(given, str) or callable(given)
    found = (given,) if one else tuple(given) if isinstance(given, Sequence) else (None,)
    if not all(isinstance(each, str) or callable(each) for each in found):
        expected = "a glob pattern, a class, a function of name and module, or a list of them"
        raise OptionError(option, expected, repr(given)[:80], 'write "encoder.*", or lambda name, module: ...')
    return found


def means(choice: Choice, name: str, module: Any, *parts: Any) -> bool:
    """Whether a choice means a module.

    Args:
        choice: a pattern, a class or a function.
        name: the module's name.
        module: the module.
        parts: others that the class may be of.

    >>> means("encoder.*", "encoder.0", None), means(int, "", 3), means(lambda name, module: module > 3, "", 3)
    (True, True, False)
    """
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    if isinstance(choice, type):
        return any(isinstance(one, choice) for one in (module, *parts))
    return bool(choice(name, module))
