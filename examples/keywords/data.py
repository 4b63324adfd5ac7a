"""The keyword-spotting example: shipped features, shipped checkpoint and accuracy.

Features are log-mel spectrograms of one-second clips, 96 frames of 10 ms by 64 mel bins, normalised by
``transformers.ASTFeatureExtractor`` and stored as 4-bit codes (see ``generate.py``).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import ASTForAudioClassification

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
FIRST = HERE / "checkpoint_first"  # the same model, trained for a shorter time and on fewer voices
FEATURES = HERE / "features"
SPLITS = ("train", "validation", "test")
VOCABULARY = (
    "backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine no off on "
    "one right seven sheila six stop three tree two up visual wow yes zero"
)
LABELS = VOCABULARY.split()


def unpack(packed: Tensor, low: float, high: float) -> Tensor:
    """Turn packed codes, uint8 (n, 96, 32), into features, float32 (n, 96, 64).

    A byte holds two neighbouring mel bins, the lower one in its high nibble; code ``c`` of 0..15 stands for the
    value ``low + c * (high - low) / 15``.
    """
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)
    return low + codes.float() * ((high - low) / 15)


def read_features(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read one feature file: features float32 (n, 96, 64), labels int64 (n,), voice name of each clip."""
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        features = unpack(file.get_tensor("features"), float(meta["low"]), float(meta["high"]))
        labels = file.get_tensor("labels").long()
        names = json.loads(meta["voices"])
        voices = [names[i] for i in file.get_tensor("voices").tolist()]
    return features, labels, voices


def load_split(name: str) -> tuple[Tensor, Tensor, list[str]]:
    """Load a shipped split, ``"train"``, ``"validation"`` or ``"test"``.

    Returns features float32 (n, 96, 64) ready for the model's ``input_values``, labels int64 (n,) indexing
    ``LABELS``, and the espeak-ng voice (``accent+variant``) of each clip.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; choose from {', '.join(SPLITS)}")
    return read_features(FEATURES / f"{name}.safetensors")


def load_model(checkpoint: Path = CHECKPOINT) -> ASTForAudioClassification:
    """Load a shipped checkpoint (stored as float16) as a float32 model in evaluation mode."""
    return ASTForAudioClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, features: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Percentage of clips (features (n, 96, 64), labels (n,)) that ``model`` classifies correctly."""
    device = next(model.parameters()).device
    hits = 0
    for x, y in zip(features.split(batch_size), labels.split(batch_size), strict=True):
        hits += int((model(input_values=x.to(device)).logits.argmax(-1).cpu() == y).sum())
    return 100 * hits / len(labels)
