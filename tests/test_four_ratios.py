"""Four independent ratios: what one of a pair loses beyond the other goes from features that it reads or writes.

``make test-exact`` runs 200 random quadruples for every family.
"""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnprune import (
    AttentionPruner,
    Plan,
    apply_plan,
    apply_to_checkpoint,
    calibrate,
    find_attention,
    load_pruned,
    make_plan,
    masked,
    prune_attention,
    save_pruned,
)
from attnprune.errors import CalibrationError, NotExpressibleError, ScorerError
from attnprune.families.registry import all_views
from attnprune.values.amount import shared
from attnprune.values.layout import KIND_OF, PROJECTIONS
from attnprune.values.ratios import Ratios
from attnprune.values.rules import Rules

from .conformance import check_exact, close, family, fresh, inputs
from .families import FAMILIES, randomised
from .selection import ALL, telling

CASES = int(os.environ.get("ATTNPRUNE_CASES", "2"))
MODES = list(itertools.product(("head", "channel", "joint"), ("local", "global"), ("uniform", "ragged")))
ratio = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9])
FOUR = (0.6, 0.3, 0.2, 0.5)


def unit(plan: Plan, p: Any, rules: Rules) -> float:
    """The largest share of a projection's weights that goes at a time, of what several projections share or of its own
    features."""
    specs = plan.specs
    if rules.scope == "local":
        return max(_unit(spec, p, rules) / spec.weights(p) for spec in specs)
    return max(_unit(spec, p, rules) for spec in specs) / sum(spec.weights(p) for spec in specs)


def _unit(spec: Any, p: Any, rules: Rules) -> float:
    channels, heads = spec.layout.channels(p), spec.layout.sizes(p)
    each = channels * spec.width(p) / len(heads)  # a head's
    if rules.granularity != "channel":
        return each * max(spec.groups)
    step = 2 if KIND_OF[p] == "qk" and any(spec.rotary_dims) else 1
    whole = each / max(heads) * step * (len(heads) if rules.heads == "uniform" else max(spec.groups))
    return max(whole, channels)


@pytest.mark.parametrize("name", telling(FAMILIES))
def test_each_projection_loses_its_own_share(name: str) -> None:
    @settings(max_examples=CASES, deadline=None)
    @given(ratios=st.tuples(ratio, ratio, ratio, ratio), mode=st.sampled_from(MODES), seed=st.integers(0, 999),
           case=st.integers(0, len(family(name).cases()) - 1), train=st.booleans())  # fmt: skip
    def check(ratios: tuple[float, ...], mode: tuple[str, str, str], seed: int, case: int, train: bool) -> None:
        model = fresh(name, case, train=train)
        rules = Rules(*mode)  # type: ignore[arg-type]
        most = 1 - 1 / find_attention(model)[0].kv_heads if mode[0] == "head" else 0.75 if mode[0] == "joint" else 1.0
        if min(ratios[:2]) > 0.75 or min(ratios[2:]) > 0.75:
            most = min(most, 0.75)
        ratios = tuple(min(one, most) for one in ratios)  # one head, or channel, of these small ones has to stay
        try:
            plan = make_plan(model, ratios, rules=rules, scorer="random", seed=seed)
        except NotExpressibleError:  # of one weight that its host reads all rows have the same features
            assert any(view.read for view in all_views(model))
            return
        together = shared(Ratios.parse(ratios), rules)
        for p, asked in zip(PROJECTIONS, ratios, strict=True):
            missed = abs(plan.fraction(p) - asked)
            assert missed < unit(plan, p, rules) + 1e-9, (p, asked, plan.fraction(p), mode)
            if asked > together.of(p):  # of features, whose units are small
                assert any(layer.features[PROJECTIONS.index(p)] for layer in plan) or missed < unit(plan, p, rules)
        assert Plan.from_json(plan.to_json()) == plan
        check_exact(name, model, inputs(name, case, seed), plan, 1e-10)
        assert [spec.shape for spec in find_attention(model)] == [spec.shape for spec in plan.after]

    check()


@pytest.mark.parametrize("name", ["ViT", "MHA", "Timm", "Decoder", "Seq2Seq"])
def test_saved_loaded_and_streamed_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, given_ = fresh(name, 0), inputs(name, 0)
    source = save_pruned(model, tmp_path / "dense")
    plan = make_plan(model, FOUR, scorer="random", heads="ragged")
    apply_plan(model, plan)
    folder = save_pruned(model, tmp_path / "pruned")
    again = load_pruned(folder, fresh(name, 0))
    state = again.state_dict()
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert find_attention(again) == find_attention(model)
    close(family(name).run(again, given_).detach(), family(name).run(model, given_).detach(), 0, "output")
    streamed = apply_to_checkpoint(source, plan, tmp_path / "streamed", model=fresh(name, 0).to("meta"))
    files = [sorted(path.read_bytes() for path in one.glob("*.safetensors")) for one in (folder, streamed)]
    assert files[0] == files[1]


SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
JOINT: dict[str, Any] = {
    "Conv1D": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    ),
    "by head": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=32)),
    "a Linear of its own": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)),
}


@pytest.mark.parametrize("name", JOINT)
def test_projections_that_lie_in_one_read_features_of_their_own(name: str, tmp_path: Path) -> None:
    """Hosts without a forward of ours: one Linear then holds several weights."""
    model = randomised(JOINT[name]()).eval()
    dense, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(TOKENS).logits.square().mean().backward()
    optimizer.step()
    plan = make_plan(model, FOUR, scorer="random", heads="ragged", example_inputs=TOKENS)
    with torch.no_grad(), masked(model, plan):
        expected = model(TOKENS).logits
    report = apply_plan(model, plan, example_inputs=TOKENS, optimizer=optimizer)
    assert "expanded" in str(report)
    close(model(TOKENS).logits.detach(), expected, 1e-12, "output")
    again = make_plan(model, (0.1, 0.3, 0.3, 0.2), scorer="random", heads="ragged", example_inputs=TOKENS)
    both = plan.then(again)
    apply_plan(model, again, optimizer=optimizer)
    whole = copy.deepcopy(dense)
    apply_plan(whole, both, example_inputs=TOKENS)
    assert [(key, tuple(p.shape)) for key, p in whole.named_parameters()] == [
        (key, tuple(p.shape)) for key, p in model.named_parameters()
    ]
    loaded = load_pruned(save_pruned(model, tmp_path), dense)
    close(loaded(TOKENS).logits.detach(), model(TOKENS).logits.detach(), 0, "loaded")
    before = model(TOKENS).logits.square().mean()
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
    assert model(TOKENS).logits.square().mean() < before


def encoder(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)))
    mix = torch.randn(8, 24, dtype=dtype)  # 8 directions carry what there is to know
    data = [torch.randn(60, 7, 8, dtype=dtype) @ mix + 0.3 for _ in range(3)]
    return model.to(dtype).eval(), data


@pytest.mark.parametrize("scorer", ["auto", "magnitude", "taylor", "fisher", "gate"])
def test_every_scorer_scores_features(scorer: str) -> None:
    model, data = encoder()
    plan = make_plan(model, FOUR, scorer=scorer, data=data, loss_fn=lambda m, x: m(x).square().mean(), progress=False)
    assert [round(plan.fraction(p), 1) for p in PROJECTIONS] == [0.6, 0.3, 0.2, 0.5]
    report = prune_attention(model, FOUR, scorer=scorer, data=data, progress=False,
                             loss_fn=lambda m, x: m(x).square().mean())  # fmt: skip
    assert report.verified is not None
    assert "0.6" in str(report) or "60" in str(report)


def test_a_feature_that_matters_to_nobody_goes_first() -> None:
    for scorer in ("auto", "magnitude", "taylor", "gate"):
        model, data = encoder()
        with torch.no_grad():
            for layer in model:
                layer.self_attn.in_proj_weight[:, :6] *= 1e-6
                layer.self_attn.out_proj.weight[18:] *= 1e-6
                layer.self_attn.out_proj.bias[18:] *= 1e-6
        plan = make_plan(model, {"q": 0.25, "v": 0.25}, scorer=scorer, data=data, progress=False, scope="local",
                         loss_fn=None if scorer in ("auto", "gate") else lambda m, x: m(x).square().mean())  # fmt: skip
        assert [layer.features for layer in plan] == [((*range(6),), (), (*range(6),), ())] * 2, scorer


def test_refits_make_up_for_features_that_others_tell() -> None:
    """Inputs of 8 directions in 24 features: two thirds of what Q and V read are told by the rest."""
    model, data = encoder()
    ratios = {"q": 0.5, "v": 0.5}
    dense = copy.deepcopy(model)[:1]
    with torch.no_grad():
        expected = dense(data[0])
    errors = {}
    for compensate in (False, True):
        pruned = copy.deepcopy(model)[:1]
        report = prune_attention(pruned, ratios, data=data, compensate=compensate, progress=False, verify=True)
        assert report.verified is not None
        with torch.no_grad():
            errors[compensate] = float((pruned(data[0]) - expected).norm() / expected.norm())
    assert errors[True] < 0.02 < errors[False]


