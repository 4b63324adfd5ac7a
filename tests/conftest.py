"""Settings of the test run."""

from __future__ import annotations

import os
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from .selection import ALIKE, ALL, covering, few

settings.register_profile(
    "attnprune",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("attnprune")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when something imports it
torch.set_num_threads(1)  # tiny tensors: threads would only wait for one another


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever a test before left."""
    torch.set_num_threads(1)


MARKERS = (
    "covering(strength): unless ATTNPRUNE_ALL=1, as few cases as meet every value of every parameter once (strength 1),"
    " or every pair of values of two parameters (strength 2)",
    "long: runs only with ATTNPRUNE_ALL=1, as others test the same in less time",
    "xdist_group(name): tests of a group run in one process",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)


COLLECTED: dict[pytest.Item, int] = {}
"""By test, its place in the order of the files: which cases run does not depend on the order in which they run."""


def pytest_itemcollected(item: Any) -> None:
    """All that is tried on one family of models runs in one process: there it is built, and proven, once."""
    COLLECTED[item] = len(COLLECTED)
    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    if isinstance(name, str):
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.hookimpl(trylast=True)  # of what -k left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only ``make test-all`` runs."""
    if ALL:
        return
    kept: set[pytest.Item] = set()
    in_order = sorted(items, key=lambda item: COLLECTED.get(item, -1))  # of doctests pytest tells nothing here
    for name, group in groupby(in_order, lambda item: item.nodeid.partition("[")[0]):
        cases: list[Any] = [item for item in group if item.get_closest_marker("long") is None and not _alike(item)]
        marker = cases[0].get_closest_marker("covering") if cases else None
        cases = cases if marker is None else covering({case: _values(case) for case in cases}, *marker.args)
        kept.update(few(cases, name))
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _alike(item: Any) -> bool:
    """Whether a case is of a family that another one stands for."""
    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    return isinstance(name, str) and name in ALIKE


def _values(case: Any) -> dict[str, int]:
    """Which value each parameter has; the values themselves need not be hashable."""
    return {name: id(value) for name, value in case.callspec.params.items()}
