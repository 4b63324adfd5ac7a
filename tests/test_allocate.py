"""Who goes: the paper's four selections written anew, and what holds for every request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification

from attnprune import (
    AttentionSpec,
    LayerPlan,
    Plan,
    Ratios,
    Rules,
    Scorer,
    Scores,
    allocate,
    errors,
    make_plan,
    prune_attention,
)
from attnprune.cost.counting import parameter_prices, total
from attnprune.families.base import AttentionView
from attnprune.planning.allocate import Layer

Array = NDArray[np.float64]
LAYERS, HEADS, DIM, WIDTH = 3, 4, 8, 32

# the paper, to the letter


def model() -> Any:
    """A small AST whose layers and heads matter more or less; the first layer least, so that its floor is reached."""
    config = ASTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=37, num_mel_bins=16,
        max_length=24, patch_size=8, frequency_stride=8, time_stride=8, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = ASTForAudioClassification(config).double().eval()
        with torch.no_grad():
            for i, layer in enumerate(found.audio_spectrogram_transformer.layers):
                for linear in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
                    linear.weight.add_(torch.randn_like(linear.weight) * torch.rand(WIDTH, 1) * (0.02, 0.2, 0.3)[i])
                o = layer.attention.o_proj.weight
                o.add_(torch.randn_like(o) * torch.rand(1, WIDTH) * (0.02, 0.3, 0.2)[i])
    return found


def data() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 24, 16, generator=generator, dtype=torch.float64)
    return [(batch, torch.arange(4) % 3) for batch in x]


def weights(of: Any, read: Callable[[torch.Tensor], torch.Tensor]) -> list[dict[str, Array]]:
    """By layer: q, k, v rows and o columns, ``(heads, channels, width)``."""
    found = []
    for layer in of.audio_spectrogram_transformer.layers:
        a = layer.attention
        each = {"q": a.q_proj.weight, "k": a.k_proj.weight, "v": a.v_proj.weight, "o": a.o_proj.weight}
        arrays = {key: read(weight).detach().numpy() for key, weight in each.items()}
        arrays["o"] = arrays["o"].T
        found.append({key: array.reshape(HEADS, DIM, WIDTH) for key, array in arrays.items()})
    return found


def mag() -> tuple[Array, Array, Array]:
    """MAG: qk ``(layers, heads, channels)``, vo, head ``(layers, heads)``."""
    w = weights(model(), lambda weight: weight)
    row = {key: np.stack([np.sqrt((layer[key] ** 2).sum(-1)) for layer in w]) for key in "qkvo"}
    head = np.stack([sum(np.sqrt((layer[key] ** 2).sum((1, 2))) for key in "qkvo") / 4 for layer in w])
    return (row["q"] + row["k"]) / 2, (row["v"] + row["o"]) / 2, head


def fi() -> tuple[Array, Array, Array]:
    """FI: the squared gradient averaged over batches, plus 1e-6 per weight, summed over a unit's weights."""
    squares: list[list[dict[str, Array]]] = []
    for x, y in data():
        fresh = model()
        nn.functional.cross_entropy(fresh(x).logits, y).backward()
        squares.append([{k: g**2 for k, g in layer.items()} for layer in weights(fresh, lambda w: w.grad)])  # type: ignore
    mean = [
        {key: sum(batch[i][key] for batch in squares) / len(squares) + 1e-6 for key in "qkvo"} for i in range(LAYERS)
    ]
    qk = np.stack([(layer["q"] + layer["k"]).sum(-1) for layer in mean])
    vo = np.stack([(layer["v"] + layer["o"]).sum(-1) for layer in mean])
    return qk, vo, qk.sum(-1) + vo.sum(-1)


SCORES = {"magnitude": cache(mag), "fisher": cache(fi)}


def ph(scores: Array, counts: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """In each head of a layer the lowest channels, as many as the layer's count."""
    lowest = scores.argsort(-1)
    return [[tuple(sorted(row[:n].tolist())) for row in lowest[i]] for i, n in enumerate(counts)]


def ph_local(scores: Array, ratio: float) -> list[list[tuple[int, ...]]]:
    return ph(scores, [round(ratio * DIM)] * LAYERS)


def ph_global(scores: Array, ratio: float) -> list[list[tuple[int, ...]]]:
    """Greedy: a move removes one more channel from every head of one layer, for the sum of the cheapest that remain."""
    ascending, counts = np.sort(scores, -1), [0] * LAYERS
    for _ in range(round(ratio * LAYERS * DIM)):
        costs = {i: ascending[i, :, counts[i]].sum() for i in range(LAYERS) if counts[i] < DIM - 1}
        counts[min(costs, key=costs.__getitem__)] += 1
    return ph(scores, counts)


def eh_local(scores: Array, ratio: float) -> list[tuple[int, ...]]:
    """The same fraction of heads in each layer."""
    return [tuple(sorted(row.argsort()[: round(ratio * HEADS)].tolist())) for row in scores]


def eh_global(scores: Array, ratio: float) -> list[tuple[int, ...]]:
    """Heads compete over layers; every layer keeps one."""
    gone: list[list[int]] = [[] for _ in range(LAYERS)]
    for flat in scores.argsort(axis=None):
        layer, head = divmod(int(flat), HEADS)
        if sum(map(len, gone)) < round(ratio * LAYERS * HEADS) and len(gone[layer]) < HEADS - 1:
            gone[layer].append(head)
    return [tuple(sorted(heads)) for heads in gone]


def paper_plan(granularity: str, scope: str, scorer: str, ratio: Any) -> Plan:
    return make_plan(
        model(), ratio, granularity=granularity, scope=scope, scorer=scorer, heads="uniform", split="fixed",
        basis="channels", compensate=False, data=data() if scorer == "fisher" else None, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.7])
