"""Law 1: the pruned model equals the dense one with removed rows and columns at zero.

Every family meets 240 random cases in float64 (20 in each of 12 modes, so every mode meets 220) and 200 in float32.
``make test-exact`` runs 200 for every family and mode.
"""

from __future__ import annotations

import importlib
import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnprune import find_attention
from attnprune.nn import attend
from attnprune.nn.attend import arrange
from attnprune.spec import HeadLayout

from .conformance import check_exact, family, fresh, inputs, random_plan
from .families import FAMILIES

attend_module = importlib.import_module("attnprune.nn.attend")  # the package has a function of this name
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


@pytest.mark.parametrize("together", [True, False], ids=["one call", "a call per bucket"])
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "part by part"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_however_heads_are_arranged(
    name: str, together: bool, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every arrangement computes the same, forced one by one."""
    monkeypatch.setattr(attend_module, "CALL", 1 << 60 if together else -1)
    monkeypatch.setattr(attend_module, "FEW", 1 << 60 if gather else 0)

    @settings(max_examples=15)
    @given(seed=seeds, qk=ratios, vo=ratios, case=st.integers(0, len(family(name).cases()) - 1), train=st.booleans())
    def check(seed: int, qk: float, vo: float, case: int, train: bool) -> None:
        model = fresh(name, case, train=train)
        plan = random_plan(model, seed, qkvo_ratios={"qk": qk, "vo": vo}, heads="ragged")
        check_exact(name, model, inputs(name, case, seed), plan, 1e-10)

    check()


def test_arrangements(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 8, 22)
    near, far = HeadLayout(qk=(4, 2, 4), vo=(3, 3, 3)), HeadLayout(qk=(18, 2, 2), vo=(2, 2, 2))
    assert [group.bucket[:3] for group in arrange(near, x, x)] == [((0, 2, 1), 4, 4)]
    assert [group.bucket[:3] for group in arrange(far, x, x)] == [((0, 1, 2), 18, 18)]  # few tokens
    monkeypatch.setattr(attend_module, "CALL", -1)
    assert [group.bucket[:3] for group in arrange(near, x, x)] == [((0, 2, 1), 4, 4)]  # little more work
    assert [group.bucket[:3] for group in arrange(far, x, x)] == [((0,), 18, 18), ((1, 2), 2, 2)]
    even = HeadLayout(qk=(4, 4), vo=(4, 4))
    assert [group.bucket for group in arrange(even, x, x)] == list(even.buckets)


def test_weights_come_in_logical_order_however_heads_are_arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = HeadLayout(qk=(4, 2, 4), vo=(3, 3, 2))
    q, k, v = torch.randn(2, 5, 10), torch.randn(2, 5, 10), torch.randn(2, 5, 8)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: object) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    found = []
    for few in (0, 1 << 60):
        monkeypatch.setattr(attend_module, "FEW", few)
        found.append(attend(q, k, v, layout, kernel))
    torch.testing.assert_close(found[0], found[1])
    own = [
        (q[..., slice(*layout.span("qk", h))] @ k[..., slice(*layout.span("qk", h))].mT).softmax(-1) for h in range(3)
    ]
    torch.testing.assert_close(found[1][1], torch.stack(own, dim=1))
