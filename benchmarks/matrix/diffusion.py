"""Families of diffusers: :func:`hosts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .own import normal
from .running import Host

WIDTH, HEADS, DIM = 64, 4, 16
SIZES = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2}
TEXT, STEPS = normal(2, 6, 32), torch.tensor([3.0, 7.0], dtype=torch.float64)
MASK = torch.ones(2, 6, dtype=torch.long)


def whole(high: int, *shape: int) -> Tensor:
    """Random numbers in [0, high), the same for a shape."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


MODELS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DiT": (
        "DiTTransformer2DModel", {**SIZES, "sample_size": 8, "num_embeds_ada_norm": 10},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS, "class_labels": torch.tensor([1, 2])},
    ),
    "PixArt": (
        "PixArtTransformer2DModel",
        {**SIZES, "sample_size": 8, "cross_attention_dim": WIDTH, "caption_channels": 32, "num_embeds_ada_norm": 10,
         "use_additional_conditions": False},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT,
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "Stable Diffusion 3": (
        "SD3Transformer2DModel",
        {**SIZES, "sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 32,
         "caption_projection_dim": WIDTH, "pooled_projection_dim": 24, "pos_embed_max_size": 8,
         "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT,
         "pooled_projections": normal(2, 24)},
    ),
    "Flux": (
        "FluxTransformer2DModel",
        {**SIZES, "num_layers": 1, "num_single_layers": 1, "in_channels": 8, "joint_attention_dim": 32,
         "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6)},
        {"hidden_states": normal(2, 9, 8), "timestep": STEPS / 10, "encoder_hidden_states": TEXT,
         "pooled_projections": normal(2, 24), "img_ids": whole(3, 9, 3).double(),
         "txt_ids": torch.zeros(6, 3).double()},
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "sample_size": 8, "joint_attention_dim": 32, "caption_projection_dim": WIDTH, "pos_embed_max_size": 16},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS / 10, "encoder_hidden_states": TEXT},
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        {**SIZES, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32, "sample_width": 8,
         "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6},
        {"hidden_states": normal(2, 2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT},
    ),
    "CogView4": (
        "CogView4Transformer2DModel",
        {**SIZES, "in_channels": 4, "out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 4,
         "sample_size": 8, "rope_axes_dim": (8, 8)},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT,
         **{name: torch.full((2, 2), 8.0).double() for name in ("original_size", "target_size", "crop_coords")}},
    ),
    "Latte": (
        "LatteTransformer3DModel",
        {**SIZES, "num_layers": 1, "in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "sample_size": 8,
         "patch_size": 2, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10, "caption_channels": 32,
         "video_length": 2},
        {"hidden_states": normal(2, 4, 2, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT},
    ),
    "Lumina 2": (
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 1, "num_refiner_layers": 1,
         "num_attention_heads": HEADS, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 6, 6),
         "axes_lens": (30, 16, 16), "cap_feat_dim": 32},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS / 10, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": MASK},
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {**SIZES, "num_layers": 1, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": HEADS,
         "cross_attention_head_dim": DIM, "cross_attention_dim": WIDTH, "caption_channels": 32, "sample_size": 8},
        {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT},
    ),
    "Stable Audio": (
        "StableAudioDiTModel",
        {**SIZES, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_key_value_attention_heads": 2,
         "cross_attention_dim": 32, "time_proj_dim": 8, "global_states_input_dim": 16, "cross_attention_input_dim": 32},
        {"hidden_states": normal(2, 4, 8), "timestep": STEPS / 10, "encoder_hidden_states": TEXT,
         "global_hidden_states": normal(2, 1, 16), "rotary_embedding": (normal(9, 8).cos(), normal(9, 8).sin())},
    ),
    "Mochi": (
        "MochiTransformer3DModel",
        {**SIZES, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 32,
         "time_embed_dim": 8, "max_sequence_length": 6},
        {"hidden_states": normal(2, 4, 2, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": MASK.bool()},
    ),
    "Wan": (
        "WanTransformer3DModel",
        {**SIZES, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32,
         "rope_max_seq_len": 16},
        {"hidden_states": normal(2, 4, 2, 8, 8), "timestep": STEPS.long(), "encoder_hidden_states": TEXT},
    ),
    "LTX-Video": (
        "LTXVideoTransformer3DModel",
        {**SIZES, "in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "caption_channels": 32},
        {"hidden_states": normal(2, 8, 4), "timestep": STEPS, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": MASK, "num_frames": 2, "height": 2, "width": 2},
    ),
    "Kandinsky prior": (
        "PriorTransformer", {**SIZES, "embedding_dim": 32, "num_embeddings": 6, "additional_embeddings": 4},
        {"hidden_states": normal(2, 32), "timestep": STEPS, "proj_embedding": normal(2, 32),
         "encoder_hidden_states": TEXT},
    ),
    "aMUSEd": (
        "UVit2DModel",
        {"hidden_size": WIDTH, "cond_embed_dim": 32, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
         "encoder_hidden_size": 32, "vocab_size": 40, "codebook_size": 32, "in_channels": 32, "block_out_channels": 32,
         "num_res_blocks": 1, "block_num_heads": 4, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 32, "sample_size": 4},
        {"input_ids": whole(30, 2, 4, 4), "encoder_hidden_states": TEXT, "pooled_text_emb": normal(2, 32),
         "micro_conds": torch.ones(2, 5).double()},
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {**SIZES, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)},
        {"hidden_states": normal(2, 9, 16), "timestep": STEPS / 10, "encoder_hidden_states": TEXT,
         "encoder_hidden_states_mask": MASK, "img_shapes": [[(1, 3, 3)]] * 2},
    ),
    "Stable Diffusion, UNet": (
        "UNet2DConditionModel",
        {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
         "norm_num_groups": 8, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        {"sample": normal(2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT},
    ),
    "DDPM, UNet": (
        "UNet2DModel",
        {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
         "attention_head_dim": 8, "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
        {"sample": normal(2, 3, 8, 8), "timestep": STEPS},
    ),
    "Stable Video Diffusion, UNet": (
        "UNetSpatioTemporalConditionModel",
        {"sample_size": 8, "in_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
         "cross_attention_dim": 32, "num_attention_heads": (2, 4), "projection_class_embeddings_input_dim": 24,
         "addition_time_embed_dim": 8, "transformer_layers_per_block": 1,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
        {"sample": normal(2, 2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT,
         "added_time_ids": normal(2, 3)},
    ),
    "AutoencoderKL": (
        "AutoencoderKL", {"block_out_channels": (32,), "norm_num_groups": 8, "sample_size": 8},
        {"sample": normal(2, 3, 8, 8)},
    ),
}  # fmt: skip
"""A class, its arguments, and what it is called with."""


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    made: nn.Module = getattr(import_module("diffusers"), name)(**options)
    return made


def hosts() -> Iterator[Host]:
    """All of them."""
    for name, (cls, options, given) in MODELS.items():
        yield Host(name, "diffusers", partial(_build, cls, options), lambda _, given=given: given, {"class": cls})
