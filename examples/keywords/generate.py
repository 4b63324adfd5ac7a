"""Synthesise the keyword clips with espeak-ng and store their features.

    python generate.py WORKDIR

writes the full training set to ``WORKDIR/train.safetensors`` and, next to this file, the shipped splits
``features/{train,validation,test}.safetensors`` (the shipped train split is the head of the full one); with
``--only SPLIT`` that split alone, whole, to ``WORKDIR/SPLIT.safetensors``: the training set, or with another ``--seed``
new clips of the voices that validation or test is made with.
Each clip depends only on the seed, its split and its index, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from data import FEATURES, LABELS, SPLITS
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import ASTFeatureExtractor

RATE = 16_000  # samples per second; clips last one second
ESPEAK_RATE = 22_050
LOW, HIGH = -1.1, 1.1  # range of the 16 quantisation levels, in normalised log-mel units
MEAN, STD = -2.5, 3.5  # log-mel statistics of the training clips
SNR_DB = (10.0, 30.0)
GAIN_DB = (-30.0, -6.0)  # root mean square of the spoken word, relative to full scale
PITCH = (20, 80)  # espeak-ng -p
SPEED = (120, 200)  # espeak-ng -s, words per minute
WIDENED = (0.75, 1.4)  # by which formants and pitch of training clips after the first PLAIN are multiplied
PLAIN = 12_250

ACCENTS = [
    "en-gb",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
]
# Speaker timbres (espeak-ng voice variants) kept out of training. Variants whose definition files share much of their
# content (all "steph", all "iven", "aunty" with "linda", ...) stay in one split.
HELD_OUT = {
    "validation": "Alex aunty belinda boris f3 f4 iven iven2 iven3 iven4 linda m5 Storm zac",
    "test": (
        "adam Alicia Annie benjamin f5 Gene Gene2 gustave Lee m3 m7 Mario Michael pablo rob robert shelby steph steph2 "
        "steph3 travis victor"
    ),
}
EXCLUDED = {"fast"}  # sets the speaking rate, not a timbre
CLIPS_PER_CLASS = {"train": 350, "validation": 10, "test": 40}
SHIPPED_TRAIN_PER_CLASS = 26
BABBLE = (
    "The meeting has been moved to Thursday afternoon.",
    "She sells fresh bread at the corner of the market.",
    "Please remember to water the plants while we are away.",
    "Nobody knew which train would arrive before midnight.",
    "Heavy rain is expected along the southern coast today.",
    "He asked whether the museum opens during the holidays.",
)


def extractor() -> ASTFeatureExtractor:
    """The feature extractor saved with the model: one-second audio in [-1, 1] to (96, 64) normalised log-mels."""
    return ASTFeatureExtractor(num_mel_bins=64, max_length=96, mean=MEAN, std=STD, sampling_rate=RATE)


def espeak(*arguments: str) -> bytes:
    """Standard output of espeak-ng."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng was not found; install it with: apt-get install espeak-ng")
    return subprocess.run(["espeak-ng", *arguments], check=True, capture_output=True).stdout


@cache
def variants(split: str) -> list[str]:
    """The voice variants of a split, sorted by name."""
    if split in HELD_OUT:
        return sorted(HELD_OUT[split].split())
    lines = espeak("--voices=variant").decode().splitlines()[1:]
    names = {line.split("!v/")[1].split("  ")[0].split(" (")[0].strip() for line in lines}
    return sorted(names.difference(EXCLUDED, " ".join(HELD_OUT.values()).split()))


def speak(text: str, voice: str, pitch: int, speed: int, widened: float = 1.0) -> np.ndarray:
    """Speech as float64 samples at 16 kHz, silence at both ends removed; its frequencies multiplied."""
    wave = espeak("-v", voice, "-p", str(pitch), "-s", str(max(round(speed / widened), 80)), "--stdout", text)
    audio = resample(np.frombuffer(wave[44:], "<i2") / 32768)
    if widened != 1.0:
        places = np.arange(0, len(audio) - 1, widened)
        audio = np.interp(places, np.arange(len(audio)), lowpassed(audio, 1 / widened))
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1]


def lowpassed(audio: np.ndarray, share: float) -> np.ndarray:
    """Audio without what lies above a share of its highest frequency."""
    spectrum = np.fft.rfft(audio)
    spectrum[int(min(share, 1.0) * len(spectrum)) :] = 0
    return np.fft.irfft(spectrum, len(audio))


