"""Attention modules that share their parameters, as those of tied encoders and decoders do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprune import (
    AttentionPruner,
    Scorer,
    apply_plan,
    export_stock,
    freeze,
    load_pruned,
    make_plan,
    masked,
    pack_qkv,
    prune_attention,
    save_pruned,
    score_attention,
    thaw,
)
from attnprune.errors import ScorerError, TiedWeightsError
from attnprune.families import find_views
from attnprune.families.tied import tied_to

HEADS, WIDTH = 4, 32
ONE = torch.zeros(1, 5, WIDTH, dtype=torch.float64)


class Tied(nn.Module):
    """The third layer has the attention's parameters of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True) for _ in "abc")
        for one, other in zip(self.layers[2].self_attn.modules(), self.layers[0].self_attn.modules(), strict=True):
            one._parameters.update(other._parameters)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make() -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    model = Tied().double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "self_attn" in name and p.dim() == 1:
                p.normal_(std=0.3)
    return model, [torch.randn(3, 5, WIDTH, dtype=torch.float64) for _ in range(4)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


WAYS: dict[str, Any] = {
    "magnitude": {},
    "heads": {"granularity": "head"},
    "joint": {"granularity": "joint", "split": "auto"},
    "local": {"scope": "local"},
    "data": {"data": True},
    "ragged": {"data": True, "heads": "ragged", "split": "auto"},
    "measured": {"data": True, "split": "measured"},
    "sequential": {"data": True, "sequential": True},
    "paper": {"data": True, "preset": "paper:PH-G-FI", "loss_fn": loss},
    "four ratios": {"data": True, "qkvo_ratios": (0.6, 0.5, 0.4, 0.5)},
    "features": {"data": True, "heads": "ragged", "split": "all"},
    "multiply-adds": {
        "data": True,
        "qkvo_ratios": None,
        "target_macs": 0.8,
        "example_inputs": ONE,
    },
    "parameters": {"qkvo_ratios": None, "target_params": 0.8, "heads": "ragged"},
    "error": {"data": True, "qkvo_ratios": None, "target_error": 0.05},
}


@pytest.mark.parametrize("way", WAYS)
def test_they_lose_the_same_and_stay_one(way: str, tmp_path: Path) -> None:
    model, data = make()
    options = {"qkvo_ratios": 0.5, "progress": False, **WAYS[way]}
    ratios = options.pop("qkvo_ratios")
    if options.get("data"):
        options["data"] = data
    plan = make_plan(model, ratios, **options)
    first, _, third = plan.layers
    assert not first.empty
    assert third.same(first)
    with masked(model, plan):
        expected = model(data[0])
    if first.fold is None and first.refit is None:
        zeroed = copy.deepcopy(model)
        for layer in (zeroed.layers[0], zeroed.layers[1]):
            _zero(layer.self_attn, plan.layers[0 if layer is zeroed.layers[0] else 1])
        assert torch.equal(zeroed(data[0]), expected)
    report = apply_plan(model, plan, example_inputs=data[0])
    assert (model(data[0]) - expected).abs().max() < 1e-10
    parts = [dict(model.layers[i].self_attn.named_parameters()) for i in (0, 2)]
    assert all(p is parts[1][name] for name, p in parts[0].items())
    if ratios == 0.5:
        unit = 1 / 3 / (HEADS if way == "heads" else WIDTH // HEADS)
        assert abs(sum(report.achieved.values()) / 4 - 0.5) <= unit + 1e-9
    if "target_macs" in options:  # neither more nor much less than may be left
        left = report.macs[1] / report.macs[0]
        assert options["target_macs"] - 0.03 < left <= options["target_macs"]
    folder = save_pruned(model, tmp_path)
    again = load_pruned(folder, make()[0])
    assert torch.equal(again(data[0]), model(data[0]))
    parts = [dict(again.layers[i].self_attn.named_parameters()) for i in (0, 2)]
    assert all(p is parts[1][name] for name, p in parts[0].items())


def _zero(attention: Any, layer: Any) -> None:
    """Rows of Q, K and V and columns of O, of a dense module."""
    dim = WIDTH // HEADS
    with torch.no_grad():
        for head in range(HEADS):
            whole = list(range(dim)) if head in layer.heads else []
            qk, vo = ([head * dim + c for c in (whole or gone[head])] for gone in (layer.qk, layer.vo))
            for part, rows in ((0, qk), (1, qk), (2, vo)):
                for row in rows:
                    attention.in_proj_weight[part * WIDTH + row] = 0
                    attention.in_proj_bias[part * WIDTH + row] = 0
            attention.out_proj.weight[:, vo] = 0


@pytest.mark.parametrize("amount", [{"qkvo_ratios": 0.5}, {"qkvo_ratios": None, "target_error": 0.05}], ids=str)
def test_moments_and_gates_are_those_of_both(amount: Any) -> None:
    """What runs where one of them stands counts as much as what runs where the other does."""
    model, data = make()
    with torch.no_grad():  # what runs through the third is larger, and other
        model.layers[1].norm2.weight.normal_(std=5)
    both = make_plan(model, data=data, progress=False, **amount)
    scores = score_attention(model, data=data, progress=False)
    assert torch.equal(scores["layers.0.self_attn"].qk, scores["layers.2.self_attn"].qk)
    apart = copy.deepcopy(model)
    for module in apart.layers[2].self_attn.modules():
        own = {key: nn.Parameter(p.detach().clone()) for key, p in module._parameters.items() if p is not None}
        module._parameters.update(own)
    one = make_plan(apart, data=data, progress=False, **amount)
    assert both.layers[0].fold not in (one.layers[0].fold, one.layers[2].fold)
    assert both.layers[0].fold == both.layers[2].fold


def test_an_optimizer_follows_once() -> None:
    model, data = make()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, data[0]).backward()
    optimizer.step()
    prune_attention(model, 0.5, data=data, optimizer=optimizer, progress=False)
    assert model.layers[0].self_attn.q_proj.weight is model.layers[2].self_attn.q_proj.weight
    own = {id(p) for p in model.parameters()}
    assert own == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(p in optimizer.state for p in model.parameters())
    optimizer.zero_grad()
    loss(model, data[0]).backward()
    optimizer.step()


def test_a_pruner_takes_them_in_steps() -> None:
    model, data = make()
    pruner = AttentionPruner(model, 0.5, steps=2, data=data, progress=False)
    while not pruner.done:
        pruner.step()
    first, _, third = pruner.plan.layers
    assert third.same(first)
    assert abs(sum(pruner.report.achieved.values()) / 4 - 0.5) < 0.09


def test_what_shares_some_parameters_is_refused_where_they_would_lose_others() -> None:
    model, _ = make()
    attention = model.layers[2].self_attn
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.detach().clone())
    assert not tied_to(find_views(model))
    before = copy.deepcopy(model.state_dict())
    plan = make_plan(model, 0.5, include="layers.0.*")
    with pytest.raises(TiedWeightsError, match=r"in_proj_weight"):
        apply_plan(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("heads", ["uniform", "ragged"])
def test_frozen_and_packed(heads: Any) -> None:
    model, data = make()
    prune_attention(model, 0.4, heads=heads, scorer="random")
    with torch.no_grad():
        expected = model(data[0])
        pack_qkv(model)
        assert (model(data[0]) - expected).abs().max() < 1e-12
        for change in (freeze, thaw):
            change(model)
            assert (model(data[0]) - expected).abs().max() < 1e-12
    assert model.layers[0].self_attn.q_proj.weight is model.layers[2].self_attn.q_proj.weight


def test_stock_checkpoints_scale_shared_queries_once(tmp_path: Path) -> None:
    """Zamba's hybrid layers share one transformer layer."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.ZambaConfig(
        hidden_size=16, attention_hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_head_dim=8,
        num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"], use_mamba_kernels=False, vocab_size=20,
        mamba_d_state=4, mamba_expand=2, n_mamba_heads=2, mamba_headdim=16, intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ZambaModel(config).eval()
    assert len(tied_to(find_views(model))) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.tensor([[3, 4, 5, 6]])
    prune_attention(model, 0.5, stock=True, scorer="random")
    expected = model(ids, use_cache=False).last_hidden_state
    export_stock(model, tmp_path)
    again = transformers.ZambaModel.from_pretrained(tmp_path).eval()
    assert (again(ids, use_cache=False).last_hidden_state - expected).abs().max() < 1e-5


class Writer(nn.Module):
    """Attention that hands on its keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def attended(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        weights = (self.split(self.q_proj(x)) @ keys.mT * self.head_dim**-0.5).softmax(-1)
        return self.o_proj((weights @ values).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        keys, values = (self.split(linear(x)) for linear in (self.k_proj, self.v_proj))
        return self.attended(x, keys, values), (keys, values)


class Reader(Writer):
    """The same projections, beside what the writer has kept, which a name does not tell."""

    def forward(self, x: Tensor, kept: Any) -> Tensor:  # type: ignore[override]
        if kept.__class__.__name__ != "Kept":
            raise TypeError("expected what a writer kept")
        pairs = zip(kept.pair, (self.k_proj, self.v_proj), strict=True)
        keys, values = (torch.cat([old, self.split(linear(x))], 2) for old, linear in pairs)
        return self.attended(x, keys, values)


class Kept:
    """Keys and values of a writer."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.pair = pair


class Both(nn.Module):
    """A writer, and a reader that shares its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader = Writer(), Reader()
        for name, module in self.writer.named_modules():
            self.reader.get_submodule(name)._parameters.update(module._parameters)

    def forward(self, x: Tensor) -> Tensor:
        y, pair = self.writer(x)
        return self.reader(y, Kept(pair))


@pytest.mark.parametrize("seen", [True, False], ids=["seen in a call", "not seen"])
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_what_reads_the_keys_of_what_it_is_tied_to_runs_as_that_does(granularity: str, seen: bool) -> None:
    torch.manual_seed(0)
    model, x = Both().double().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    options: Any = {"example_inputs": x} if seen else {}
    plan = make_plan(model, 0.5, granularity=granularity, scope="local", scorer="magnitude", example_inputs=x)
    with masked(model, plan):
        expected = model(x)
    report = apply_plan(model, plan, **options)
    assert len({way.partition(":")[0] for way in report.ways.values()}) == 1, report.ways
    torch.testing.assert_close(model(x), expected)
    assert model.writer.q_proj.weight is model.reader.q_proj.weight
    assert len(model.writer.q_proj.weight) == WIDTH // 2


@pytest.mark.parametrize("tied", [True, False])
def test_scores_that_are_no_mapping_are_named(tied: bool) -> None:
    class Nothing(Scorer):
        name = "nothing"

        def score(self, model: nn.Module, views: Any, **_: Any) -> Any:
            return None

    model = make()[0] if tied else nn.MultiheadAttention(WIDTH, HEADS)
    with pytest.raises(ScorerError, match="expected a mapping from name to Scores, found a NoneType"):
        make_plan(model, 0.5, scorer=Nothing())


def test_multiples_are_measured_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make()
    for one, other in zip(model.layers[1].self_attn.modules(), model.layers[0].self_attn.modules(), strict=True):
        one._parameters.update(other._parameters)
    monkeypatch.setattr("attnprune.planning.faster.MULTIPLES", 1e-9)
    plan = make_plan(model, 0.5, round_to="auto", example_inputs=data[0], progress=False)
    assert plan.asked is not None
    assert plan.asked.round_to == 2
