"""Where a kind of model of transformers needs more than its fields' names tell: for its config, and for its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Dinov2Config, ResNetConfig

RESNET = ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip
DINO = Dinov2Config(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8, mlp_ratio=1,
    out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
)  # fmt: skip
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
DEPTH = {"backbone_config": DINO, "neck_hidden_sizes": [16, 16, 32, 32], "reassemble_hidden_size": 64, "patch_size": 8}
SAM2 = {"hidden_size": 16, "embed_dim_per_stage": [16, 32, 64, 128], "blocks_per_stage": [1, 1, 1, 1],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [2], "image_size": [64, 64]}  # fmt: skip


def sections(*numbers: int) -> dict[str, Any]:
    """Rotary parameters of three axes."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(numbers)}


CONFIGS: dict[str, Mapping[str, Any]] = {
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "patch_size": 8},
    "lilt": {"hidden_size": 96},
    "llama4": {"vision_config": {"intermediate_size": 256, "vision_output_dim": 64,
                                 "projector_input_dim": 64, "projector_output_dim": 64}},
    "longcat_flash": {"head_dim": 8},
    "oneformer": {"conv_dim": 64, "mask_dim": 64},  # else parts that no file holds lie between them
    "lxmert": {"l_layers": 1, "x_layers": 1, "r_layers": 1},
    "levit": {"hidden_sizes": (64, 64, 64), "num_attention_heads": (4, 4, 4), "patch_size": 16},
    "maskformer": {"backbone_config": {"embed_dim": 48}},
    "superglue": {"hidden_size": 256},
    "mistral4": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3334}},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "tvp": {"backbone_config": {"out_features": ["stage4"]}, "max_img_size": 32, "visual_prompt_size": 8,
            "num_frames": 2},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "seamless_m4t": {"feature_projection_input_dim": 32},
    "seamless_m4t_v2": {"feature_projection_input_dim": 32},
    "xlm": {"emb_dim": 64, "n_words": 128, "mask_index": 5},
    "flaubert": {"emb_dim": 64, "n_words": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128,
              "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8,
               "attention_hidden_size": 128, "attention_head_dim": 32},
    "sam2_hiera_det_model": SAM2,
    "sam2": {"vision_config": {"backbone_config": SAM2}},
    "sam2_vision_model": {"backbone_config": SAM2},
    "align": {
        "vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        "projection_dim": 320,
    },

    "autoformer": {**SERIES, "label_length": 2, "moving_average": 3},
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "blip-2": {"image_token_index": 100},
    "blt": {"patcher_config": {"sliding_window": 5}},
    "chameleon": {"vocabulary_map": {"<image>": 100, **{f"IMGIMG{chr(65 + i)}Z": 20 + i for i in range(8)}}},
    "clap": {
        "audio_config": {"spec_size": 64, "num_mel_bins": 16, "hidden_size": 128, "patch_embeds_hidden_size": 16,
                         "num_attention_heads": [1, 2, 4, 8], "window_size": 4},
    },
    "colqwen2": {"vlm_config": {"text_config": {"rope_parameters": sections(4, 2, 2)}}},
    "conditional_detr": {"backbone_config": RESNET},
    "dab-detr": {"backbone_config": RESNET},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deformable_detr": {"backbone_config": RESNET},
    "depth_anything": DEPTH,
    "depth_pro": {"patch_size": 32},
    "detr": {"backbone_config": RESNET},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
        "pad_token_id": 0,
    },
    "efficientloftr": {"hidden_size": 64, "out_features": [16, 16, 32, 64]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "emu3": {"pad_token_id": 0},
    "eomt": {"attn_implementation": "eager"},  # its masks are of single precision; sdpa misreads them beside double
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": sections(3, 3, 2)}},
    "esm": {"vocab_size": 128, "mask_token_id": 100, "pad_token_id": 0, "position_embedding_type": "rotary"},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_h1": {"mamba_expand": 2, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm46v": {"text_config": {"rope_parameters": sections(4, 2, 2)}},
    "glm4v": {"text_config": {"rope_parameters": sections(4, 2, 2)}},
    "glm4v_moe": {"text_config": {"rope_parameters": sections(2, 1, 1)}},
    "glm4v_moe_text": {"rope_parameters": {**sections(2, 1, 1), "partial_rotary_factor": 0.5}},
    "glm4v_text": {"rope_parameters": sections(4, 2, 2)},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "glm5_next_text": {"index_topk": 16},
    "glm_image": {"text_config": {"rope_parameters": sections(4, 2, 2)}},
    "glm_image_text": {"rope_parameters": sections(4, 2, 2)},
    "glm_ocr": {"text_config": {"rope_parameters": sections(4, 2, 2)}},
    "glm_ocr_text": {"rope_parameters": sections(4, 2, 2)},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "granite_speech5_encoder": {"context_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "hunyuan_vl_text": {"head_dim": 16},
    "hy_v4_vl": {"text_config": {"rope_parameters": sections(2, 1, 1)}},
    "hy_v4_vl_text": {"rope_parameters": sections(2, 1, 1)},
    "informer": SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lw_detr": {"backbone_config": {"num_windows": 4, "out_indices": [1, 2]}},
    "lw_detr_vit": {"num_windows": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mobilebert": {"embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "prompt_depth_anything": DEPTH,
    "qwen2_5_vl": {"text_config": {"rope_parameters": sections(4, 2, 2)}},
    "qwen2_5_vl_text": {"rope_parameters": sections(4, 2, 2)},
    "qwen2_vl": {"text_config": {"rope_parameters": sections(4, 2, 2)}},
    "qwen2_vl_text": {"rope_parameters": sections(4, 2, 2)},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 5},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (4, 16), "lsh_attn_chunk_length": 4,
                 "local_attn_chunk_length": 4},
    "seggpt": {"image_size": (64, 32), "num_hidden_layers": 4, "merge_index": 0,
               "intermediate_hidden_state_indices": [1, 2, 3, 3]},
    "table-transformer": {"backbone_config": RESNET},
    "time_series_transformer": SERIES,
    "wavtokenizer": {"codebook_dim": 64},
    "wavtokenizer_encoder": {"codebook_dim": 64},
}  # fmt: skip
"""By ``model_type``: values of fields, taken as they are; a mapping for a config within."""

