"""Queries with more channels than keys: multi-head latent attention, and gates, beyond the laws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import Plan, apply_plan, load_pruned, make_plan, masked, prune_attention, save_pruned
from attnprune.errors import PlanFormatError
from attnprune.families.proof.stand_in import StandIn
from attnprune.families.registry import Survey, all_views
from attnprune.planning.scorers import Magnitude
from attnprune.testing import check_family

from .families import LATENT
from .family import DECODER, randomised

HEADS, NOPE, ROPE, VALUE = 4, 8, 4, 6
KINDS = ({"kind": "DeepseekV3"}, {"kind": "DeepseekV2", "q_lora_rank": None})
every_kind = pytest.mark.parametrize("config", KINDS, ids=["DeepseekV3", "DeepseekV2"])


def language_model(kind: str, **config: Any) -> Any:
    more = {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None}
    built = getattr(transformers, f"{kind}Config")(**{**DECODER, **LATENT, **more, **config})
    return randomised(getattr(transformers, f"{kind}ForCausalLM")(built))


def given() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 4, 2, 6, 3, 8]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def data() -> list[dict[str, Tensor]]:
    return [{"input_ids": one, "labels": one} for one in torch.arange(36).remainder(17).add(2).view(3, 2, 6)]


@every_kind
def test_what_is_counted(config: dict[str, Any]) -> None:
    """Ratios are of the channels that may go; parameters are all, and heads take their rotary channels along."""
    model = language_model(**config)
    spec = attnprune.find_attention(model)[0]
    assert (spec.qk_dims, spec.vo_dims, spec.q_extra) == ((NOPE,) * HEADS, (VALUE,) * HEADS, ROPE)
    attention = model.model.layers[0].self_attn
    q = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
    own = sum(one.weight.numel() for one in (q, attention.kv_b_proj, attention.o_proj))
    assert spec.parameters == own
    for options in ({"heads": "ragged"}, {"granularity": "head"}, {"granularity": "joint", "heads": "ragged"}):
        other = copy.deepcopy(model)
        report = prune_attention(other, 0.5, scorer="magnitude", **options)
        assert report.achieved == pytest.approx(dict.fromkeys("qkvo", 0.5), abs=0.05)
        before, after = report.attention_parameters
        assert before - after == report.removed_parameters
        for layer, one in zip(report.layers, other.model.layers, strict=True):
            left = one.self_attn.q_proj if config.get("q_lora_rank", 1) is None else one.self_attn.q_b_proj
            assert left.out_features == layer.after.layout.channels("q") + ROPE * layer.after.heads
            assert one.self_attn.kv_a_proj_with_mqa.out_features == 12 + ROPE, "what is of low rank stays"
    assert report.cache_bytes is None, "a cache keeps what K and V are made from"


def test_scores_are_of_the_channels_that_may_go() -> None:
    model = language_model("DeepseekV3")
    found = Magnitude().score(model, all_views(model))
    for one, layer in zip(found.values(), model.model.layers, strict=True):
        attention = layer.self_attn
        q = attention.q_b_proj.weight.norm(dim=1).view(HEADS, NOPE + ROPE)[:, :NOPE]
        k, v = attention.kv_b_proj.weight.norm(dim=1).view(HEADS, NOPE + VALUE).split([NOPE, VALUE], 1)
        o = attention.o_proj.weight.norm(dim=0).view(HEADS, VALUE)
        torch.testing.assert_close(one.qk, ((q + k) / 2).detach())
        torch.testing.assert_close(one.vo, ((v + o) / 2).detach())
        torch.testing.assert_close(one.head, torch.stack([x.norm(dim=1) for x in (q, k, v, o)]).mean(0).detach())


@pytest.mark.parametrize("granularity", ["channel", "head", "joint"])
@pytest.mark.parametrize("target", ["target_params", "target_macs"])
def test_budgets_count_what_goes_with_a_head(target: str, granularity: str) -> None:
    model = language_model("DeepseekV3")
    report = prune_attention(
        model, scorer="magnitude", example_inputs=given(), granularity=granularity, **{target: 0.88}
    )
    assert report.plan.asked is not None
    assert report.plan.asked.budget is not None
    assert report.macs is not None
    before, after = report.macs if target == "target_macs" else report.model_parameters
    assert after / before == pytest.approx(report.plan.asked.budget.promised, abs=1e-9)
    assert 0.8 < after / before <= 0.88


@pytest.mark.parametrize("options", [{}, {"granularity": "head"}, {"heads": "ragged"}], ids=str)
@every_kind
def test_generation_and_files(config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    """Greedy tokens with a cache are those without one, and the masked model's; files hold it all."""
    dense, how = language_model(**config), {"max_new_tokens": 8, "do_sample": False}
    plan, pruned = make_plan(dense, 0.5, scorer="random", **options), copy.deepcopy(dense)
    apply_plan(pruned, plan)
    with masked(dense, plan):
        expected = dense.generate(**given(), **how)
        assert torch.equal(dense.generate(**given(), **how, use_cache=False), expected)
        logits = dense(**given()).logits
    torch.testing.assert_close(pruned(**given()).logits, logits, rtol=1e-10, atol=1e-10)
    again = load_pruned(save_pruned(pruned, tmp_path / "pruned"))
    for one in (pruned, again):
        assert torch.equal(one.generate(**given(), **how), expected)
        assert torch.equal(one.generate(**given(), **how, use_cache=False), expected)
    assert attnprune.find_attention(again) == attnprune.find_attention(pruned) == plan.after


