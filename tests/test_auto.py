"""Pruned models by transformers' own ``from_pretrained``, its Auto classes too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from attnprune import find_attention, from_pretrained, load_pruned, prune_attention, save_pruned
from attnprune.errors import CheckpointError
from attnprune.integrations.auto import AttnPruneConfig

from .conformance import close, family, fresh, inputs
from .families import FAMILIES, HFFamily
from .selection import telling
from .test_checkpoint import PIXELS, clip, logits, pruned, same, vit

HUGGING_FACE = [name for name, cls in FAMILIES.items() if issubclass(cls, HFFamily)]  # type: ignore[arg-type]


def load(cls: Any, folder: Path, **options: Any) -> Any:
    return cls.from_pretrained(folder, quantization_config=AttnPruneConfig(), **options)


def unmarked(model: nn.Module) -> bool:
    """Whether nothing says that a model is quantised."""
    marks = ("hf_quantizer", "is_quantized", "quantization_method")
    configs = [vars(module.config) for module in model.modules() if hasattr(module, "config")]
    return not any(hasattr(model, mark) for mark in marks) and not any("quantization_config" in one for one in configs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", ["decoupled", "ragged", "heads", "compensated"])
@pytest.mark.parametrize("name", telling(HUGGING_FACE))
def test_it_is_the_model_that_our_own_loader_gives(name: str, way: str, tmp_path: Path) -> None:
    model: Any = pruned(name, 0, way, torch.float64)
    model.save_pretrained(tmp_path)
    extra = {} if getattr(model, "pooler", model) is not None else {"add_pooling_layer": False}
    kernel = model.config._attn_implementation
    again = load(type(model), tmp_path, dtype="auto", attn_implementation=kernel, **extra)
    same(model, again)
    assert find_attention(again) == find_attention(model)
    assert unmarked(again)
    assert not again.training
    assert again.config.attnprune == from_pretrained(tmp_path).config.attnprune == model.config.attnprune
    given = inputs(name, 0)
    found, expected = (family(name).run(one, given).detach() for one in (again, model))
    close(found, expected, 1e-14, "output")


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device_map": "cpu", "attn_implementation": "eager"}])
def test_auto_classes_and_their_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5, heads="ragged")
    model.save_pretrained(tmp_path / "one", max_shard_size="5KB")
    again = load(transformers.AutoModelForImageClassification, tmp_path / "one", **options)
    same(model, again)
    assert (logits(again) - logits(model)).abs().max() < 1e-6
    assert unmarked(again)
    half = load(transformers.AutoModelForImageClassification, tmp_path / "one", dtype=torch.bfloat16, **options)
    same(model.bfloat16(), half)
    prune_attention(again, 0.3, heads="ragged")  # and once more, by all ways
    again.save_pretrained(tmp_path / "two")
    assert "quantization_config" not in json.loads((tmp_path / "two/config.json").read_text())
    same(again, load(transformers.ViTForImageClassification, tmp_path / "two"))
    same(again, from_pretrained(tmp_path / "two"))


def test_a_base_model_takes_another_head_and_the_other_way_round(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5, heads="ragged")
    model.save_pretrained(tmp_path / "whole")
    base = load(transformers.AutoModel, tmp_path / "whole", add_pooling_layer=False)
    same(model.vit, base)
    assert [one["spec"]["name"] for one in base.config.attnprune["attention"]] == [
        f"layers.{i}.attention" for i in range(2)
    ]
    base.save_pretrained(tmp_path / "base")
    same(base, from_pretrained(tmp_path / "base"))
    again = load(transformers.AutoModelForImageClassification, tmp_path / "base", num_labels=7)
    same(base, again.vit)
    assert again.classifier.out_features == 7
    loss = again(PIXELS, labels=torch.tensor([1, 6])).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in again.parameters())
    again.save_pretrained(tmp_path / "again")
    same(again, from_pretrained(tmp_path / "again"))
    other = load(transformers.ViTForImageClassification, tmp_path / "whole", num_labels=7, ignore_mismatched_sizes=True)
    same(model.vit, other.vit)


def test_a_trainer_takes_it(tmp_path: Path) -> None:
    """It refuses models that are quantised."""
    model = vit()
    prune_attention(model, 0.5)
    model.save_pretrained(tmp_path / "model")
    again = load(transformers.AutoModelForImageClassification, tmp_path / "model")
    data = [{"pixel_values": image, "labels": i} for i, image in enumerate(PIXELS)]
    args = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        save_strategy="steps", save_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(again, args, train_dataset=data).train()
    same(again, load(transformers.AutoModelForImageClassification, tmp_path / "out/checkpoint-1"))


def test_composite_models(tmp_path: Path) -> None:
    model = clip()
    prune_attention(model, 0.5, heads="ragged")
    model.save_pretrained(tmp_path)
    again = load(transformers.AutoModel, tmp_path)
    same(model, again)
    assert unmarked(again)
    assert again.config.text_config is again.text_model.config


def test_a_dense_directory_gives_the_dense_model(tmp_path: Path) -> None:
    model = vit()
    model.save_pretrained(tmp_path)
    again = load(transformers.AutoModelForImageClassification, tmp_path)
    same(model, again)
    assert unmarked(again)
    assert not hasattr(again.config, "attnprune")


def test_an_entry_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5)
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"attnprune": {**found["attnprune"], "version": 2}},
        {"attnprune": {**found["attnprune"], "attention": []}},
        {"attnprune": [1]},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 2},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**found, **change}))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(transformers.AutoModelForImageClassification, tmp_path)


def test_without_it_transformers_refuses(tmp_path: Path) -> None:
    model = fresh("DeiT", 0)
    prune_attention(model, 0.5)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"attnprune\.from_pretrained"):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Swinv2", "Gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_no_file_holds_has_the_dtype_that_transformers_gives_it(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Frequencies of rotary embeddings stay exact; coordinates that parameters multiply are as these."""
    common = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 8, "vocab_size": 10}
    configs = {
        "Llama": {**common, "num_hidden_layers": 1},
        "Gemma2": {**common, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8},
        "Swinv2": {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2},
    }
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**configs[kind])).eval()
    model.save_pretrained(tmp_path)
    pixels, ids = {"pixel_values": torch.randn(1, 3, 8, 8).to(dtype)}, {"input_ids": torch.tensor([[1, 2]])}
    example: Any = pixels if kind == "Swinv2" else ids
    theirs = type(model).from_pretrained(tmp_path, dtype=dtype)
    for written in (False, True):
        ours = from_pretrained(tmp_path, dtype=dtype)
        found = {name: buffer.dtype for name, buffer in ours.named_buffers()}
        assert found == {name: buffer.dtype for name, buffer in theirs.named_buffers()}, written
        assert torch.get_default_dtype() == torch.float32
        ours(**example)
        prune_attention(ours, 0.5, example_inputs=example)
        ours.save_pretrained(tmp_path)


