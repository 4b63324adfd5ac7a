"""Adapters of one's own whose projections share a parameter, with the commit of the base class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprune
from attnprune import Adapter, AttentionSpec, AttentionView, Slot, apply_plan, make_plan, masked
from attnprune.errors import AttnPruneError, NoAttentionError
from attnprune.testing import check_family


class Packed(nn.Module):
    """One Linear for three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)

    def packed(self, x: Tensor) -> Any:
        return self.to_qkv(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        found: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class Shifted(Packed):
    """What its forward wants besides, nobody can guess."""

    def forward(self, x: Tensor, shift: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x + shift.amount)


class Own(Packed):
    """The packed weight is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.to_qkv.weight
        del self.to_qkv

    def packed(self, x: Tensor) -> Any:
        return F.linear(x, self.weight)


class OwnShifted(Own):
    def forward(self, x: Tensor, shift: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x + shift.amount)


class Amount:
    amount = 1.0


class Plainly(Adapter):
    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Packed)

    def view(self, name: str, module: nn.Module) -> AttentionView:
        m: Any = module
        owner, key = (m, "weight") if isinstance(m, Own) else (m.to_qkv, "weight")
        slots = {f"{p}.weight": Slot(owner, key, 32, start=32 * i) for i, p in enumerate("qkv")}
        slots["o.weight"] = Slot(m.to_out, "weight", 32, axis=1)
        bias = (False, False, False, True)
        spec = AttentionSpec.of(name, heads=4, head_dim=8, d_model=32, bias=bias, fused=True)
        return AttentionView(spec, module, self, slots)


class Claiming(Plainly):
    """Says that the host runs any number of heads, and leaves it to the base class to put weights in place."""

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        return not spec.ragged and spec.qk_dim == spec.vo_dim


@pytest.fixture(params=[Plainly, Claiming])
def adapter(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    found = attnprune.register_adapter(request.param())
    yield found
    attnprune.unregister_adapter(found)


@pytest.mark.parametrize("cls", [Packed, Shifted, Own, OwnShifted])
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_it_is_right_or_refused(cls: Any, granularity: Any, adapter: Adapter) -> None:
    """Never a report of success over a broken model."""
    model, x, more = cls().eval(), torch.randn(2, 5, 32), [Amount()] if "Shifted" in cls.__name__ else []
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        plan = make_plan(model, 0.5, granularity=granularity)
        with masked(model, plan):
            expected = model(x, *more)
        apply_plan(model, plan)
    except AttnPruneError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model(x, *more)
    else:
        torch.testing.assert_close(model(x, *more), expected)
        assert isinstance(model.to_qkv, nn.Linear)
        assert model.to_qkv.weight.shape[0] == 48


def test_a_claim_that_nothing_could_prove_is_an_error_before_anything_moves() -> None:
    adapter = attnprune.register_adapter(Claiming())
    try:
        with pytest.raises(NoAttentionError, match="could not be run"):
            make_plan(OwnShifted(), 0.5, granularity="head")
    finally:
        attnprune.unregister_adapter(adapter)


def test_check_family_finds_it() -> None:
    adapter = attnprune.register_adapter(Claiming())
    try:
        with pytest.raises((AssertionError, AttnPruneError)):
            check_family(OwnShifted(), (torch.randn(2, 5, 32), Amount()))
        check_family(Packed(), torch.randn(2, 5, 32))
    finally:
        attnprune.unregister_adapter(adapter)
