"""Hosts that repeat a mask for the heads of the dense model."""

from __future__ import annotations

import pytest
import torch

from attnprune import apply_plan, make_plan, masked

transformers = pytest.importorskip("transformers")


@pytest.mark.long
def test_heads_of_grounding_dino_go_without_inputs() -> None:
    """Its decoder repeats the text's mask for as many heads as its config says, whatever its attention has left."""
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoDecoder

    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig(
        d_model=16, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=16, num_queries=5,
        num_feature_levels=1, decoder_n_points=1,
    )  # fmt: skip
    decoder = GroundingDinoDecoder(config).eval()
    inputs = {
        "inputs_embeds": torch.randn(1, 5, 16),
        "vision_encoder_hidden_states": torch.randn(1, 6, 16),
        "text_encoder_hidden_states": torch.randn(1, 3, 16),
        "text_encoder_attention_mask": torch.tensor([[False, False, True]]),
        "reference_points": torch.rand(1, 5, 4),
        "spatial_shapes": torch.tensor([[2, 3]]),
        "spatial_shapes_list": [(2, 3)],
        "level_start_index": torch.tensor([0]),
        "valid_ratios": torch.ones(1, 1, 2),
    }
    plan = make_plan(decoder, 0.5, granularity="head", scope="local", scorer="magnitude", exclude="*.encoder_attn")
    with torch.no_grad(), masked(decoder, plan):
        expected = decoder(**inputs).last_hidden_state
    report = apply_plan(decoder, plan)
    assert set(report.ways) == {"layers.0.self_attn", "layers.0.encoder_attn_text"}
    assert [spec.heads for spec in report.plan.after] == [2, 2]
    with torch.no_grad():
        torch.testing.assert_close(decoder(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
