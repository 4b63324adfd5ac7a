"""Law 1: the pruned model equals the dense one with removed rows and columns at zero.

Every family meets 240 random cases in float64 (20 in each of 12 modes, so every mode meets 220) and 200 in float32.
``make test-exact`` runs 200 for every family and mode.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnprune import find_attention

from .conformance import check_exact, family, fresh, inputs, random_plan
from .families import FAMILIES

MODES = list(itertools.product(("head", "channel", "joint"), ("local", "global"), ("uniform", "ragged")))
CASES = int(os.environ.get("ATTNPRUNE_CASES", "20"))  # for every family and mode
seeds = st.integers(0, 10_000)
ratios = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 0.75, 0.8])


def reachable(model: nn.Module, ratio: float) -> float:
    """One head of every layer has to stay."""
    return min(ratio, 1 - 1 / find_attention(model)[0].heads)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_exact(name: str, mode: tuple[str, str, str]) -> None:
    granularity, scope, heads = mode

    @settings(max_examples=CASES)
    @given(seed=seeds, qk=ratios, vo=ratios, case=st.integers(0, len(family(name).cases()) - 1), train=st.booleans())
    def check(seed: int, qk: float, vo: float, case: int, train: bool) -> None:
        model = fresh(name, case, train=train)
        if granularity == "head":
            qk = vo = reachable(model, qk)
        plan = random_plan(
            model, seed, qkvo_ratios={"qk": qk, "vo": vo}, granularity=granularity, scope=scope, heads=heads
        )
        check_exact(name, model, inputs(name, case, seed), plan, 1e-10)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_in_float32(name: str) -> None:
    @settings(max_examples=200)
    @given(seed=seeds, ratio=ratios, mode=st.sampled_from(MODES), case=st.integers(0, len(family(name).cases()) - 1))
    def check(seed: int, ratio: float, mode: tuple[str, str, str], case: int) -> None:
        granularity, scope, heads = mode
        model = fresh(name, case, torch.float32)
        ratio = reachable(model, ratio) if granularity == "head" else ratio
        plan = random_plan(model, seed, qkvo_ratios=ratio, granularity=granularity, scope=scope, heads=heads)
        check_exact(name, model, inputs(name, case, seed, torch.float32), plan, 1e-5)

    check()
