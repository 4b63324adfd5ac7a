"""How far something has come: a bar in a terminal and in a notebook, elsewhere lines in a log (:func:`bar`)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

LOGGER = logging.getLogger("attnprune")
FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line in the log, and between lines."""


def bar(
    items: Iterable[Any] | None = None, *, what: str, shown: bool = True, total: int | None = None, initial: int = 0
) -> Any:
    """A progress bar of tqdm; where neither terminal nor notebook could draw it, :class:`Lines` with the same methods.

    Args:
        items: what to go through, if the bar is iterated over; else call ``update`` after each step.
        what: a word for what is done.
        shown: False: no bar and no lines.
        total: how many steps there are; None: as many as ``items``, if they can be counted.
        initial: how many of them were done before.

    >>> sum(bar([1, 2, 3], what="sums", shown=False))
    6
    """
    if shown and (_terminal() or _notebook()):
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # needed for a bar that is seen, and only then

        return tqdm(items, desc=f"attnprune: {what}", total=total, initial=initial, leave=False)
    return Lines(items, what, shown, total, initial)


class Lines:
    """A bar for logs: a line at level INFO of the logger ``attnprune`` after 10 s, one every 30 s, and one at the end.

    What is over within 10 s writes none. ``logging.basicConfig(level="INFO")`` shows them.
    """

    def __init__(
        self, items: Iterable[Any] | None, what: str, shown: bool = True, total: int | None = None, initial: int = 0
    ) -> None:
        self.items, self.what, self.shown, self.n, self.initial = items, what, shown, initial, initial
        self.total = _count(items) if total is None else total
        self.postfix = ""
        self.began = monotonic()
        self.next = self.began + FIRST
        self.written = False

    def update(self, n: int = 1) -> None:
        """So many steps more are done."""
        self.n += n
        if self.shown and monotonic() >= self.next:
            self.next, self.written = monotonic() + EVERY, True
            self._write(self._left())

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What the next lines end with."""
        self.postfix = text

    def close(self) -> None:
        """Writes the last line, if there were any."""
        if self.written:
            self.written = False
            self._write("done")

    def _left(self) -> str:
        done = self.n - self.initial
        if self.total is None or not 0 < done <= self.total - self.initial:
            return ""
        return f"about {(monotonic() - self.began) / done * (self.total - self.n):.0f} s left"

    def _write(self, more: str) -> None:
        whole = "" if self.total is None else f" of {self.total}"
        told = (f"{self.n}{whole}", f"{monotonic() - self.began:.0f} s", more, self.postfix)
        LOGGER.info("%s: %s", self.what, ", ".join(filter(None, told)))

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.items or ():
                yield item
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def logged() -> Iterator[None]:
    """Inside the block :class:`Lines` go to stderr, unless the program has set up its log; for the command line."""
    if LOGGER.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), LOGGER.level
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _notebook() -> bool:
    """Whether a Jupyter kernel runs this: its stderr is no terminal, but it draws."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _count(items: Any) -> int | None:
    try:
        return len(items)
    except (TypeError, AttributeError):
        return None
