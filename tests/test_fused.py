"""Queries, keys and values in one projection, in any order; and attention classes whose parts are named in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import attnprune
from attnprune import apply_plan, from_pretrained, make_plan, prune_attention, save_pruned
from attnprune.errors import AdapterError, OptionError
from attnprune.families.orders import orders_of, places_of
from attnprune.families.registry import Survey, all_views
from attnprune.testing import check_family, zeroed
from attnprune.values.layout import HeadLayout

from .families import randomised

WIDTH, DIM = 24, 6
X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Fused(nn.Module):
    """Rows of ``qkv`` lie in an order that is told; 4 query heads on ``keys`` key heads."""

    def __init__(self, order: str, keys: int = 4) -> None:
        super().__init__()
        self.order = order  # two hosts with plain attributes of the same values are one to proof
        self.n_head, self.layout = 4, HeadLayout((DIM,) * keys, (DIM,) * keys, (4 // keys,) * keys)
        self.qkv, self.proj = nn.Linear(WIDTH, (4 + 2 * keys) * DIM), nn.Linear(WIDTH, WIDTH, bias=False)
        self.places = {key: list(found) for key, found in places_of(order, self.layout).items()}

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(x)
        q, k, v = (rows[..., self.places[p]].unflatten(-1, (-1, DIM)).transpose(1, 2) for p in "qkv")
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        return self.proj(torch.tanh(attend(q, k, v, is_causal=True)).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@torch.no_grad()
def exact(model: nn.Module, run: Callable[[nn.Module], Tensor], **options: Any) -> attnprune.Report:
    """Law 1, twice: against the dense model with rows and columns at zero."""
    report = None
    for seed, granularity in enumerate(("channel", "joint")):
        plan = make_plan(model, 0.3, scorer="random", heads="ragged", seed=seed, granularity=granularity, **options)
        if not seed:
            expected = run(zeroed(model, plan))
        else:
            with attnprune.masked(model, plan):
                expected = run(model)
        before = sum(p.numel() for p in model.parameters())
        now = apply_plan(model, plan)
        torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-10)
        assert sum(p.numel() for p in model.parameters()) == before - now.removed_parameters < before
        report = report or now
    assert report is not None
    return report


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    adapters: list[attnprune.Adapter] = []
    yield lambda *args, **parts: adapters.append(attnprune.register_adapter(*args, **parts))
    for adapter in adapters:
        attnprune.unregister_adapter(adapter)


ORDERS = {
    **{order: (order, 4) for order in orders_of("qkv", HeadLayout((1,) * 4, (1,) * 4))},
    "grouped blocks": ("qkv h d", 2),
    "grouped by head": ("h qkv d", 2),
    "one key head": ("qkv h d", 1),
    "other blocks, grouped": ("vqk h d", 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_found_and_pruned_exactly(name: str) -> None:
    order, keys = ORDERS[name]
    model = randomised(nn.Sequential(Fused(order, keys)))
    view = all_views(model)[0]
    held = {p: list(view.slots[f"{p}.weight"].places) for p in "qkv"}
    assert held == model[0].places
    assert (view.spec.kv_heads, view.spec.fused) == (keys, True)
    report = exact(model, lambda m: m(X))
    assert report.ways["0"].startswith("expanded")
    assert {name for name, _ in model.named_parameters()} == {"0.qkv.weight", "0.qkv.bias", "0.proj.weight"}


def test_what_lies_in_no_order_is_refused() -> None:
    """Queries of one head next to the keys of another: no table has it, so nothing is pruned under a wrong name."""
    model = randomised(Fused("h qkv d"))
    q, model.order = model.places["q"], "none"
    model.places["q"] = q[DIM:] + q[:DIM]
    (found,) = attnprune.skipped_attention(model)
    assert "its heads do not lie" in found.why


def test_a_role_is_not_taken_for_another() -> None:
    """Values in the place of keys would be removed exactly, and without the columns that read them."""
    for order in ("qvk h d", "vkq h d", "kqv h d"):
        view = all_views(randomised(Fused(order)))[0]
        assert view.verdict is not None
        assert view.verdict.order == order


def test_a_rotated_basis_and_refits_of_rows_that_lie_apart() -> None:
    data = [torch.randn(4, 5, WIDTH, dtype=torch.float64) for _ in range(3)]
    for model in (nn.Sequential(Fused("h qkv d")), nn.Sequential(Fused("h d qkv")), nn.Sequential(Fused("qkv h d", 2))):
        model = randomised(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        model(X).square().mean().backward()
        optimizer.step()
        for ratio in (0.25, 0.25):
            report = prune_attention(model, ratio, data=data, heads="ragged", progress=False, optimizer=optimizer)
            assert report.verified is not None
            assert report.verified.error < 1e-10
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in model.parameters()} == held
        optimizer.step()


def test_gradients_come_along() -> None:
    """Those of rows that stay are picked like the rows."""
    model = randomised(Fused("h qkv d"))
    model(X).square().mean().backward()
    plan = make_plan(model, {"vo": 0.4}, scorer="random")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    apply_plan(model, plan)
    for name, p in model.named_parameters():
        axis = 1 if name == "proj.weight" else 0
        for row, grad in zip(p.movedim(axis, 0), p.grad.movedim(axis, 0), strict=True):
            place = (dense[name].movedim(axis, 0) == row).flatten(1).all(1) if p.dim() > 1 else dense[name] == row
            assert torch.equal(grads[name].movedim(axis, 0)[place][0], grad)


class Gated(Fused):
    """More rows than those of queries, keys and values: a gate of the output, first."""

    def __init__(self) -> None:
        super().__init__("h qkv d")
        self.qkv = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, rows = self.qkv(x).split((WIDTH, 3 * WIDTH), -1)
        q, k, v = rows.unflatten(-1, (4, 3, DIM)).transpose(1, 2).unbind(-2)
        return self.proj(gate.sigmoid() * attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedAdapter(attnprune.Adapter):
    """Slots by hand."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Gated)

    def view(self, name: str, module: Any) -> Any:
        slots = {"o.weight": attnprune.Slot(module.proj, "weight", WIDTH, axis=1)}
        for p, places in module.places.items():
            for key in ("weight", "bias"):
                slots[f"{p}.{key}"] = attnprune.Slot(module.qkv, key, WIDTH, apart=tuple(WIDTH + i for i in places))
        spec = attnprune.AttentionSpec.of(name, heads=4, head_dim=DIM, d_model=WIDTH, bias=(True, True, True, False))
        return attnprune.AttentionView(spec, module, self, slots)