@pytest.mark.skipif(not hasattr(transformers, "NomicBertModel"), reason="a class of newer transformers")
@pytest.mark.parametrize("loaded", [False, True])
def test_projections_that_files_held_in_one_tensor_are_saved_apart(loaded: bool, tmp_path: Path) -> None:
    """Transformers splits such a tensor in three equal parts, which ragged heads do not have."""
    config = transformers.NomicBertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16
    )
    model = transformers.NomicBertModel(config).eval()
    if loaded:
        model.save_pretrained(tmp_path / "dense")
        with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
            assert any("Wqkv" in key for key in file.keys()), "one tensor"  # noqa: SIM118
        model = transformers.NomicBertModel.from_pretrained(tmp_path / "dense").eval()
    prune_attention(model, {"qk": 0.5, "vo": 0.25}, heads="ragged")
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "pruned")
    for again in (from_pretrained(tmp_path / "pruned"), load(transformers.NomicBertModel, tmp_path / "pruned")):
        same(model, again)
        close(again(ids).last_hidden_state, expected, 0.0, "read again")
        again.save_pretrained(tmp_path / "again")
        same(model, from_pretrained(tmp_path / "again"))
    later = copy.deepcopy(model)
    later.save_pretrained(tmp_path / "copied")
    same(model, from_pretrained(tmp_path / "copied"))


@pytest.mark.skipif("internlm3" not in transformers.CONFIG_MAPPING, reason="a kind of newer transformers")
def test_kinds_that_transformers_builds_by_another_kinds_class(tmp_path: Path) -> None:
    config = transformers.CONFIG_MAPPING["internlm3"](
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(model).config_class.model_type != config.model_type
    prune_attention(model, 0.5)
    ids = torch.tensor([[1, 2, 3]])
    save_pruned(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again: Any = from_pretrained(tmp_path / folder)
        assert type(again.config) is type(config)
        assert torch.equal(again(ids).logits, model(ids).logits)
    told = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**told, "model_type": "bert"}))
    with pytest.raises(CheckpointError, match="model_type"):
        from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize("kind", ["OpenAIGPT", "GPT2", "ImageGPT"])
def test_causal_masks_that_no_file_holds(kind: str, tmp_path: Path) -> None:
    """A class that multiplies scores with its mask is known also where the mask has no values yet."""
    config = getattr(transformers, f"{kind}Config")(vocab_size=30, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    prune_attention(model, 0.5, example_inputs={"input_ids": ids})
    save_pruned(model, tmp_path)
    again = from_pretrained(tmp_path)
    same(model, again)
    assert torch.equal(again(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def test_parameters_that_a_class_computes_are_in_no_file(tmp_path: Path) -> None:
    """Marian's positions, which ``save_pretrained`` leaves out."""
    config = transformers.MarianConfig(
        vocab_size=20, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model: Any = transformers.MarianMTModel(config).eval()
    x = {"input_ids": torch.tensor([[3, 4, 5, 1]]), "decoder_input_ids": torch.tensor([[0, 6, 7]])}
    model.save_pretrained(tmp_path / "dense")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        assert not any("embed_positions" in key for key in file.keys())  # noqa: SIM118
    dense = from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(**x).logits, model(**x).logits)
    assert not dense.model.encoder.embed_positions.weight.requires_grad
    prune_attention(model, {"qk": 0.5, "vo": 0.25}, example_inputs=x)
    model.save_pretrained(tmp_path / "pruned")
    save_pruned(model, tmp_path / "ours")
    for folder in ("pruned", "ours"):
        again: Any = from_pretrained(tmp_path / folder)
        same(model, again)
        assert torch.equal(again(**x).logits, model(**x).logits)
    own = load_pruned(tmp_path / "pruned", transformers.MarianMTModel(config).eval())
    assert torch.equal(own(**x).logits, model(**x).logits)
