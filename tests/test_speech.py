"""Models of sound: pruned completely and exactly; Whisper generates, saved and loaded, as the masked model does."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from attnprune import apply_plan, from_pretrained, make_plan, masked, save_pruned, skipped_attention
from examples import prune_whisper
from examples.speech import phrases

LAYERS: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
SOUND: dict[str, Any] = {
    **LAYERS, "vocab_size": 20, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
MOONSHINE: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip
CLAP: dict[str, Any] = {
    "audio_config": {"spec_size": 64, "num_mel_bins": 16, "hidden_size": 32, "patch_embeds_hidden_size": 8,
                     "depths": [1, 1, 1], "num_attention_heads": [1, 2, 4], "window_size": 4},
    "text_config": {**LAYERS, "vocab_size": 20, "max_position_embeddings": 20, "pad_token_id": 0},
    "projection_dim": 16,
}  # fmt: skip
SPECTROGRAM: dict[str, Any] = {  # an encoder and a decoder over patches of one channel, as AudioMAE's
    **LAYERS, "image_size": 32, "patch_size": 8, "num_channels": 1, "mask_ratio": 0.75, "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 16,
}  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


IDS = torch.tensor([[3, 5, 4, 7], [6, 3, 8, 2]])
WAVE = {"input_values": noise(2, 400)}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], int]] = {
    "Wav2Vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", SOUND, WAVE, 2),
    "HuBERT": ("HubertConfig", "HubertForCTC", SOUND, WAVE, 2),
    "WavLM": ("WavLMConfig", "WavLMForCTC", SOUND, WAVE, 2),
    "Conformer": ("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", SOUND, WAVE, 2),
    "Conformer, rotary": (
        "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", {**SOUND, "position_embeddings_type": "rotary"}, WAVE, 2
    ),
    "Moonshine": (
        "MoonshineConfig", "MoonshineForConditionalGeneration", MOONSHINE,
        {"input_values": noise(2, 2_000), "decoder_input_ids": IDS}, 3,
    ),
    "CLAP": (
        "ClapConfig", "ClapModel", CLAP,
        {"input_ids": IDS, "input_features": noise(2, 1, 64, 16), "is_longer": torch.zeros(2, 1, dtype=torch.bool)}, 5,
    ),
    "AudioMAE": (
        "ViTMAEConfig", "ViTMAEForPreTraining", SPECTROGRAM,
        {"pixel_values": noise(2, 1, 32, 32), "noise": noise(2, 16)}, 3,
    ),
}  # fmt: skip
"""Config, model, what the config says, what the model is called with, and how many attentions there are."""


def build(name: str) -> nn.Module:
    config, model, options, _, _ = MODELS[name]
    if not hasattr(transformers, model) and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"no {model} in this transformers")
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options)).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return built


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    with torch.no_grad():
        found = model(**MODELS[name][3], return_dict=True)
    keys = ("logits", "text_embeds", "audio_embeds")
    return [found[key] for key in keys if key in found]


@pytest.mark.filterwarnings("ignore")  # of hosts, about tiny configs
@pytest.mark.parametrize("name", MODELS)
def test_models_of_sound_are_pruned_completely_and_exactly(name: str) -> None:
    model, (_, _, _, given, count) = build(name), MODELS[name]
    assert not skipped_attention(model, lambda: model(**given))
    for options in ({"heads": "ragged"}, {"granularity": "joint"}):
        model = build(name)
        dense = outputs(model, name)
        plan = make_plan(model, 0.4, scorer="random", example_inputs=given, **options)
        assert len(plan.specs) == count
        with masked(model, plan):
            expected = outputs(model, name)
        apply_plan(model, plan)
        for found, one, before in zip(outputs(model, name), expected, dense, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-9)
            assert (one - before).abs().max() > 1e-6


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"heads": "ragged"}, marks=pytest.mark.long),
        pytest.param({"granularity": "head"}, marks=pytest.mark.long),
        {"basis": "rotated", "split": "auto"},
    ],
)
def test_whisper_generates_as_the_masked_model(options: dict[str, Any], tmp_path: Path) -> None:
    """With and without a cache, with a static one, by beams and with timestamps; and so it does after a round trip."""
    model, train = phrases.load_model().double(), phrases.load_phrases("train")
    data = [{**batch, "input_features": batch["input_features"].double()} for batch in train.batches(16, 8)]
    given = {"data": data, "progress": False} if "split" in options else {"scorer": "magnitude"}
    plan = make_plan(model, 0.4, **given, **options)
    probe = train.features[:2].double()
    with masked(model, plan):
        expected = prune_whisper.every_search(model, probe, "en")
    apply_plan(model, plan)
    loaded: Any = from_pretrained(save_pruned(model, tmp_path))
    for one in (model, loaded):
        for name, tokens in prune_whisper.every_search(one, probe, "en").items():
            assert torch.equal(tokens, expected[name]), name
    said = phrases.read(expected["timestamps"][0].tolist())
    assert said
    assert int(expected["timestamps"][0, 0]) >= phrases.FIRST_TIMESTAMP


@pytest.mark.long
def test_the_example_for_whisper(tmp_path: Path, capsys: Any) -> None:
    random, folder = np.random.default_rng(0), tmp_path / "recordings"
    folder.mkdir()
    for number in range(3):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((3_000 * random.standard_normal(32_000)).astype("<i2").tobytes())
    prune_whisper.main(["--model", str(phrases.CHECKPOINT), "--audio", str(folder), "--out", str(tmp_path / "pruned")])
    printed = capsys.readouterr().out
    assert printed.count("the same as the dense model") == 2 * len(prune_whisper.SEARCHES)
    assert "NOT THE SAME" not in printed


def test_what_a_phrase_is_spelt_like() -> None:
    tokens = phrases.spell("six go")
    assert phrases.read([phrases.START, phrases.stamp(0.1), *tokens, phrases.stamp(1.5), phrases.END]) == "six go"
    assert phrases.processor().tokenizer("six go", add_special_tokens=False).input_ids == tokens
    assert phrases.word_error_rate(["one two", "go stop", ""], ["one two", "go up stop", "no"]) == pytest.approx(
        100 / 3
    )


def test_the_shipped_model_hears_what_is_said() -> None:
    """The first phrases of voices that it never heard, in combinations that it never heard."""
    test, train = phrases.load_phrases("test"), phrases.load_phrases("train")
    assert len(test) >= 300
    assert not set(test.texts) & set(train.texts)
    timbres = [{voice.split("+")[1] for voice in split.voices} for split in (test, train)]
    assert not timbres[0] & timbres[1]
    heard = phrases.transcribe(phrases.load_model(), test.features[:64])
    assert phrases.word_error_rate(heard, test.texts[:64]) < 10
