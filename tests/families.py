"""The models that the conformance suite runs: one small subclass of :class:`Family` each."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .family import (
    IMAGE,
    KERNELS,
    SMALL,
    Decoder,
    Family,
    HFFamily,
    Part,
    Read,
    Rows,
    itself,
    normal,
    randomised,
    timm_module,
)  # fmt: skip
from .kinds import KINDS
from .selection import spread


class AST(HFFamily):
    model, config = transformers.ASTModel, transformers.ASTConfig
    options = {**SMALL, "num_mel_bins": 24, "max_length": 24, "patch_size": 16, "time_stride": 8,
               "frequency_stride": 8}  # fmt: skip

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        return {"input_values": normal(generator, 2, 24, 24), "attention_mask": mask}


class ViT(HFFamily):
    model, config = staticmethod(partial(transformers.ViTModel, add_pooling_layer=False)), transformers.ViTConfig


class DeiT(HFFamily):
    model, config = staticmethod(partial(transformers.DeiTModel, add_pooling_layer=False)), transformers.DeiTConfig


class DINOv2(HFFamily):
    model, config = transformers.Dinov2Model, transformers.Dinov2Config
    options = {**IMAGE, "mlp_ratio": 1}


class CLIPText(HFFamily):
    """A causal mask, ``out_proj``, and the scale under another name."""

    model, config = transformers.CLIPTextModel, transformers.CLIPTextConfig
    options = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 20,
               "max_position_embeddings": 8, "eos_token_id": 19}  # fmt: skip
    configs = HFFamily.configs[:-1]
    o_name = "out_proj"

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        return {"input_ids": torch.randint(0, 20, (2, 6), generator=generator)}


class TwoModule(HFFamily):
    options = {**SMALL, "vocab_size": 20, "max_position_embeddings": 12}
    configs = tuple(
        {"num_attention_heads": heads, "kernel": kernel, "is_decoder": decoder, "add_cross_attention": decoder}
        for heads, kernel, decoder in spread((4, 3), KERNELS, (False, True), strength=2)
    )

    def inputs(self, generator: torch.Generator, is_decoder: bool = False, **_: Any) -> dict[str, Any]:
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        found = {"input_ids": torch.randint(2, 20, (2, 6), generator=generator), "attention_mask": mask}
        if is_decoder:
            found["encoder_hidden_states"] = normal(generator, 2, 5, 24)
        return found

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        parts = {"q": module.self.query, "k": module.self.key, "v": module.self.value, "o": module.output.dense}
        return {p: (read(linear.weight), read(linear.bias)) for p, linear in parts.items()}


class Bert(TwoModule):
    model, config = staticmethod(partial(transformers.BertModel, add_pooling_layer=False)), transformers.BertConfig


class Roberta(TwoModule):
    model = staticmethod(partial(transformers.RobertaModel, add_pooling_layer=False))
    config = transformers.RobertaConfig


class TorchFamily(Family):
    """Models around nn.MultiheadAttention."""

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        weights = (
            read(module.in_proj_weight).chunk(3)
            if module.in_proj_weight is not None
            else [read(weight) for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
        )
        biases = (None,) * 3 if module.in_proj_bias is None else read(module.in_proj_bias).chunk(3)
        parts = dict(zip("qkv", zip(weights, biases, strict=True), strict=True))
        return {**parts, "o": (read(module.out_proj.weight), read(module.out_proj.bias))}


class _Attention(nn.Module):
    """Two attentions in a row, so that layers can compete."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(24, **options)
        self.second = nn.MultiheadAttention(24, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        hidden, _ = self.first(query, key, value, **options)
        output, weights = self.second(query + hidden, key, value, **options)
        return output


class MHA(TorchFamily):
    """nn.MultiheadAttention with every option it has."""

    configs = (
        {"num_heads": 4},
        {"num_heads": 4, "batch_first": True, "mask": "2d-float"},
        {"num_heads": 3, "kdim": 10, "vdim": 7, "mask": "padding"},
        {"num_heads": 4, "bias": False, "batch_first": True, "mask": "3d-bool"},
        {"num_heads": 3, "add_bias_kv": True, "add_zero_attn": True, "mask": "both"},
        {"num_heads": 4, "add_bias_kv": True, "batch_first": True, "need_weights": True, "mask": "3d-float"},
        {"num_heads": 2, "mask": "causal", "batch_first": True},
        {"num_heads": 2, "mask": "2d-bool", "need_weights": True, "add_zero_attn": True, "bias": False},
        {"num_heads": 4, "unbatched": True, "mask": "padding"},
    )

    def build(self, mask: str = "", need_weights: bool = False, unbatched: bool = False, **options: Any) -> nn.Module:
        return randomised(_Attention(**options))

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        queries, keys, batch = 5, 6, 2
        mask, first = config.get("mask", ""), config.get("batch_first", False)
        keys = queries if mask == "causal" else keys

        def tokens(length: int, width: int) -> Tensor:
            if config.get("unbatched"):
                return normal(generator, length, width)
            return normal(generator, *((batch, length) if first else (length, batch)), width)

        found: dict[str, Any] = {
            "query": tokens(queries, 24),
            "key": tokens(keys, config.get("kdim", 24)),
            "value": tokens(keys, config.get("vdim", 24)),
            "need_weights": config.get("need_weights", False),
        }
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[1, 3:] = True
        if mask in ("padding", "both"):
            found["key_padding_mask"] = padding[1] if config.get("unbatched") else padding
        shape = (batch * config["num_heads"], queries, keys) if mask.startswith("3d") else (queries, keys)
        blocked = torch.rand(shape, generator=generator) < 0.3
        blocked[..., 0] = False
        if mask.endswith("bool") or mask == "both":
            found["attn_mask"] = blocked
        if mask.endswith("float"):
            found["attn_mask"] = normal(generator, *shape)
        if mask == "causal":
            found["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(queries, dtype=torch.float64)
            found["is_causal"] = True
        return found

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)


class Encoder(TorchFamily):
    """nn.TransformerEncoder; its fused inference path must step aside."""

    configs = (
        {"nhead": 4, "batch_first": True, "padding": True},
        {"nhead": 4, "batch_first": True},
        {"nhead": 3, "norm_first": True, "padding": True},
        {"nhead": 2, "batch_first": True, "causal": True},
    )

    def build(self, padding: bool = False, causal: bool = False, **options: Any) -> nn.Module:
        layer = nn.TransformerEncoderLayer(24, dim_feedforward=12, dropout=0.0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says when the nested path is off
            return randomised(nn.TransformerEncoder(layer, 2))

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        shape = (2, 5, 24) if config.get("batch_first") else (5, 2, 24)
        found: dict[str, Any] = {"src": normal(generator, *shape)}
        if config.get("padding"):
            found["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        if config.get("causal"):
            found["mask"] = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
            found["is_causal"] = True
        return found

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        output = model(**inputs)
        padding = inputs.get("src_key_padding_mask")
        if padding is None:
            return output
        rows = padding if output.shape[0] == 2 else padding.T
        return output.masked_fill(rows[..., None], 0)  # what stands at padded places is nobody's business


class Transformer(TorchFamily):
    """nn.Transformer: encoder, decoder and cross-attention."""

    configs = ({"nhead": 4, "batch_first": True}, {"nhead": 3, "batch_first": False, "norm_first": True})

    def build(self, **options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return randomised(nn.Transformer(24, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=12,
                                             dropout=0.0, **options))  # fmt: skip

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        def tokens(length: int) -> Tensor:
            return normal(generator, *((2, length) if config["batch_first"] else (length, 2)), 24)

        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        return {"src": tokens(5), "tgt": tokens(4), "tgt_mask": mask, "tgt_is_causal": True}

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)


class _EncoderBlock(nn.Module):
    """torchvision's ViT block: the attention is called with ``need_weights=False`` on a layer-normed input."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(24)
        self.self_attention = nn.MultiheadAttention(24, heads, dropout=0.0, batch_first=True)
        self.ln_2 = nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 24))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.ln_1(hidden)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + hidden
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(TorchFamily):
    """Blocks as in torchvision's ViT (which has no CPU build everywhere)."""

    configs = ({"heads": 4}, {"heads": 3})

    def build(self, heads: int) -> nn.Module:
        return randomised(nn.Sequential(OrderedDict(a=_EncoderBlock(heads), b=_EncoderBlock(heads))))

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        return {"input": normal(generator, 2, 5, 24)}

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)


class Timm(Family):
    """timm's ViT: one fused ``qkv``, with a fused kernel or written out."""

    configs = tuple(
        {"num_heads": heads, "fused": fused, "qkv_bias": bias}
        for heads, fused, bias in ((4, True, True), (3, True, False), (4, False, True), (2, False, False))
    )

    def build(self, fused: bool, **config: Any) -> nn.Module:
        model = timm_module("timm.models").VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, mlp_ratio=0.5, num_classes=0, **config
        )
        for block in model.blocks:
            block.attn.fused_attn = fused
        return randomised(model)

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        return {"x": normal(generator, 2, 3, 16, 16)}

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        weights = read(module.qkv.weight).chunk(3)
        biases = (None,) * 3 if module.qkv.bias is None else read(module.qkv.bias).chunk(3)
        parts = dict(zip("qkv", zip(weights, biases, strict=True), strict=True))
        return {**parts, "o": (read(module.proj.weight), read(module.proj.bias))}


class TimmAttention(Timm):
    """timm's attention by itself, with masks."""

    configs = (
        {"heads": 4, "mask": "bool", "fused": True},
        {"heads": 3, "mask": "float", "fused": False},
        {"heads": 4, "mask": "causal", "fused": True},
        {"heads": 2, "mask": "causal", "fused": False},
        {"heads": 3, "mask": "bool", "fused": False, "attn_head_dim": 5, "dim_out": 24},
    )

    def build(self, heads: int, mask: str, fused: bool, **config: Any) -> nn.Module:
        attention = timm_module("timm.models.vision_transformer").Attention
        layers = [attention(24, heads, **config) for _ in range(2)]
        for layer in layers:
            layer.fused_attn = fused
        return randomised(_Chain(layers))

    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"x": normal(generator, 2, 5, 24)}
        if config["mask"] == "bool":
            found["attn_mask"] = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
            found["attn_mask"][..., 0] = True
        if config["mask"] == "float":
            found["attn_mask"] = normal(generator, 2, config["heads"], 5, 5)
        if config["mask"] == "causal":
            found["is_causal"] = True
        return found


