"""Figures in README and documentation are those of the results files, wherever they are stated."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest

from benchmarks.figures import runs
from benchmarks.figures.quotes import GENERATED, PLAIN, quotes, results
from benchmarks.figures.quoting import Quote, faults, table, texts, unquoted
from benchmarks.quality_medians import LESS_IS_BETTER, medians

QUOTES, PAGES = quotes(results()), texts()


def test_what_is_stated_is_what_was_measured() -> None:
    """Where this fails: ``python -m benchmarks.figures --check`` says the same, without ``--check`` it writes them."""
    assert faults(QUOTES, PAGES) == []


def test_every_figure_comes_from_a_results_file() -> None:
    """A new sentence with a figure needs its words in ``benchmarks/figures/quotes.py``."""
    own = {page: text for page, text in PAGES.items() if Path(page).name not in GENERATED}
    assert {page: found for page, text in own.items() if (found := unquoted(QUOTES, text, PLAIN))} == {}


def test_a_change_of_any_figure_is_seen() -> None:
    """Of every quote one figure, by its last digit, in one of its places."""
    seen = 0
    for quote in QUOTES:
        page, place = next((page, place) for page, text in PAGES.items() for place in quote.places(text))
        if not quote.figures:
            continue
        start, end = place.spans[-1]
        last = PAGES[page][end - 1]
        other = "0" if last == "9" else chr(ord(last) + 1)
        changed = PAGES[page][: end - 1] + other + PAGES[page][end:]
        assert faults([quote], {**PAGES, page: changed}), repr(quote)
        assert quote.corrected(changed)[start:end] == quote.figures[-1]
        seen += 1
    assert seen > 80


def test_a_result_that_changes_is_wanted_in_every_place() -> None:
    changed = copy.deepcopy(results())
    stated = f"says {changed['demo']['dense']:.2f} "
    changed["demo"]["dense"] += 1
    said = [fault.partition(" says")[0] for fault in faults(quotes(changed), PAGES) if stated in fault]
    assert len(set(said)) >= 4
    assert "README.md" in said


def test_others_are_where_the_readme_says_that_they_are() -> None:
    """No other method reaches the best of ours, and two are at the level of the default where half goes, twice."""
    found, level = results()["quality"], {}
    for task, ratio, steps in itertools.product(("keywords", "llama", "minilm", "whisper"), (0.5, 0.75), (0, 60)):
        sign = -1 if task in LESS_IS_BETTER else 1
        ways = {way: sign * value for way, value in medians(found, task, ratio, steps).items()}
        if steps and not ways:
            continue  # recovered at three quarters alone
        others = {way: value for way, value in ways.items() if not way.startswith("attnprune")}
        assert max(others.values()) < max(ways.values()), (task, ratio, steps)
        if as_good := {way for way, value in others.items() if value >= ways["attnprune, the default"]}:
            level[task, ratio, steps] = as_good
    both = {"CLOVER", "A3"}
    assert level == {("keywords", 0.5, 0): both, ("whisper", 0.5, 0): both}


def test_words_that_are_gone_and_figures_of_nowhere_are_named() -> None:
    quote = Quote("dense {} %", "88.57")
    assert faults([quote], {"a": "dense 90.00 %", "b": "nothing"}) == [
        "a says 90.00 where the results say 88.57: ... dense 90.00 % ..."
    ]
    assert faults([quote], {"b": "nothing"}) == ["nowhere: dense 88.57 %"]
    text = "dense 88.57 %, 3.5 more" + 20 * " x" + "\n\n>>> 1.5\n1.5\n\n``0.5`` torch 2.4\n\n::\n\n   2.5\n\nand 1,400"
    assert unquoted([quote], text, ["torch [0-9.]+"]) == [
        "dense 88.57 %, 3.5 more x x x x x x x",
        "1.5 ``0.5`` torch 2.4 :: 2.5 and 1,400",
    ]
    rows = table(["way", "a"], [("one", ["{}"], ["1.5"]), ("two", ["", "{} %"], ["-2.50"])])
    [place] = rows.places("   * - way\n     - a\n   * - one\n     - 1.5\n   * - two\n     -\n     - -2.50 %\n")
    assert place.figures == ("1.5", "-2.50")


def test_runs_are_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that has its results is up to date, until what it reads is another."""
    program, data = tmp_path / "program.py", tmp_path / "data.txt"
    program.write_text('import sys, pathlib\npathlib.Path(sys.argv[-1]).write_text(\'{"seeds": [0], "x": 1.5}\')\n')
    data.write_text("1")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(runs, "DECIDING", ())
    run = runs.Run("one", "program.py", ("data.txt",))
    assert runs.outdated(run)
    assert runs.execute(run)["result"] == {"seeds": [0], "x": 1.5}
    assert not runs.outdated(run)
    assert set(json.loads((tmp_path / "one.json").read_text())) == {
        "command", "measured", "seconds", "of a processor", "environment", "inputs", "result",
    }  # fmt: skip
    data.write_text("2")
    assert runs.outdated(run)


def test_every_results_file_is_run_or_said_not_to_be() -> None:
    names = {path.stem for path in runs.RESULTS.glob("*.json")}
    assert {run.name for run in runs.RUNS} | set(runs.ELSEWHERE) == names
    assert not {run.name for run in runs.RUNS} & set(runs.ELSEWHERE)
    for name in runs.ELSEWHERE:
        assert "command" in runs.kept(name) or name in runs.COMMANDS, name
