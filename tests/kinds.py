"""Small models of the stages that the first families lack: a kind of model is one line of a table here.

:mod:`tests.stages` says which stage each of them shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import attnprune
from attnprune.families.registry import Survey
from attnprune.nn.exactly import Exactly

from .family import (
    DECODER,
    IMAGE,
    KERNELS,
    Family,
    HFFamily,
    Part,
    Read,
    Rows,
    itself,
    normal,
    randomised,
    timm_module,
)

ROUNDING = ("InternVLVision", "BitNet", "Llama4Text")
"""Those whose norms round to float32 and sum up otherwise where zeros are among the channels."""
Kinds = Mapping[str, Mapping[str, Any]]
OUTPUTS = ("o_proj", "out_proj", "dense", "projection_layer", "o")
HEADS = 4
CALM = {"dropout": 0.0, "drop_path_rate": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout_rate": 0.0}  # fmt: skip


def kinds_of(kinds: Kinds, kernels: tuple[str, ...] = KERNELS) -> tuple[dict[str, Any], ...]:
    """Configurations: a kind each, with one kernel or the other where its line says none."""
    return tuple(
        {"kind": kind, "kernel": options.get("kernel", kernels[place % len(kernels)])}
        for place, (kind, options) in enumerate(kinds.items())
    )


def transformer(kind: str, options: Mapping[str, Any], kernel: str, common: Mapping[str, Any]) -> nn.Module:
    """A model of transformers; of what is common to many, what its config has."""
    config: Any = getattr(transformers, f"{kind}Config")
    names, known = config.attribute_map, {*config().to_dict()}
    own = {key: value for key, value in options.items() if key not in ("kernel", "seen")}
    shared = {key: value for key, value in {**CALM, **common}.items() if {key, names.get(key)} & known}
    built = config(**{key: value for key, value in shared.items() if not {key, names.get(key)} & {*own}}, **own)
    built._attn_implementation, built._experts_implementation = kernel, "eager"  # the others have no float64
    return randomised(getattr(transformers, f"{kind}Model")(built))  # type: ignore[no-any-return]


def padded() -> Tensor:
    """A mask of two sequences of six tokens, of which the second is shorter."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


class Kind(HFFamily):
    """Kinds with Q, K, V and O as Linears of their own."""

    kinds: Kinds
    common: Mapping[str, Any] = {}

    def build(self, kind: str, kernel: str, **_: Any) -> nn.Module:
        options = self.kinds[kind]
        model = transformer(kind, options, kernel, self.common)
        if "seen" in options:  # its arguments' names tell too little: a call of the model does
            given = self.inputs(torch.Generator().manual_seed(0), kind=kind)
            Survey(model, run=lambda: self.run(model, given))
        return model

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        rounds = type(model).__name__.removesuffix("Model") in ROUNDING
        with Exactly() if rounds else nullcontext():
            return super().run(model, inputs)

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        parts = {p: getattr(module, f"{p}_proj", None) or getattr(module, p) for p in "qkv"}
        parts["o"] = next(getattr(module, one) for one in OUTPUTS if hasattr(module, one))
        return {p: (read(linear.weight), read(linear.bias)) for p, linear in parts.items()}


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
HALF = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
FULL = {"layer_types": ["full_attention"] * 2}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}