class _Chain(nn.Module):
    """Attentions in a row."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **options)
        return x


LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
          "num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 2, "moe_intermediate_size": 4}  # fmt: skip


class Latent(Decoder):
    """Multi-head latent attention: queries and keys meet in channels of their own and in rotary ones, whose keys all
    heads share; K and V are one projection of a low rank."""

    configs = (
        {"kind": "DeepseekV3", "kernel": "sdpa"}, {"kind": "DeepseekV2", "kernel": "eager"},
        {"kind": "DeepseekV3", "kernel": "eager", "q_lora_rank": None},
        {"kind": "DeepseekV2", "kernel": "sdpa", "q_lora_rank": None, "attention_bias": True},
    )  # fmt: skip

    def build(self, kind: str, kernel: str, **config: Any) -> nn.Module:
        return super().build(kind, kernel, **{**LATENT, **config})

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module: Any = model.get_submodule(name)
        nope, rope, value = (LATENT[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

        def rows(linear: nn.Linear, before: int, own: int, after: int) -> Any:
            starts = range(before, linear.out_features, before + own + after)
            return Rows(read(linear.weight), [row for start in starts for row in range(start, start + own)]), None

        q = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        o = module.o_proj
        return {
            "q": rows(q, 0, nope, rope), "k": rows(module.kv_b_proj, 0, nope, value),
            "v": rows(module.kv_b_proj, nope, value, 0), "o": (read(o.weight), read(o.bias)),
        }  # fmt: skip

    def beside(self, model: nn.Module, name: str, projection: str) -> list[Tensor]:
        module: Any = model.get_submodule(name)
        q = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        return [q.weight] if projection == "q" else []


class Seq2Seq(HFFamily):
    """Self-attention and cross-attention by one class: BART, Whisper."""

    configs = ({"kernel": "sdpa"}, {"kernel": "eager"})
    o_name = "out_proj"

    def build(self, kernel: str, **config: Any) -> nn.Module:
        sides = {f"{side}_{what}": size for side in ("encoder", "decoder")
                 for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 12))}  # fmt: skip
        built = transformers.BartConfig(vocab_size=20, d_model=24, max_position_embeddings=16, dropout=0.0, **sides)
        built._attn_implementation = kernel
        return randomised(transformers.BartModel(built))

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 5:] = 0
        return {
            "inputs_embeds": normal(generator, 2, 7, 24), "attention_mask": mask,
            "decoder_inputs_embeds": normal(generator, 2, 5, 24), "use_cache": False,
        }  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {
    cls.__name__: cls
    for cls in (
        AST,
        ViT,
        DeiT,
        DINOv2,
        CLIPText,
        Bert,
        Roberta,
        MHA,
        Encoder,
        Transformer,
        TorchvisionViT,
        Timm,
        TimmAttention,
        Decoder,
        Latent,
        Seq2Seq,
        *KINDS,
    )
}
