"""What cannot be pruned as it is has an error of its own, before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

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
from attnprune.errors import ShardedError

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
