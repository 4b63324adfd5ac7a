"""What cannot be pruned as it is has an error of its own, before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import attnprune
from attnprune import (
    apply_plan,
    find_attention,
    load_pruned,
    make_plan,
    prune_attention,
    prune_heads,
    save_pruned,
    score_attention,
)
from attnprune.errors import (
    AttnPruneWarning,
    DataError,
    ExportError,
    NoAttentionError,
    ParametrizedError,
    QuantizedError,
    ShardedError,
    TiedWeightsError,
    WrappedModelError,
)

from .families import timm_module

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "multi-head attention": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES)),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)),
    "Llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **SIZES)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]()


def partition(model: nn.Module) -> dict[str, torch.Tensor]:
    """As DeepSpeed's ZeRO-3 leaves parameters outside of a forward pass; returns what they were."""
    whole = {}
    for name, parameter in model.named_parameters():
        whole[name] = parameter.data
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    return whole


def test_partitioned_parameters(model: nn.Module, tmp_path: Any) -> None:
    plan = make_plan(model, 0.5)
    folder = save_pruned(model, tmp_path)
    whole = partition(model)
    calls: list[Callable[[], object]] = [
        lambda: find_attention(model),
        lambda: prune_attention(model, 0.5),
        lambda: make_plan(model, 0.5),
        lambda: apply_plan(model, plan),
        lambda: prune_heads(model, {0: [1]}),
        lambda: score_attention(model),
        lambda: load_pruned(folder, model),
    ]
    for call in calls:
        with pytest.raises(ShardedError, match="ZeRO-3"):
            call()
    for name, parameter in model.named_parameters():  # gathered for a while
        parameter.data = whole[name]
    assert make_plan(model, 0.5) == plan
    with pytest.raises(ShardedError, match=r"before deepspeed\.initialize"):
        apply_plan(model, plan)


# parameters that are more, or less, than an nn.Parameter


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def attention(model: nn.Module) -> Any:
    return model.get_submodule(find_attention(model)[0].name)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_parametrisation_on_a_pruned_module_itself(ragged: bool) -> None:
    """It changes the class of what it is put on."""
    heads = "ragged" if ragged else "uniform"
    model = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
    prune_attention(model, 0.25, heads=heads)
    x = torch.randn(2, 5, 32)
    expected = model(x, x, x)[0]
    nn.utils.parametrize.register_parametrization(model, "bias_k", Double())
    with torch.no_grad():
        model.parametrizations.bias_k.original.div_(2)
    for call in (lambda: prune_attention(model, 0.25, heads=heads), lambda: prune_heads(model, {0: [0]})):
        with pytest.raises(ParametrizedError, match=r"bias_k.*parametrizations\.bias_k"):
            call()
    torch.testing.assert_close(model(x, x, x)[0], expected)
    nn.utils.parametrize.remove_parametrizations(model, "bias_k")  # the remedy
    prune_attention(model, 0.25, heads=heads)


@pytest.mark.parametrize("kind", ["decoupled", "expanded"])
def test_a_parametrisation_on_a_pruned_projection(kind: str) -> None:
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 4}
    model: Any = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    name = "q"
    if kind == "decoupled":
        model, name = MODELS["ViT"](), "q_proj"
    prune_attention(model, {"qk": 0.25})
    nn.utils.parametrize.register_parametrization(getattr(attention(model), name), "weight", Double())
    with pytest.raises(ParametrizedError, match=r"parametrizations\.weight"):
        prune_attention(model, 0.25)
    find_attention(model)


class Mine(nn.Parameter):
    pass


class QuantTensor(nn.Parameter):
    """Of a package that quantises."""

    __module__ = "somequant.tensors"


@pytest.mark.parametrize(("kind", "error"), [(Mine, WrappedModelError), (QuantTensor, QuantizedError)])
def test_a_subclass_of_parameter(model: nn.Module, kind: Any, error: Any) -> None:
    owner, name = next(
        (module, key)
        for module in attention(model).modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 2
    )
    owner._parameters[name] = kind(owner._parameters[name].detach())
    with pytest.raises(error) as found:
        prune_attention(model, 0.5)
    assert type(found.value) is error
    assert kind.__name__ in str(found.value)
    owner._parameters[name] = nn.Parameter(owner._parameters[name].detach().as_subclass(torch.Tensor))  # the remedy
    prune_attention(model, 0.5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_of_eight_bits(model: nn.Module, dtype: torch.dtype) -> None:
    plan = make_plan(model, 0.5)
    for module in attention(model).modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    calls: list[Callable[[], object]] = [
        lambda: prune_attention(model, 0.5),
        lambda: apply_plan(model, plan),
        lambda: prune_heads(model, {0: [1]}),
    ]
    for call in calls:
        with pytest.raises(QuantizedError, match="16 bits"):
            call()


# what was refused once, and messages


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinModel(config).eval()


def davit() -> Any:
    return timm_module("timm.models.davit").DaVit(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), num_classes=5)


@pytest.mark.filterwarnings("ignore:Attention that is not pruned")
@pytest.mark.parametrize(("make", "size"), [(swin, 32), (davit, 64)])
def test_windows_of_samples(make: Any, size: int) -> None:
    data = [torch.randn(2, 3, size, size) for _ in range(2)]
    report = prune_attention(make().eval(), 0.5, data=data, progress=False)
    assert report.verified is not None


