"""Spoken phrases for a small Whisper: shipped features, shipped checkpoint, spelling and word error rate.

A phrase is two to four of twenty words, spoken in at most two seconds by one voice. Features are the log-mel
spectrogram of ``transformers.WhisperFeatureExtractor``, 40 mel bins by 100 frames of 20 ms, stored as 4-bit codes (see
``synthesise.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
FEATURES = HERE / "features"
VOCABULARY = "zero one two three four five six seven eight nine yes no up down left right on off stop go"
WORDS = VOCABULARY.split()
SECONDS, FRAMES, MELS = 2, 100, 40

# Token numbers in Whisper's order: text, end, start, "no timestamps", then one timestamp every 20 ms.
LETTERS = " " + "".join(sorted(set("".join(WORDS))))
END, START, NO_TIMESTAMPS = range(len(LETTERS), len(LETTERS) + 3)
FIRST_TIMESTAMP = NO_TIMESTAMPS + 1
TOKENS = FIRST_TIMESTAMP + SECONDS * 50 + 1
LONGEST = 32  # tokens of the longest phrase with its prompt, timestamps and end, rounded up


def spell(phrase: str) -> list[int]:
    """The letters of a phrase as token numbers."""
    return [LETTERS.index(letter) for letter in phrase]


def read(tokens: Sequence[int]) -> str:
    """The phrase that token numbers spell; the prompt, timestamps and the end are left out."""
    return "".join(LETTERS[token] for token in tokens if token < END)


def stamp(seconds: float) -> int:
    """The token of a time, rounded to 20 ms."""
    return FIRST_TIMESTAMP + min(max(round(seconds * 50), 0), SECONDS * 50)


def extractor() -> WhisperFeatureExtractor:
    """Audio at 16 kHz to (40, 100) log-mels of two seconds."""
    return WhisperFeatureExtractor(feature_size=MELS, hop_length=320, chunk_length=SECONDS)


def processor() -> WhisperProcessor:
    """The processor saved with the model: :func:`extractor`, and letters as tokens."""
    text = {("\u0120" if letter == " " else letter): token for token, letter in enumerate(LETTERS)}
    special = {"<|endoftext|>": END, "<|startoftranscript|>": START, "<|notimestamps|>": NO_TIMESTAMPS}
    tokenizer = WhisperTokenizer(vocab=text | special, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    times = [f"<|{number / 50:.2f}|>" for number in range(SECONDS * 50 + 1)]
    tokenizer.add_tokens([AddedToken(name, special=False) for name in times])
    return WhisperProcessor(extractor(), tokenizer)


MARKS = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}


def build_model() -> WhisperForConditionalGeneration:
    """A new model: 4 encoder and 2 decoder layers of 4 heads of 24, that generates as English-only Whisper does."""
    config = WhisperConfig(
        vocab_size=TOKENS,
        num_mel_bins=MELS,
        max_source_positions=FRAMES // 2,
        max_target_positions=LONGEST,
        d_model=96,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        init_std=0.1,  # about 1 / sqrt(96); the default of 0.02 leaves a model this narrow on a long plateau
        dropout=0.0,
        **MARKS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **MARKS,
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
        return_timestamps=False,
        max_length=LONGEST,
    )
    return model


def unpack(packed: Tensor, low: float, high: float) -> Tensor:
    """Turn packed codes, uint8 (n, 20, 100), into features, float32 (n, 40, 100).

    A byte holds two neighbouring mel bins, the lower one in its high nibble; code ``c`` of 0..15 stands for the
    value ``low + c * (high - low) / 15``.
    """
    codes = torch.stack((packed >> 4, packed & 15), dim=2).flatten(1, 2)
    return low + codes.float() * ((high - low) / 15)


class Phrases:
    """One feature file: what was said, by whom and when, and how it sounds."""

    features: Tensor  #: float32 (n, 40, 100), ready for the model's ``input_features``
    texts: list[str]
    voices: list[str]  #: espeak-ng voices, ``accent+variant``
    times: Tensor  #: float32 (n, 2), the second at which speech begins and ends

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            self.features = unpack(file.get_tensor("features"), float(meta["low"]), float(meta["high"]))
            self.times = file.get_tensor("times").float() / 50
            self.texts = meta["texts"].split("\n")
            names = json.loads(meta["voices"])
            self.voices = [names[i] for i in file.get_tensor("voices").tolist()]

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, count: int, size: int = 16) -> list[dict[str, Tensor]]:
        """The first phrases as batches for ``attnprune``: what the decoder reads and what it must say next."""
        starts = range(0, min(count, len(self)), size)
        return [teacher(self.features[i : i + size], self.texts[i : i + size]) for i in starts]


def load_phrases(name: str) -> Phrases:
    """A shipped split: ``"train"`` (the head of the training set, to calibrate with) or ``"test"``."""
    return Phrases(FEATURES / f"{name}.safetensors")


def teacher(features: Tensor, texts: Sequence[str], times: Tensor | None = None) -> dict[str, Tensor]:
    """A batch for the model: features, and ``labels`` (n, longest) padded by -100 that begin after the start token.

    Args:
        features: (n, 40, 100).
        texts: n phrases.
        times: (n, 2), when speech begins and ends; rows of -1 are spelt without timestamps, and all where it is None.
    """
    rows = []
    for i, text in enumerate(texts):
        begin, end = (-1.0, -1.0) if times is None else times[i].tolist()
        spoken = [stamp(begin), *spell(text), stamp(end)] if begin >= 0 else [NO_TIMESTAMPS, *spell(text)]
        rows.append(torch.tensor([*spoken, END]))
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_features": features, "labels": labels}


def load_model(path: Path = CHECKPOINT) -> WhisperForConditionalGeneration:
    """Load the shipped checkpoint (stored as float16) as a float32 model in evaluation mode."""
    return WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def transcribe(
    model: WhisperForConditionalGeneration, features: Tensor, beams: int = 1, batch_size: int = 240
) -> list[str]:
    """What ``model`` hears in features (n, 40, 100), by greedy search or by beams."""
    return [
        read(row)
        for x in features.to(model.device).split(batch_size)
        for row in model.generate(x, attention_mask=torch.ones_like(x[:, 0]), num_beams=beams).tolist()
    ]


def edits(heard: Sequence[str], said: Sequence[str]) -> int:
    """The least number of words put in, left out or replaced that makes ``heard`` of ``said``."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(heard, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != other))
    return row[-1]


def word_error_rate(heard: Sequence[str], said: Sequence[str]) -> float:
    """Percentage of the words said that were heard wrong: insertions, deletions and replacements."""
    wrong = sum(edits(a.split(), b.split()) for a, b in zip(heard, said, strict=True))
    return 100 * wrong / sum(len(text.split()) for text in said)
