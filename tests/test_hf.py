"""What transformers does around attention: kernels, masks, caches, checkpointing, recorded outputs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import apply_plan, find_attention, make_plan, masked, prune_attention
from attnprune.families.registry import all_views

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 4}
PLANS: dict[str, dict[str, Any]] = {
    "stock": {"scope": "local"},
    "heads": {"granularity": "head"},
    "decoupled": {"qkvo_ratios": {"qk": 0.75, "vo": 0.25}},
    "ragged": {"heads": "ragged", "granularity": "joint"},
}
every_plan = pytest.mark.parametrize("kind", PLANS)


def plan_for(model: nn.Module, kind: str) -> attnprune.Plan:
    return make_plan(model, scorer="random", **{"qkvo_ratios": 0.5, **PLANS[kind]})


def vit(kernel: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, attn_implementation=kernel)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def decoder(kernel: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, vocab_size=50, is_decoder=True, attn_implementation=kernel, pad_token_id=0, **options
    )
    return transformers.BertLMHeadModel(config).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_classes_stay_where_the_host_can_run_the_result() -> None:
    for kind, stock in (("stock", True), ("heads", True), ("decoupled", False), ("ragged", False)):
        model = vit()
        before = [type(m) for m in model.modules()]
        hosts = [type(view.module) for view in all_views(model)]
        apply_plan(model, plan_for(model, kind))
        assert ([type(m) for m in model.modules()] == before) == stock
        views = all_views(model)
        assert all(isinstance(view.module, host) for view, host in zip(views, hosts, strict=True))
        assert all(type(view.owner("q")) is nn.Linear for view in views)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without:UserWarning")
@every_plan
def test_kernels_agree(kind: str) -> None:
    """eager, sdpa and flex give the same output; the user may switch after pruning."""
    model = vit("eager")
    apply_plan(model, plan_for(model, kind))
    with torch.no_grad():
        expected = model(image()).last_hidden_state
        for kernel in ("sdpa", "flex_attention"):
            model.config._attn_implementation = kernel
            with torch.compiler.set_stance("force_eager"):  # flex would be compiled for minutes
                found = model(image())
            assert (found.last_hidden_state - expected).abs().max() < 1e-5


@every_plan
def test_recorded_attentions_are_those_of_the_dense_heads(kind: str) -> None:
    model = vit("eager")
    plan = plan_for(model, kind)
    with torch.no_grad():
        with attnprune.masked(model, plan):
            expected = model(image(), output_attentions=True)
        apply_plan(model, plan)
        found = model(image(), output_attentions=True)
    assert len(found.attentions) == 2
    for layer, before, after in zip(plan, expected.attentions, found.attentions, strict=True):
        assert (after - before[:, list(layer.kept_heads)]).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@every_plan
def test_gradient_checkpointing(kind: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = vit()
        apply_plan(model, plan_for(model, kind))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(image()).last_hidden_state.square().sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert (grad - grads[1][key]).abs().max() <= 1e-4 * (1 + grad.abs().max())


@every_plan
@pytest.mark.parametrize("cross", [False, True])
def test_generation_with_a_cache(kind: str, cross: bool) -> None:
    """Keys and values of any width go through the cache; tokens are those found without one."""
    model = decoder(add_cross_attention=cross)
    apply_plan(model, plan_for(model, kind))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    if cross:
        options["encoder_hidden_states"] = torch.randn(2, 3, 32)
    prompt = torch.randint(1, 50, (2, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cached = model(prompt, use_cache=True, encoder_hidden_states=options.get("encoder_hidden_states"))
        step = torch.full((2, 1), 7)
        takes = inspect.signature(type(model).forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"  # as transformers calls it from 5.24 on
        found = model(
            step, **{name: cached.past_key_values}, encoder_hidden_states=options.get("encoder_hidden_states")
        ).logits
        whole = model(torch.cat([prompt, step], 1), encoder_hidden_states=options.get("encoder_hidden_states")).logits
    assert (found[:, -1] - whole[:, -1]).abs().max() < 1e-5


@every_plan
def test_compiled_without_graph_breaks(kind: str) -> None:
    model = vit()
    apply_plan(model, plan_for(model, kind))
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(image()).last_hidden_state
        assert (found - model(image()).last_hidden_state).abs().max() < 1e-5


@every_plan
def test_autocast_and_bfloat16(kind: str) -> None:
    model = vit()
    apply_plan(model, plan_for(model, kind))
    expected = model(image()).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(image()).last_hidden_state - expected).abs().max() < 0.2
    low = copy.deepcopy(model).bfloat16()
    assert (low(image().bfloat16()).last_hidden_state.float() - expected).abs().max() < 0.2


def test_training_mode_drops_out_without_gradients_too() -> None:
    """Matrix products, which have no dropout, do not step in."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **SMALL, image_size=16, patch_size=8, attn_implementation="sdpa", attention_probs_dropout_prob=0.5
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).train()
    apply_plan(model, plan_for(model, "ragged"))
    with torch.no_grad():
        one, other = (model(image()).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other)


