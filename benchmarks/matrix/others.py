"""Families of torchvision, x-transformers and open_clip: :func:`hosts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .diffusion import whole
from .own import normal
from .running import Host

Inputs = Callable[[], tuple[Any, ...]]


def _torchvision() -> Iterator[tuple[str, Callable[[], nn.Module], Inputs]]:
    def at(name: str) -> Any:
        module, _, found = name.rpartition(".")
        return getattr(import_module(f"torchvision.models.{module}"), found)

    sizes = {"depths": [2, 2], "embed_dim": 32, "num_heads": [2, 4], "num_classes": 5, "stochastic_depth_prob": 0.0}
    yield (
        "ViT",
        lambda: at("vision_transformer.VisionTransformer")(32, 8, 2, 4, 64, 32, num_classes=5),
        lambda: (normal(2, 3, 32, 32),),
    )
    yield (
        "Swin",
        lambda: at("swin_transformer.SwinTransformer")([4, 4], window_size=[2, 2], **sizes),
        lambda: (normal(2, 3, 32, 32),),
    )
    yield (
        "Swin v2",
        lambda: at("swin_transformer.SwinTransformer")(
            [4, 4], window_size=[2, 2], **sizes, block=at("swin_transformer.SwinTransformerBlockV2"),
            downsample_layer=at("swin_transformer.PatchMergingV2"),
        ),
        lambda: (normal(2, 3, 32, 32),),
    )  # fmt: skip
    yield (
        "Video Swin",
        lambda: at("video.swin_transformer.SwinTransformer3d")([2, 4, 4], window_size=[2, 2, 2], **sizes),
        lambda: (normal(2, 3, 4, 32, 32),),
    )
    yield "MaxViT", lambda: at("maxvit.MaxVit")(
        (32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=5
    ), lambda: (normal(2, 3, 32, 32),)  # fmt: skip
    yield "MViT v2", lambda: at("video.mvit.MViT")(
        (32, 32), 4, [
            at("video.mvit.MSBlockConfig")(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
            at("video.mvit.MSBlockConfig")(4, 32, 64, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        ],
        residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True, num_classes=5,
    ), lambda: (normal(2, 3, 4, 32, 32),)  # fmt: skip


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary_pos_emb": True},
    "rotary, grouped queries": {"rotary_pos_emb": True, "attn_kv_heads": 2},
    "ALiBi": {"alibi_pos_bias": True},
    "T5 bias": {"rel_pos_bias": True},
    "qk norm": {"attn_qk_norm": True},
    "talking heads": {"attn_pre_talking_heads": True},
    "gated values": {"attn_gate_values": True},
    "multi-query": {"attn_one_kv_head": True},
    "memory keys": {"attn_num_mem_kv": 2},
    "softcap": {"attn_softclamp_logits": True},
}
"""Options of x-transformers' layers, by what is in them."""


def _x_transformers() -> Iterator[tuple[str, Callable[[], nn.Module], Inputs]]:
    def decoder(options: dict[str, Any]) -> nn.Module:
        x = import_module("x_transformers")
        layers = x.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
        found: nn.Module = x.TransformerWrapper(num_tokens=40, max_seq_len=16, attn_layers=layers)
        return found

    for what, options in LAYERS.items():
        yield f"Decoder, {what}", lambda options=options: decoder(options), lambda: (whole(40, 2, 9),)

    def vit() -> nn.Module:
        x = import_module("x_transformers")
        layers = x.Encoder(dim=64, depth=2, heads=4, attn_dim_head=16)
        found: nn.Module = x.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)
        return found

    yield "ViTransformerWrapper", vit, lambda: (normal(2, 3, 32, 32),)

    def both() -> nn.Module:
        sizes = {"num_tokens": 40, "depth": 1, "heads": 4, "max_seq_len": 16, "attn_dim_head": 16}
        sides = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in sizes.items()}
        return _Pair(import_module("x_transformers").XTransformer(dim=64, **sides))

    yield "XTransformer", both, lambda: (whole(40, 2, 9), whole(40, 2, 6))


class _Pair(nn.Module):
    """Gives logits where the model itself gives a loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder.net

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        found: Tensor = self.decoder(target, context=self.encoder(source, return_embeddings=True))
        return found


VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 90, "width": 64, "heads": 4, "layers": 2}
CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIP", {"vision_cfg": VISION, "text_cfg": TEXT}),
    "CLIP, ResNet": ("CLIP", {"vision_cfg": {**VISION, "layers": [1, 1, 1, 1], "width": 16}, "text_cfg": TEXT}),
    "CLIP, attention pool": ("CLIP", {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4},
                                      "text_cfg": TEXT}),
    "CLIP, text tower apart": ("CustomTextCLIP", {"vision_cfg": VISION, "text_cfg": {**TEXT, "no_causal_mask": True}}),
    "CoCa": (
        "CoCa",
        {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
         "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True}, "multimodal_cfg": TEXT},
    ),
}  # fmt: skip


def _open_clip() -> Iterator[tuple[str, Callable[[], nn.Module], Inputs]]:
    for name, (cls, options) in CLIPS.items():

        def build(cls: str = cls, options: dict[str, Any] = options) -> nn.Module:
            places = import_module("open_clip.model"), import_module("open_clip.coca_model")
            found = next(getattr(place, cls) for place in places if hasattr(place, cls))
            made: nn.Module = found(embed_dim=64, **options)
            return made

        yield name, build, lambda: (normal(2, 3, 32, 32), 1 + whole(80, 2, 12))


def hosts() -> Iterator[Host]:
    """All of them."""
    sources = {"torchvision": _torchvision, "x-transformers": _x_transformers, "open_clip": _open_clip}
    for source, families in sources.items():
        for name, build, inputs in families():
            yield Host(name, source, build, lambda _, inputs=inputs: inputs())
