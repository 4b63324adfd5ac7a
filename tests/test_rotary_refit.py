"""Refits of rotary attention: queries take the pairs that stay for those that went, as far as these turn alike."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnprune
from attnprune.calibration.elimination import refitted_losses
from attnprune.calibration.refit import refit_one
from attnprune.errors import CalibrationError
from attnprune.families.registry import find_views

from .conformance import fresh, inputs

DIM = 8
NAME = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Of four pairs of channels two hardly turn, and of these one is half of the other in K."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, head_dim=DIM, rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
        attention = model.model.layers[0].self_attn
        for first in range(3, 8 * DIM, DIM // 2):  # the last channel of either half of a head
            attention.q_proj.weight[first] *= 0.3
        for first in range(3, 2 * DIM, DIM // 2):
            attention.k_proj.weight[first] = 0.5 * attention.k_proj.weight[first - 1]
    return model


@pytest.fixture(scope="module")
def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (4, 24), generator=generator)} for _ in range(6)]


@torch.no_grad()
def error(model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]], **options: object) -> float:
    """Largest change of the logits, with a quarter of the pairs gone."""
    pruned = copy.deepcopy(model)
    report = attnprune.prune_attention(pruned, {"qk": 0.25}, data=data, scope="local", progress=False, **options)  # type: ignore[arg-type]
    assert report.plan.layers[0].qk == ((3, 7), (3, 7))
    assert report.verified is not None
    return float((pruned(**data[0]).logits - model(**data[0]).logits).abs().max())


def test_queries_make_up_for_a_pair_that_turns_like_another(model, data):
    lost = error(model, data, basis="channels", compensate=False)
    assert error(model, data, basis="channels", compensate=True) < 0.05 * lost
    assert error(model, data) < 0.05 * lost


def test_pairs_that_turn_apart_are_not_mixed():
    covariance = torch.eye(4, dtype=torch.float64)
    kept = torch.eye(4, dtype=torch.float64)[:2]
    torch.testing.assert_close(refit_one(covariance, kept, kept), kept)


def test_keys_count_as_queries_see_them(model, data):
    """Channels that hardly turn stay as like one another as they are in K."""
    found = attnprune.calibrate(model, data, progress=False)[NAME]
    assert found.relative
    keys = found.keys()[0]
    slow = keys[[2, 3]][:, [2, 3]]  # hardly turned: one is half of the other
    torch.testing.assert_close(slow[1, 1], slow[0, 0] / 4, rtol=1e-3, atol=0)
    torch.testing.assert_close(slow[0, 1], slow[0, 0] / 2, rtol=1e-3, atol=0)


def test_padding_is_not_seen(model, data):
    ids = data[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    padded = [{"input_ids": ids.where(mask.bool(), other), "attention_mask": mask} for other in (7, 8)]
    one, other = (attnprune.calibrate(model, [batch], progress=False)[NAME].keys()[0] for batch in padded)
    torch.testing.assert_close(one, other)


def test_what_keys_are_is_stored_and_merged(model, data):
    one = attnprune.calibrate(model, data[:3], progress=False)
    again = attnprune.Calibration.from_state_dict(one.state_dict())
    assert again[NAME].relative
    both = again.merge(attnprune.calibrate(model, data[3:], progress=False))
    whole = attnprune.calibrate(model, data, progress=False)
    torch.testing.assert_close(both[NAME].keys()[1], whole[NAME].keys()[1])
    layer = one[NAME]
    plain = attnprune.Calibration({NAME: type(layer)(layer.spec, layer.q, layer.k, layer.c)})
    with pytest.raises(CalibrationError, match="keys rotated"):
        one.merge(plain)


def test_queries_that_a_norm_follows_are_left(data):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=DIM,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    assert not attnprune.calibrate(model, data, progress=False)[NAME].relative
    plan = attnprune.make_plan(model, 0.5, data=data, scope="local", progress=False)
    fold = plan.layers[0].fold
    assert fold is not None
    assert bool(((fold.q[0] == 0) | (fold.q[0] == 1)).all())


def test_losses_in_turn_are_those_of_refits():
    """Of every prefix of the order, the sum is what the best fit of the rest loses."""
    generator = torch.Generator().manual_seed(3)
    left, covariance = (x @ x.T for x in torch.randn(2, 6, 9, generator=generator, dtype=torch.float64))
    units = [(0, 3), (1, 4), (2, 5)]
    losses = refitted_losses(left, covariance, units)
    order = sorted(units, key=lambda unit: float(losses[list(unit)].sum()))
    for count in (1, 2):
        gone = {channel for unit in order[:count] for channel in unit}
        kept = torch.eye(6, dtype=torch.float64)[[channel for channel in range(6) if channel not in gone]]
        rest = torch.eye(6, dtype=torch.float64) - refit_one(covariance, kept, kept).T @ kept
        lost = float(torch.trace(left @ rest @ covariance @ rest.T))
        told = sum(float(losses[list(unit)].sum()) for unit in order[:count])
        assert lost <= told * (1 + 1e-2)
        assert abs(lost - told) < 0.05 * lost


@pytest.mark.parametrize(("number", "tokens"), [(1, 5), (2, 8)], ids=["DINOv3", "Pixtral"])
def test_tables_are_those_of_all_tokens(number, tokens):
    """Also where the whole batch shares one, and where it leaves out the first token, which is not rotated."""
    model, given, seen = fresh("Sight", number), inputs("Sight", number), {}
    for view in find_views(model):
        view.module.register_forward_pre_hook(
            lambda module, args, kwargs, view=view: seen.update({view.name: view.adapter.turning(view, args, kwargs)}),
            with_kwargs=True,
        )
    model(**given)
    assert len(seen) == 2
    for turning in seen.values():
        assert turning.cos.shape == turning.sin.shape == (1, tokens, DIM)
        assert bool((turning.cos[:, 0] == 1).all())
        assert bool((turning.cos[:, 1] != 1).any())
