"""Measures and photographs built pages at the width of a phone, a laptop and a wide screen. Needs a Chromium.

python docs/look.py docs/_build/html                                   # names pages wider than their window
python docs/look.py docs/_build/html --out shots                       # pictures of all, pages side by side
python docs/look.py docs/_build/html --out shots --pages index how_to/options --height 2600
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTHS = (420, 1200, 1600)  # pixels
ACROSS = 2400  # of a picture, which has as many pages side by side as fit in
MEASURE = """<!doctype html><body><pre id="found"></pre><script>
const pages = %s, found = []
async function width(page, wide) {
  const frame = document.createElement("iframe")
  frame.style = `width: ${wide}px; height: 900px; border: 0`
  frame.src = page
  await new Promise(done => { frame.onload = done; document.body.append(frame) })
  const inside = frame.contentDocument.documentElement.scrollWidth
  frame.remove()
  return inside
}
async function all() {
  for (const page of pages) for (const wide of %s) {
    const inside = await width(page, wide)
    if (inside > wide) found.push([page, wide, inside])
  }
  document.getElementById("found").textContent = JSON.stringify(found)
}
all()
</script></body>"""


def chromium(*options: str) -> str:
    """What Chromium prints."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("needs chromium")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def photograph(built: Path, pages: Sequence[str], width: int, height: int, out: Path) -> Path:
    """One picture of pages side by side, each in a window of its own; several cost as much time as one."""
    style = f"width: {width}px; height: {height}px; border: 0; border-right: 2px solid red"
    frames = "".join(f'<iframe src="{html.escape(page)}.html" style="{style}"></iframe>' for page in pages)
    sheet = built / "look.html"
    sheet.write_text(f'<!doctype html><body style="margin: 0; display: flex">{frames}</body>')
    shot = out / f"{width}-{pages[0].replace('/', '-')}.png"
    try:
        size = f"--window-size={(width + 2) * len(pages)},{height}"
        chromium(
            "--allow-file-access-from-files",
            "--virtual-time-budget=20000",
            size,
            f"--screenshot={shot}",
            sheet.as_uri(),
        )
    finally:
        sheet.unlink()
    return shot


def too_wide(built: Path, pages: Sequence[str]) -> list[tuple[str, int, int]]:
    """Pages that are wider than their window: name, width of the window, width of the page."""
    place = built / "look.html"
    place.write_text(MEASURE % (json.dumps([f"{page}.html" for page in pages]), json.dumps(WIDTHS)))
    try:
        said = chromium("--allow-file-access-from-files", "--virtual-time-budget=600000", "--dump-dom", place.as_uri())
    finally:
        place.unlink()
    match = re.search(r'<pre id="found">(.+?)</pre>', said)
    if match is None:
        sys.exit("chromium measured nothing")
    return [(page, wide, inside) for page, wide, inside in json.loads(html.unescape(match[1]))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("built", type=Path, help="a directory that make docs wrote")
    parser.add_argument("--out", type=Path, help="photograph the pages there")
    parser.add_argument("--pages", nargs="+", help="names without .html (default: all, without the source of modules)")
    parser.add_argument("--height", type=int, default=2600, help="of a photograph, in pixels (2600)")
    args = parser.parse_args()
    built = args.built.resolve()
    if not (built / "index.html").is_file():
        sys.exit(f"{args.built} has no pages: make docs writes them to docs/_build/html")
    every = [path.relative_to(built).with_suffix("").as_posix() for path in sorted(built.rglob("*.html"))]
    pages = args.pages or [page for page in every if not page.startswith(("_modules", "look", "genindex", "search"))]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for width in WIDTHS:
            for sheet in range(0, len(pages), side := max(1, ACROSS // width)):
                print(photograph(built, pages[sheet : sheet + side], width, args.height, args.out), flush=True)
    wide = too_wide(built, pages)
    for page, window, inside in wide:
        print(f"{page} is {inside} pixels wide in a window of {window}")
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
