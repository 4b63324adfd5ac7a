"""Grouped queries and rotary embeddings beyond the laws: scores by arithmetic of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnprune import Plan, make_plan
from attnprune.errors import PlanFormatError
from attnprune.families.registry import find_views
from attnprune.planning.scorers import Fisher, Gate, Magnitude, Taylor

from .family import DECODER, randomised

HEADS, KEYS, DIM, WIDTH = 4, 2, 8, 24
SHARE = HEADS // KEYS


def llama() -> Any:
    return randomised(transformers.LlamaModel(transformers.LlamaConfig(**DECODER)))


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(1, 5, WIDTH, generator=generator, dtype=torch.float64)} for _ in range(count)]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(inputs_embeds=batch["x"], use_cache=False).last_hidden_state.square().mean()


def weights(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    return [{p: getattr(layer.self_attn, f"{p}_proj").weight for p in "qkvo"} for layer in model.layers]


def of_key(rows: Tensor, key: int) -> Tensor:
    """``(query heads of a key head, channels)`` from one number for each channel of Q or O."""
    return rows.view(KEYS, SHARE, DIM)[key]


def units(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over what a qk channel, a vo channel and a query head hold, from one number for each channel of each."""
    qk, vo = torch.zeros(KEYS, DIM), torch.zeros(KEYS, DIM)
    head = torch.zeros(HEADS)
    qk, vo, head = qk.double(), vo.double(), head.double()
    for key in range(KEYS):
        for channel in range(DIM):
            own = key * DIM + channel
            qk[key, channel] = rows["k"][own] + of_key(rows["q"], key)[:, channel].sum()
            vo[key, channel] = rows["v"][own] + of_key(rows["o"], key)[:, channel].sum()
    for number in range(HEADS):
        key, own = number // SHARE, slice(number * DIM, (number + 1) * DIM)
        shared = slice(key * DIM, (key + 1) * DIM)
        head[number] = sum(rows[p][own].sum() for p in "qo") + sum(rows[p][shared].sum() for p in "kv")
    return qk, vo, head


def rows_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """One number for each channel: sums over rows of Q, K, V and columns of O."""
    return {p: value.sum(0 if p == "o" else 1) for p, value in values.items()}


def test_magnitude() -> None:
    model = llama()
    found = Magnitude().score(model, find_views(model))
    for one, parts in zip(found.values(), weights(model), strict=True):
        squares = rows_of({p: weight.detach().square() for p, weight in parts.items()})
        qk, vo, _ = units({p: value.sqrt() for p, value in squares.items()})
        torch.testing.assert_close(one.qk, qk / 2)
        torch.testing.assert_close(one.vo, vo / 2)


@pytest.mark.parametrize("scorer", ["taylor", "fisher", "fisher per sample"])
def test_gradients(scorer: str) -> None:
    """Batches of one sample, so that both kinds of Fisher information are the same."""
    model, total = llama(), []
    for batch in batches():
        loss = loss_fn(model, batch)
        parts = [weight for layer in weights(model) for weight in layer.values()]
        grads = iter(torch.autograd.grad(loss, parts))
        for number, layer in enumerate(weights(model)):
            own = {p: next(grads) for p in layer}
            if scorer == "taylor":
                now = [one.abs() for one in units(rows_of({p: own[p] * layer[p].detach() for p in own}))]
            else:
                now = list(units(rows_of({p: grad.square() for p, grad in own.items()})))
            total.append((number, [one / len(batches()) for one in now]))
    scorers = {"taylor": Taylor(), "fisher": Fisher(damping=0.0), "fisher per sample": Fisher(True, damping=0.0)}
    found = scorers[scorer].score(model, find_views(model), data=batches(), loss_fn=loss_fn, progress=False)
    for number, one in enumerate(found.values()):
        parts = [values for layer, values in total if layer == number]
        for mine, expected in zip((one.qk, one.vo, one.head), map(sum, zip(*parts, strict=True)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-14)


def test_gates() -> None:
    """Against gates that are really there: a factor on a channel in every query head that shares it."""
    model, found = llama(), []
    attention = [layer.self_attn for layer in model.layers]
    gates = [{kind: torch.ones(KEYS, DIM, dtype=torch.float64, requires_grad=True) for kind in ("qk", "vo")}
             for _ in attention]  # fmt: skip

    def spread(gate: Tensor) -> Tensor:
        return gate.repeat_interleave(SHARE, 0).flatten()

    hooks = []
    for module, gate in zip(attention, gates, strict=True):
        hooks.append(module.q_proj.register_forward_hook(lambda _, __, out, gate=gate: out * spread(gate["qk"])))
        hooks.append(
            module.o_proj.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * spread(gate["vo"]),))
        )
    leaves = [gate[kind] for gate in gates for kind in ("qk", "vo")]
    for batch in batches():
        found.append([grad.square() for grad in torch.autograd.grad(loss_fn(model, batch), leaves)])
    expected = [sum(parts) / len(found) for parts in zip(*found, strict=True)]
    for hook in hooks:
        hook.remove()
    scores = Gate().score(model, find_views(model), data=batches(), loss_fn=loss_fn, progress=False)
    mine = [one.of(kind) for one in scores.values() for kind in ("qk", "vo")]
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-14)


def test_plans_say_so_in_a_version_of_their_own() -> None:
    plan = make_plan(llama(), 0.5, heads="ragged")
    text = plan.to_json()
    assert '"version":4' in text
    assert Plan.from_json(text) == plan
    with pytest.raises(PlanFormatError, match="grouped queries"):
        Plan.from_json(text.replace('"version":4', '"version":3'))