class Between(Kind):
    """Decoders of transformers and what they have between projections and product, or between product and O."""

    kinds: Kinds = {
        "Glm": HALF, "Phi": {**HALF, "qk_layernorm": True}, "StableLm": {**HALF, "qk_layernorm": True},
        "Qwen2VLText": SECTIONS, "Qwen3VLText": SECTIONS,
        "NanoChat": {}, "Llama4Text": {"num_local_experts": 2, "intermediate_size_mlp": 12, **FULL},
        "VaultGemma": {**SLIDING, "attn_logit_softcapping": 2.0, "kernel": "eager"},
        "GptOss": {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1, "kernel": "eager",
                   "rope_parameters": ROPE},
        "MiMoV2Flash": {**SLIDING, "kernel": "eager", "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
                        "swa_head_dim": 8, "v_head_dim": 6, "swa_v_head_dim": 6, "n_routed_experts": 2,
                        "mlp_layer_types": ["dense", "dense"]},
        "Qwen3Next": {**FULL, "num_experts": 0, "mlp_only_layers": [0, 1]},
        "Afmoe": {**SLIDING, "num_dense_layers": 2}, "BitNet": {},
    }  # fmt: skip
    common = {**DECODER, "hidden_size": 32, "eos_token_id": 1, "bos_token_id": 1}
    configs = kinds_of(kinds)

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        found = {"inputs_embeds": normal(generator, 2, 6, 32), "attention_mask": padded(), "use_cache": False}
        if self.kinds[config["kind"]] is SECTIONS:  # time, height and width of each token
            found["position_ids"] = torch.randint(0, 9, (3, 2, 6), generator=generator)
        return found

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        parts = super().dense(model, name, read)
        if module.q_proj.out_features == 2 * HEADS * 8:  # each head's gate lies after its queries
            own = [head * 16 + channel for head in range(HEADS) for channel in range(8)]
            parts["q"] = Rows(read(module.q_proj.weight), own), None  # type: ignore[assignment,arg-type]
        return parts

    def beside(self, model: nn.Module, name: str, projection: str) -> list[Tensor]:
        module: Any = model.get_submodule(name)
        gates = [module.q_proj] + ([module.gate_proj] if hasattr(module, "gate_proj") else [])
        return [gate.weight for gate in gates] if projection == "q" else []


class Pack(NamedTuple):
    """Where Q, K and V lie in one weight, and O."""

    fused: str
    o: str
    keys: int = HEADS
    dim: int = 6
    by_head: bool = False
    """Whether the queries of a key head, it and its value lie together, instead of all queries first."""

    def places(self) -> dict[str, list[int]]:
        """The rows of each, head by head."""
        share, dim = HEADS // self.keys, self.dim
        found: dict[str, list[int]] = {"q": [], "k": [], "v": []}
        for key in range(self.keys):
            start = key * (share + 2) * dim
            for p, (before, size) in {"q": (0, share), "k": (share, 1), "v": (share + 1, 1)}.items():
                found[p] += range(start + before * dim, start + (before + size) * dim)
        if self.by_head:
            return found
        sizes = {p: len(rows) for p, rows in found.items()}
        ends = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}
        return {p: [*range(ends[p], ends[p] + sizes[p])] for p in "qkv"}


