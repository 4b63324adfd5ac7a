"""Figures in texts: a quote says the words around them, and what has to stand between.

>>> quote = Quote("dense {} %, on {} clips", "88.57", "1,400")
>>> [found.figures for found in quote.places("so dense 88.60 %, on 1,400\\nclips of them")]
[('88.60', '1,400')]
>>> quote.corrected("so dense 88.60 %, on 1,400\\nclips of them")
'so dense 88.57 %, on 1,400\\nclips of them'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\d)"
MEASURED = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+)(?![\w.]*\w)")
"""What has a decimal point, or thousands."""


class Place(NamedTuple):
    """Where a quote stands in a text."""

    span: tuple[int, int]
    figures: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    """Of each figure."""


class Quote:
    """Words, and the figures that belong between them.

    Args:
        words: ``{}`` stands for a figure; any white space for any other.
        figures: in their order, as they are written.
    """

    def __init__(self, words: str, *figures: str) -> None:
        self.words, self.figures = words, figures
        parts = words.split("{}")
        assert len(parts) == len(figures) + 1, (words, figures)
        literal = [r"\s+".join(re.escape(word) for word in re.split(r"\s+", part)) for part in parts]
        kinds = [f"({NUMBER})" if re.fullmatch(NUMBER, figure) else r"(\w+)" for figure in figures]
        self.pattern = re.compile("".join(a + b for a, b in zip(literal, [*kinds, ""], strict=True)))

    def __repr__(self) -> str:
        return self.words.format(*self.figures)

    def places(self, text: str) -> Iterator[Place]:
        """Where the words stand, whatever the figures between them."""
        for found in self.pattern.finditer(text):
            numbers = range(1, 1 + len(self.figures))
            yield Place(found.span(), found.groups(), tuple(found.span(number) for number in numbers))

    def corrected(self, text: str) -> str:
        """The text, with its own figures wherever the words stand."""
        for place in reversed(list(self.places(text))):
            for (start, end), figure in reversed(list(zip(place.spans, self.figures, strict=True))):
                text = text[:start] + figure + text[end:]
        return text


Row = tuple[str, list[str], list[str]]
"""Of a table: the first cell, the others, in which ``{}`` stands for a figure, and the figures."""


def table(head: Sequence[str], rows: Sequence[Row], *figures: str, after: str = "") -> Quote:
    """A list table of reStructuredText, whole.

    Args:
        head: its first row.
        rows: the others.
        figures: of the head.
        after: the words before it, where another table has its first cells.
    """
    lines = [head, *([name, *cells] for name, cells, _ in rows)]
    words = " ".join("* " + " ".join(f"- {cell}".rstrip() for cell in line) for line in lines)
    words = f"{after} .. list-table:: :header-rows: 1 {words}" if after else words
    return Quote(words, *figures, *(figure for _, _, own in rows for figure in own))


def signed(value: float, digits: int = 2) -> str:
    """With its sign, and +0.00 rather than -0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def bare(value: float, digits: int) -> str:
    """Without the zero before the point."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def texts() -> dict[str, str]:
    """README and the pages of the documentation, by path."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.rst"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths if "_build" not in path.parts}


def faults(quotes: Sequence[Quote], pages: Mapping[str, str]) -> list[str]:
    """What of the quotes stands nowhere, or with another figure."""
    found = []
    for quote in quotes:
        places = [(page, place) for page, text in pages.items() for place in quote.places(text)]
        if not places:
            found.append(f"nowhere: {quote!r}")
        for page, place in places:
            for said, figure, (start, end) in zip(place.figures, quote.figures, place.spans, strict=True):
                if said != figure:
                    around = " ".join(pages[page][max(0, start - 80) : end + 20].split())
                    found.append(f"{page} says {said} where the results say {figure}: ... {around} ...")
    return found


def unquoted(quotes: Sequence[Quote], text: str, plain: Sequence[str]) -> list[str]:
    """Figures of a text, outside of code, that no quote has, with the words around them.

    Args:
        quotes: all of them.
        text: a page.
        plain: patterns of what is no result; a space is any white space.
    """
    covered = [place.span for quote in quotes for place in quote.places(text)]
    patterns = [pattern.replace(" ", r"\s+") for pattern in plain]
    covered += [found.span() for pattern in patterns for found in re.finditer(pattern, text)]
    found = []
    for one in MEASURED.finditer(blanked(text)):
        if not any(start <= one.start() and one.end() <= end for start, end in covered):
            found.append(" ".join(text[max(0, one.start() - 40) : one.end() + 20].split()))
    return found


def blanked(text: str) -> str:
    """A page whose code (blocks, doctests, words in backquotes) is white space, all else where it was."""
    lines = text.split("\n")
    block: int | None = None
    fenced = tested = False
    for number, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        tested = bool(line.strip()) and (tested or line.lstrip().startswith(">>> "))
        block = None if block is not None and line.strip() and depth <= block else block
        fence = line.startswith("```")
        if fenced or fence or tested or block is not None:
            lines[number] = " " * len(line)
        elif re.match(r"\s*\.\. (code-block|image|figure)::|(?!\s*\.\.).*::$", line):
            block = depth
        fenced ^= fence
    return re.sub(r"(`+)[^`]+\1", lambda code: re.sub(r"\S", " ", code[0]), "\n".join(lines))
