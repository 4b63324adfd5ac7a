"""The paper's eight ways against its public code's rule, written here in a few lines that use nothing of attnprune."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprune import make_plan

HEADS, DIM, WIDTH, LAYERS = 6, 4, 24, 3
RATIOS = (0.1, 0.3, 0.5, 0.55, 0.7)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True) for _ in range(LAYERS)))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 5, WIDTH, generator=generator), torch.randn(4, 5, WIDTH, generator=generator))
            for _ in range(3)]  # fmt: skip


def loss(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (net(x) - y).square().mean()


def importance(net: nn.Module, score: str) -> list[dict[str, Tensor]]:
    """Per layer, by projection ``(heads, dim)``: the L1 norm of a channel's weights, or the sum of their mean squared
    gradients over batches, each with a damping of 1e-6."""
    found = []
    for layer in net:
        own = layer.self_attn
        weights = [*own.in_proj_weight.chunk(3), own.out_proj.weight.T]
        if score == "MAG":
            values = [w.detach().double().abs().sum(1) for w in weights]
        else:
            total = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
            for batch in batches():
                grads = torch.autograd.grad(loss(net, batch), [own.in_proj_weight, own.out_proj.weight])
                for sums, grad in zip(total, [*grads[0].chunk(3), grads[1].T], strict=True):
                    sums += grad.double().square() / len(batches())
            values = [(sums + 1e-6).sum(1) for sums in total]
        found.append({p: v.reshape(HEADS, DIM) for p, v in zip("qkvo", values, strict=True)})
    return found


def lowest(values: list[tuple[float, Any]], count: int) -> list[Any]:
    return [unit for _, unit in sorted(values, key=lambda one: one[0])[:count]]


def expected(net: nn.Module, name: str, ratio: float) -> list[tuple[set[int], list[set[int]], list[set[int]]]]:
    """Per layer the heads that go, and per head the qk and vo channels."""
    scheme, threshold, score = name.split("-")
    layers = importance(net, score)
    if scheme == "EH":
        sums = [sum(one[p].sum(1) for p in "qkvo") for one in layers]
        scores = [(float(s[h]), (i, h)) for i, s in enumerate(sums) for h in range(HEADS)]
        if threshold == "L":
            gone = [u for i in range(LAYERS) for u in lowest([s for s in scores if s[1][0] == i],
                                                             min(math.ceil(ratio * HEADS), HEADS - 1))]  # fmt: skip
        else:
            gone, left = [], [HEADS] * LAYERS
            for _, (i, h) in sorted(scores):  # theirs may empty a layer, and then keeps its head 0; we keep its best
                if len(gone) < math.ceil(ratio * HEADS * LAYERS) and left[i] > 1:
                    gone.append((i, h))
                    left[i] -= 1
        nothing: list[set[int]] = [set() for _ in range(HEADS)]
        return [({h for j, h in gone if j == i}, nothing, nothing) for i in range(LAYERS)]
    by_kind = []
    for pair in ("qk", "vo"):
        orders = [(one[pair[0]] + one[pair[1]]).sort(1) for one in layers]
        counts = [math.ceil(ratio * DIM)] * LAYERS if threshold == "L" else [0] * LAYERS
        if threshold == "G":
            for _ in range(math.floor(ratio * DIM * LAYERS + 1e-9)):
                costs = [(float(o.values[:, n].sum()), i) for i, (o, n) in enumerate(zip(orders, counts, strict=True))
                         if n < DIM - 1]  # fmt: skip
                counts[min(costs)[1]] += 1
        counts = [min(n, DIM - 1) for n in counts]
        pairs = zip(orders, counts, strict=True)
        by_kind.append([[set(o.indices[h, :n].tolist()) for h in range(HEADS)] for o, n in pairs])
    return [(set(), qk, vo) for qk, vo in zip(*by_kind, strict=True)]


@pytest.mark.parametrize("name", [f"{a}-{b}-{c}" for a in ("PH", "EH") for b in "LG" for c in ("MAG", "FI")])
def test_the_same_units_go_and_as_many(name: str) -> None:
    net = model()
    for ratio in RATIOS:
        if name.startswith("EH") and ratio > 1 - 1 / HEADS:
            continue
        plan = make_plan(net, ratio, preset=f"paper:{name}", data=batches(), loss_fn=loss, progress=False)
        found = [({*one.heads}, [{*c} for c in one.qk], [{*c} for c in one.vo]) for one in plan]
        assert found == expected(net, name, ratio), (name, ratio)


def test_rounding_says_how_many_units_go() -> None:
    net = model()
    shares = {}
    for rounding in ("nearest", "up", "down"):
        plan = make_plan(net, 0.4, rounding=rounding, scope="local", scorer="magnitude")
        assert plan.asked is not None
        assert plan.asked.rounding == rounding
        shares[rounding] = plan.fraction("q")
    assert shares == {"nearest": 0.5, "up": 0.5, "down": 0.25}
    assert make_plan(net, 0.5, rounding="up", scope="local", scorer="magnitude").fraction("q") == 0.5
    four = make_plan(net, {"q": 0.5, "k": 0.25}, rounding="up", scope="local", scorer="magnitude")
    assert 0.5 <= four.fraction("q") < 0.55
