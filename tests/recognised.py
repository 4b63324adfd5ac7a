"""What is recognised in the installed transformers: ``python -m tests.recognised`` writes it to a file of that version.

Of every kind of model below a tiny one of random weights is built, and of every class of attention in it is written
down how it may run. ``test_recognised.py`` compares, so that what an upgrade loses, or runs another way, is seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn

from attnprune.families.registry import Survey
from attnprune.families.ways import Way

FOLDER = Path(__file__).parent / "data" / "recognised"
Found = Mapping[str, Mapping[str, str]]
"""By kind of model, by class of attention: the ways to run, or ``skipped:`` and the reason; one for each that differs.
"""

LAYERS: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
TEXT = {**LAYERS, **MARKS, "vocab_size": 20, "max_position_embeddings": 16}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**LAYERS, "image_size": 16, "patch_size": 8}
FILM = {**IMAGE, "num_frames": 2, "tubelet_size": 1}
PAIR: dict[str, Any] = {
    **MARKS, "vocab_size": 20, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_start_token_id": 1,
    "max_position_embeddings": 16,
}  # fmt: skip
GPT: dict[str, Any] = {**MARKS, "vocab_size": 20, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 4}
SOUND: dict[str, Any] = {
    **LAYERS, "vocab_size": 20, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2,
}  # fmt: skip
RELATIVE = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ALBERT": ("Albert", {**TEXT, "embedding_size": 12}),
    "AST": ("AST", {**LAYERS, "num_mel_bins": 24, "max_length": 24, "time_stride": 8, "frequency_stride": 8}),
    "BART": ("Bart", PAIR),
    "BEiT": ("Beit", IMAGE),
    "BERT": ("Bert", TEXT),
    "BERT, decoder": ("Bert", {**TEXT, "is_decoder": True, "add_cross_attention": True}),
    "BLOOM": ("Bloom", {**MARKS, "vocab_size": 20, "hidden_size": 24, "n_layer": 1, "n_head": 4}),
    "CamemBERT": ("Camembert", TEXT),
    "CLIP": ("CLIP", {"vision_config": IMAGE, "text_config": TEXT}),
    "DeBERTa": ("Deberta", RELATIVE),
    "DeBERTa v2": ("DebertaV2", RELATIVE),
    "DeiT": ("DeiT", IMAGE),
    "DINOv2": ("Dinov2", {**IMAGE, "mlp_ratio": 1}),
    "DINOv3": ("DINOv3ViT", IMAGE),
    "DistilBERT": (
        "DistilBert",
        {"vocab_size": 20, "max_position_embeddings": 16, "dim": 24, "hidden_dim": 16, "n_layers": 1, "n_heads": 4},
    ),
    "DPT": (
        "DPT",
        {**IMAGE, "is_hybrid": False, "backbone_out_indices": [0, 0, 0, 0], "neck_hidden_sizes": [8, 8, 8, 8],
         "fusion_hidden_size": 8},
    ),
    "ELECTRA": ("Electra", {**TEXT, "embedding_size": 12}),
    "ESM": ("Esm", {**TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "Falcon": ("Falcon", {**MARKS, "vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 1,
                          "num_attention_heads": 4}),
    "Gemma 2": ("Gemma2", {**GROUPED, "head_dim": 6}),
    "GPT-2": ("GPT2", GPT),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeo",
        {**MARKS, "vocab_size": 20, "max_position_embeddings": 16, "hidden_size": 24, "num_layers": 1, "num_heads": 4,
         "attention_types": [[["global"], 1]]},
    ),
    "GPT-NeoX": ("GPTNeoX", TEXT),
    "HuBERT": ("Hubert", SOUND),
    "LayoutLM": ("LayoutLM", TEXT),
    "Llama, grouped": ("Llama", GROUPED),
    "Llama, multi-head": ("Llama", TEXT),
    "Mistral": ("Mistral", GROUPED),
    "ModernBERT": ("ModernBert", TEXT),
    "MPNet": ("MPNet", TEXT),
    "OPT": (
        "OPT",
        {**MARKS, "vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 16,
         "max_position_embeddings": 16, "word_embed_proj_dim": 24},
    ),
    "Phi": ("Phi", TEXT),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen3": ("Qwen3", {**GROUPED, "head_dim": 6}),
    "RoBERTa": ("Roberta", TEXT),
    "SegFormer": (
        "Segformer",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [12, 24], "strides": [2, 2],
         "patch_sizes": [3, 3], "num_attention_heads": [2, 4], "mlp_ratios": [1, 1]},
    ),
    "SigLIP": ("Siglip", {"vision_config": IMAGE, "text_config": TEXT}),
    "Swin": ("Swin", SWIN),
    "T5": ("T5", {"vocab_size": 20, "d_model": 24, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 4}),
    "TimeSformer": ("Timesformer", FILM),
    "VideoMAE": ("VideoMAE", FILM),
    "ViT": ("ViT", IMAGE),
    "ViT-MAE": ("ViTMAE", {**IMAGE, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1,
                           "decoder_num_attention_heads": 4, "decoder_intermediate_size": 16}),
    "Wav2Vec2": ("Wav2Vec2", SOUND),
    "WavLM": ("WavLM", SOUND),
    "Whisper": ("Whisper", {**PAIR, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}),
    "XLM-R": ("XLMRoberta", TEXT),
    "XLNet": ("XLNet", {**MARKS, "vocab_size": 20, "d_model": 24, "n_layer": 1, "n_head": 4, "d_inner": 16}),
    "YOLOS": ("Yolos", {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 2}),
}  # fmt: skip
"""Of a kind, what its classes' names begin with, and a tiny config."""


