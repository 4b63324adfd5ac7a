"""Families that are not of transformers: timm's, and those of the other modules here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from . import diffusion, others, own
from .running import Host

DIMS = {"embed_dim": 64, "depth": 2, "num_heads": 4}
STAGES = {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2, "patch_size": 4}
VIT = {**DIMS, "patch_size": 8}

TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", 32, VIT),
    "ViT, qk norm": ("vit_tiny_patch16_224", 32, {**VIT, "qk_norm": True}),
    "ViT, norm before O": ("vit_tiny_patch16_224", 32, {**VIT, "scale_attn_norm": True}),
    "ViT, post-norm": ("vit_base_patch16_rpn_224", 32, VIT),
    "ViT, relative positions": ("vit_relpos_small_patch16_224", 32, VIT),
    "ViT, shared relative bias": ("vit_relpos_medium_patch16_rpn_224", 32, {**VIT, "rel_pos_type": "bias"}),
    "ViT-22B, parallel": ("vit_tiny_patch16_224", 32, {**VIT, "block_fn": "ParallelScalingBlock"}),
    "ViT, differential": ("vit_tiny_patch16_224", 32, {**VIT, "block_fn": "DiffParallelScalingBlock"}),
    "ViT, parallel things": ("vit_tiny_patch16_224", 32, {**VIT, "block_fn": "ParallelThingsBlock"}),
    "ViT, attention pool": ("vit_base_patch16_siglip_224", 32, VIT),
    "ViT hybrid": ("vit_tiny_r_s16_p8_224", 32, DIMS),
    "SAM ViT": ("samvit_base_patch16", 64, {**VIT, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 16}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", 32, VIT),
    "BEiT": ("beit_base_patch16_224", 32, VIT),
    "BEiT v2": ("beitv2_base_patch16_224", 32, VIT),
    "EVA": ("eva_giant_patch14_224", 32, VIT),
    "EVA-02": ("eva02_tiny_patch14_224", 32, VIT),
    "EVA, qk norm, apart": ("eva02_base_patch14_224", 32, VIT),
    "ViT, rotary": ("vit_medium_patch16_rope_reg1_gap_256", 32, VIT),
    "DINOv3": ("vit_small_patch16_dinov3", 32, VIT),
    "PE": ("vit_pe_core_tiny_patch16_384", 32, {**VIT, "attn_pool_num_heads": 4}),
    "NaFlexViT": ("naflexvit_base_patch16_gap", 32, {"embed_dim": 64, "depth": 2, "num_heads": 4}),
    "CaiT": ("cait_xxs24_224", 32, VIT),
    "CoaT": ("coat_tiny", 64, {"parallel_depth": 1}),
    "ConViT": ("convit_tiny", 32, {**VIT, "embed_dim": 16, "local_up_to_layer": 1}),
    "CrossViT": ("crossvit_tiny_240", 240, {}),
    "CSATv2": ("csatv2", 128, {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "transformer_depths": (0, 0, 1, 1)}),
    "CPUBone": ("cpubone_nano", 64, {"width_list": [8, 16, 16, 32, 64], "depth_list": [0, 1, 1, 1, 1],
                                     "head_widths": (32, 32)}),
    "DaViT": ("davit_tiny", 64, {**STAGES, "window_size": 2}),
    "DeepSeek-OCR ViT": ("deepseek_vit_412m", 42, {**DIMS, "patch_size": 7}),
    "EdgeNeXt": ("edgenext_xx_small", 64, {"dims": (16, 32, 64, 64), "depths": (2, 2, 2, 2), "heads": (4, 4, 4, 4)}),
    "EfficientFormer": ("efficientformer_l1", 224, {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 32, 64)}),
    "EfficientFormerV2": ("efficientformerv2_s0", 64, {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64),
                                                       "mlp_ratios": 2}),
    "EfficientViT (MIT)": ("efficientvit_b0", 64, {}),
    "EfficientViT (MSRA)": ("efficientvit_m0", 224, {}),
    "EfficientViM": ("efficientvim_m1", 64, {"embed_dim": (32, 64, 64)}),
    "FastViT": ("fastvit_sa12", 64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}),
    "FastViT, MobileCLIP": ("fastvit_mci0", 64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}),
    "GCViT": ("gcvit_xxtiny", 64, {"window_ratio": (8, 8, 4, 2)}),
    "Gemma 4 ViT": ("gemma4_vit_167m", 48, {**DIMS, "head_dim": 16, "intermediate_size": 32}),
    "Hiera": ("hiera_tiny_224", 64, {"embed_dim": 16, "stages": (1, 1, 1, 1), "num_heads": 2}),
    "Hiera, SAM 2": ("sam2_hiera_tiny", 64, {"embed_dim": 16, "stages": (1, 1, 2, 1), "num_heads": 2,
                                             "global_att_blocks": (3,)}),
    "iFormer": ("iformer_t", 64, {"dims": (16, 32, 64, 64)}),
    "LeViT": ("levit_128s", 64, {"embed_dim": (32, 64), "key_dim": 8, "depth": (1, 1), "num_heads": (4, 4)}),
    "LowFormer": ("lowformer_b0", 64, {"width_list": [8, 16, 16, 32, 64], "depth_list": [0, 1, 1, 1, 1],
                                       "head_widths": (32, 32)}),
    "CoAtNet": ("coatnet_pico_rw_224", 64, {}),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", 64, {}),
    "MaxxViT": ("maxxvit_rmlp_nano_rw_256", 64, {}),
    "MetaFormer, CAFormer": ("caformer_s18", 64, {}),
    "MobileViT": ("mobilevit_xxs", 64, {}),
    "MobileViTv2": ("mobilevitv2_050", 64, {}),
    "MobileNetV4, hybrid": ("mobilenetv4_hybrid_medium", 64, {}),
    "MobileNetV5": ("mobilenetv5_300m", 64, {}),
    "MViTv2": ("mvitv2_tiny", 64, {}),
    "NesT": ("nest_tiny", 64, {}),
    "NextViT": ("nextvit_small", 64, {}),
    "PiT": ("pit_ti_224", 32, {"base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (2, 4, 8), "patch_size": 8,
                               "stride": 4}),
    "PVTv2": ("pvt_v2_b0", 64, STAGES),
    "PVTv2, linear": ("pvt_v2_b2_li", 64, STAGES),
    "Qwen3 ViT": ("qwen3_vit_88m", 32, {**DIMS, "patch_size": 8}),
    "Swin": ("swin_tiny_patch4_window7_224", 32, SWIN),
    "Swin v2": ("swinv2_tiny_window8_256", 32, SWIN),
    "Swin v2, CR": ("swinv2_cr_tiny_224", 32, {**SWIN, "window_size": 2}),
    "SwiftFormer": ("swiftformer_xs", 64, {"layers": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 64]}),
    "SHViT": ("shvit_s1", 128, {}),
    "TinyViT": ("tiny_vit_5m_224", 64, {**STAGES, "window_sizes": (2, 2, 2, 2)}),
    "TNT": ("tnt_s_patch16_224", 32, {"embed_dim": 64, "inner_dim": 16, "depth": 2, "num_heads_inner": 4,
                                      "num_heads_outer": 4, "patch_size": 8}),
    "Twins, PCPVT": ("twins_pcpvt_small", 64, STAGES),
    "Twins, SVT": ("twins_svt_small", 64, {**STAGES, "wss": (2, 2, 2, 2)}),
    "Visformer": ("visformer_tiny", 64, {"embed_dim": 64, "depth": (1, 1, 1), "num_heads": 4}),
    "ViTamin": ("vitamin_small_224", 64, {"embed_dim": 384, "depth": 1, "num_heads": 6}),
    "VOLO": ("volo_d1_224", 64, {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (2, 4, 4, 4)}),
    "XCiT": ("xcit_nano_12_p16_224", 32, {**DIMS, "patch_size": 16}),
    "BoTNet": ("botnet26t_256", 64, {}),
    "HaloNet": ("halonet26t", 64, {}),
    "LambdaNet": ("lambda_resnet26t", 64, {}),
    "ResNet, attention pool": ("resnet50_clip", 64, {"layers": (1, 1, 1, 1)}),
}  # fmt: skip
"""A variant, the size of its images, and arguments."""


def timm_model(variant: str, size: int, options: dict[str, Any]) -> nn.Module:
    """A tiny model of timm; the size of images is told where the class takes one."""
    timm = import_module("timm")
    options = dict(options)
    if isinstance(block := options.get("block_fn"), str):
        options["block_fn"] = getattr(import_module("timm.models.vision_transformer"), block)
    try:
        return timm.create_model(variant, pretrained=False, num_classes=5, img_size=size, **options)  # type: ignore[no-any-return]
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(variant, pretrained=False, num_classes=5, **options)  # type: ignore[no-any-return]


def image(size: int, channels: int = 3) -> tuple[Any, ...]:
    """Two images."""
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def _timm() -> Iterator[Host]:
    for name, (variant, size, options) in TIMM.items():
        yield Host(name, "timm", partial(timm_model, variant, size, options), lambda _, size=size: image(size))


def elsewhere() -> Iterator[Host]:
    """All of these families."""
    yield from _timm()
    yield from others.hosts()
    yield from diffusion.hosts()
    yield from own.hosts()
