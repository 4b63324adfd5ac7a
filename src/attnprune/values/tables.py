"""Tables as text and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for every row: the first column to the left, the others to the right.

    >>> aligned([["way", "score"], ["default", "9"]])
    ['way      score', 'default      9']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows]  # fmt: skip


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]], below: Iterable[str] = ()) -> str:
    """A table for notebooks, with lines of text below it.

    >>> html_table(["a"], [["<"]], ["b", "c"])
    '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;</td></tr></tbody></table><p>b<br>c</p>'
    """
    import html  # costs 2 ms, and only notebooks need it

    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    says = "<br>".join(html.escape(line) for line in below)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table><p>{says}</p>"


def arrow(before: object, after: object) -> str:
    """What changes, or what stays.

    >>> arrow(12, 10), arrow(12, 12)
    ('12 -> 10', '12')
    """
    return str(before) if before == after else f"{before} -> {after}"


def dims(sizes: Sequence[int]) -> str:
    """One size, or from the least to the most.

    >>> dims((8, 8)), dims((8, 3))
    ('8', '3..8')
    """
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)}..{max(sizes)}"