def test_rows_of_no_projection_stay(registered: Callable[..., None]) -> None:
    registered(GatedAdapter())
    model = randomised(Gated())
    gate = model.qkv.weight[:WIDTH].clone()
    exact(model, lambda m: m(X))
    assert torch.equal(model.qkv.weight[-WIDTH:], gate)


class Gates(nn.Module):
    """Q's projection makes a gate for every channel that O reads; ``order`` says how both lie in it."""

    def __init__(self, order: str, keys: int = 4) -> None:
        super().__init__()
        self.order, self.n_head = order, 4  # plain attributes tell hosts apart
        self.q_proj, self.o_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, keys * DIM), nn.Linear(WIDTH, keys * DIM, bias=False)
        rows = torch.arange(2 * WIDTH).view([{"h": 4, "d": DIM}.get(word, 2) for word in order.split()])
        q, g = rows.unbind(next(i for i, word in enumerate(order.split()) if len(word) == 2))
        self.places = {"q": q.flatten().tolist(), "g": g.flatten().tolist()}
        if "gq" in order:
            self.places = {"q": self.places["g"], "g": self.places["q"]}

    def forward(self, x: Tensor) -> Tensor:
        q, gate = (self.q_proj(x)[..., self.places[p]] for p in "qg")
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in (q, self.k_proj(x), self.v_proj(x)))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2) * gate.sigmoid())  # type: ignore[no-any-return]