@pytest.mark.parametrize("scorer", SCORES)
@pytest.mark.parametrize(("scope", "select"), [("local", ph_local), ("global", ph_global)])
def test_paper_ph(scope: str, select: Callable[..., Any], scorer: str, ratio: float) -> None:
    plan = paper_plan("channel", scope, scorer, ratio)
    qk, vo, _ = SCORES[scorer]()
    assert [list(layer.qk) for layer in plan] == select(qk, ratio)
    assert [list(layer.vo) for layer in plan] == select(vo, ratio)
    assert not any(layer.heads for layer in plan)


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.7])
@pytest.mark.parametrize("scorer", SCORES)
@pytest.mark.parametrize(("scope", "select"), [("local", eh_local), ("global", eh_global)])
def test_paper_eh(scope: str, select: Callable[..., Any], scorer: str, ratio: float) -> None:
    plan = paper_plan("head", scope, scorer, ratio)
    _, _, head = SCORES[scorer]()
    assert [layer.heads for layer in plan] == select(head, ratio)
    assert not any(channels for layer in plan for channels in (*layer.qk, *layer.vo))


@pytest.mark.parametrize("scorer", SCORES)
def test_paper_budgets_of_qk_and_vo_are_separate(scorer: str) -> None:
    both = paper_plan("channel", "global", scorer, {"qk": 0.5, "vo": 0.25})
    qk, vo, _ = SCORES[scorer]()
    assert [list(layer.qk) for layer in both] == ph_global(qk, 0.5)
    assert [list(layer.vo) for layer in both] == ph_global(vo, 0.25)
    assert (both.fraction("q"), both.fraction("k"), both.fraction("v"), both.fraction("o")) == (0.5, 0.5, 0.25, 0.25)


def test_the_small_ast_can_tell_the_selections_apart() -> None:
    """Else the tests above would prove little."""
    for scorer in SCORES:
        plans = {paper_plan(g, s, scorer, 0.5).layers for g in ("head", "channel") for s in ("local", "global")}
        assert len(plans) == 4
        kept = [layer.after.heads for layer in paper_plan("head", "global", scorer, 0.5)]
        assert len(set(kept)) > 1
    assert 1 in [layer.after.heads for layer in paper_plan("head", "global", "magnitude", 0.5)], "the floor is reached"
    assert (
        paper_plan("channel", "local", "fisher", 0.5).layers != paper_plan("channel", "local", "magnitude", 0.5).layers
    )


# any request


@st.composite
def spec_lists(draw: st.DrawFn, ragged: bool = True) -> list[AttentionSpec]:
    """One to three attention modules of any shape."""
    specs = []
    for i in range(draw(st.integers(1, 3))):
        heads, sizes = draw(st.integers(1, 4)), st.integers(1, 9)
        if ragged and draw(st.booleans()):
            dims = [tuple(draw(sizes) for _ in range(heads)) for _ in range(2)]
        else:
            dims = [(draw(sizes),) * heads for _ in range(2)]
        widths = [draw(st.integers(1, 40)) for _ in range(4)]
        specs.append(AttentionSpec(f"layers.{i}", widths[0], dims[0], dims[1], 0.5, *widths[1:]))
    return specs