GPT = {"vocab_size": 21, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": HEADS, "n_inner": 12}
BY_HEAD = Pack("query_key_value", "dense", dim=8, by_head=True)
FALCON: dict[str, Any] = {"hidden_size": 32, "ffn_hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "vocab_size": 20}  # fmt: skip
WIDE = {**DECODER, "hidden_size": 32}
GRID: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": 16,
                        "patch_size": 4, "window_size": 2}  # fmt: skip


class Packed(Kind):
    """Q, K and V in one weight: blocks, head by head, of unequal sizes, as a Conv1D; grids of tokens."""

    kinds: Kinds = {
        "GPTNeoX": {**WIDE, **HALF}, "Persimmon": WIDE,
        "Falcon": {**FALCON, "kernel": "sdpa", "num_kv_heads": 2, "new_decoder_architecture": True},
        "Phi3": WIDE, "GPTBigCode": GPT, "GPT2": GPT, "ImageGPT": GPT,
        "Mpt": {"vocab_size": 20, "d_model": 24, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 16,
                "expansion_ratio": 1, "kernel": "eager"},
        "Bloom": {"vocab_size": 20, "hidden_size": 24, "n_layer": 2, "n_head": HEADS, "kernel": "eager", "seen": True},
        "SamVision": {**GRID, "global_attn_indexes": [1], "mlp_dim": 12, "output_channels": 8},
        "VitDet": {**GRID, "window_block_indices": [0], "mlp_ratio": 1, "use_relative_position_embeddings": True,
                   "kernel": "eager"},
    }  # fmt: skip
    common = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    packs = {
        "GPTNeoX": BY_HEAD, "Persimmon": BY_HEAD, "Falcon": BY_HEAD._replace(keys=2),
        "Phi3": Pack("qkv_proj", "o_proj", keys=2, dim=8), "GPTBigCode": Pack("c_attn", "c_proj", keys=1),
        "GPT2": Pack("c_attn", "c_proj"), "ImageGPT": Pack("c_attn", "c_proj"), "Mpt": Pack("Wqkv", "out_proj"),
        "Bloom": BY_HEAD._replace(dim=6), "SamVision": Pack("qkv", "proj"), "VitDet": Pack("qkv", "proj"),
    }  # fmt: skip
    configs = kinds_of(kinds)

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        if config["kind"] in ("SamVision", "VitDet"):
            return super().inputs(generator)
        width = self.packs[config["kind"]].dim * HEADS
        return {"inputs_embeds": normal(generator, 2, 6, width), "attention_mask": padded(), "use_cache": False}

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        pack = self.packs[type(model).__name__.removesuffix("Model")]
        fused, o = getattr(module, pack.fused), getattr(module, pack.o)

        def weight(linear: Any) -> Any:
            return read(linear.weight).T if hasattr(linear, "nf") else read(linear.weight)  # type: ignore[union-attr]

        parts: dict[str, Any] = {}
        for p, rows in pack.places().items():
            bias = read(fused.bias)
            parts[p] = Rows(weight(fused), rows), None if bias is None else Rows(bias, rows)
        return {**parts, "o": (weight(o), read(o.bias))}


class Sight(Kind):
    """Encoders of images: rotary embeddings by row and column, tables of relative biases, tokens of a grid."""

    kinds: Kinds = {
        "Beit": {"use_relative_position_bias": True},
        "DINOv3ViT": {"hidden_size": 32, "pos_embed_rescale": None}, "PixtralVision": {"hidden_size": 32},
        "InternVLVision": {"image_size": [16, 16], "patch_size": [8, 8], "use_qk_norm": True, "use_mask_token": False},
        "Segformer": {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [1, 1], "hidden_sizes": [12, 24],
                      "strides": [2, 2], "patch_sizes": [3, 3], "num_attention_heads": [2, 4], "mlp_ratios": [1, 1]},
        "Swin": {"patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
                 "mlp_ratio": 1.0, "seen": True},
    }  # fmt: skip
    common = {**IMAGE, "num_attention_heads": HEADS}
    configs = kinds_of(kinds)


PAIR: dict[str, Any] = {
    "vocab_size": 20, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
}  # fmt: skip
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic",
                          "out_features": ["stage4"]}  # fmt: skip
DETR: dict[str, Any] = {**PAIR, "backbone_config": transformers.ResNetConfig(**RESNET), "use_timm_backbone": False,
                        "num_queries": 3, "kernel": "eager"}  # fmt: skip
del DETR["vocab_size"]