@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("order", ["h qg d", "qg h d", "h gq d", "gq h d"])
def test_gates_go_with_what_they_gate(order: str, keys: int) -> None:
    model = randomised(nn.Sequential(Gates(order, keys)))
    (view,) = all_views(model)
    assert view.spec.gated
    assert {p: list(view.slots[f"{p}.weight"].places) for p in "qg"} == model[0].places
    assert view.spec.parameters == sum(p.numel() for p in model.parameters())
    before = model[0].q_proj.weight.clone()
    plan = make_plan(model, {"qk": 0, "vo": 0.5}, scorer="random")
    assert set(view.fixed) == {"vo"}  # gates tell channels apart
    exact(copy.deepcopy(model), lambda m: m(X))
    data = [torch.randn(4, 5, WIDTH, dtype=torch.float64) for _ in range(3)]
    total = sum(p.numel() for p in model.parameters())
    report = prune_attention(model, data=data, target_params=0.5)
    assert abs(sum(p.numel() for p in model.parameters()) / total - 0.5) < 0.08
    assert report.attention_parameters[1] == sum(p.numel() for p in model.parameters())
    assert attnprune.Plan.from_json(plan.to_json()) == plan
    rows = {tuple(row.tolist()) for row in before[model[0].places["g"]]}
    left = all_views(model)[0].slots["g.weight"]
    assert all(tuple(row.tolist()) in rows for row in left.cut(left.values))  # picked, whatever becomes of O


# hosts of transformers

IDS = {"input_ids": torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(1))}
SMALL = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT = {"vocab_size": 30, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
HOSTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPTNeoX": ("GPTNeoXModel", {**SMALL, "intermediate_size": 48}, "h qkv d"),
    "Bloom": ("BloomModel", {"vocab_size": 30, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "h qkv d"),
    "Falcon": ("FalconModel", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}, "h qkv d"),
    "GPTBigCode": ("GPTBigCodeModel", GPT, "qkv h d"),
    "CodeGen": ("CodeGenModel", {**GPT, "n_head": 8, "rotary_dim": 4, "n_ctx": 64}, "4 qvk h d"),
    "Persimmon": ("PersimmonModel", {**SMALL, "intermediate_size": 48}, "h qkv d"),
    "Phi3": ("Phi3Model", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}, "qkv h d"),
    "ModernBert": ("ModernBertModel", {**SMALL, **MODERN, "intermediate_size": 48}, "qkv h d"),
    "Qwen3Next": (
        "Qwen3NextModel",
        {
            **SMALL,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mlp_only_layers": [0],
            "layer_types": ["full_attention"],
        },
        "h qg d",
    ),
    "OpenAIGPT": ("OpenAIGPTModel", {"vocab_size": 30, "n_embd": 32, "n_layer": 1, "n_head": 4}, "qkv h d"),
}


def hidden(model: Any) -> Tensor:
    return model(**IDS).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_of_transformers(name: str, tmp_path: Path) -> None:
    kind, options, order = HOSTS[name]
    config = getattr(transformers, kind.replace("Model", "Config"))(**options)
    model = randomised(getattr(transformers, kind)(config))
    (view,) = Survey(model, run=lambda: hidden(model)).views
    assert view.verdict is not None
    assert view.verdict.order == order
    exact(model, hidden, example_inputs=IDS)
    if name in ("GPTNeoX", "Phi3", "Qwen3Next"):
        assert torch.equal(hidden(from_pretrained(save_pruned(model, tmp_path / name))), hidden(model))


def test_cross_attention_with_keys_and_values_in_one() -> None:
    config = transformers.GPT2Config(**GPT, add_cross_attention=True)
    model, source = randomised(transformers.GPT2Model(config)), torch.randn(2, 3, 32, dtype=torch.float64)
    views = all_views(model)
    assert [view.verdict.order for view in views if view.verdict] == ["qkv h d", "kv h d"]
    exact(model, lambda m: m(**IDS, encoder_hidden_states=source).last_hidden_state)


