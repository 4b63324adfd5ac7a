"""timm's attention, and one's own classes of that shape."""

from __future__ import annotations

import copy
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import attnprune
from attnprune import (
    AttentionPruner,
    apply_plan,
    find_attention,
    load_pruned,
    make_plan,
    masked,
    prune_attention,
)
from attnprune.errors import AdapterError, QuantizedError, WrappedModelError
from attnprune.families import FusedQKVAdapter

from .families import timm_module


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm_module("timm.models").VisionTransformer(**{**sizes, **options}).eval()


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def exact(model: nn.Module, x: Tensor, plan: attnprune.Plan) -> None:
    """Against the dense model with the same channels zeroed."""
    with masked(model, plan):
        expected = model(x)
    apply_plan(model, plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        ("timm.models.deit", "VisionTransformerDistilled", {"img_size": 16, "patch_size": 8, "embed_dim": 24,
                                                            "depth": 2, "num_heads": 4, "num_classes": 5}),
        ("timm.models.davit", "DaVit", {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4),
                                        "num_classes": 5}),
        ("timm.models.metaformer", "MetaFormer", {"depths": (1, 1), "dims": (32, 64), "num_classes": 5,
                                                  "token_mixers": ["SepConv", "Attention"],
                                                  "norm_layers": ["LayerNorm2dNoBias", "LayerNormNoBias"]}),
        ("timm.models.convit", "ConVit", {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4,
                                          "local_up_to_layer": 1, "num_classes": 5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ratios", [{"qk": 0.5}, 0.5])
@pytest.mark.filterwarnings("ignore:Attention that is not pruned")  # DaViT also attends over channels
def test_other_models_of_timm(module: str, name: str, options: dict[str, Any], ratios: Any) -> None:
    torch.manual_seed(0)
    source = timm_module(module)
    options = {key: [getattr(source, one) for one in value] if isinstance(value, list) else value
               for key, value in options.items()}  # fmt: skip
    model = getattr(source, name)(**options).eval()
    size = options.get("img_size", 64)
    exact(model, torch.randn(2, 3, size, size), make_plan(model, ratios, scorer="random", scope="local"))


def test_a_plan_with_data_is_that_of_the_same_packed_attention() -> None:
    """Bases, refits and layers' shares, against nn.MultiheadAttention with the same weights."""

    class Chain(nn.Module):
        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for layer in self.layers:
                if isinstance(layer, nn.MultiheadAttention):
                    x = x + layer(x, x, x, need_weights=False, attn_mask=~mask)[0]
                else:
                    x = x + layer(x, mask)
            return x

    torch.manual_seed(0)
    attention = timm_module("timm.models.vision_transformer").Attention
    if "attn_mask" not in signature(attention.forward).parameters:
        pytest.skip("this timm's attention takes no mask")
    ours = Chain([attention(24, 4, qkv_bias=True) for _ in range(2)]).eval()
    theirs = Chain([nn.MultiheadAttention(24, 4, batch_first=True) for _ in range(2)]).eval()
    with torch.no_grad():
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            for parameter in one.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
            other.in_proj_weight.copy_(one.qkv.weight)
            other.in_proj_bias.copy_(one.qkv.bias)
            other.out_proj.load_state_dict(one.proj.state_dict())
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 4:] = False  # nobody attends to these, so they count for nothing
    data, x = [{"x": torch.randn(4, 6, 24), "mask": mask} for _ in range(3)], torch.randn(2, 6, 24)
    torch.testing.assert_close(ours(x, mask), theirs(x, mask))
    for model in (ours, theirs):
        prune_attention(model, 0.5, data=data, split="auto", progress=False)
    assert [spec.vo_dims for spec in find_attention(ours)] == [spec.vo_dims for spec in find_attention(theirs)]
    torch.testing.assert_close(ours(x, mask), theirs(x, mask), rtol=1e-4, atol=1e-5)


def test_training_goes_on_and_files_come_back(tmp_path: Path) -> None:
    model, x = vit(), image()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = AttentionPruner(model, 0.5, steps=2, scorer="taylor")
    for _ in range(2):
        model(x).square().sum().backward()
        pruner.observe()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    folder = attnprune.save_pruned(model, tmp_path / "vit")
    again = load_pruned(folder, vit())
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.long
def test_packed_compiled_and_exported() -> None:
    model, x = vit(), image()
    prune_attention(model, {"qk": 0.5}, scorer="random", heads="ragged", progress=False)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        assert attnprune.pack_qkv(model) == ("blocks.0.attn", "blocks.1.attn")
        torch.testing.assert_close(model(x), expected)
        attnprune.unpack_qkv(model)
        assert torch.equal(model(x), expected)
    assert not any(module.training for module in model.modules())
    assert isinstance(copy.deepcopy(model).blocks[0].attn, timm_module("timm.models.vision_transformer").Attention)


def test_dropout_is_the_hosts() -> None:
    for fused in (True, False):
        model = vit(attn_drop_rate=0.5, proj_drop_rate=0.3)
        for block in model.blocks:
            block.attn.fused_attn = fused
        prune_attention(model, {"qk": 0.5}, progress=False)
        x = image(1)
        assert torch.equal(model(x), model(x))
        model.train()
        torch.manual_seed(0)
        first = model(x)
        assert not torch.equal(first, model(x))
        torch.manual_seed(0)
        assert torch.equal(first, model(x))


def test_hooks_on_attn_drop_see_attention_weights() -> None:
    model, seen = vit(), []
    for block in model.blocks:
        block.attn.fused_attn = False
    prune_attention(model, {"qk": 0.5}, progress=False, scope="local")
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    model(image())
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}])
def test_norms_inside_are_not_taken_for_nothing(options: dict[str, Any]) -> None:
    if not options.keys() <= signature(timm_module("timm.models").VisionTransformer).parameters.keys():
        pytest.skip("this timm has no such norm")
    model = vit(**options)
    exact(model, image(), make_plan(model, 0.5, heads="ragged", scorer="random"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_wrapped_projections_are_refused() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["qkv"], r=2), vit())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WrappedModelError, match=r"qkv|q\.weight"):
        prune_attention(model, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = vit()
    model.blocks[0].attn.qkv = nn.Identity()
    (skipped,) = attnprune.skipped_attention(model)
    assert skipped.name == "blocks.0.attn"
    model = torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear}, torch.qint8)
    with pytest.raises((QuantizedError, WrappedModelError)):
        prune_attention(model, 0.5)


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Module):
        def __init__(self, rows: int = 72, scale: float | None = None) -> None:
            super().__init__()
            self.scale = scale
            self.num_heads, self.qkv, self.proj = 4, nn.Linear(24, rows), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
            return self.proj(x.transpose(1, 2).flatten(2))

    class Other(Mine):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    adapter = attnprune.register_adapter(FusedQKVAdapter(Mine))
    try:
        for ratios, scale in ((0.5, None), ({"qk": 0.75, "vo": 0.25}, None), (0.5, 0.7)):
            model = Mine(scale=scale).eval()
            exact(model, torch.randn(2, 5, 24), make_plan(model, ratios))
            with monkeypatch.context() as patch:
                kernel = Mock(side_effect=lambda q, k, v, *_, **__: v)
                patch.setattr(nn.functional, "scaled_dot_product_attention", kernel)
                model.train()(torch.randn(2, 5, 24, requires_grad=True))
            kernel.assert_called()  # as the class does
        with pytest.raises(AdapterError, match=r"qkv \(60, 24\)"):
            find_attention(Mine(60))
        model = Other().eval()
        exact(model, torch.randn(2, 5, 24), make_plan(model, {"qk": 0.5}))
    finally:
        attnprune.unregister_adapter(adapter)


class Pair(nn.Module):
    """Returns its weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class Named(Pair):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": super().forward(x)[0]}


class TokensFirst(Pair):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.transpose(0, 1))[0].transpose(0, 1)


@pytest.mark.parametrize("kind", [Pair, Named, TokensFirst])
def test_a_class_of_ones_own_that_returns_more_than_a_tensor(kind: Any) -> None:
    adapter = attnprune.register_adapter(FusedQKVAdapter(kind))
    try:
        for options in ({"heads": "ragged"}, {"granularity": "head"}):
            model, x = kind().double().eval(), torch.randn(2, 5, 24).double()
            plan = make_plan(model, 0.5, scorer="random", **options)
            with masked(model, plan):
                expected = model(x)
            apply_plan(model, plan)
            first, wanted = (next(iter(tree_leaves(one))) for one in (model(x), expected))
            torch.testing.assert_close(first, wanted)
            assert type(model(x)) is type(expected)
    finally:
        attnprune.unregister_adapter(adapter)


def test_a_forward_that_is_no_function_is_nobodys() -> None:
    class Partial(nn.Module):
        forward = partial(torch.mul, other=2.0)

    model = nn.Sequential(vit(), Partial())
    assert len(find_attention(model)) == 2
