"""Draws the rooms of attnprune as they import one another: ``python docs/house.py`` writes ``_static/house.svg``.

Arrows are read from the code. One that follows from others is left out.
"""

from __future__ import annotations

import ast
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "attnprune"
OUT = HERE / "_static" / "house.svg"

FACES, ACTS, DECIDES, HOLDS = "#ffffff", "#fde8d0", "#dcebf9", "#ececec"
MEANINGS = ((FACES, "asks"), (DECIDES, "decides"), (ACTS, "acts"), (HOLDS, "holds"))


class Room(NamedTuple):
    """A room, and where it is drawn."""

    storey: int
    """From the top."""
    place: int
    """From the left."""
    colour: str
    says: tuple[str, ...]
    """One sentence, in lines."""


ROOMS = {
    "integrations": Room(0, 0, FACES, ("pruning inside", "others' trainers")),
    "cli": Room(0, 1, FACES, ("the same as", "a command")),
    "by_hand": Room(0, 2, FACES, ("units that", "the user names")),
    "training": Room(1, 0, ACTS, ("a share at a time,", "in a loop")),
    "studies": Room(1, 1, DECIDES, ("ways and layers", "side by side")),
    "testing": Room(1, 2, FACES, ("the laws, for", "any module")),
    "api": Room(2, 0, FACES, ("what users call: chains what is below",)),
    "planning": Room(3, 0, DECIDES, ("Scores, and who goes:", "a Plan")),
    "checkpoint": Room(3, 1, ACTS, ("models as directories", "of ordinary files")),
    "cost": Room(4, 0, DECIDES, ("multiply-adds,", "latency")),
    "recovery": Room(4, 1, ACTS, ("learns what the", "dense model does")),
    "report": Room(4, 2, DECIDES, ("a Report: asked", "and achieved")),
    "calibration": Room(5, 0, DECIDES, ("runs data: moments, bases, refits",)),
    "surgery": Room(6, 0, ACTS, ("carries out a Plan: all of it, or none",)),
    "families": Room(7, 0, DECIDES, ("find attention, prove how it may run",)),
    "nn": Room(8, 0, HOLDS, ("forwards for heads of any dims",)),
    "values": Room(9, 0, HOLDS, ("Request, AttentionSpec, Plan: frozen",)),
    "errors": Room(10, 0, HOLDS, ("where, expected, found, what to do",)),
}

WIDTH, SIDE, GAP, BETWEEN = 360, 10, 8, 20
TITLE, LINE, PADDING = 17, 15, 7


def arrows() -> dict[str, set[str]]:
    """By room, the rooms that its files import, in functions and for types too."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if here[0] in ROOMS and isinstance(node, ast.ImportFrom) and node.level:
                package = here[: len(here) - node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                rooms = [package[0]] if package else [name.split(".")[0] for name in names]
                found[here[0]].update(room for room in rooms if room in ROOMS and room != here[0])
    return found


def below(room: str, direct: dict[str, set[str]]) -> set[str]:
    """All that a room rests on."""
    return direct[room].union(*(below(other, direct) for other in direct[room]))


def drawn() -> str:
    """The drawing as SVG."""
    direct = arrows()
    storeys = [[name for name, room in ROOMS.items() if room.storey == level] for level in range(11)]
    boxes: dict[str, tuple[float, float, float, float]] = {}
    top = SIDE
    for names in storeys:
        height = 2 * PADDING + TITLE + LINE * max(len(ROOMS[name].says) for name in names)
        width = (WIDTH - 2 * SIDE - GAP * (len(names) - 1)) / len(names)
        for name in names:
            boxes[name] = (SIDE + ROOMS[name].place * (width + GAP), top, width, height)
        top += height + BETWEEN
    parts = []
    for name in ROOMS:
        kept = {to for to in direct[name] if not any(to in below(other, direct) for other in direct[name])}
        for to in sorted(kept, key=list(ROOMS).index):
            parts.append(_arrow(boxes, name, to))
    parts += [_box(name, *boxes[name]) for name in ROOMS]
    left = SIDE
    for colour, meaning in MEANINGS:
        parts.append(f'<rect x="{left}" y="{top - 8}" width="12" height="12" fill="{colour}" stroke="#666"/>')
        parts.append(f'<text x="{left + 17}" y="{top + 2.5}" font-size="12">{meaning}</text>')
        left += 40 + 7 * len(meaning)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 10}" width="{WIDTH}"'
    style = 'font-family="Helvetica, Arial, sans-serif" fill="#222"'
    marker = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker>'
    )
    return "\n".join([f"{head} {style}>", f"<defs>{marker}</defs>", *parts, "</svg>", ""])


def _box(name: str, left: float, top: float, width: float, height: float) -> str:
    room, middle = ROOMS[name], left + width / 2
    lines = [
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="4" fill="{room.colour}" '
        'stroke="#444"/>',
        f'<text x="{middle:g}" y="{top + PADDING + 12:g}" text-anchor="middle" font-size="14" font-weight="bold">'
        f"{name}</text>",
    ]
    for number, line in enumerate(room.says):
        y = top + PADDING + TITLE + LINE * number + 11.5
        narrow = f' textLength="{width - 8:g}" lengthAdjust="spacingAndGlyphs"' if 7 * len(line) > width - 8 else ""
        lines.append(
            f'<text x="{middle:g}" y="{y:g}" text-anchor="middle" font-size="12"{narrow}>{escape(line)}</text>'
        )
    return "\n".join(lines)


def _arrow(boxes: dict[str, tuple[float, float, float, float]], start: str, end: str) -> str:
    """From the lower edge of one room to the upper edge of another; past storeys in between by the gap that fits."""
    left, top, width, height = boxes[start]
    to_left, to_top, to_width, _ = boxes[end]
    points = [(left + width / 2, top + height)]
    for level in range(ROOMS[start].storey + 1, ROOMS[end].storey):
        row = [boxes[name] for name, room in ROOMS.items() if room.storey == level]
        gaps = [(one[0] + one[2] + other[0]) / 2 for one, other in pairwise(row)]
        x = min(gaps or [WIDTH - SIDE / 2], key=lambda gap: abs(gap - points[-1][0]))
        points += [(x, row[0][1] - 4), (x, row[0][1] + row[0][3] + 4)]
    inside = min(max(points[-1][0], to_left + 12), to_left + to_width - 12)
    points.append((inside, to_top))
    route = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{route}" fill="none" stroke="#444" stroke-width="1.4" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    OUT.write_text(drawn())
    print(OUT)
