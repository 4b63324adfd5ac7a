"""What attention has besides four projections and a softmax, and which models of the suite have it: :data:`STAGES`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from attnprune import AttentionView
from attnprune.families.calls import ADDED, CACHES, KEYS, SOURCES
from attnprune.nn import host_class

from .families import FAMILIES

View = AttentionView
NORMS = ("q_norm", "q_layernorm", "query_layernorm", "qk_norm")


class Stage(NamedTuple):
    """One stage."""

    what: str
    """As the documentation has it."""
    models: tuple[str, ...]
    """Those that have it, as :func:`labels` calls them."""
    shows: Callable[[AttentionView, Any], bool]
    """Whether an attention, with its model's config, has it."""


def labels() -> Iterator[tuple[str, str, int]]:
    """Of every configuration of the suite: what the tables here call it, its family, its number there."""
    for name, cls in FAMILIES.items():
        for number, config in enumerate(cls.cases()):  # type: ignore[attr-defined]
            yield config.get("kind", name), name, number


def takes(*names: str) -> Callable[[View, Any], bool]:
    return lambda view, _: bool({*names} & {*inspect.signature(host_class(view.module).forward).parameters})


def norm_of(view: View) -> Any:
    """The norm of queries; None if there is none."""
    found: Any = next((getattr(view.module, name) for name in NORMS if hasattr(view.module, name)), None)
    return None if isinstance(found, nn.Identity) else found


def normed(width: int) -> Callable[[View, Any], bool]:
    """Whether queries are normalised over one head, or (1) over all of them."""

    def shows(view: View, _: Any) -> bool:
        norm, spec = norm_of(view), view.spec
        if norm is None or hasattr(norm, "norms"):  # one for each head
            return norm is not None and not width
        weight = getattr(norm, "weight", None)
        return weight is not None and weight.numel() == spec.qk_dim * (spec.heads if width else 1)

    return shows


def kind_of_norm(word: str) -> Callable[[View, Any], bool]:
    return lambda view, _: any(word in type(one).__name__ for one in (norm_of(view) or nn.Identity()).modules())


def has(*names: str) -> Callable[[View, Any], bool]:
    """Whether the attention has an attribute that is neither None nor False."""
    found = (None, False)
    return lambda view, _: not all(any(getattr(view.module, name, None) is one for one in found) for name in names)


def in_config(*names: str) -> Callable[[View, Any], bool]:
    return lambda _, config: any(hasattr(config, name) for name in names)


def order(*words: str) -> Callable[[View, Any], bool]:
    return lambda view, _: view.joint and view.verdict is not None and view.verdict.order in words


def rotary(style: str, partial: bool = False) -> Callable[[View, Any], bool]:
    def shows(view: View, _: Any) -> bool:
        turned = view.spec.rotary_dims[0]
        return view.spec.rotary == style and (turned < view.spec.qk_dim) == partial

    return shows


def source(*words: str) -> Callable[[View, Any], bool]:
    """Whether a forward, or what it is made of, says one of these."""
    return lambda view, _: any(word in inspect.getsource(host_class(view.module)) for word in words)


def verdict(**values: Any) -> Callable[[View, Any], bool]:
    return lambda view, _: all(getattr(view.verdict, key) == value for key, value in values.items())


