"""The matrix: its page says what its results say, and the program runs a handful of families."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from benchmarks.matrix.cells import CELLS, PASSED
from benchmarks.matrix.hosts import hosts
from benchmarks.matrix.page import PAGE, SUPPORT, group_of, rendered, support
from benchmarks.matrix.run import RESULTS, filled, one_row, read
from benchmarks.matrix.running import Host

HANDFUL = ("transformers:bert", "transformers:llama", "PyTorch:nn.TransformerDecoder", "own class:Lucidrains")


def test_the_page_is_of_the_results() -> None:
    assert PAGE.read_text("utf-8") == rendered(read(RESULTS)), "python -m benchmarks.matrix.page"
    assert SUPPORT.read_text("utf-8") == support(read(RESULTS)["rows"]), "python -m benchmarks.matrix.page"


def test_every_family_has_a_row() -> None:
    if read(RESULTS)["about"]["versions"]["transformers"] != transformers.__version__:
        pytest.skip("other versions have other families")
    assert set(read(RESULTS)["rows"]) == {f"{host.source}:{host.name}" for host in hosts()}


@pytest.mark.filterwarnings("ignore")  # of hosts, about tiny configs
@pytest.mark.parametrize("key", HANDFUL)
def test_families_run(key: str) -> None:
    host = next(one for one in hosts() if f"{one.source}:{one.name}" == key)
    row: dict[str, Any] = {}
    try:
        filled(host, ["channels", "heads"], {}, row.update)
    finally:
        torch.set_default_dtype(torch.float32)  # a family in its own process may set another
    assert row["prunable"] == row["attention"] > 0
    assert row["silent"] == row["skipped"] == []
    assert {row["channels"], row["heads"]} == {PASSED}
    assert sum(row["ways"].values()) == row["prunable"]


@pytest.mark.filterwarnings("ignore")  # Python says that forking with threads is not for everyone
def test_a_family_that_does_not_end_is_said_to() -> None:
    def forever() -> nn.Module:
        time.sleep(60)
        raise AssertionError

    row = one_row(Host("slow", "here", forever, lambda _: {}), list(CELLS), {}, seconds=0.5)
    assert row["failed"] == "more than 0.5 seconds"
    assert group_of(row) == "Not finished"


@pytest.mark.filterwarnings("ignore")
def test_a_family_that_cannot_be_built_is_said_to() -> None:
    def broken() -> nn.Module:
        raise ValueError("no such size")

    row = one_row(Host("broken", "here", broken, lambda _: {}), list(CELLS), {}, seconds=60)
    assert row["unusable"] == "ValueError: no such size"
    assert PASSED not in row.values()