def test_means_of_what_is_no_longer_written_stay() -> None:
    model, data = encoder()
    model = model[:1]
    expected = model[0].self_attn(data[0], data[0], data[0])[0].flatten(0, 1).mean(0)
    prune_attention(model, {"o": 0.5}, data=[data[0]], progress=False)
    found = model[0].self_attn(data[0], data[0], data[0])[0].flatten(0, 1).mean(0)
    close(found, expected, 1e-8, "mean")


def test_plans_with_refits_compose_and_survive_json() -> None:
    model, data = encoder()
    whole, x = copy.deepcopy(model), data[0]
    first = make_plan(model, (0.4, 0.2, 0.1, 0.3), data=data, progress=False)
    apply_plan(model, first)
    second = make_plan(model, (0.2, 0.3, 0.3, 0.1), data=data, progress=False)
    apply_plan(model, second)
    both = first.then(second)
    assert any(layer.refit for layer in both)
    assert Plan.from_json(both.to_json()) == both
    assert Plan.from_json(both.to_json()).digest == both.digest
    with masked(whole, both):
        seen = whole(x)
    apply_plan(whole, both)
    close(whole(x), model(x), 1e-9, "output")
    close(seen, model(x), 1e-9, "masked")


def test_a_calibration_that_knows_no_inputs_is_refused_and_one_that_does_is_enough(tmp_path: Path) -> None:
    model, data = encoder()
    with pytest.raises(CalibrationError, match="reads=True"):
        make_plan(model, FOUR, calibration=calibrate(model, data, progress=False), progress=False)
    known = calibrate(model, data, reads=True, progress=False)
    torch.save(known.state_dict(), tmp_path / "known")
    known = type(known).from_state_dict(torch.load(tmp_path / "known"))
    options: dict[str, Any] = {"scope": "local", "progress": False}
    plan = make_plan(model, FOUR, calibration=known, method={"basis": "rotated", "compensate": True}, **options)
    assert plan.layers[0].refit is not None


def test_scorers_without_scores_of_features_are_refused() -> None:
    from attnprune import Scorer, Scores

    class Flat(Scorer):
        def score(self, model: Any, views: Any, **_: Any) -> dict[str, Scores]:
            return {v.name: Scores(torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4)) for v in views}

    model, _ = encoder()
    with pytest.raises(ScorerError, match="score_features"):
        make_plan(model, {"q": 0.5}, scorer=Flat())
    assert make_plan(model, 0.5, scorer=Flat()).fraction("q") == 0.5


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_on_and_optimizers_follow(kind: Any) -> None:
    model, data = encoder()
    optimizer = kind(model.parameters(), lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    for x in data:
        model(x).square().mean().backward()
        optimizer.step()
    before = {name: optimizer.state[p] for name, p in model.named_parameters()}
    old = {key: value.clone() for key, value in before["0.self_attn.out_proj.weight"].items()}
    plan = make_plan(model, FOUR, scorer="magnitude")
    apply_plan(model, plan, optimizer=optimizer)
    layer, out = plan.layers[0], model[0].self_attn.out_proj.weight  # type: ignore[union-attr]
    rows, columns = list(layer.left("o")), [head * 6 + one for head, kept in layer.stays("o") for one in kept]
    for key, value in optimizer.state[out].items():
        if value.dim():
            close(value, old[key][rows][:, columns], 0, key)
    start = model(data[0]).square().mean()
    for _ in range(3):
        optimizer.zero_grad()
        model(data[0]).square().mean().backward()
        optimizer.step()
    assert model(data[0]).square().mean() < start


def test_a_pruner_reaches_four_ratios_in_steps() -> None:
    model, data = encoder()
    pruner = AttentionPruner(model, FOUR, steps=4)
    while not pruner.done:
        model.zero_grad()
        model(data[0]).square().mean().backward()
        pruner.observe()
        pruner.step()
    assert [round(pruner.report.plan.fraction(p), 1) for p in PROJECTIONS] == [0.6, 0.3, 0.2, 0.5]
    state = pruner.state_dict()
    fresh_model, _ = encoder()
    again = AttentionPruner(fresh_model, FOUR, steps=4)
    again.load_state_dict(state)
    assert find_attention(fresh_model) == find_attention(model)
    fresh_model.load_state_dict(model.state_dict())
    close(fresh_model(data[0]), model(data[0]), 0, "output")


@pytest.mark.skipif(not ALL, reason="compiled in make test-all")
def test_compiled_and_exported() -> None:
    model, data = encoder(torch.float32)
    prune_attention(model, FOUR, heads="ragged")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(data[0]), model(data[0]), 1e-5, "compiled")
    exported = torch.export.export(model, (data[0],)).module()
    close(exported(data[0]), model(data[0]), 1e-5, "exported")
