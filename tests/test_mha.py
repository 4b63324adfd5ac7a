"""What nn.MultiheadAttention does around its heads: fused paths, nested tensors, masks, weights, state dicts."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprune
from attnprune import apply_plan, make_plan, prune_attention, prune_heads

RAGGED = {"heads": "ragged", "scorer": "random", "granularity": "joint"}


def encoder(layers: int = 3, **options: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(24, 4, 12, batch_first=True, **options)
        return nn.TransformerEncoder(layer, layers).double().eval()


def zeroed(model: nn.Module, plan: attnprune.Plan) -> nn.Module:
    """The oracle: a dense copy with removed rows and columns at zero."""
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plan:
            module = oracle.get_submodule(layer.spec.name)
            assert isinstance(module, nn.MultiheadAttention)
            for i, kind in enumerate(("qk", "qk", "vo")):
                module.in_proj_weight.chunk(3)[i][rows(layer, kind)] = 0
                module.in_proj_bias.chunk(3)[i][rows(layer, kind)] = 0
            module.out_proj.weight[:, rows(layer, "vo")] = 0
    return oracle


def rows(layer: attnprune.LayerPlan, kind: str) -> list[int]:
    dim = layer.spec.qk_dim
    gone = [range(dim) if h in layer.heads else getattr(layer, kind)[h] for h in range(layer.spec.heads)]
    return [h * dim + c for h, channels in enumerate(gone) for c in channels]


@pytest.mark.parametrize("include", ["layers.0.*", "layers.1.*", ["layers.0.*", "layers.2.*"], "*"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_paths_step_aside(include: str | list[str], gradients: bool, padded: bool) -> None:
    """In eval mode PyTorch would read packed weights, and hand nested tensors from dense layers to pruned ones."""
    model = encoder()
    plan = make_plan(model, 0.5, include=include, **RAGGED)
    oracle = zeroed(model, plan)
    apply_plan(model, plan)
    x = torch.randn(3, 6, 24, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]]) if padded else None
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        expected, found = (one(x, src_key_padding_mask=padding) for one in (oracle, model))
    assert (expected - found).abs().max() < 1e-10  # where there is padding too


def test_packed_weight_is_gone_and_says_so() -> None:
    model = nn.MultiheadAttention(24, 4)
    prune_attention(model, 0.5)
    with pytest.raises(TypeError, match="PrunedAway"):
        torch.sum(model.in_proj_weight)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match=r"q_proj\.weight"):
        _ = model.in_proj_weight.shape
    assert set(model.state_dict()) == {
        f"{p}_proj.{part}" for p in ("q", "k", "v", "out") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("strict", [False, True])
def test_dense_state_dict_is_refused(strict: bool) -> None:
    model = encoder()
    dense = copy.deepcopy(model.state_dict())
    prune_attention(model, 0.5)
    with pytest.raises(attnprune.errors.StateDictError, match="apply the plan"):
        model.load_state_dict(dense, strict=strict)


def test_masks_for_dense_and_for_remaining_heads() -> None:
    """A 3-D mask may have a row for every head of the dense model, or for every head that is left."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(24, 4, batch_first=True).double()
    x, mask = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        oracle.out_proj.weight[:, 6:12] = 0
    expected, weights = oracle(x, x, x, attn_mask=mask.flatten(0, 1), average_attn_weights=False)
    prune_heads(model, {0: [1]})
    kept = [0, 2, 3]
    for given in (mask, mask[:, kept]):
        found, left = model(x, x, x, attn_mask=given.flatten(0, 1), average_attn_weights=False)
        assert (found - expected).abs().max() < 1e-10
        assert (left - weights[:, kept]).abs().max() < 1e-10
    with pytest.raises(RuntimeError, match="dense model's heads"):
        model(x, x, x, attn_mask=mask[:, :2].flatten(0, 1))


def test_weights_come_in_logical_order() -> None:
    """Ragged heads are stored sorted by shape; what shows heads keeps their order."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(24, 4, batch_first=True).double()
    plan = make_plan(model, 0.5, **RAGGED)
    layer = plan[""]
    there = attnprune.AttentionSpec.of("0", heads=4, head_dim=6, d_model=24)
    wrapped = attnprune.Plan((attnprune.LayerPlan(there, layer.heads, layer.qk, layer.vo),))
    oracle = zeroed(nn.Sequential(model), wrapped)[0]
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    _, expected = oracle(x, x, x, average_attn_weights=False)
    apply_plan(model, plan)
    assert len(set(plan.after[0].qk_dims)) > 1
    _, found = model(x, x, x, average_attn_weights=False)
    assert (found - expected[:, list(layer.kept_heads)]).abs().max() < 1e-10
    _, mean = model(x, x, x)
    assert (mean - found.mean(1)).abs().max() < 1e-12


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_has_the_dense_mean(need_weights: bool) -> None:
    """In training, attention weights drop out with the module's probability and are scaled up again."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(24, 4, dropout=0.4, batch_first=True).double()
    prune_attention(model, 0.5, scope="local", heads="ragged")
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    still = model.eval()(x, x, x)[0]
    model.train()
    runs = torch.stack([model(x, x, x, need_weights=need_weights)[0] for _ in range(1500)])
    assert runs.std(0).min() > 0
    error = (runs.mean(0) - still).abs() / (runs.std(0) / len(runs) ** 0.5)
    assert error.max() < 6


