"""AST and ViT under any transformers from 4.48 on: ``make test-compat`` runs this file under several of them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnprune import Plan, apply_plan, find_attention, make_plan

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 4,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
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
