"""The short examples run."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["loop", "accelerate_loop"])
def test_loop(capsys: Any, name: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1].endswith("50% of Q removed")
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < first


def test_with_torch_pruning(capsys: Any) -> None:
    runpy.run_path(str(EXAMPLES / "with_torch_pruning.py"))["main"]()
    *lines, last = capsys.readouterr().out.splitlines()
    for column in (-4, -2):
        counts = [int(line.split()[column].replace(",", "")) for line in lines]
        assert counts == sorted(counts, reverse=True)
        assert len({*counts}) == 4
    assert last == "loaded again, the same: True"


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, with new versions of torch
@pytest.mark.parametrize("name", ["lightning_fit", "hf_trainer"])
def test_trainer(capsys: Any, name: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "50% of Q removed" in last
    first, final = (float(number) for number in last.split(",")[0].removeprefix("loss ").split(" -> "))
    assert final < first


@pytest.mark.long
def test_sweep_of_keywords(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--ways", "1", "--samples", "32", "--clips", "20", "--seconds", "0", "--plot", f"{tmp_path}/a.png"]
    monkeypatch.setattr("sys.argv", ["sweep_keywords.py", *words])
    runpy.run_path(str(EXAMPLES / "sweep_keywords.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[4:7]] == [["default", ratio] for ratio in ("0.25", "0.5", "0.75")]
    assert lines[-2].startswith("on 20 test clips that chose nothing: dense ")
    assert lines[-1].startswith("best by params: ")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("folder", "expected"), [("CHECKPOINT", 96.29), ("FIRST", 90.0)])
def test_keyword_models_are_as_good_as_their_page_says(
    folder: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from keywords import data

    features, labels, _ = data.load_split("validation")
    assert data.accuracy(data.load_model(getattr(data, folder)), features, labels) == pytest.approx(expected, abs=0.6)