class Streams(Kind):
    """Self-attention and cross-attention, tables of biases that layers share, and positions that are added (DETR)."""

    kinds: Kinds = {
        "T5": {"d_model": 24, "d_kv": 6, "num_heads": HEADS, "num_layers": 2, "d_ff": 12, "vocab_size": 20},
        "Whisper": {**PAIR, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0,
                    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "Detr": DETR, "TableTransformer": DETR,
    }  # fmt: skip
    configs = kinds_of(kinds)

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        text = {"inputs_embeds": normal(generator, 2, 6, 24), "attention_mask": padded()}
        if config["kind"] in ("Detr", "TableTransformer"):
            return {"pixel_values": normal(generator, 2, 3, 64, 64)}
        answer = {"decoder_inputs_embeds": normal(generator, 2, 5, 24), "use_cache": False}
        if config["kind"] == "Whisper":
            return {"input_features": normal(generator, 2, 8, 16), **answer}
        return {**text, **answer}


class Reads(nn.Module):
    """Reads the weights of its projections instead of calling them, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        fused = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = fused.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context = (0.3 * q @ k.mT).softmax(-1) @ v
        return F.linear(context.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)


def timm_beit() -> nn.Module:
    """Reads its weights too, and has biases of its own."""
    made: nn.Module = timm_module("timm.models.beit").Attention(24, num_heads=HEADS, qkv_bias=True)
    return made


def timm_normed() -> nn.Module:
    """Has norms of queries and keys, and one before O."""
    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}
    made: nn.Module = timm_module("timm.models.vision_transformer").Attention(24, HEADS, **options)
    return made


class Mine(nn.Module):
    """Parts of names that nobody knows but who registers it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.size = HEADS, 6**-0.5
        self.ask, self.offer, self.hold = (nn.Linear(24, 24) for _ in range(3))
        self.merge = nn.Sequential(nn.Linear(24, 24), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.parts, -1)).transpose(1, 2) for part in (self.ask, self.offer, self.hold)
        )
        return self.merge(F.scaled_dot_product_attention(q, k, v, scale=self.size).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MinePacked(nn.Module):
    """The same with keys and values in one, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.ask, self.offer = HEADS, nn.Linear(24, 24), nn.Linear(24, 48)
        self.merge = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q = self.ask(x).unflatten(-1, (self.parts, -1)).transpose(1, 2)
        k, v = self.offer(x).unflatten(-1, (self.parts, -1)).transpose(1, 2).chunk(2, -1)
        return self.merge((q @ k.mT / 6**0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@cache
def named() -> None:
    """Says what the parts of :class:`Mine` and :class:`MinePacked` are called."""
    attnprune.register_adapter(Mine, q="ask", k="offer", v="hold", o="merge.0", heads="parts", scale="size")
    attnprune.register_adapter(MinePacked, q="ask", kv="offer", o="merge", heads="parts")


class Chain(nn.Module):
    """Attentions in a row."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Own(Family):
    """Classes of one's own and of timm, alone: hosts that read weights, and parts that ``register_adapter`` names."""

    kinds = {"timm's BEiT": timm_beit, "Reads": Reads, "timm's ViT with norms": timm_normed, "Mine": Mine,
             "MinePacked": MinePacked}  # fmt: skip
    configs = tuple({"kind": kind} for kind in kinds)

    def build(self, kind: str) -> nn.Module:
        named()
        return randomised(Chain([self.kinds[kind]() for _ in range(2)]))  # type: ignore[no-any-return]

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        return {"x": normal(generator, 2, 5, 24)}

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)  # type: ignore[no-any-return]

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)

        def whole(linear: nn.Linear) -> Part:
            return read(linear.weight), read(linear.bias)

        def rows(linear: nn.Linear, own: list[int]) -> Any:
            return Rows(read(linear.weight), own), Rows(read(linear.bias), own)

        if isinstance(module, Mine):
            return {"q": whole(module.ask), "k": whole(module.offer), "v": whole(module.hold),
                    "o": whole(module.merge[0])}  # fmt: skip
        if isinstance(module, MinePacked):
            own = {p: [head * 12 + 6 * i + c for head in range(HEADS) for c in range(6)] for i, p in enumerate("kv")}
            pair = {p: rows(module.offer, places) for p, places in own.items()}
            return {"q": whole(module.ask), **pair, "o": whole(module.merge)}
        weights, bias = read(module.qkv.weight).chunk(3), read(module.qkv.bias)  # type: ignore[union-attr]
        biases = bias.chunk(3) if bias is not None else (read(module.q_bias), None, read(module.v_bias))
        return {**dict(zip("qkv", zip(weights, biases, strict=True), strict=True)), "o": whole(module.proj)}


KINDS = (Between, Packed, Sight, Streams, Own)