@every_kind
def test_both_kinds_are_rotated_and_refitted(config: dict[str, Any]) -> None:
    report = prune_attention(language_model(**config), 0.5, data=data(), heads="ragged", progress=False)
    assert report.plan.asked is not None
    assert report.plan.asked.basis == "rotated"
    assert not any("instead of a rotated basis" in note for note in report.notes)
    assert report.verified is not None


def test_plans_say_so_in_a_version_of_their_own() -> None:
    plan = make_plan(language_model("DeepseekV3"), 0.5, heads="ragged")
    text = plan.to_json()
    assert '"version":5' in text
    assert Plan.from_json(text) == plan
    for changed in (text.replace('"version":5', '"version":4'), text.replace('"q_extra":4', '"q_extra":1048576')):
        with pytest.raises(PlanFormatError, match=r"more in Q than in K|q_extra of all heads"):
            Plan.from_json(changed)


def test_a_wide_model_is_proven_in_small() -> None:
    model = language_model("DeepseekV3", hidden_size=320, q_lora_rank=300, kv_lora_rank=280)
    view = Survey(model).views[0]
    small = StandIn(view, torch.float64, small=True)
    widths = {(64, 64), (48, 64), (68, 64), (56, 64), (64, 24)}
    assert {p.shape for p in small.host.parameters() if p.dim() > 1} == widths
    assert view.verdict is not None
    assert view.verdict.expanded


class Mine(nn.Module):
    """Rotary channels come before the others in a head's queries, values before keys; or a gate is in Q, too."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated, self.keys = 4, gated, 2 if gated else 4
        self.down, self.shared = nn.Linear(24, 7), nn.Linear(24, 2)
        self.ask = nn.Linear(24, 4 * (5 + 3) if gated else 4 * (2 + 3))
        self.offer, self.merge = nn.Linear(7, self.keys * (5 + 3)), nn.Linear(4 * 5, 24)

    def forward(self, x: Tensor) -> Tensor:
        more, q = self.ask(x).unflatten(-1, (4, -1)).transpose(1, 2).split([5 if self.gated else 2, 3], -1)
        v, k = self.offer(torch.tanh(self.down(x))).unflatten(-1, (self.keys, -1)).transpose(1, 2).split([5, 3], -1)
        k, v = (y.repeat_interleave(4 // self.keys, 1) for y in (k, v))
        logits = q @ k.mT
        if not self.gated:
            logits = logits + more @ self.shared(x)[:, None].mT
        context = logits.softmax(-1) @ v
        context = context * more.sigmoid() if self.gated else context
        return self.merge(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("gated", [False, True], ids=["latent", "gated"])
def test_a_class_of_ones_own(gated: bool) -> None:
    keys = {"kv_heads": 2} if gated else {}
    adapter = attnprune.register_adapter(Mine, q="ask", kv="offer", o="merge", heads="heads", scale=1.0, **keys)
    try:
        model = randomised(Mine(gated))
        view = Survey(model).views[0]
        assert (view.spec.qk_dim, view.spec.vo_dim, view.spec.q_extra) == (3, 5, 5 if gated else 2)
        assert view.verdict is not None
        assert view.verdict.order == "h vk d, h xq d"
        assert check_family(model, torch.randn(2, 5, 24, dtype=torch.float64), plans=4).ways == ("expanded",)
    finally:
        attnprune.unregister_adapter(adapter)
