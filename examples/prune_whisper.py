"""Prunes a Whisper checkpoint from the hub (or a local folder) and shows that generation goes on as it should.

    python examples/prune_whisper.py --model openai/whisper-tiny.en --audio recordings --ratio 0.4 --out pruned
    python examples/prune_whisper.py --model openai/whisper-small --language de --audio recordings --out pruned

Needs the network for a hub name. ``recordings`` holds a few hundred ``.wav`` files of the kind that the model will hear
(16 bits, one channel, 16 kHz). Nobody has to write down what is said: the dense model's own transcripts are what the
decoder reads in calibration. Encoder self-attention, decoder self-attention and cross-attention are pruned together.

Then the pruned model, and the one that is loaded from ``pruned``, transcribe by every kind of search, and each has to
say what the dense model says with what went at zero. ``--model examples/speech/checkpoint`` needs no network.
"""

from __future__ import annotations

import argparse
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor

import attnprune

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, without a cache": {"use_cache": False},
    "greedy, static cache": {"cache_implementation": "static"},
    "4 beams": {"num_beams": 4},
    "timestamps": {"return_timestamps": True},
}


def read_audio(folder: Path) -> list[np.ndarray]:
    """The recordings of a folder by name, each float32 (samples,) in [-1, 1]."""
    found = []
    for path in sorted(folder.glob("*.wav")):
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, 16_000):
                raise SystemExit(
                    f"{path} is not of 16 bits, one channel and 16 kHz; sox -r 16000 -c 1 -b 16 converts it"
                )
            found.append(np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768)
    if not found:
        raise SystemExit(f"no .wav files in {folder}")
    return found


def prompt(model: WhisperForConditionalGeneration, language: str) -> list[int]:
    """What the decoder reads before the first word: start, language and task where there are several, no timestamps."""
    known = model.generation_config
    begin = [model.config.decoder_start_token_id]
    if getattr(known, "is_multilingual", False):
        begin += [known.lang_to_id[f"<|{language}|>"], known.task_to_id["transcribe"]]
    return [*begin, known.no_timestamps_token_id]


def calibration(
    model: WhisperForConditionalGeneration, features: Tensor, language: str, size: int = 8
) -> list[dict[str, Tensor]]:
    """Batches of features (n, mels, frames) with what the model itself hears in them, as its decoder reads it."""
    batches = []
    for x in features.split(size):
        heard = transcribe(model, x, language)
        begin = heard.new_tensor(prompt(model, language)).expand(len(x), -1)
        batches.append({"input_features": x, "decoder_input_ids": torch.cat([begin, heard], 1)})
    return batches


@torch.inference_mode()
def transcribe(model: WhisperForConditionalGeneration, features: Tensor, language: str, **search: Any) -> Tensor:
    """Tokens (n, longest) without the prompt."""
    if getattr(model.generation_config, "is_multilingual", False):
        search = {"language": language, "task": "transcribe", **search}
    tokens: Tensor = model.generate(features, attention_mask=torch.ones_like(features[:, 0]), **search)
    return tokens


def every_search(model: WhisperForConditionalGeneration, features: Tensor, language: str) -> dict[str, Tensor]:
    """What the model says by each of :data:`SEARCHES`."""
    return {name: transcribe(model, features, language, **search) for name, search in SEARCHES.items()}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-tiny.en", help="hub name or folder")
    parser.add_argument("--audio", type=Path, required=True, help="folder of .wav files to calibrate with")
    parser.add_argument("--language", default="en", help="of the recordings, for models of several languages")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of the attention weights to remove")
    parser.add_argument("--heads", choices=["uniform", "ragged"], default="uniform")
    parser.add_argument("--out", type=Path, help="folder for the pruned model")
    args = parser.parse_args(given)

    model = WhisperForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(args.model)
    features = processor(read_audio(args.audio), sampling_rate=16_000, return_tensors="pt").input_features
    data = calibration(model, features, args.language)
    plan = attnprune.make_plan(model, args.ratio, split="auto", heads=args.heads, data=data)
    probe = features[:4]
    with attnprune.masked(model, plan):
        expected = every_search(model, probe, args.language)
    print(attnprune.apply_plan(model, plan, example_inputs=data[0]))
    models = {"pruned": model}
    if args.out is not None:
        attnprune.save_pruned(model, args.out)
        processor.save_pretrained(args.out)
        models["loaded"] = attnprune.from_pretrained(args.out)
    for which, one in models.items():
        found = every_search(one, probe, args.language)
        for name, tokens in expected.items():
            said = "the same" if torch.equal(found[name], tokens) else "NOT THE SAME"
            print(f"{which}, {name}: {said} as the dense model with what went at zero")
    for text in processor.batch_decode(expected["greedy"], skip_special_tokens=True):
        print(f"  {text.strip()}")


if __name__ == "__main__":
    main()
