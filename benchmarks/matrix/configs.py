"""A tiny config of any kind of model of transformers, by the names of its fields: :func:`tiny`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .odd import CONFIGS

HEADS, DIM, LAYERS, WORDS = 4, 16, 2, 128
WIDTH = HEADS * DIM
PLACES = 64
"""Positions of text."""
FIRST_MARK = 100
"""Words from here on are marks (image tokens and so on), which no random text holds."""

_WIDTH = re.compile(
    r"(\w+_)?(hidden_size|hidden_dim|d_model|model_dim|n_embd|embed_dim|embedding_dim|embedding_size|proj_dim|"
    r"projection_dim|channels_dim|lru_width|attention_hidden_size|pooler_output_size|output_dim|latent_dim)"
)
_WIDTHS = {"dim", "width", "hidden_channels", "encoder_in_channels", "decoder_in_channels", "output_hidden_size"}
_HEADS = re.compile(r"(\w+_)?(attention_heads|num_heads|n_heads?|attn_heads|query_heads|q_heads|heads)(_\w+)?")
_LAYERS = re.compile(
    r"(\w+_)?(num_hidden_layers|hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth|num_blocks)"
)
_INNER = re.compile(
    r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|inner_dim|feedforward_dim)"
)
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_group": 2,
    "num_group": 2,
    "num_expert_group": 2,
    "moe_k": 2,
}
_NUMBERS: Mapping[str, int] = {
    "vocab_size": WORDS, "max_position_embeddings": PLACES, "n_positions": PLACES, "max_source_positions": 16,
    "max_target_positions": PLACES, "max_2d_position_embeddings": 128, "num_mel_bins": 16, "num_queries": 8,
    "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": DIM, "qk_nope_head_dim": DIM, "qk_rope_head_dim": 8,
    "qk_head_dim": DIM + 8, "index_head_dim": DIM, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": DIM, "d_kv": DIM, "global_head_dim": DIM,
    "attention_head_size": DIM, "kv_channels": DIM, "sliding_window": 5, "attention_window": 4,
    "num_register_tokens": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "index_topk": 6, "attention_chunk_size": 8,
    "num_position_embeddings": 64, "query_pre_attn_scalar": DIM, "num_mtp_layers": 0, "image_seq_length": 4,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_labels": 3, "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
    "rotary_dim": 8, "n_ctx": PLACES, "n_groups": 2, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "sliding_window_size": 5, "upsample_groups": WIDTH, "vector_quantization_hidden_dimension": WIDTH,
    "num_filters": 8, "codebook_dim": WIDTH, "classifier_proj_size": 32, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": WORDS, "codebook_size": 64, "subsampling_conv_channels": 16, "mamba_d_ssm": 128,
    "dim_ff": 32, "dff": 32, "d_inner": 32, "num_embeddings": 64, "base_channels": 32, "latent_channels": 32,
    "encoder_linear_units": 32, "decoder_linear_units": 32, "src_vocab_size": WORDS, "tgt_vocab_size": WORDS,
    "text_vocab_size": WORDS, "audio_vocab_size": WORDS, "num_latents": 8, "d_latents": WIDTH, "entity_vocab_size": 32,
    "feed_forward_size": 32, "intermediate_size_mlp": 32, "max_seq_len": PLACES, "num_hash_buckets": 32,
    "visual_feat_dim": 32, "num_qa_labels": 8, "num_object_labels": 8, "num_attr_labels": 8, "zero_expert_num": 2,
}  # fmt: skip
"""Of fields whose default is a larger number."""


def tiny(kind: str) -> Any:
    """A config of this ``model_type``, of two layers with four heads of sixteen, where the kind allows."""
    default = CONFIG_MAPPING[kind]()
    return shrunk(default, CONFIGS.get(kind, {}))


def shrunk(config: Any, more: Mapping[str, Any]) -> Any:
    """A config of the same class with small numbers in its fields.

    Args:
        config: of default size.
        more: values to take as they are; a mapping under the name of a config within is for that.
    """
    known = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    found: dict[str, Any] = {}
    layers = _layers_of(known, more)
    for name, value in known.items():
        if isinstance(value, PretrainedConfig):
            inner = more.get(name, {})
            found[name] = shrunk(value, inner) if isinstance(inner, Mapping) else inner
        elif name not in more and (small := _smaller(name, value, known, layers)) is not None:
            found[name] = small
    found |= {name: value for name, value in more.items() if not isinstance(known.get(name), PretrainedConfig)}
    for name in ("out_features", "out_indices"):  # kept under names of their own
        if f"_{name}" in vars(config) and name not in found and isinstance(known.get("depths"), (list, tuple)):
            found[name] = getattr(config, name)
            break
    return type(config)(**{name: value for name, value in found.items() if value is not DROP})


DROP = object()
"""In place of a value: leave the field to the class."""


def _layers_of(known: Mapping[str, Any], more: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """How many layers the default has, and which of them a small model takes: one of every type, two at least."""
    name = next((name for name in ("num_hidden_layers", "n_layer", "num_layers", "depth") if name in known), "")
    count = known.get(name)
    if not isinstance(count, int) or _staged(known):
        return 0, ()
    wanted = more.get(name, LAYERS)
    firsts: list[int] = []
    for kinds in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = known.get(kinds)
        if isinstance(types, (list, tuple)) and len(types) == count:
            firsts += [place for one in dict.fromkeys(types) if (place := types.index(one)) not in firsts]
    if firsts:
        places = firsts + [place for place in range(count) if place not in firsts]
        return count, tuple(sorted(places[: max(wanted, len(firsts))]))
    return count, tuple(range(min(wanted, count)))


def _smaller(name: str, value: Any, known: Mapping[str, Any], layers: tuple[int, tuple[int, ...]]) -> Any:
    """A smaller value of a field; None: as it is."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return None
    if isinstance(value, Mapping):
        return _rope(value) if name == "rope_parameters" or name == "rope_scaling" else None
    if isinstance(value, (list, tuple)):
        return _smaller_list(name, value, known, layers)
    if not isinstance(value, int):
        return None
    return _smaller_int(name, value, known, layers)