STAGES = (
    Stage("a cache in the signature", ("Llama", "Mistral", "GPT2", "Whisper"), takes(*CACHES)),
    Stage("self- and cross-attention in one forward", ("Seq2Seq", "Whisper", "T5", "MHA"), takes(*SOURCES, *KEYS)),
    Stage("softmax written out", ("Timm", "Mpt", "Bloom", "VitDet", "TableTransformer"), source("softmax(")),
    Stage("attention weights on request", ("MHA", "Bloom", "SamVision"),
          takes("output_attentions", "need_weights")),
    Stage("rotary, half", ("Llama", "Qwen3", "Mistral", "NanoChat"), rotary("half")),
    Stage("rotary, interleaved", ("Cohere", "Llama4Text"), rotary("interleaved")),
    Stage("rotary, of a part of the channels", ("GPTNeoX", "Qwen3Next"), rotary("half", True)),
    Stage("rotary, multi-section", ("Qwen2VLText", "Qwen3VLText"),
          lambda _, config: "mrope_section" in (getattr(config, "rope_parameters", None) or {})),
    Stage("rotary, by row and column", ("DINOv3ViT", "PixtralVision"),
          lambda view, config: view.spec.rotary != "none" and hasattr(config, "patch_size")),
    Stage("grouped queries", ("Llama", "Qwen3", "Phi3", "Falcon"), lambda v, _: 1 < v.spec.kv_heads < v.spec.heads),
    Stage("multi-query", ("Llama", "GPTBigCode"), lambda v, _: v.spec.kv_heads == 1),
    Stage("norms per head", ("Qwen3", "Persimmon", "Phi", "StableLm"), normed(0)),
    Stage("norms of the whole width", ("Olmo2", "InternVLVision"), normed(1)),
    Stage("RMSNorm", ("Qwen3", "Olmo2", "InternVLVision"), kind_of_norm("RMSNorm")),
    Stage("LayerNorm", ("Phi", "StableLm", "Persimmon", "timm's ViT with norms"), kind_of_norm("LayerNorm")),
    Stage("norms without a weight", ("NanoChat", "Llama4Text"),
          lambda view, _: norm_of(view) is not None and not [*norm_of(view).parameters()]),
    Stage("softcap", ("Gemma2", "VaultGemma"), has("attn_logit_softcapping")),
    Stage("sinks", ("GptOss", "MiMoV2Flash"), has("sinks")),
    Stage("sliding windows", ("Gemma2", "VaultGemma", "GptOss", "Afmoe"), has("sliding_window")),
    Stage("ALiBi", ("Bloom", "Mpt"), takes("alibi", "position_bias")),
    Stage("relative biases", ("T5", "Beit", "Swin", "SamVision", "VitDet"),
          lambda view, _: view.masks_by_head or source("relative_position", "rel_pos")(view, _)),
    Stage("position terms of DETR", ("Detr", "TableTransformer"),
          lambda view, config: hasattr(config, "num_queries") and takes(*ADDED, "position_embeddings")(view, config)),
    Stage("output gates", ("Qwen3Next", "Afmoe"), source("sigmoid(gate", "sigmoid(self.gate_proj")),
    Stage("a norm before O", ("BitNet", "timm's ViT with norms"),
          lambda view, _: any(isinstance(getattr(view.module, name, None), nn.Module) and not isinstance(
              getattr(view.module, name), nn.Identity) for name in ("attn_sub_norm", "norm"))),
    Stage("fused: q, k, v", ("Timm", "Mpt", "GPT2", "SamVision"), order("qkv h d")),
    Stage("fused: head by head", ("GPTNeoX", "Persimmon", "Bloom", "Falcon"), order("h qkv d")),
    Stage("fused: unequal parts", ("Phi3", "GPTBigCode", "Falcon"),
          lambda view, _: view.spec.fused and view.spec.kv_heads < view.spec.heads),
    Stage("Conv1D", ("GPT2", "ImageGPT"), lambda view, _: type(view.owner("q")) is Conv1D),
    Stage("names of one's own (``register_adapter``)", ("Mine", "MinePacked"),
          lambda view, _: type(view.adapter).__name__ == "NamedAdapter"),
    Stage("latent attention (MLA)", ("DeepseekV2", "DeepseekV3"), has("kv_lora_rank")),
    Stage("a host that reads weights", ("Reads", "timm's BEiT"), verdict(read=True)),
    Stage("grids and windows of tokens", ("Segformer", "Swin", "SamVision", "VitDet"),
          in_config("sr_ratios", "window_size")),
    Stage("stock: the host's own forward", ("ViT", "Beit", "T5", "Whisper"), verdict(stock=True)),
    Stage("decoupled: a forward of ours", ("ViT", "Bert", "Llama", "Timm"),
          lambda view, _: view.verdict is not None and view.verdict.decoupled is not None),
    Stage("expanded: for the rest", ("DeepseekV3", "Phi", "GPT2", "Qwen3Next", "Detr"),
          verdict(stock=False, decoupled=None, expanded=True)),
)  # fmt: skip
"""Issue by issue what the stages are; each has two models at least, which ``test_stages.py`` checks by running them."""
