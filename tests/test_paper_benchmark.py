"""The program of the paper's table, on a tiny model: one round, interrupted and continued, and rendered."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ASTConfig, ASTForAudioClassification

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_protocol

    return paper_protocol


@pytest.fixture
def task(protocol: Any) -> Any:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=8, time_stride=8, num_labels=5,
    )  # fmt: skip
    clips = [protocol.Clips(torch.randn(n, 32, 16), torch.randint(5, (n,))) for n in (24, 12, 12)]
    model = ASTForAudioClassification(config).eval()
    return protocol.Task(model, *clips, lambda x: x + 0.1 * torch.randn_like(x), torch.device("cpu"))


@pytest.mark.parametrize("name", ["PH-G-FI", "EH-L-MAG", "dense", "rotated, free; full, distilled"])
def test_a_run_continues_where_it_was(protocol: Any, task: Any, name: str, tmp_path: Path) -> None:
    way = protocol.WAYS[name]._replace(steps=(4, 7))
    said: list[str] = []
    whole = protocol.run(task, way, 0, tmp_path / "whole.pt", said.append)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protocol.run(task, way, 0, tmp_path / "parts.pt", stop)
    parts = protocol.run(task, way, 0, tmp_path / "parts.pt", said.append)
    timed = {"cpu", "wall"}
    assert [{k: v for k, v in one.items() if k not in timed} for one in parts] == [
        {k: v for k, v in one.items() if k not in timed} for one in whole
    ]
    assert len(said) == 3
    if way.options is not None:
        assert whole[1]["removed"] == pytest.approx(0.5)


def test_the_protocol_is_the_papers(protocol: Any) -> None:
    shares = [protocol.share(step) for step in range(15)]
    left = [1 - share for share in shares]
    assert shares[7] == 0.5
    assert shares[14] == 0.75
    assert all(b / a == pytest.approx(left[1]) for a, b in itertools.pairwise(left))
    assert len(protocol.VARIANTS) == 8


def test_shipped_results_render(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is shipped is what the shipped results give."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_render

    text = paper_render.render(json.loads((BENCHMARKS / "results" / "paper_table.json").read_text()), tmp_path)
    assert text + "\n" == (BENCHMARKS / "results" / "paper_table.md").read_text()
    shipped, drawn = (root / "docs" / "_static" / "paper_table.csv" for root in (BENCHMARKS.parent, tmp_path))
    assert shipped.read_text() == drawn.read_text()
    assert set(paper_render.PAPER) <= set(json.loads((BENCHMARKS / "results" / "paper_table.json").read_text())["runs"])