def build(kind: str) -> nn.Module | None:
    """A tiny model of random weights; None where the installed transformers has no such class."""
    stem, options = KINDS[kind]
    config, model = (getattr(transformers, f"{stem}{part}", None) for part in ("Config", "Model"))
    if config is None or model is None:
        return None
    torch.manual_seed(0)
    made: nn.Module = model(config(**options)).eval()
    return made


def ways(model: nn.Module) -> dict[str, str]:
    """By class of attention, how it may run."""
    survey = Survey(model)
    found: dict[str, set[str]] = {}
    for view in survey.views:
        assert view.verdict is not None, view.name
        can = ", ".join(way for way in get_args(Way) if getattr(view.verdict, way))
        found.setdefault(type(view.module).__name__, set()).add(can)
    for skipped in survey.skipped():
        reason = re.split(r" ?[(\[;]", skipped.why)[0]  # without numbers, which rounding may change
        found.setdefault(skipped.kind, set()).add(f"skipped: {reason}")
    return {name: "; ".join(sorted(found[name])) for name in sorted(found)}


def recognised(kinds: Iterable[str] = tuple(KINDS)) -> dict[str, dict[str, str]]:
    """What is recognised in the installed transformers."""
    models = {kind: build(kind) for kind in kinds}
    return {kind: ways(model) for kind, model in models.items() if model is not None}


def lost(before: Found, now: Found) -> list[str]:
    """What could be run in a way in which it no longer can; a class under a new name counts as the same."""
    found = []
    for kind, classes in before.items():
        here = now.get(kind, {})
        new = [name for name in here if name not in classes]
        for name, said in classes.items():
            successors = [name] if name in here else new
            some, every = _ways([said])
            some_now, every_now = _ways([here[other] for other in successors])
            if some - some_now or every - every_now:
                found.append(f"{kind}: {name} was {said!r}, now there is {dict(here)}")
    return found


def _ways(said: Sequence[str]) -> tuple[set[str], set[str]]:
    """The ways in which some run, and those in which all do."""
    sets = [set() if part.startswith("skipped:") else {*part.split(", ")} for one in said for part in one.split("; ")]
    return set[str]().union(*sets), set.intersection(*sets) if sets else set()


def file_of(version: str) -> Path:
    return FOLDER / f"transformers-{version}.json"


def nearest(version: str) -> Path | None:
    """The file of the newest version that is not newer than this one; None if all are."""
    files = {_numbers(path.stem.removeprefix("transformers-")): path for path in FOLDER.glob("transformers-*.json")}
    older = [numbers for numbers in files if numbers <= _numbers(version)]
    return files[max(older)] if older else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def read(path: Path) -> Found:
    found: Found = json.loads(path.read_text("utf-8"))
    return found


def main() -> None:
    """Writes the file of the installed version."""
    torch.set_num_threads(1)
    path = file_of(transformers.__version__)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recognised(), indent=1) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
