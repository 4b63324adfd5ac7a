"""State dicts of pruned models say how channels lie: weights of the same shapes may belong to other heads."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from attnprune import apply_plan, make_plan, prune_attention, prune_channels, prune_heads
from attnprune.errors import StateDictError
from attnprune.nn import Decoupled

from .families import randomised, timm_module

BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 16, batch_first=True)


def rotary() -> nn.Module:
    config = transformers.LlamaConfig(**{**BERT, "num_key_value_heads": 2})
    return transformers.LlamaModel(config)


RAGGED: dict[str, Any] = {
    "multi-head attention": encoder,
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "timm": lambda: timm_module("timm.models.vision_transformer").Attention(32, 4, qkv_bias=True),
    "T5, expanded": lambda: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=4)
    ),
    "Llama": rotary,
}


def first(model: nn.Module) -> str:
    return make_plan(model, 0.5).specs[0].name


def pruned(make: Any, last: bool) -> nn.Module:
    """Without half of the channels of a key head: the first or the last one; all shapes are the same."""
    model = randomised(make()).float()
    spec = make_plan(model, 0.5).specs[0]
    head = spec.kv_heads - 1 if last else 0
    half = [channel for channel in range(8) if channel % 4 < 2]  # rotary pairs are whole
    gone = [half if key == head else [] for key in range(spec.kv_heads)]
    prune_channels(model, {spec.name: {"qk": gone, "vo": gone}})
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", RAGGED)
def test_weights_of_other_heads_are_refused(name: str, strict: bool) -> None:
    a, b = (pruned(RAGGED[name], last) for last in (False, True))
    assert {key: value.shape for key, value in a.state_dict().items()} == {
        key: value.shape for key, value in b.state_dict().items()
    }
    with pytest.raises(StateDictError, match="lie as here"):
        b.load_state_dict(a.state_dict(), strict=strict)


@pytest.mark.parametrize("name", RAGGED)
def test_weights_of_the_same_heads_load_through_a_file(name: str) -> None:
    a, b = (pruned(RAGGED[name], False) for _ in range(2))
    nn.init.zeros_(next(b.parameters()))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert all(value.equal(b.state_dict()[key]) for key, value in a.state_dict().items())
    file.seek(0)
    with pytest.raises(StateDictError):
        pruned(RAGGED[name], True).load_state_dict(torch.load(file, weights_only=True))


def test_a_file_without_metadata_loads_as_ever() -> None:
    """Older ones, and what went through safetensors."""
    a, b = pruned(encoder, False), pruned(encoder, True)
    b.load_state_dict(dict(a.state_dict()))
    b.load_state_dict(a.state_dict() | {})  # as a copy without metadata is


def test_a_stock_state_dict_loads_where_it_fits() -> None:
    model = nn.MultiheadAttention(32, 4)
    linears = nn.ModuleDict({f"{name}_proj": nn.Linear(32, 16) for name in "qkv"})
    linears["out_proj"] = nn.Linear(16, 32)
    prune_attention(model, 0.5)
    model.load_state_dict(linears.state_dict())
    assert torch.equal(model.q_proj.weight, linears["q_proj"].weight)


def test_rotary_pairs_of_other_frequencies_are_refused() -> None:
    """Equal heads, and still other channels."""
    models = []
    for pair in (0, 1):
        model = randomised(rotary()).float()
        gone = [pair, pair + 4]
        prune_channels(model, {first(model): {"qk": [gone, gone]}})
        models.append(model)
    with pytest.raises(StateDictError, match="channels"):
        models[0].load_state_dict(models[1].state_dict())


def test_heads_of_other_rows_of_a_mask_are_refused() -> None:
    a, b = encoder(), encoder()
    prune_heads(a, {"self_attn": [0]})
    prune_heads(b, {"self_attn": [3]})
    with pytest.raises(StateDictError, match="heads"):
        b.load_state_dict(a.state_dict())


def test_wrappers_and_copies_keep_it() -> None:
    a, b = pruned(encoder, False), pruned(encoder, True)
    for wrap in (nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda model: nn.Sequential(model)):
        with pytest.raises(StateDictError):
            wrap(b).load_state_dict(wrap(a).state_dict())


def test_the_same_plan_twice_gives_models_that_exchange_weights() -> None:
    a, b = encoder(), encoder()
    plan = make_plan(a, 0.5, heads="ragged", scorer="random")
    for model in (a, b):
        apply_plan(model, plan)
    assert any(isinstance(module, Decoupled) for module in b.modules())
    b.load_state_dict(a.state_dict())
