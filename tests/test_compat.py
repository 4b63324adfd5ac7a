"""AST and ViT under any transformers from 4.48 on: ``make test-compat`` runs this file under several of them."""

from __future__ import annotations

import copy
import itertools
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnprune import (
    Plan,
    apply_plan,
    apply_to_checkpoint,
    export_stock,
    find_attention,
    from_pretrained,
    load_pruned,
    make_plan,
    save_pruned,
)
from attnprune.errors import NotExpressibleError

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 4,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
MODES = list(itertools.product(("head", "channel", "joint"), ("local", "global"), ("uniform", "ragged")))


def build(kind: str, kernel: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "ast":
        config: Any = transformers.ASTConfig(**SMALL, num_mel_bins=24, max_length=24, time_stride=8, frequency_stride=8)
        config._attn_implementation = kernel
        model: nn.Module = transformers.ASTModel(config)
    else:
        config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
        config._attn_implementation = kernel
        model = transformers.ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.double().eval()


def example(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "ast":
        return {"input_values": torch.randn(2, 24, 24, generator=generator, dtype=torch.float64)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)}


def zero(model: nn.Module, plan: Plan) -> None:
    """The oracle: removed rows of Q, K, V and columns of O become zero, found by the names of the parameters."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in plan:
            for key, parameter in parameters.items():
                if not key.startswith(layer.spec.name + "."):
                    continue
                part, field = key[len(layer.spec.name) + 1 :].rsplit(".", 1)
                letter = {"q": "q", "k": "k", "v": "v", "o": "o", "d": "o"}[part.split(".")[-1][0]]
                kind = "qk" if letter in "qk" else "vo"
                dim = layer.spec.dims("qk" if letter in "qk" else "vo")[0]
                gone = [range(dim) if h in layer.heads else getattr(layer, kind)[h] for h in range(layer.spec.heads)]
                rows = [h * dim + c for h, channels in enumerate(gone) for c in channels]
                if letter == "o":
                    if field == "weight":
                        parameter[:, rows] = 0
                else:
                    parameter[rows] = 0


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_exact(kind: str, kernel: str, mode: tuple[str, str, str]) -> None:
    granularity, scope, heads = mode
    ratios: list[Any] = [0.25, 0.5, 0.7] if granularity != "head" else [0.25, 0.5]
    if granularity != "head":
        ratios += [{"qk": 0.5}, {"vo": 0.5}, {"qk": 0.6, "vo": 0.3}]
    inputs = example(kind)
    for seed, ratio in enumerate(ratios):
        model = build(kind, kernel)
        assert len(find_attention(model)) == 2
        plan = make_plan(model, ratio, granularity=granularity, scope=scope, heads=heads, scorer="random", seed=seed)
        oracle = copy.deepcopy(model)
        zero(oracle, plan)
        apply_plan(model, plan)
        outputs = []
        for one in (oracle, model):
            output = one(**inputs).last_hidden_state
            output.square().sum().backward()
            outputs.append(output.detach())
        assert (outputs[0] - outputs[1]).abs().max() < 1e-10
        embedding = [dict(one.named_parameters())["embeddings.cls_token"].grad for one in (oracle, model)]
        assert (embedding[0] - embedding[1]).abs().max() < 1e-9 * embedding[0].abs().max()


@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_attention_weights(kind: str) -> None:
    """Weights of heads that stay are those of the dense model's same heads."""
    model = build(kind, "eager")
    plan = make_plan(model, 0.5, granularity="joint", heads="ragged", scorer="random", seed=4)
    oracle = copy.deepcopy(model)
    zero(oracle, plan)
    apply_plan(model, plan)
    with torch.no_grad():
        expected, found = (one(**example(kind), output_attentions=True).attentions for one in (oracle, model))
    for layer, before, after in zip(plan, expected, found, strict=True):
        assert (before[:, list(layer.kept_heads)] - after).abs().max() < 1e-10


def classifier(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "ast":
        config: Any = transformers.ASTConfig(**SMALL, num_mel_bins=24, max_length=24, time_stride=8, frequency_stride=8)
        return transformers.ASTForAudioClassification(config).double().eval()
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)).eval()


def logits(model: Any, kind: str) -> Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{key: value.to(dtype) for key, value in example(kind).items()}).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{"heads": "ragged"}, {"scope": "local"}, {"granularity": "head"}], ids=str)
@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every way to a directory and back gives the same bits."""
    model = classifier(kind)
    model.save_pretrained(tmp_path / "dense")
    plan = make_plan(model, 0.5, **options)
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "ours", max_shard_size="5KB")
    model.save_pretrained(tmp_path / "theirs")
    apply_to_checkpoint(tmp_path / "dense", plan, tmp_path / "streamed")
    loaded = [from_pretrained(tmp_path / name) for name in ("ours", "theirs", "streamed")]
    loaded.append(load_pruned(tmp_path / "ours", classifier(kind)))
    for again in loaded:
        assert find_attention(again) == find_attention(model)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert torch.equal(logits(again, kind), logits(model, kind))
    apply_plan(loaded[1], make_plan(loaded[1], 0.3, heads="ragged"))
    loaded[1].save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again"), kind), logits(loaded[1], kind))


@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_stock(kind: str, tmp_path: Path) -> None:
    """Either transformers loads it and gives the same, or it cannot be said in a config and an error says so."""
    model = classifier(kind)
    if VERSION < (5,):
        with pytest.raises(NotExpressibleError, match="all that its class can have"):
            make_plan(model, 0.5, stock=True)
        return
    apply_plan(model, make_plan(model, 0.5, stock=True))
    export_stock(model, tmp_path)
    assert (logits(type(model).from_pretrained(tmp_path).eval(), kind) - logits(model, kind)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_by_transformers_own_loader(kind: str, tmp_path: Path) -> None:
    if VERSION < (4, 57):  # it would mark models as quantised
        with pytest.raises(ImportError, match=r"transformers 4\.57"):
            import_module("attnprune.integrations.auto")
        return
    from attnprune.integrations.auto import AttnPruneConfig

    model = classifier(kind)
    apply_plan(model, make_plan(model, 0.5, heads="ragged"))
    model.save_pretrained(tmp_path)
    dtype = {"dtype" if hasattr(model.config, "dtype") else "torch_dtype": "auto"}
    again = type(model).from_pretrained(tmp_path, quantization_config=AttnPruneConfig(), **dtype)
    assert (logits(again, kind) - logits(model, kind)).abs().max() < 1e-6
