"""Synthesise the spoken phrases with espeak-ng and store their features.

    python synthesise.py WORKDIR

writes the full training set and the validation set to ``WORKDIR`` and, next to this file, the shipped splits
``features/{train,test}.safetensors`` (the shipped train split is the head of the full one). ``--only SPLIT --count N``
writes that split alone, to ``WORKDIR/SPLIT.safetensors``; with another ``--seed`` these are other phrases.
Voices, noise and levels are those of ``../keywords/generate.py``: no timbre is in two of the splits.
One phrase in five, told by a checksum, is for validation and test alone, so these combinations of words are unseen.
Each phrase depends only on the seed, its split and its number.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from phrases import FEATURES, SECONDS, WORDS, extractor
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import WhisperFeatureExtractor

sys.path.append(str(Path(__file__).resolve().parents[1] / "keywords"))
from generate import GAIN_DB, RATE, SPLITS, espeak, noise, random_voice, speak

LOW, HIGH = -0.7, 1.4  # range of the 16 quantisation levels, in log-mel units of the extractor
SNR_DB = (15.0, 35.0)
SPEED = (130, 200)  # espeak-ng -s, words per minute
LENGTHS = (2, 4)  # words in a phrase
COUNTS = {"train": 6_000, "validation": 300, "test": 480}
SHIPPED_TRAIN = 256
HELD_OUT = 5  # one phrase in so many

Example = tuple[np.ndarray, str, str, tuple[int, int]]


def held_out(text: str) -> bool:
    """Whether a phrase is for validation and test, not for training."""
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def spoken(split: str, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """A phrase of the split as samples that fit into two seconds, its text and its voice."""
    while True:
        text = " ".join(rng.choice(WORDS, rng.integers(*LENGTHS, endpoint=True)))
        if held_out(text) != (split != "train"):
            continue
        voice, pitch, _ = random_voice(split, rng)
        speech = speak(text, voice, pitch, int(rng.integers(*SPEED, endpoint=True)))
        if len(speech) <= SECONDS * RATE:
            return speech, text, voice


@cache
def cached_extractor() -> WhisperFeatureExtractor:
    return extractor()


def features_of(audio: np.ndarray) -> np.ndarray:
    """Log-mel features (40, 100) of two seconds of audio."""
    return np.asarray(cached_extractor()(audio, sampling_rate=RATE)["input_features"][0])


def pack(features: np.ndarray) -> np.ndarray:
    """Quantise features (40, 100) to 16 levels in [LOW, HIGH] and pack two mel bins per byte: uint8 (20, 100)."""
    codes = np.rint((np.clip(features, LOW, HIGH) - LOW) * (15 / (HIGH - LOW))).astype(np.uint8)
    return codes[0::2] << 4 | codes[1::2]


def sound(split: str, index: int, seed: int) -> tuple[np.ndarray, str, str, tuple[int, int]]:
    """Two seconds of noisy speech, float32 in [-1, 1]; what is said, by whom, and from when to when, in 20 ms."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, SECONDS])
    speech, text, voice = spoken(split, rng)
    speech = speech / np.sqrt(np.mean(speech**2))
    audio = noise(split, seed, rng, SECONDS * RATE) * 10 ** (-rng.uniform(*SNR_DB) / 20)
    start = int(rng.integers(len(audio) - len(speech) + 1))
    audio[start : start + len(speech)] += speech
    audio *= 10 ** (rng.uniform(*GAIN_DB) / 20)
    ends = (round(start / RATE * 50), round((start + len(speech)) / RATE * 50))
    return np.clip(audio, -1, 1).astype(np.float32), text, voice, ends


def example(job: tuple[str, int, int]) -> Example:
    """Packed features, uint8 (20, 100), text, voice and times of a phrase; job is (split, number, seed)."""
    audio, text, voice, ends = sound(*job)
    return pack(features_of(audio)), text, voice, ends


def save(path: Path, examples: list[Example], seed: int) -> None:
    """Write a feature file: uint8 features (n, 20, 100), times (n, 2) in 20 ms, voice numbers (n,), texts."""
    packed, texts, voices, ends = zip(*examples, strict=True)
    names = sorted(set(voices))
    tensors = {
        "features": torch.from_numpy(np.stack(packed)).contiguous(),
        "times": torch.tensor(ends, dtype=torch.uint8),
        "voices": torch.tensor([names.index(voice) for voice in voices], dtype=torch.int16),
    }
    version = espeak("--version").decode().split("  ")[0]
    metadata = {"low": str(LOW), "high": str(HIGH), "seed": str(seed), "texts": "\n".join(texts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata | {"voices": json.dumps(names), "espeak": version})


def main() -> None:
    parser = argparse.ArgumentParser(description="Synthesise spoken phrases with espeak-ng.")
    parser.add_argument("workdir", type=Path, help="where the full training set is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=SPLITS, help="write this split alone, to WORKDIR")
    parser.add_argument("--count", type=int, help="phrases, with --only (train 6000, validation 300, test 480)")
    args = parser.parse_args()
    if args.count and not args.only:
        parser.error("--count needs --only")
    with get_context("spawn").Pool(args.processes) as pool:
        for split in [args.only] if args.only else SPLITS:
            count = args.count or COUNTS[split]
            jobs = [(split, i, args.seed) for i in range(count)]
            examples = list(tqdm(pool.imap(example, jobs, chunksize=16), split, count))
            if args.only or split != "test":
                save(args.workdir / f"{split}.safetensors", examples, args.seed)
            if not args.only and split != "validation":
                shipped = examples[: SHIPPED_TRAIN if split == "train" else count]
                save(FEATURES / f"{split}.safetensors", shipped, args.seed)


if __name__ == "__main__":
    main()