@pytest.mark.parametrize("rotated", [False, True])
def test_tied_weights_name_both_users(model: nn.Module, rotated: bool) -> None:
    """Where the weight is pruned, and who else uses it; not the same twice."""
    owner, name = next(
        (module, key)
        for module in attention(model).modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 2
    )
    holder = nn.Module()
    holder.pruned, holder.other = model, nn.Linear(32, 32)
    holder.other.weight = owner._parameters[name]
    batch = torch.randn(2, 3, 16, 16) if "ViT" in type(model).__name__ else torch.randint(0, 50, (2, 5))
    batch = torch.randn(2, 5, 32) if isinstance(model, nn.TransformerEncoderLayer) else batch
    holder.forward = lambda x: model(x)  # type: ignore[method-assign]
    holder.eval()
    data = [batch] if rotated else None
    with pytest.raises(TiedWeightsError) as found:
        prune_attention(holder, 0.5, data=data, progress=False)
    assert found.value.where.startswith("pruned."), str(found.value)
    assert "other.weight" in found.value.found


# attention that is read by hand


class ByHand(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a: Any = self.attention
        separate = {}
        if a.in_proj_weight is None:
            weights = {f"{p}_proj_weight": getattr(a, f"{p}_proj_weight") for p in "qkv"}
            separate = {"use_separate_proj_weight": True, **weights}
        found: torch.Tensor = nn.functional.multi_head_attention_forward(
            x, x, x, 32, 4, a.in_proj_weight, a.in_proj_bias, a.bias_k, a.bias_v, False, 0.0, a.out_proj.weight,
            a.out_proj.bias, **separate,
        )[0]  # fmt: skip
        return found


def product(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, attention.in_proj_weight)


class ByAFunction(ByHand):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(self.attention, x)


class ByAMethod(ByHand):
    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return (lambda y: y @ self.attention.in_proj_weight.T)(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x)


class Started(nn.Module):
    """Touches the weight before it is trained, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4)
        self.start()

    def start(self) -> None:
        nn.init.normal_(self.attention.in_proj_weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x)[0]
        return found


@pytest.mark.parametrize("make", [ByHand, ByAFunction, ByAMethod, lambda: ByHand(kdim=32, vdim=32, add_bias_kv=True)])
def test_attention_that_is_read_by_hand(make: Any) -> None:
    model, x = make().eval(), torch.randn(5, 2, 32)
    model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NoAttentionError, match="reads its packed weight instead of calling it"):
        prune_attention(model, 0.5)
    whole = nn.ModuleDict({"hand": model, "called": nn.TransformerEncoderLayer(32, 4, 64)})
    with pytest.warns(AttnPruneWarning, match=r"hand\.attention"):
        report = prune_attention(whole, 0.5)
    assert [layer.spec.name for layer in report.layers] == ["called.self_attn"]
    assert [one.name for one in report.skipped] == ["hand.attention"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(x)


@pytest.mark.parametrize(
    "make", [Started, lambda: nn.TransformerEncoderLayer(32, 4, 64), lambda: nn.Transformer(32, 4, batch_first=True)]
)
def test_attention_that_is_called(make: Any) -> None:
    prune_attention(make(), 0.5)


# TorchScript


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("heads", ["uniform", "ragged"])
@pytest.mark.parametrize("kind", ["multi-head attention", "timm", "T5, expanded"])
def test_torch_script_is_refused_with_what_works(kind: str, heads: Any) -> None:
    x: torch.Tensor = torch.randn(2, 5, 32)
    if kind == "timm":
        model: Any = timm_module("timm.models.vision_transformer").Attention(32, 4)
    elif kind == "multi-head attention":
        model = MODELS[kind]()
    else:
        sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 4}
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes, return_dict=False, use_cache=False))
        x = torch.randint(0, 50, (2, 5))
    model = model.eval()
    prune_attention(model, {"qk": 0.5}, heads=heads)
    with pytest.raises(ExportError, match=r"torch\.jit\.trace"):
        torch.jit.script(model)
    if kind != "T5, expanded":
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


# data of another dtype


class Patches(nn.Module):
    """Images in patches, by a convolution, whose errors say "type"."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 32, 8, 8), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(self.patches(pixels).flatten(2).mT)
        return found


def wide_image() -> tuple[nn.Module, Any]:
    return Patches(), {"pixels": torch.randn(2, 3, 16, 16).double()}


def wide_tokens() -> tuple[nn.Module, Any]:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.randn(2, 5, 32).double()


def by_a_loss(model: nn.Module, batch: Any) -> Any:
    return (model(**batch) if isinstance(batch, dict) else model(batch)).square().mean()


WIDE: dict[str, Any] = {
    "rotated": lambda model, x: attnprune.make_plan(model, 0.5, data=[x], progress=False),
    "fisher": lambda model, x: attnprune.make_plan(
        model, 0.5, data=[x], loss_fn=by_a_loss, scorer="fisher", progress=False
    ),
    "calibrate": lambda model, x: attnprune.calibrate(model, [x], progress=False),
    "a loss": lambda model, x: attnprune.calibrate(model, [x], loss_fn=by_a_loss, progress=False),
    "example": lambda model, x: attnprune.prune_attention(model, 0.5, example_inputs=x),
    "budget": lambda model, x: attnprune.prune_attention(model, target_macs=0.9, example_inputs=x),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [wide_image, wide_tokens])
@pytest.mark.parametrize("call", WIDE)
def test_data_of_another_dtype(call: str, make: Any) -> None:
    model, given = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"float32.*found torch\.float64.*x\.to\(torch\.float32\)"):
        WIDE[call](model, given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_errors_of_a_model_stay() -> None:
    def broken(model: Any, batch: Any) -> Any:
        raise RuntimeError("a type of its own")

    with pytest.raises(RuntimeError, match=r"^a type of its own"):
        attnprune.calibrate(wide_tokens()[0], [torch.randn(2, 5, 32)], loss_fn=broken, progress=False)
