"""Hosts with required arguments that nobody knows, and with attention functions by name, as in transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprune import apply_plan, make_plan, masked

from .test_hosts import Whole, hidden, model_of

ALL_ATTENTION_FUNCTIONS: dict[str, Any] = {}


def eager_attention_forward(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT * scaling).softmax(-1)
    return (weights @ v).transpose(1, 2), weights


class Sized(Whole):
    """Needs arguments whose names tell nothing, and does not read them (SegFormer, where it reduces nothing)."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.scaling = SimpleNamespace(_attn_implementation="eager"), 6**-0.5

    def forward(self, hidden_states: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        q, k, v = (self.split(part(hidden_states)) for part in (self.query, self.key, self.value))
        function = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        context, weights = function(self, q, k, v, None, scaling=self.scaling)
        return self.out_lin(self.sized(context, height).flatten(2)), weights

    def sized(self, context: Tensor, height: int | None) -> Tensor:
        return context


class SizedInDeed(Sized):
    """Reads one, where it is given."""

    def sized(self, context: Tensor, height: int | None) -> Tensor:
        return context if height is None else height * context


@pytest.mark.parametrize("kind", [Sized, SizedInDeed])
def test_required_arguments_that_nobody_knows(kind: type[Sized]) -> None:
    """No forward of ours takes them for something else, or does without what the host makes of them."""
    model = model_of(kind())
    plan = make_plan(model, 0.5, heads="ragged", scorer="random")
    with masked(model, plan), torch.no_grad():
        expected = model.layer(hidden(), 3, 2)[0]
    apply_plan(model, plan)
    torch.testing.assert_close(model.layer(hidden(), 3, 2)[0], expected, rtol=0, atol=1e-10)