def random_scores(specs: Sequence[AttentionSpec], seed: int, negative: bool = False) -> dict[str, Scores]:
    """Distinct scores, over several powers of ten."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).exp()
        return -values if negative else values

    return {s.name: Scores(draw(s.heads, s.qk_dim), draw(s.heads, s.vo_dim), draw(s.heads)) for s in specs}


rules = st.builds(
    Rules,
    granularity=st.sampled_from(["head", "channel", "joint"]),
    scope=st.sampled_from(["local", "global"]),
    heads=st.sampled_from(["uniform", "ragged"]),
    split=st.sampled_from(["fixed", "auto"]),
    round_to=st.sampled_from([1, 1, 2, 3, 4, 8]),
    min_heads=st.integers(1, 3),
    min_channels=st.integers(1, 3),
)
shares = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9]), st.floats(0, 0.95))
seeds = st.integers(0, 2**32 - 1)


def fits(specs: Sequence[AttentionSpec], rule: Rules) -> bool:
    """Whether the rules can take these specs at all: uniform channels want heads that are alike."""
    if rule.granularity == "head" or rule.heads == "ragged":
        return True
    return all(len(set(spec.qk_dims)) == len(set(spec.vo_dims)) == 1 for spec in specs)


def ratios_for(rule: Rules, qk: float, vo: float) -> Ratios:
    vo = qk if rule.granularity == "head" and rule.split == "fixed" else vo
    return Ratios(qk, qk, vo, vo)


def channels(spec: AttentionSpec, kind: str) -> int:
    return sum(spec.qk_dims if kind == "qk" else spec.vo_dims)


def price(spec: AttentionSpec, kind: str) -> int:
    """Weights in one channel."""
    return spec.q_in + spec.k_in if kind == "qk" else spec.v_in + spec.d_model


def freed(layers: Sequence[LayerPlan], kind: str) -> int:
    return sum((channels(one.spec, kind) - channels(one.after, kind)) * price(one.spec, kind) for one in layers)


def unit(spec: AttentionSpec, kind: str, rule: Rules) -> int:
    """Weights in one unit of the granularity and rounding; under ``joint`` a head is one, too."""
    dim = max(spec.qk_dims if kind == "qk" else spec.vo_dims)
    step = min(rule.round_to, dim) * (1 if rule.heads == "ragged" else spec.heads)
    channels_in = {"head": rule.round_to * dim, "channel": step, "joint": step}
    return channels_in[rule.granularity] * price(spec, kind)


def budgets(plan: Plan, ratios: Ratios, rule: Rules) -> list[tuple[float, int, int]]:
    """By layer or for all, by qk and vo or for both: weights asked, weights freed, weights in one unit."""
    groups = [[layer] for layer in plan] if rule.scope == "local" else [list(plan)]
    kinds = [("qk", "vo")] if rule.split == "auto" else [("qk",), ("vo",)]
    found = []
    for group in groups:
        for both in kinds:
            share = {"qk": ratios.qk, "vo": ratios.vo}
            wanted = sum(
                share[kind] * channels(one.spec, kind) * price(one.spec, kind) for kind in both for one in group
            )
            largest = max(sum(unit(one.spec, kind, rule) for kind in both) for one in group)
            found.append((wanted, sum(freed(group, kind) for kind in both), largest))
    return found


@settings(derandomize=True, deadline=None, max_examples=150)
@given(spec_lists(), rules, shares, shares, seeds, st.booleans())
def test_asked_is_kept(
    specs: list[AttentionSpec], rule: Rules, qk: float, vo: float, seed: int, negative: bool
) -> None:
    """Within one unit, floors and rounding hold; or AllocationError, where the floors do not allow it."""
    assume(fits(specs, rule))
    ratios, scores = ratios_for(rule, qk, vo), random_scores(specs, seed, negative)
    try:
        plan = allocate(specs, scores, ratios, rule)
    except errors.AllocationError:
        assert not reachable(specs, ratios, rule), "the floors would allow it"
        return
    for wanted, got, one in budgets(plan, ratios, rule):
        assert abs(got - wanted) < one + 1e-6
    for layer in plan:
        check_rules(layer, rule)
    assert plan.asked is not None
    assert plan.asked.ratios == ratios
    assert allocate(specs, scores, ratios, rule) == plan


def check_rules(layer: LayerPlan, rule: Rules) -> None:
    """Floors, rounding and uniform heads."""
    spec, after = layer.spec, layer.after
    assert after.heads >= min(rule.min_heads, spec.heads)
    if rule.granularity == "channel":
        assert after.heads == spec.heads
    if rule.granularity == "head":
        assert after.heads == spec.heads or after.heads % rule.round_to == 0
        assert not any(layer.qk + layer.vo)
    for kind in ("qk", "vo"):
        before = [spec.dims(kind)[head] for head in layer.kept_heads]
        left = list(after.dims(kind))
        if rule.granularity != "head":
            assert all(
                a == b or (a % rule.round_to == 0 and a >= rule.min_channels) for a, b in zip(left, before, strict=True)
            )
        if rule.heads == "uniform" and rule.granularity != "head":
            assert len(set(left)) == 1


def reachable(specs: Sequence[AttentionSpec], ratios: Ratios, rule: Rules) -> bool:
    """Whether removing all that floors and rounding allow reaches every budget."""

    def least(dim: int) -> int:
        floor = -(-rule.min_channels // rule.round_to) * rule.round_to
        return min(dim, floor)

    def most(spec: AttentionSpec, kind: str) -> int:
        dims = spec.qk_dims if kind == "qk" else spec.vo_dims
        if rule.granularity == "head":
            kept = min(spec.heads, -(-rule.min_heads // rule.round_to) * rule.round_to)
            return sum(sorted(dims)[: spec.heads - kept]) * price(spec, kind)
        return sum(dim - least(dim) for dim in dims) * price(spec, kind)

    groups = [[spec] for spec in specs] if rule.scope == "local" else [list(specs)]
    kinds = [("qk", "vo")] if rule.split == "auto" else [("qk",), ("vo",)]
    share = {"qk": ratios.qk, "vo": ratios.vo}
    return all(
        sum(most(spec, kind) for spec in group for kind in both)
        >= sum(share[kind] * channels(spec, kind) * price(spec, kind) for spec in group for kind in both)
        for group in groups
        for both in kinds
    )


@settings(derandomize=True, deadline=None, max_examples=80)
@given(spec_lists(ragged=False), rules, shares, shares, seeds, st.randoms(use_true_random=False))
def test_order(specs: list[AttentionSpec], rule: Rules, qk: float, vo: float, seed: int, shuffle: Any) -> None:
    """A permutation of heads, or of channels inside a head, permutes the plan and nothing else."""
    ratios, scores = ratios_for(rule, qk, vo), random_scores(specs, seed)
    try:
        plan = allocate(specs, scores, ratios, rule)
    except errors.AllocationError:
        with pytest.raises(errors.AllocationError):
            allocate(specs, {s.name: permuted(s, scores[s.name], shuffle)[0] for s in specs}, ratios, rule)
        return
    moved = {spec.name: permuted(spec, scores[spec.name], shuffle) for spec in specs}
    other = allocate(specs, {name: found for name, (found, *_) in moved.items()}, ratios, rule)
    for layer in plan:
        _, heads, inner = moved[layer.spec.name]
        now = other[layer.spec.name]
        assert {heads[head] for head in now.heads} == set(layer.heads)
        for kind in ("qk", "vo"):
            for head, gone in enumerate(now.removed(kind)):
                old = layer.removed(kind)[heads[head]]
                assert {inner[kind][head][channel] for channel in gone} == set(old)


def permuted(spec: AttentionSpec, scores: Scores, shuffle: Any) -> tuple[Scores, list[int], dict[str, list[list[int]]]]:
    """Scores with heads and channels elsewhere; for every new place, the old one."""
    heads = shuffle.sample(range(spec.heads), spec.heads)
    inner = {
        kind: [shuffle.sample(range(dim), dim) for dim in [spec.dims(kind)[0]] * spec.heads] for kind in ("qk", "vo")
    }
    moved = {
        kind: torch.stack([scores.of(kind)[old][order] for old, order in zip(heads, inner[kind], strict=True)])
        for kind in ("qk", "vo")
    }
    return Scores(moved["qk"], moved["vo"], scores.head[heads]), heads, inner


@settings(derandomize=True, deadline=None, max_examples=80)
@given(spec_lists(ragged=False), shares, seeds)
def test_lower_scores_go_first(specs: list[AttentionSpec], share: float, seed: int) -> None:
    """In every head what goes scores lower than what stays; with ragged heads, in all heads of one size together."""
    scores = random_scores(specs, seed)
    for rule in (Rules(), Rules(scope="local"), Rules(heads="ragged"), Rules(granularity="joint")):
        try:
            plan = allocate(specs, scores, Ratios.parse(share), rule)
        except errors.AllocationError:
            continue
        for layer in plan:
            for kind in ("qk", "vo"):
                values = scores[layer.spec.name].of(kind)
                cheapest_left, dearest_gone = [], []
                for head in layer.kept_heads:
                    kept, gone = list(layer.kept(kind, head)), list(layer.removed(kind)[head])
                    assert not gone or float(values[head, gone].max()) < float(values[head, kept].min())
                    dearest_gone += [float(values[head, gone].max())] if gone else []
                    cheapest_left += [float(values[head, kept].min())] if len(kept) > 1 else []
                if rule.heads == "ragged" and cheapest_left and dearest_gone:
                    assert max(dearest_gone) < min(cheapest_left)


# ties


def ones(specs: Sequence[AttentionSpec]) -> dict[str, Scores]:
    return {
        s.name: Scores(torch.ones(s.heads, s.qk_dim), torch.ones(s.heads, s.vo_dim), torch.ones(s.heads)) for s in specs
    }


def plain(layers: int = 2, heads: int = 4, dim: int = 4, **more: Any) -> list[AttentionSpec]:
    # names whose order as strings is not the model's
    return [
        AttentionSpec.of(f"layers.{9 + i}", heads=heads, head_dim=dim, d_model=heads * dim, **more)
        for i in range(layers)
    ]


def test_ties_go_by_model_order_then_unit() -> None:
    specs = plain()
    first, second = allocate(specs, ones(specs), Ratios.parse(0.5))
    assert first.qk == first.vo == ((0, 1, 2),) * 4
    assert second.qk == second.vo == ((0,),) * 4
    first, second = allocate(specs, ones(specs), Ratios.parse(0.5), Rules(scope="local"))
    assert first.qk == second.vo == ((0, 1),) * 4
    first, second = allocate(specs, ones(specs), Ratios.parse(0.5), Rules(granularity="head"))
    assert (first.heads, second.heads) == ((0, 1, 2), (0,))
    first, second = allocate(specs, ones(specs), Ratios.parse(0.25), Rules(heads="ragged"))
    assert first.qk == ((0, 1, 2), (0, 1, 2), (0, 1), ())
    assert second.empty


def test_equal_scores_within_a_head_go_by_channel_whatever_the_rest() -> None:
    specs = plain(layers=1, heads=2)
    scores = Scores(torch.tensor([[3.0, 1, 1, 1], [2, 1, 2, 2]]), torch.ones(2, 4), torch.ones(2))
    (layer,) = allocate(specs, {"layers.9": scores}, Ratios.parse(0.5))
    assert layer.qk == ((1, 2), (0, 1))


# scope, split, joint


def test_local_takes_the_same_fraction_of_every_layer() -> None:
    specs = plain(layers=3)
    scores = random_scores(specs, 0)
    scores["layers.10"] = Scores(*(1e6 * getattr(scores["layers.10"], key) for key in ("qk", "vo", "head")))
    local = allocate(specs, scores, Ratios.parse(0.5), Rules(scope="local"))
    assert [layer.fraction("q") for layer in local] == [0.5] * 3
    spread = [layer.fraction("q") for layer in allocate(specs, scores, Ratios.parse(0.5), Rules(scope="global"))]
    assert spread == [0.75, 0.0, 0.75]


@pytest.mark.parametrize("granularity", ["channel", "joint"])
def test_auto_split_takes_from_the_cheaper_kind(granularity: Any) -> None:
    specs = plain(heads=1, dim=16)
    cheap = {s.name: Scores(torch.rand(1, 16), 100 + torch.rand(1, 16), torch.ones(1)) for s in specs}
    rule = Rules(granularity=granularity, split="auto")
    plan = allocate(specs, cheap, Ratios.parse(0.25), rule)
    assert (plan.fraction("q"), plan.fraction("v")) == (0.5, 0.0)
    # the total is what counts, not who was asked to bear it
    assert allocate(specs, cheap, Ratios.parse({"vo": 0.5}), rule).layers == plan.layers
    fixed = allocate(specs, cheap, Ratios.parse({"vo": 0.5}), Rules(granularity=granularity))
    assert (fixed.fraction("q"), fixed.fraction("v")) == (0.0, 0.5)


def test_auto_split_compares_by_weight() -> None:
    """A channel that holds twice the weights is the better bargain at less than twice the score."""
    spec = AttentionSpec.of("a", heads=1, head_dim=8, d_model=8, q_in=24, k_in=24)  # qk: 48 weights, vo: 16
    for qk, kind in ((2.9, "qk"), (3.1, "vo")):
        scores = Scores(torch.full((1, 8), qk), torch.ones(1, 8), torch.ones(1))
        (layer,) = allocate([spec], {"a": scores}, Ratios.parse({"qk": 1 / 8}), Rules(split="auto"))
        gone = {kind for kind in ("qk", "vo") if any(layer.removed(kind))}
        assert gone == {kind}


def test_joint_drops_a_head_whose_channels_are_all_cheap() -> None:
    specs = plain(layers=2, dim=8)
    scores = {s.name: Scores(1 + torch.rand(4, 8), 1 + torch.rand(4, 8), torch.ones(4)) for s in specs}
    for name, head in (("layers.9", 2), ("layers.10", 0)):
        scores[name].qk[head] *= 1e-6
        scores[name].vo[head] *= 1e-6
    plan = allocate(specs, scores, Ratios.parse(0.25), Rules(granularity="joint"))
    assert [layer.heads for layer in plan] == [(2,), (0,)]
    assert not any(gone for layer in plan for gone in (*layer.qk, *layer.vo))
    # and where all heads are alike, channels go
    for name in scores:
        scores[name] = Scores(torch.arange(8.0).expand(4, 8) + 1, torch.arange(8.0).expand(4, 8) + 1, torch.ones(4))
    plan = allocate(specs, scores, Ratios.parse(0.25), Rules(granularity="joint"))
    assert not any(layer.heads for layer in plan)
    assert all(layer.after.qk_dims == (6,) * 4 for layer in plan)


def test_joint_goes_down_to_the_last_head() -> None:
    scores = Scores(torch.full((4, 8), 1e-6), torch.full((4, 8), 1e-6), torch.ones(4))
    scores.qk[3] = scores.vo[3] = 1.0
    plan = allocate(plain(layers=1, dim=8), {"layers.9": scores}, Ratios.parse(0.75), Rules(granularity="joint"))
    assert plan.layers[0].heads == (0, 1, 2)
    assert plan.layers[0].after.qk_dims == plan.layers[0].after.vo_dims == (8,)


@pytest.mark.parametrize(("scope", "where"), [("global", "all layers: qk"), ("local", "layers.9: qk")])
def test_floors_that_are_too_high_are_named(scope: Any, where: str) -> None:
    specs = plain(layers=2, dim=8)
    scores = {s.name: Scores(torch.rand(4, 8), torch.rand(4, 8), torch.ones(4)) for s in specs}
    with pytest.raises(
        errors.AllocationError, match=f"^{where}: expected floors that allow 75.0% to go, found at most"
    ):
        allocate(specs, scores, Ratios.parse(0.75), Rules(scope=scope, min_channels=4))


def test_joint_keeps_min_heads() -> None:
    specs = plain(layers=1, dim=8)
    scores = {"layers.9": Scores(torch.full((4, 8), 1e-6), torch.full((4, 8), 1e-6), torch.ones(4))}
    scores["layers.9"].qk[3] = scores["layers.9"].vo[3] = 1.0
    for least in (1, 2, 3):
        plan = allocate(specs, scores, Ratios.parse(0.75), Rules(granularity="joint", heads="ragged", min_heads=least))
        assert plan.layers[0].after.heads >= least
        assert 3 not in plan.layers[0].heads


@pytest.mark.parametrize(("ratio", "kept"), [(0.3, 8), (0.5, 4), (0.0, 9)])
def test_rounding_goes_to_the_nearest(ratio: float, kept: int) -> None:
    """Of 9 channels, with multiples of four: the first move frees one channel, the second four."""
    specs = plain(layers=1, dim=9)
    (layer,) = allocate(specs, random_scores(specs, 0), Ratios.parse(ratio), Rules(round_to=4))
    assert layer.after.qk_dims == (kept,) * 4


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
def test_binary_fractions_lose_no_unit(ratio: float) -> None:
    """Three tenths of ten are three, though 0.3 is not three tenths."""
    specs = plain(layers=3, dim=10)
    rules = Rules(), Rules(scope="local"), Rules(heads="ragged"), Rules(split="auto"), Rules(rounding="up")
    for rule in (*rules, Rules(rounding="down")):
        plan = allocate(specs, random_scores(specs, 1), Ratios.parse(ratio), rule)
        total = sum(freed(plan.layers, kind) for kind in ("qk", "vo"))
        assert total == round(ratio * 3 * 40 * 2) * 80


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_half_a_unit_goes(heads: int) -> None:
    """0.575 of twenty channels are eleven and a half, which in binary is a little less."""
    assert 0.575 * 800 < 460
    specs = plain(layers=1, heads=heads, dim=20)
    (layer,) = allocate(specs, random_scores(specs, 0), Ratios.parse(0.575))
    assert layer.after.qk_dims == layer.after.vo_dims == (8,) * heads


# costs and ties, by hand


def scored(spec: AttentionSpec, head: Sequence[float], value: float = 1.0) -> Scores:
    qk, vo = (torch.full((spec.kv_heads, dim), value) for dim in (spec.qk_dim, spec.vo_dim))
    return Scores(qk, vo, torch.tensor(head))


def test_costs_are_of_one_unit() -> None:
    """A move of one channel, or head, that costs 3 comes before one of four that cost 2 each."""
    narrow, wide = (AttentionSpec.of(name, heads=2, head_dim=dim, d_model=8) for name, dim in (("n", 5), ("w", 8)))
    scores = {"n": scored(narrow, [1, 1], 3.0), "w": scored(wide, [1, 1], 2.0)}
    plan = allocate([narrow, wide], scores, Ratios.parse(0.3), Rules(scope="global", round_to=4))
    assert [layer.after.qk_dims for layer in plan] == [(5, 5), (4, 4)]
    five, eight = (AttentionSpec.of(name, heads=heads, head_dim=1, d_model=8) for name, heads in (("f", 5), ("e", 8)))
    scores = {"f": scored(five, [3.0] * 5), "e": scored(eight, [2.0] * 8)}
    plan = allocate([five, eight], scores, Ratios.parse(0.3), Rules("head", scope="global", round_to=4))
    assert [layer.after.heads for layer in plan] == [5, 4]


def test_a_unit_of_grouped_heads_costs_what_its_heads_cost_together() -> None:
    spec = AttentionSpec.of("a", heads=4, head_dim=2, d_model=8, kv_heads=2)
    (layer,) = allocate([spec], {"a": scored(spec, [1.0, 4.0, 3.0, 3.0])}, Ratios.parse(0.5), Rules("head"))
    assert layer.heads == (0, 1)


def test_a_head_whose_keys_stay_for_others_costs_its_share_of_them() -> None:
    """Four query heads of one key head: each frees half of what one with keys of its own frees, and costs a quarter."""
    several = AttentionSpec.of("s", heads=4, head_dim=4, d_model=8, kv_heads=1)
    own = AttentionSpec.of("o", heads=4, head_dim=4, d_model=8)
    scores = {"s": scored(several, [1.0] * 4), "o": scored(own, [1.0] * 4)}
    rules = Rules("joint", scope="global", heads="ragged", split="auto", min_channels=4)
    plan = allocate([several, own], scores, Ratios.parse(0.2), rules)
    assert [layer.heads for layer in plan] == [(0, 1), ()]


SHARED = {
    "heads of their own": {}, "groups": {"kv_heads": 2}, "one key head": {"kv_heads": 1}, "beside Q": {"q_extra": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("priced", [False, True])
def test_a_move_frees_what_the_attention_then_costs_less(kind: str, priced: bool) -> None:
    """One after the other, of every source."""
    spec = AttentionSpec.of("a", heads=4, head_dim=4, d_model=8, v_in=5, **SHARED[kind])
    prices = parameter_prices(spec) if priced else None
    layer = Layer(spec, scored(spec, [1.0] * 4), Rules("joint", heads="ragged", split="auto"), prices)

    def cost() -> int:
        after = layer.plan().after
        return total(after, prices) if prices else sum(after.weights(p) for p in ("q", "k", "v", "o"))

    for name in ("qk", "head", "vo", "qk", "head", "qk"):
        source = next((one for one in layer.sources() if one[0] == name), None)
        move = None if source is None else layer.offer(source)
        if move is not None:
            before = cost()
            layer.make(move)
            assert sum(move.frees.values()) == before - cost(), (name, move)


def test_a_head_costs_what_is_left_of_it() -> None:
    spec = AttentionSpec.of("a", heads=2, head_dim=4, d_model=8)
    scores = scored(spec, [1.0] * 2)
    scores.qk[0] = torch.tensor([1.0, 5.0, 5.0, 5.0])
    layer = Layer(spec, scores, Rules("joint", heads="ragged", split="auto"))
    move = layer.offer(("qk", (0,)))
    assert move is not None
    layer.make(move)
    head = layer.offer(("head", (0,)))
    assert head is not None
    assert head.cost == (15 + 4) / (3 * 16 + 4 * 16)


def test_matched_dims_have_one_budget() -> None:
    """A's pairs are cheap and mostly qk, B's are dear and mostly vo: with a budget each B would keep all."""
    a = AttentionSpec.of("a", heads=1, head_dim=4, d_model=8, q_in=16, k_in=16, v_in=8)
    b = AttentionSpec.of("b", heads=1, head_dim=4, d_model=16, q_in=8, k_in=8, v_in=16)
    scores = {"a": scored(a, [1.0]), "b": scored(b, [1.0], 10.0)}
    plan = allocate([a, b], scores, Ratios.parse(0.5), Rules(scope="global", match_dims=True))
    assert [(layer.after.qk_dims, layer.after.vo_dims) for layer in plan] == [((1,), (1,)), ((3,), (3,))]


def test_floors_may_be_reached() -> None:
    spec = AttentionSpec.of("a", heads=4, head_dim=4, d_model=8)
    for rules in (Rules(min_channels=2), Rules("head", min_heads=2)):
        (layer,) = allocate([spec], {"a": scored(spec, [1.0] * 4)}, Ratios.parse(0.5), rules)
        assert layer.fraction("q") == 0.5
    small = AttentionSpec.of("a", heads=2, head_dim=4, d_model=8)
    with pytest.raises(errors.AllocationError, match="round_to=8"):  # no channel can go, and more than a head should
        allocate([small], {"a": scored(small, [1.0] * 2)}, Ratios.parse(0.75), Rules(heads="ragged", round_to=8))


def test_what_stays_of_rotary_pairs_is_a_multiple_of_both() -> None:
    spec = AttentionSpec.of("a", heads=2, head_dim=12, d_model=8, rotary="half", rotary_dims=(12, 12))
    (layer,) = allocate([spec], {"a": scored(spec, [1.0] * 2)}, Ratios.parse(0.25), Rules(round_to=3))
    assert layer.after.qk_dims == (6, 6)
    assert layer.after.vo_dims == (9, 9)


def test_ties_go_by_model_order_kind_and_head() -> None:
    """The first layer, qk before vo before whole heads, the first head."""
    specs = [AttentionSpec.of(name, heads=4, head_dim=4, d_model=8) for name in ("z", "a")]
    scores = {spec.name: scored(spec, [1.0] * 4) for spec in specs}

    def gone(share: float, **options: Any) -> list[Any]:
        found = allocate(specs, scores, Ratios.parse(share), Rules(scope="global", **options))
        return [(layer.heads, layer.qk, layer.vo) for layer in found]

    none: tuple[Any, ...] = ((),) * 4
    first = (((0,), (), (), ()),)
    assert gone(1 / 32, heads="ragged") == [((), *first, *first), ((), none, none)]
    assert gone(1 / 64, heads="ragged", split="auto") == [((), *first, none), ((), none, none)]
    assert gone(1 / 8, granularity="head") == [((0,), none, none), ((), none, none)]
    assert gone(1 / 64, granularity="joint", heads="ragged", split="auto") == [((), *first, none), ((), none, none)]
    assert gone(3 / 8, granularity="head")[0][0] == (0, 1, 2)
    most = ((0, 1, 2), (0, 1, 2), (0, 1), ())
    assert gone(1 / 8, granularity="joint", heads="ragged", split="auto") == [((), most, none), ((), none, none)]


# names


class ByNumber(Scorer):
    """Scores every unit by its place."""

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> dict[str, Scores]:
        def ramp(*shape: int) -> torch.Tensor:
            return torch.arange(float(np.prod(shape))).reshape(shape)

        return {
            v.name: Scores(ramp(v.spec.heads, v.spec.qk_dim), ramp(v.spec.heads, v.spec.vo_dim), ramp(v.spec.heads))
            for v in views
        }


PREFIX = "audio_spectrogram_transformer.layers."


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, [0, 1, 2]),
        ("*", None, [0, 1, 2]),
        ("*layers.1.*", None, [1]),
        (["*layers.2.*", "*.0.attention"], None, [0, 2]),
        (None, "*layers.1.*", [0, 2]),
        ("*layers.[01].*", ["*.1.*"], [0]),
        (PREFIX + "2.attention", None, [2]),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, left: list[int]) -> None:
    names = [f"{PREFIX}{i}.attention" for i in left]
    for scope in ("local", "global"):
        plan = make_plan(model(), 0.5, include=include, exclude=exclude, scorer=ByNumber(), scope=scope)
        assert [layer.spec.name for layer in plan] == names
        assert plan.fraction("q") == 0.5, "ratios are of the chosen layers"
    pruned, dense = model(), model()
    report = prune_attention(pruned, 0.5, include=include, exclude=exclude)
    assert [layer.spec.name for layer in report.layers] == names
    for i in range(LAYERS):
        now, before = (m.audio_spectrogram_transformer.layers[i].attention for m in (pruned, dense))
        untouched = all(
            torch.equal(a, b) for a, b in zip(now.parameters(), before.parameters(), strict=True) if a.shape == b.shape
        )
        assert (now.q_proj.weight.shape == before.q_proj.weight.shape and untouched) == (i not in left)


# what is refused


@pytest.mark.parametrize("rule", [Rules(granularity="head"), Rules(granularity="head", scope="local")])
def test_heads_take_the_least_of_four_ratios(rule: Rules) -> None:
    specs = plain()
    plan = allocate(specs, ones(specs), Ratios.parse({"qk": 0.5, "v": 0.5, "o": 0.25}), rule)
    assert plan.layers == allocate(specs, ones(specs), Ratios.parse(0.25), rule).layers


def test_scores_are_checked() -> None:
    specs = plain()
    with pytest.raises(errors.ScorerError, match=r"layers\.9.*none"):
        allocate(specs, {"layers.10": ones(specs)["layers.10"]}, Ratios.parse(0.5))
    wrong = ones(specs) | {"layers.10": ones(plain(heads=5))["layers.10"]}
    with pytest.raises(errors.ScorerError, match=r"layers\.10.*\(4, 4\).*\(5, 4\)"):
        allocate(specs, wrong, Ratios.parse(0.5))
    bad = ones(specs)
    bad["layers.10"].head[2] = torch.nan
    with pytest.raises(errors.NonFiniteError, match=r"layers\.10.*head.*1 of 4"):
        allocate(specs, bad, Ratios.parse(0.5))


def test_places_that_ragged_heads_lack_are_not_looked_at() -> None:
    spec = AttentionSpec("a", 8, (4, 2), (2, 4), 0.5, 8, 8, 8)
    scores = Scores(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2))
    scores.qk[1, 2:], scores.vo[0, 2:] = torch.nan, -torch.inf
    (layer,) = allocate([spec], {"a": scores}, Ratios.parse(0.5), Rules(heads="ragged"))
    assert layer.qk == ((0, 1, 2), ())
    assert sum(map(len, layer.vo)) == 3


def test_allocation_is_a_pure_function() -> None:
    specs = plain()
    scores = random_scores(specs, 0)
    before = {name: (one.qk.clone(), one.vo.clone(), one.head.clone()) for name, one in scores.items()}
    state = torch.get_rng_state()
    plans = {allocate(specs, scores, Ratios.parse(0.5), Rules(granularity="joint")) for _ in range(3)}
    assert len(plans) == 1
    assert torch.equal(torch.get_rng_state(), state)
    for name, one in scores.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], (one.qk, one.vo, one.head), strict=True))
    shuffled = {name: scores[name] for name in reversed(scores)}
    assert plans == {allocate(specs, shuffled, Ratios.parse(0.5), Rules(granularity="joint"))}