def resample(audio: np.ndarray) -> np.ndarray:
    """Resample 22.05 kHz audio to 16 kHz by truncating its spectrum (the ratio is 441 to 320)."""
    blocks = -(-len(audio) // 441)
    spectrum = np.fft.rfft(audio, blocks * 441)[: blocks * 160 + 1]
    return np.fft.irfft(spectrum, blocks * 320) * (RATE / ESPEAK_RATE)


def random_voice(split: str, rng: np.random.Generator) -> tuple[str, int, int]:
    """A voice of the split (``accent+variant``), a pitch and a speed."""
    voice = f"{rng.choice(ACCENTS)}+{rng.choice(variants(split))}"
    return voice, int(rng.integers(*PITCH, endpoint=True)), int(rng.integers(*SPEED, endpoint=True))


@cache
def babble_pool(split: str, seed: int) -> list[np.ndarray]:
    """Sentences spoken by the split's own voices, the raw material of babble noise."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return [speak(text, *random_voice(split, rng)) for text in BABBLE * 6]


def noise(split: str, seed: int, rng: np.random.Generator, size: int = RATE) -> np.ndarray:
    """White, pink or babble noise, (size,), by default of one second, with unit root mean square."""
    kind = rng.choice(["white", "pink", "babble"])
    if kind == "babble":
        pool = babble_pool(split, seed)
        voices = [np.roll(pool[i], rng.integers(RATE)) for i in rng.choice(len(pool), 5, replace=False)]
        audio = sum(np.resize(voice, max(size, len(voice)))[:size] for voice in voices)
    else:
        spectrum = np.fft.rfft(rng.standard_normal(size))
        if kind == "pink":
            spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * size // RATE))
        audio = np.fft.irfft(spectrum, size)
    return audio / np.sqrt(np.mean(audio**2))


def clip(word: str, split: str, seed: int, rng: np.random.Generator, wide: bool = False) -> tuple[np.ndarray, str]:
    """One second of noisy speech, float32 (16000,) in [-1, 1], and its voice."""
    voice, pitch, speed = random_voice(split, rng)
    widened = float(np.exp(rng.uniform(*np.log(WIDENED)))) if wide else 1.0
    speech = speak(word, voice, pitch, speed, widened)[:RATE]
    speech /= np.sqrt(np.mean(speech**2))
    audio = noise(split, seed, rng) * 10 ** (-rng.uniform(*SNR_DB) / 20)
    start = rng.integers(RATE - len(speech) + 1)
    audio[start : start + len(speech)] += speech
    audio *= 10 ** (rng.uniform(*GAIN_DB) / 20)
    return np.clip(audio, -1, 1).astype(np.float32), voice


def pack(features: np.ndarray) -> np.ndarray:
    """Quantise features (96, 64) to 16 levels in [LOW, HIGH] and pack two mel bins per byte: uint8 (96, 32)."""
    codes = np.rint((np.clip(features, LOW, HIGH) - LOW) * (15 / (HIGH - LOW))).astype(np.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2]


@cache
def cached_extractor() -> ASTFeatureExtractor:
    return extractor()


def example(job: tuple[str, int, int]) -> tuple[np.ndarray, str]:
    """Packed features, uint8 (96, 32), and voice of clip number ``index`` of a split; job is (split, index, seed)."""
    split, index, seed = job
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    audio, voice = clip(LABELS[index % len(LABELS)], split, seed, rng, wide=split == "train" and index >= PLAIN)
    return pack(cached_extractor()(audio, sampling_rate=RATE)["input_values"][0]), voice


def save(path: Path, packed: list[np.ndarray], voices: list[str], seed: int) -> None:
    """Write a feature file: uint8 features (n, 96, 32), labels (n,), voice numbers (n,), metadata."""
    names = sorted(set(voices))
    tensors = {
        "features": torch.from_numpy(np.stack(packed)).contiguous(),
        "labels": (torch.arange(len(packed)) % len(LABELS)).to(torch.uint8),
        "voices": torch.tensor([names.index(voice) for voice in voices], dtype=torch.int16),
    }
    meta = {"low": LOW, "high": HIGH, "mean": MEAN, "std": STD, "seed": seed, "labels": " ".join(LABELS)}
    version = espeak("--version").decode().split("  ")[0]
    metadata = {key: str(value) for key, value in meta.items()} | {"voices": json.dumps(names), "espeak": version}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Synthesise the keyword data set with espeak-ng.")
    parser.add_argument("workdir", type=Path, help="where the full training set is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=SPLITS, help="write this split alone, to WORKDIR")
    parser.add_argument(
        "--per-class", type=int, help="clips per keyword, with --only (train 350, validation 10, test 40)"
    )
    args = parser.parse_args()
    if args.per_class and not args.only:
        parser.error("--per-class needs --only")
    with get_context("spawn").Pool(args.processes) as pool:
        for split in [args.only] if args.only else SPLITS:
            count = (args.per_class or CLIPS_PER_CLASS[split]) * len(LABELS)
            jobs = [(split, i, args.seed) for i in range(count)]
            packed, voices = zip(*tqdm(pool.imap(example, jobs, chunksize=16), split, count), strict=True)
            if args.only or split == "train":
                save(args.workdir / f"{split}.safetensors", packed, voices, args.seed)
            if args.only:
                continue
            shipped = SHIPPED_TRAIN_PER_CLASS * len(LABELS) if split == "train" else count
            save(FEATURES / f"{split}.safetensors", packed[:shipped], voices[:shipped], args.seed)


if __name__ == "__main__":
    main()
