"""What the documentation states of the paper's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from .quoting import Quote, Row, signed, table

Results = Mapping[str, Any]


def protocol(results: Results) -> Iterator[Quote]:
    """The paper's protocol."""
    from paper_render import PAPER as THEIRS
    from paper_render import PAPER_DENSE, distance

    table_of = results["paper_table"]
    new = table_of["new clips"]
    clips, dense = f"{new['clips']:,}", f"{new['dense']:.2f}"

    def points(name: str, step: int, *, tuned: bool = False, new: bool = False) -> float:
        spread = distance(table_of, name, step, tuned=tuned, new=new)
        assert spread is not None, (name, step)
        return spread.median

    default, free, tuned = "rotated; no recovery", "rotated, free; no recovery", "rotated, free; more clips"
    long = "EH-L-FI; 84,843 clips"
    tests = results["demo"]["clips"]  # of either model
    yield Quote("6 layers, 6 heads of 32, 35 words; {} % on {} test clips",
                f"{table_of['dense']['test']:.2f}", f"{tests:,}")  # fmt: skip
    error = sqrt(table_of["dense"]["test"] * (100 - table_of["dense"]["test"]) / tests)
    yield Quote("A test clip is {} points, and the standard error of such an accuracy {} points",
                f"{100 / tests:.2f}", f"{error:.2f}")  # fmt: skip
    yield Quote("On {} more clips of the same voices (dense {} %; ranges over seeds)", clips, dense)
    more = f"{table_of['recipes'][tuned]['clips']:,}"
    rounds = [f"{table_of['recipes'][name]['clips']:,}" for name in ("PH-G-FI", tuned, long)]
    head = [f"{{}} clips a round{end}" for end in ("", "", ", as the paper has")]
    rows: list[Row] = []
    for name in THEIRS:
        if name.endswith("FI"):
            figures = [points(name, 7), points(f"{name}; more clips", 7), THEIRS[name][4] - PAPER_DENSE]
            rows.append((name, ["{}", "{}", "", "{}"], [signed(one) for one in figures]))
    rows[-1][1][2] = "{}; a round later {}"
    rows[-1][2][2:2] = [signed(points(long, 7)), signed(points(long, 8))]
    rows.append(("**ours**: rotated, split found, ragged", ["", "{}", "", ""], [f"{points(tuned, 7):.2f}"]))
    rows.append(("**ours**, nothing trained: the default", ["{}"], [signed(points(default, 7))]))
    yield table(["variant", f"its protocol, {head[0]}", *head[1:], "the paper, on AST-base"], rows, *rounds)
    yield Quote("loses nothing at 50 % and {} points at 75 %", f"{-points(default, 14):.2f}")
    yield Quote("by {} points with {} clips a round", f"{points('dense; more clips', 7):.2f}", more)
    alike = [-points(f"{name}; more clips", 7, tuned=True) for name in ("PH-G-FI", "PH-L-FI", "EH-G-FI")]
    alike.append(-points(long, 7, tuned=True))
    yield Quote("the four Fisher variants lose {} to {} points", f"{min(alike):.2f}", f"{max(alike):.2f}")
    rows = []
    for first, name, steps in (
        (f"PH-G-FI, {more} clips a round", "PH-G-FI; more clips", (7,)),
        (f"EH-G-FI, {more} clips a round", "EH-G-FI; more clips", (7,)),
        (f"PH-L-FI, {more} clips a round", "PH-L-FI; more clips", (7,)),
        ("EH-L-FI, 84,843 clips, seven rounds", long, (7,)),
        (f"**ours**: rotated, split found, ragged, {more} clips a round", tuned, (7, 14)),
        ("**ours**, nothing trained: the default", default, (7, 14)),
        ("**ours**, nothing trained: split found, ragged", free, (7, 14)),
    ):
        spreads = [distance(table_of, name, step, new=True) for step in steps]
        figures = [signed(value) for one in spreads if one for value in (one.median, one.low, one.high)]
        rows.append((first, ["{} ({} to {})"] * len(steps) + [""] * (2 - len(steps)), figures))
    yield table(["way", "50 %", "75 %"], rows)


ROWS = {
    "**ours**, nothing trained: the default": "rotated; no recovery",
    "**ours**, nothing trained: split found, ragged": "rotated, free; no recovery",
    "**ours**: the default, 6,125 clips a round": "rotated; LoRA",
    "**ours**: split found, ragged, 6,125 clips a round": "rotated, free; LoRA",
}
MORE = ("PH-G-FI", "PH-L-FI", "EH-G-FI", "EH-L-FI")


def protocol_shipped(results: Results) -> Iterator[Quote]:
    """The same on the shipped recogniser, with what has been run of it so far."""
    from paper_render import PAPER, distance

    found = results["paper_table_shipped"]
    new, clips = found["new clips"], found["recipes"]["PH-G-FI"]["clips"]
    dense = results["demo"]["dense"], new["dense"]
    words = "(dense {} % on the test clips, {} % on {} more clips of the same voices"
    yield Quote(words, *(f"{one:.2f}" for one in dense), f"{new['clips']:,}")
    yield Quote("a round trains on {} clips, of {}", f"{clips:,}", f"{found['environment']['training clips']:,}")
    tried = {name: name for name in PAPER} | {"dense, nothing removed": "dense"}
    tried |= {f"{name}, 24,500 clips a round": f"{name}; more clips" for name in MORE}
    tried |= {"dense, 24,500 clips a round": "dense; more clips"} | ROWS
    columns: list[tuple[int, dict[str, bool]]] = [
        (7, {}), (7, {"tuned": True}), (7, {"new": True}), (14, {}), (14, {"new": True}),
    ]  # fmt: skip
    rows: list[Row] = []
    for shown, name in tried.items():
        spreads = [distance(found, name, step, **how) for step, how in columns]
        if name.startswith("dense") or name.endswith("no recovery"):  # not trained, or the reference itself
            spreads[1] = None
        cells = ["{}" if spread else "" for spread in spreads]
        rows.append((shown, cells, [signed(spread.median) for spread in spreads if spread]))
    head = ["way", "50 %", "from dense trained alike", "on the new clips", "75 %", "on the new clips"]
    yield table(head, rows)
    trained = [distance(found, name, 7) for name in PAPER]
    least, most = (pick(-one.median for one in trained if one) for pick in (min, max))
    yield Quote("lose {} to {} points at 50 %, where ours lose {} and {} untrained", f"{least:.2f}", f"{most:.2f}",
                *(f"{-distance(found, ROWS[name], 7).median + 0.0:.2f}" for name in list(ROWS)[:2]))  # fmt: skip
    alone, longer = (distance(found, name, 7) for name in ("dense", "dense; more clips"))
    assert alone is not None
    assert longer is not None
    yield Quote("costs the dense model {} points too", f"{-alone.median:.2f}")
    yield Quote(
        "with {} clips a round {}", f"{found['recipes']['dense; more clips']['clips']:,}", signed(longer.median)
    )
    more = [distance(found, f"{name}; more clips", 7) for name in MORE]
    alike = [distance(found, f"{name}; more clips", 7, tuned=True) for name in MORE]
    figures = [f"{-pick(one.median for one in spreads if one) + 0.0:.2f}"
               for spreads in (more, alike) for pick in (max, min)]  # fmt: skip
    words = "variants by Fisher end {} to {} points below dense, {} to {} below a dense model that was trained alike"
    yield Quote(words, *figures)
