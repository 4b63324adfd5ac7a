"""The laws that every adapter obeys. A new family is one subclass of ``families.Family`` in the table there.

The oracle is the dense model with rows and columns zeroed by index arithmetic of its own; it uses nothing of attnprune.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnprune import AttentionView, LayerPlan, Plan, apply_plan, make_plan
from attnprune.families.registry import all_views

from .families import FAMILIES
from .family import Family, gradient
from .selection import ALL


@lru_cache(maxsize=None)
def family(name: str) -> Family:
    return FAMILIES[name]()


@lru_cache(maxsize=None)
def _built(name: str, case: int) -> nn.Module:
    one = family(name)
    return one.build(**one.cases()[case])


def cases(name: str, number: int) -> list[int]:
    """A family's configurations: in ``make test`` the one that ``number`` comes to, else all."""
    count = len(family(name).cases())
    return list(range(count)) if ALL else [number % count]


def fresh(name: str, case: int, dtype: torch.dtype = torch.float64, train: bool = False) -> nn.Module:
    """A dense model of its own."""
    return copy.deepcopy(_built(name, case)).to(dtype).train(train)


def inputs(name: str, case: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Inputs; those that are real numbers ask for gradients."""
    one = family(name)
    raw = one.inputs(torch.Generator().manual_seed(seed), **one.cases()[case])
    return {
        key: value.to(dtype).requires_grad_("mask" not in key)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in raw.items()
    }


def flat_removed(layer: LayerPlan, projection: str) -> list[int]:
    """Rows of a dense projection that go: head times dim plus channel. Heads of Q and O are query heads; those of K and
    V go with the last of the query heads that share them."""
    spec, by_key = layer.spec, layer.qk if projection in "qk" else layer.vo
    dim = spec.qk_dims[0] if projection in "qk" else spec.vo_dims[0]
    share = spec.heads // spec.kv_heads
    rows = []
    for head in range(spec.heads if projection in "qo" else spec.kv_heads):
        if projection in "qo":
            key, whole = head // share, head in layer.heads
        else:
            key, whole = head, {*range(head * share, (head + 1) * share)} <= {*layer.heads}
        rows += [head * dim + channel for channel in (range(dim) if whole else by_key[key])]
    return rows


def zero(name: str, oracle: nn.Module, plan: Plan) -> None:
    """Makes a dense model the oracle: removed rows of Q, K, V and columns of O become zero, and so do the columns and
    rows of features that go."""
    with torch.no_grad():
        for layer in plan:
            for p, (weight, bias) in family(name).dense(oracle, layer.spec.name).items():
                rows = flat_removed(layer, p)
                if p == "o":
                    weight[:, rows] = 0
                else:
                    weight[rows] = 0
                    if bias is not None:
                        bias[rows] = 0
                features = list(layer.features["qkvo".index(p)])
                for part in [weight, *family(name).beside(oracle, layer.spec.name, p)]:
                    if p == "o":
                        part[features] = 0
                    else:
                        part[:, features] = 0


def forward_backward(name: str, model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of a fixed projection of it with respect to the inputs."""
    model.zero_grad()
    leaves = {key: value.detach().clone().requires_grad_() if _leaf(value) else value for key, value in given.items()}
    output = family(name).run(model, leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (output * direction.to(output.dtype)).sum().backward()
    return output.detach(), {key: leaf.grad for key, leaf in leaves.items() if _leaf(leaf) and leaf.grad is not None}


@contextmanager
def without_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder as it trains: its fast path leaves out padded tokens."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    assert not expected.isnan().any(), what
    error = (found - expected).abs().max().item() if found.numel() else 0.0
    largest = expected.abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * max(1.0, largest), (what, error)


def check_exact(name: str, model: nn.Module, given: dict[str, Any], plan: Plan, tolerance: float) -> None:
    """Law 1: forward and gradients of the pruned model are those of the oracle. Uses the model up."""
    oracle = copy.deepcopy(model)
    zero(name, oracle, plan)
    apply_plan(model, plan)
    expected, expected_inputs = forward_backward(name, oracle, given)
    found, found_inputs = forward_backward(name, model, given)
    close(found, expected, tolerance, "output")
    if not any(getattr(module, "dropout", 0) for module in model.modules() if module.training):
        with torch.no_grad(), without_fast_path():
            close(family(name).run(model, given), expected, tolerance, "output without gradients")
    assert found_inputs.keys() == expected_inputs.keys()
    for key, grad in expected_inputs.items():
        close(found_inputs[key], grad, tolerance, f"gradient of {key}")
    attention = set()
    for view in all_views(model):
        attention |= {id(slot.parameter) for slot in view.slots.values()}
        check_gradients(name, oracle, view, plan[view.name], tolerance)
    others = {key: p.grad for key, p in oracle.named_parameters()}
    for key, parameter in model.named_parameters():
        if id(parameter) not in attention and parameter.grad is not None:
            close(parameter.grad, others[key], tolerance, f"gradient of {key}")


def check_gradients(name: str, oracle: nn.Module, view: AttentionView, layer: LayerPlan, tolerance: float) -> None:
    """Gradients of what was kept are those of the same rows and columns of the oracle."""
    for p, (weight, _) in family(name).dense(oracle, view.name, gradient).items():
        gone = {*flat_removed(layer, p)}
        length = weight.shape[1] if p == "o" else weight.shape[0]
        rows = [row for row in range(length) if row not in gone]
        missing = {*layer.features["qkvo".index(p)]}
        features = [place for place in range(weight.shape[0 if p == "o" else 1]) if place not in missing]
        slot = view.slots[f"{p}.weight"]
        found = slot.cut(gradient(slot.parameter))
        found = torch.cat([found[slice(*span)] for span in view.spans(p)])  # type: ignore[arg-type]
        close(found, (weight.T if p == "o" else weight)[rows][:, features], tolerance, f"gradient of {view.name} {p}")


def random_plan(model: nn.Module, seed: int, **options: Any) -> Plan:
    """A plan by random scores."""
    return make_plan(model, scorer="random", seed=seed, **options)