def test_training_mode_drops_out_without_gradients_too() -> None:
    """Matrix products, which have no dropout, do not step in."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(24, 4, dropout=0.5, batch_first=True)
    prune_attention(model, 0.5, **RAGGED)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        one, other = (model.train()(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(one, other)


def test_causal_hint_needs_its_mask() -> None:
    model = nn.MultiheadAttention(24, 4)
    prune_attention(model, 0.5)
    x = torch.randn(5, 2, 24)
    with pytest.raises(RuntimeError, match="is_causal"):
        model(x, x, x, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    model = encoder().float()
    x = torch.randn(2, 5, 24)
    prune_attention(model, 0.5, **RAGGED)
    expected = model(x)
    low = copy.deepcopy(model).to(dtype)
    assert all(p.dtype == dtype for p in low.parameters())
    assert (low(x.to(dtype)).float() - expected).abs().max() < 0.1
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert (model(x).float() - expected).abs().max() < 0.1


def test_hooks_and_identity_stay() -> None:
    """The module object, its hooks and the hooks of its output projection are those of before."""
    model = encoder(1)
    attention = model.layers[0].self_attn
    out_proj = attention.out_proj
    seen: list[str] = []
    attention.register_forward_hook(lambda *_: seen.append("attention"))
    out_proj.register_forward_hook(lambda *_: seen.append("output"))
    prune_attention(model, 0.5)
    assert model.layers[0].self_attn is attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.out_proj is out_proj
    model(torch.randn(2, 5, 24, dtype=torch.float64))
    assert seen == ["output", "attention"]


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.long), RAGGED, {"scope": "local"}])
def test_compiled_without_graph_breaks(options: dict[str, str]) -> None:
    model = encoder(2)
    prune_attention(model, 0.5, **options)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found: Tensor = compiled(x)
    assert (found - model(x)).abs().max() < 1e-10


def test_pruning_a_compiled_model() -> None:
    model = encoder(2)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    compiled(x)
    plan = make_plan(compiled, 0.5)
    oracle = zeroed(model, plan)
    apply_plan(compiled, plan)
    assert (compiled(x) - oracle(x)).abs().max() < 1e-10


PADDING = torch.arange(6) >= torch.tensor([[6], [4], [2]])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_padded_positions_are_zero_where_those_of_the_dense_encoder_are(bias: bool, norm: bool, frozen: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 16, batch_first=True, bias=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24) if norm else None).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    x, plan = torch.randn(3, 6, 24), make_plan(model, 0.5, heads="ragged")
    found = []
    for pruned in (False, True):
        if pruned:
            apply_plan(model, plan)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients), nullcontext() if pruned else attnprune.masked(model, plan):
                found.append(model(x, src_key_padding_mask=PADDING))
    assert torch.allclose(found[0], found[2], atol=1e-5)
    assert torch.allclose(found[1], found[3], atol=1e-5)
    assert norm or bool((found[0][PADDING] == 0).all()) == bias  # without biases there is no fused path


@pytest.mark.filterwarnings("ignore")
def test_padding_in_a_trace_and_on_reloading() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 16, batch_first=True), 2).eval()
    prune_attention(model, 0.5, heads="ragged")
    x = torch.randn(3, 6, 24)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(again(x, src_key_padding_mask=PADDING), expected)

        class Padded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor, padding: Tensor) -> Tensor:
                found: Tensor = self.model(x, src_key_padding_mask=padding)
                return found

        traced = torch.jit.trace(Padded(), (x, PADDING), check_trace=False)
        found = traced(torch.cat([x, x]), torch.cat([PADDING, PADDING]))
    keep = ~PADDING
    assert torch.allclose(found[:3][keep], expected[keep], atol=1e-5)


@pytest.mark.parametrize("bias_kv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", ["uniform", "ragged"])
def test_it_can_be_initialised_anew(heads: Any, bias: bool, bias_kv: bool) -> None:
    """As other libraries do with modules of this class: the host's own way read packed weights."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, bias=bias, add_bias_kv=bias_kv, batch_first=True)
    prune_attention(module, 0.5, heads=heads, scorer="random")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
        module.out_proj.weight.fill_(0.5)  # which the host's own way leaves alone as well
    module._reset_parameters()
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert all(not value.any() for key, value in module.named_parameters() if key.endswith(".bias"))
    q = module.q_proj.weight.detach()
    assert bool((q.abs() <= (6 / sum(q.shape)) ** 0.5).all())
    assert float(q.std()) > 0.1


def test_a_subclass_is_initialised_in_its_own_way() -> None:
    class Mine(nn.MultiheadAttention):
        def _reset_parameters(self) -> None:
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.25)

    torch.manual_seed(0)
    module = Mine(16, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    prune_attention(module, 0.5, scorer="random")
    assert type(module) is not Mine
    module._reset_parameters()
    assert all(bool((parameter == 0.25).all()) for parameter in module.parameters())