_PAST = {
    "past_values": (2, 10), "past_time_features": (2, 10, 0), "past_observed_mask": torch.ones(2, 10).double(),
    "future_values": (2, 4), "future_time_features": (2, 4, 0),
}  # fmt: skip
_IDS = ((2, 12), 3, 90)
_PATCHES = {
    "pixel_values": (2, 16, 192), "pixel_attention_mask": ((2, 16), 1, 2), "spatial_shapes": torch.tensor([[4, 4]] * 2),
}  # fmt: skip

SHAPES: dict[str, Mapping[str, Any]] = {
    "musicgen": {"input_ids": _IDS, "decoder_input_ids": ((8, 5), 3, 60)},
    "lxmert": {"input_ids": _IDS, "visual_feats": (2, 4, 32), "visual_pos": (2, 4, 4)},
    "canine": {"input_ids": ((2, 32), 3, 90)},
    "pix2struct": {
        "flattened_patches": torch.cat([torch.arange(8).expand(2, 8)[..., None].repeat(1, 1, 2).double(),
                                        torch.ones(2, 8, 64).double()], -1),
        "decoder_input_ids": ((2, 5), 3, 90),
    },
    "seggpt": {"pixel_values": (1, 3, 32, 32), "prompt_pixel_values": (1, 3, 32, 32), "prompt_masks": (1, 3, 32, 32)},
    "siglip2": {"input_ids": _IDS, **_PATCHES},
    "siglip2_vision_model": _PATCHES,
    "superglue": {"pixel_values": (1, 2, 3, 64, 64)},
    "timesfm": {"past_values": (2, 512), "past_values_padding": ((2, 512), 0, 1), "freq": ((2, 1), 0, 2)},
    "timesfm2_5": {"past_values": (2, 512)},
    "tvp": {"pixel_values": (1, 2, 3, 32, 32), "input_ids": ((1, 12), 3, 90)},
    "wav2vec2-bert": {"input_features": (2, 24, 16)},
    "autoformer": _PAST,
    "blip_2_qformer": {"query_embeds": (2, 8, 64), "encoder_hidden_states": (2, 6, 64)},
    "clap": {"input_ids": _IDS, "input_features": (2, 1, 64, 16), "is_longer": torch.zeros(2, 1, dtype=torch.bool)},
    "clvp": {"input_ids": _IDS, "input_features": (2, 80, 16)},
    "decision_transformer": {
        "states": (2, 6, 17), "actions": (2, 6, 4), "rewards": (2, 6, 1), "returns_to_go": (2, 6, 1),
        "timesteps": ((2, 6), 0, 10), "attention_mask": ((2, 6), 1, 2),
    },
    "depth_pro": {"pixel_values": (1, 3, 128, 128)},
    "efficientloftr": {"pixel_values": (1, 2, 1, 64, 64)},
    "gemma3n_audio": {"audio_mel": (2, 32, 128), "audio_mel_mask": torch.zeros(2, 32, dtype=torch.bool)},
    "gemma4_audio": {"input_features": (2, 32, 128)},
    "idefics": {"input_ids": _IDS, "pixel_values": (2, 1, 3, 32, 32), "image_attention_mask": ((2, 12, 1), 1, 2)},
    "informer": _PAST,
    "muse_glimmer_assistant": {"noise_embeds": (2, 4, 64), "context_hidden_states": (2, 6, 64)},
    "muse_spark_audio": {"input_values": (2, 1920)},
    "oneformer": {"pixel_values": (2, 3, 64, 64), "task_inputs": ((2, 77), 1, 90)},
    "patchtsmixer": {"past_values": (2, 32, 1)},
    "patchtst": {"past_values": (2, 32, 1)},
    "perceiver": {"inputs": (2, 12, 64)},
    "time_series_transformer": _PAST,
}  # fmt: skip
"""By ``model_type``: what the model is called with, in place of what its arguments' names tell: a shape is random real
numbers, a shape with a least and a greatest number (not reached) random whole numbers, a tensor itself."""