def test_pruning_a_bfloat16_model() -> None:
    model = vit().bfloat16()
    plan = plan_for(model, "ragged")
    with torch.no_grad(), attnprune.masked(model, plan):
        expected = model(image().bfloat16()).last_hidden_state
    apply_plan(model, plan)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert (model(image().bfloat16()).last_hidden_state - expected).abs().max() < 0.1


def test_prune_heads_as_in_transformers_4() -> None:
    """Layer numbers or names, on any model."""
    model = vit()
    first, second = all_views(model)
    report = attnprune.prune_heads(model, {0: [1, 3], second.name: [0]})
    assert [layer.after.heads for layer in report.layers] == [2, 3]
    assert first.module.num_attention_heads == 2
    assert first.owner("q").weight.shape == (16, 32)


def test_training_goes_on() -> None:
    """A pruned model trains: the loss falls with a fresh optimizer over its new parameters."""
    model = vit().train()
    prune_attention(model, 0.5, heads="ragged")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = (model(image()).last_hidden_state - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_saved_and_loaded_by_state_dict(tmp_path: Any) -> None:
    """A plan and a state dict bring a pruned model back."""
    model = vit()
    plan = plan_for(model, "ragged")
    apply_plan(model, plan)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "plan.json").write_text(plan.to_json())
    other = vit()
    apply_plan(other, attnprune.Plan.from_json((tmp_path / "plan.json").read_text()))
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        assert torch.equal(other(image()).last_hidden_state, model(image()).last_hidden_state)


def test_projections_that_hand_on_more_than_a_tensor() -> None:
    """I-BERT's hand on the scale of their numbers."""
    config = transformers.IBertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16,
        max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.IBertModel(config).eval()
    data = [{"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])}]
    plan = make_plan(model, 0.5, data=data, compensate=False, progress=False)
    assert plan.layers[0].fold is not None
    with masked(model, plan), torch.no_grad():
        expected = model(**data[0]).last_hidden_state
    apply_plan(model, plan)
    torch.testing.assert_close(model(**data[0]).last_hidden_state.detach(), expected, rtol=1e-4, atol=1e-5)
    assert find_attention(model)[0].qk_dims == (4, 4, 4, 4)
    prune_attention(model, 0.5)
    assert find_attention(model)[0].qk_dims == (2, 2, 2, 2)


def test_attention_that_is_told_its_place_in_the_cache() -> None:
    """Zamba's layers share one attention, which is called with the number of the layer."""
    zamba = pytest.importorskip("transformers.models.zamba.modeling_zamba")
    config = transformers.ZambaConfig(
        hidden_size=16, attention_hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_head_dim=8,
        num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"], use_mamba_kernels=False,
    )  # fmt: skip
    torch.manual_seed(0)
    attention = zamba.ZambaAttention(config, None).eval().double()
    model = torch.nn.ModuleDict({"attention": attention})
    x = torch.randn(1, 3, 32, dtype=torch.float64)

    def steps() -> torch.Tensor:
        cache, found = transformers.DynamicCache(), []
        for token in x.split(1, 1):
            for layer in (0, 1):
                key = "cache" if "cache" in inspect.signature(attention.forward).parameters else "past_key_values"
                found.append(attention((layer + 1) * token, layer_idx=layer, attention_mask=None, **{key: cache})[0])
        return torch.cat(found)

    plan = make_plan(model, 0.4, heads="ragged", scorer="random")
    with masked(model, plan), torch.no_grad():
        expected = steps()
    apply_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(steps(), expected, rtol=1e-9, atol=1e-9)