def _smaller_int(name: str, value: int, known: Mapping[str, Any], layers: tuple[int, tuple[int, ...]]) -> Any:
    if re.fullmatch(r"\w*(token_id|token_index|_id|_index|_idx)", name):
        return _mark(name, value, known)
    if name == "head_dim" and "qk_rope_head_dim" in known:
        return None  # the class makes it of its parts
    if name in _NUMBERS:
        return min(value, _NUMBERS[name])
    if name in _EXPERTS:
        return min(value, _EXPERTS[name])
    if name.endswith("experts_per_tok") or name in ("num_experts_per_token", "moe_topk", "topk_group"):
        return min(value, 1 if name == "topk_group" else 2)
    if "image_size" in name or name in ("input_size", "img_size"):
        return min(value, 64 if _staged(known) else 32)
    if name == "patch_size":
        return min(value, 8)
    if name == "window_size":
        return 32 if value > 64 else min(value, 2)  # in pixels, or in patches
    if name.endswith(("key_value_heads", "kv_heads", "num_heads_kv", "key_value_head")):
        return _grouped(value, known)
    if _LAYERS.fullmatch(name) and value > 1:
        if _staged(known) and name in ("num_hidden_layers", "num_layers"):
            return None  # the number of stages
        return len(layers[1]) if value == layers[0] else min(value, LAYERS)
    if _HEADS.fullmatch(name) and value > 1:
        return min(value, HEADS)
    if _INNER.fullmatch(name):
        return min(value, WIDTH // 2)
    if (_WIDTH.fullmatch(name) or name in _WIDTHS) and value > DIM:
        heads = known.get("num_heads") or known.get("num_attention_heads")
        if _staged(known) and name == "hidden_size" and "embed_dim" in known:
            return None  # the class makes it of the stages
        return DIM * heads[0] if _staged(known) and isinstance(heads, (list, tuple)) else min(value, WIDTH)
    return None


def _grouped(value: int, known: Mapping[str, Any]) -> int:
    """Heads of keys and values: as many as of queries, one, or a half of them, as the default has it."""
    heads = known.get("num_attention_heads") or known.get("n_heads") or value
    return HEADS if value == heads else 1 if value == 1 else HEADS // 2


def _mark(name: str, value: int, known: Mapping[str, Any]) -> int | None:
    if value < 3:
        return None
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
    marks = sorted(other for other in known if re.fullmatch(r"\w*(token_id|token_index|_id|_index|_idx)", other))
    return usual.get(name, min(FIRST_MARK + marks.index(name), WORDS - 1))


def _staged(known: Mapping[str, Any]) -> bool:
    """Whether the model has stages of different widths."""
    return any(isinstance(known.get(name), (list, tuple)) for name in ("depths", "hidden_sizes", "embed_dims"))


def _smaller_list(
    name: str, value: Sequence[Any], known: Mapping[str, Any], layers: tuple[int, tuple[int, ...]]
) -> Any:
    kind = type(value)
    if re.fullmatch(r"\w*token_id", name):
        return kind([2])
    if value and len(value) == layers[0]:
        return kind(value[place] for place in layers[1])
    if not value or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        return None
    if name in ("depths", "num_layers", "layers", "num_blocks", "blocks_per_stage"):
        return kind(min(one, 1 + ("swin" in str(known.get("model_type")))) for one in value)
    if name.endswith(("indices", "indexes", "out_layers", "feature_layers")) and layers[0]:
        return kind(min(one, len(layers[1]) - 1) for one in value)
    if name in ("hidden_sizes", "embed_dims", "widths", "embed_dim", "neck_hidden_sizes"):
        heads = next((known[key] for key in ("num_attention_heads", "num_heads") if key in known), None)
        if isinstance(heads, (list, tuple)) and len(heads) == len(value):
            return kind(8 * one for one in heads)
        return kind(max(8, one * 16 // min(value) // 8 * 8) for one in value)
    if name in (
        "stem_channels",
        "stage_in_channels",
        "stage_mid_channels",
        "stage_out_channels",
        "encoder_in_channels",
    ):
        return kind(one if one <= 3 else max(8, one // 16) for one in value)
    if name == "decoder_in_channels":
        return kind(WIDTH for _ in value)
    if name == "conv_dim":
        return kind(16 for _ in value)
    if "image_size" in name:
        return kind(min(one, 64 if _staged(known) else 32) for one in value)
    return None


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of heads of :data:`DIM`."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping):
            found[key] = _rope(one)
        elif key == "mrope_section":
            half, total = int(DIM * value.get("partial_rotary_factor", 1.0)) // 2, sum(one)
            parts = [max(1, part * half // total) for part in one]
            found[key] = [half - sum(parts[1:]), *parts[1:]]
        elif key in ("long_factor", "short_factor"):
            found[key] = [1.0] * (DIM // 2)
        else:
            found[key] = one
    return found
