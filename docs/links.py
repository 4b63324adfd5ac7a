"""Checks the links of built pages: every page, picture and place in a page that they lead to is there.

python docs/links.py docs/_build/html

Addresses elsewhere (``https:``, ``mailto:``) are not looked up.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page leads to, and the places in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.places.add(value)


def broken(built: Path) -> list[tuple[str, str]]:
    """Pages with links that lead nowhere, and those links."""
    built = built.resolve()
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(built.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc or link == "#":
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            place = unquote(to.fragment)
            there = target.is_file() and (not place or target not in pages or place in pages[target].places)
            if not there:
                found.append((path.relative_to(built).as_posix(), link))
    return found


def main() -> int:
    built = Path(sys.argv[1])
    if not any(built.rglob("*.html")):
        sys.exit(f"{built} has no pages: make docs writes them to docs/_build/html")
    found = broken(built)
    for page, link in found:
        print(f"{page}: {link} leads nowhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