def test_a_linear_of_ones_own() -> None:
    """What computes a product of weight and bias is one, whatever its code; what does more is not."""

    class Same(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T + self.bias

    class More(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).round(decimals=1)

    model = Fused("h qkv d")
    model.qkv = Same(WIDTH, 3 * WIDTH)
    exact(randomised(model), lambda m: m(X))
    model = Fused("h qkv d")
    model.qkv = More(WIDTH, 3 * WIDTH)
    with pytest.raises(attnprune.errors.WrappedModelError, match="forward of its own"):
        make_plan(model, 0.5)


# named in one call


class Odd(nn.Module):
    """Four Linears under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"asks": nn.Linear(WIDTH, WIDTH), "offers": nn.Linear(WIDTH, 2 * DIM)})
        self.parts = 4
        self.tells, self.merges = nn.Linear(WIDTH, 2 * DIM), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner["asks"](x), self.inner["offers"](x), self.tells(x)
        q, k, v = (y.unflatten(-1, (n, -1)).transpose(1, 2) for y, n in ((q, self.parts), (k, 2), (v, 2)))
        context = attend(q, k, v, scale=0.3, enable_gqa=True)
        return self.merges(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


NAMES: dict[str, Any] = {"q": "inner.asks", "k": "inner.offers", "v": "tells", "o": "merges.0", "heads": "parts"}


class Strange(Fused):
    """Fused, under other names."""

    def __init__(self) -> None:
        super().__init__("h qkv d")
        self.mixed, self.last, self.count = self.qkv, self.proj, self.n_head
        del self.qkv, self.proj, self.n_head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(x).unflatten(-1, (4, 3, DIM)).unbind(-2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.last(attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_four_linears_by_name(registered: Callable[..., None]) -> None:
    registered(Odd, **NAMES, kv_heads=2, scale=0.3)
    model = randomised(Odd())
    assert all_views(model)[0].spec.groups == (2, 2)
    assert check_family(copy.deepcopy(model), X).error < 1e-12
    exact(model, lambda m: m(X))


@pytest.mark.parametrize("heads", [4, "count"])
@pytest.mark.parametrize("order", [None, "h qkv d"])
def test_one_fused_by_name(order: str | None, heads: int | str, registered: Callable[..., None]) -> None:
    registered(Strange, qkv="mixed", o="last", heads=heads, order=order)
    exact(randomised(Strange()), lambda m: m(X))


def test_a_wrong_order_is_refused(registered: Callable[..., None]) -> None:
    registered(Strange, qkv="mixed", o="last", heads=4, order="qkv h d")
    (found,) = attnprune.skipped_attention(randomised(Strange()))
    assert "its heads do not lie" in found.why


def test_heads_by_the_hosts_own_forward(registered: Callable[..., None]) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.a, self.b = 4, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.c, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one(x).unflatten(-1, (self.count, -1)).transpose(1, 2) for one in (self.a, self.b, self.c))
            return self.d(attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    registered(Plain, q="a", k="b", v="c", o="d", heads="count")
    model = randomised(Plain())
    for granularity in ("head", "channel"):
        plan = make_plan(model, 0.5, granularity=granularity, scope="local", scorer="random")
        expected = zeroed(model, plan)(X)
        assert apply_plan(model, plan).ways == {"": "stock"}
        torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    assert (model.count, model.a.weight.shape) == (2, (6, WIDTH))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"q": "a", "k": "b", "o": "c", "heads": 2}, "found parts k, o, q"),
        ({"qkv": "a", "o": "c"}, "no heads"),
        ({"qkv": "a", "o": 3, "heads": 0}, "o=3; heads=0"),
        ({"qkv": "a", "o": "c", "heads": 2, "order": "qkv"}, "order='qkv'"),
        ({"q": "a", "k": "b", "v": "d", "o": "c", "heads": 2, "order": "qkv h d"}, "no fused part"),
        ({"qkv": "a", "o": "c", "heads": 2, "head": 3}, "no argument 'head'"),
    ],
)
def test_faults_of_names(given: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        attnprune.register_adapter(Odd, **given)


def test_a_part_that_is_not_there(registered: Callable[..., None]) -> None:
    registered(Odd, **{**NAMES, "q": "inner.ask"})
    with pytest.raises(AdapterError, match=r"inner\.ask: expected 'ask' in ModuleDict, found asks, offers"):
        make_plan(Odd(), 0.5)


def test_an_order_that_is_none(registered: Callable[..., None]) -> None:
    class Wrong(attnprune.Adapter):
        def matches(self, module: nn.Module) -> bool:
            return isinstance(module, Fused)

        def view(self, name: str, module: Any) -> Any:
            return self.of_linears(name, module, qkv=module.qkv, o=module.proj, heads=4, order="qk h d")

    registered(Wrong())
    with pytest.raises(OptionError, match="order"):
        make_plan(Fused("qkv h d"), 0.5)
