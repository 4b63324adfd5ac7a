"""Faults that are found one by one and raised together: :class:`Faults`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from ..errors import AttnPruneError, OptionError

T = TypeVar("T")


class Faults:
    """What is wrong with a value, collected so that all of it is raised at once.

    >>> faults = Faults()
    >>> faults.add(OptionError("steps", "a number", "'x'", "write 3"))
    >>> faults.attempt(int, "7")  # what goes well is returned
    7
    >>> faults.throw()
    Traceback (most recent call last):
    attnprune.errors.OptionError: steps: expected a number, found 'x'. Write 3.
    """

    def __init__(self) -> None:
        self._found: dict[str, AttnPruneError] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[AttnPruneError]:
        return iter(self._found.values())

    def add(self, error: AttnPruneError) -> None:
        """Adds a fault, or all those that an error lists; the same one counts once."""
        for one in getattr(error, "faults", ()) or (error,):
            self._found.setdefault(str(one), one)

    def attempt(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """What the call returns; None where it raises one of our errors, which is added."""
        try:
            return call(*args, **kwargs)
        except AttnPruneError as error:
            self.add(error)
            return None

    def known(self, where: str, given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
        """The part of a mapping whose keys are known; a fault for every other key, with the nearest name."""
        for key in given:
            if key not in names:
                near = get_close_matches(str(key), sorted(names), n=1)
                remedy = f"write {near[0]}" if near else f"it takes {', '.join(sorted(names))}"
                self.add(OptionError(where, "names that it takes", repr(key), remedy))
        return {key: value for key, value in given.items() if key in names}

    def throw(self) -> None:
        """Raises the fault, or an OptionError that lists all of them; returns where there are none.

        Raises:
            AttnPruneError: the fault itself, if there is one.
            OptionError: there are several; its ``faults`` holds each.
        """
        found = tuple(self)
        if len(found) == 1:
            raise found[0]
        if found:
            raise OptionError.of(found)
