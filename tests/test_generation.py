"""Generation with a cache is that without one, token by token: greedily and by beams, pruned and read from a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attnprune import apply_plan, load_pruned, make_plan, masked, save_pruned

from .families import LATENT
from .family import DECODER, randomised
from .kinds import GPT, PAIR

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 4, 2, 6, 3, 8]])
TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
LONG = {**DECODER, "max_position_embeddings": 32}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1,
         "forced_eos_token_id": None}  # fmt: skip
SOUND = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32}
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", LONG),
    "GPT2": ("LMHeadModel", {**GPT, "n_positions": 32}),
    "Mistral": ("ForCausalLM", {**LONG, "sliding_window": 4}),
    "Gemma2": ("ForCausalLM", {**LONG, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "DeepseekV3": ("ForCausalLM", {**LONG, **LATENT}),
    "T5": (
        "ForConditionalGeneration",
        {
            **MARKS,
            "d_model": 24,
            "d_kv": 6,
            "num_heads": 4,
            "num_layers": 2,
            "d_ff": 12,
            "vocab_size": 20,
            "tie_word_embeddings": False,
        },
    ),
    "Whisper": ("ForConditionalGeneration", {**PAIR, **MARKS, **SOUND}),
}
"""Of a kind, the end of its class's name and a config: own, fused and latent projections, windows, two streams."""
LIKE = ("Gemma2", "DeepseekV3", "T5")
"""Those that others stand for in ``make test``."""
HOWS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 2}}


def generated(model: Any, given: dict[str, Any], how: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(  # type: ignore[no-any-return]
            **given, **how, **more, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0
        )


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long if kind in LIKE else ()) for kind in HOSTS])
def test_generation(kind: str, tmp_path: Path) -> None:
    """Before and after a file: the tokens of the dense model whose removed rows and columns are zero."""
    head, options = HOSTS[kind]
    config = getattr(transformers, f"{kind}Config")(**{**options, "bos_token_id": 1, "eos_token_id": None})
    made = getattr(transformers, f"{kind}{head}")(config)
    dense = randomised(made, 0.6 if kind == "T5" else 0.3)
    given: dict[str, Any] = TEXT
    if kind == "Whisper":
        given = {"input_features": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).double()}
    heads = "uniform" if kind in LIKE else "ragged"
    plan, pruned = make_plan(dense, 0.5, heads=heads, granularity="joint", scorer="random"), copy.deepcopy(dense)
    report = apply_plan(pruned, plan)
    assert set(report.ways) == {layer.spec.name for layer in plan}
    again = load_pruned(save_pruned(pruned, tmp_path / "pruned"))
    for how in HOWS.values():
        with masked(dense, plan):
            expected = generated(dense, given, how)
            assert torch.equal(generated(dense, given, how, use_cache=False), expected)
        assert not torch.equal(generated(dense, given, how), expected)
        for model in (pruned, again):
            assert torch.equal(generated(model, given, how), expected)
            assert torch.equal(generated(model, given, how, use_cache=False), expected)
    if kind in ("Llama", "Mistral"):
        assert torch.equal(generated(again, given, {}, cache_implementation="static"), generated(again, given, {}))
