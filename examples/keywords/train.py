"""Train the Audio Spectrogram Transformer on the synthesised keywords.

    python train.py WORKDIR

reads ``WORKDIR/train.safetensors`` (written by ``generate.py``) and writes ``checkpoint/`` next to this file, or
``--out``. Accuracy is printed on the validation voices only; the test split is not read here.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from bands import draw, mask
from data import CHECKPOINT, LABELS, accuracy, load_model, load_split, read_features
from generate import extractor
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import ASTConfig, ASTForAudioClassification

BATCH = 64
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.998
INITIALIZER_RANGE = 0.06  # about 1 / sqrt(192); the default of 0.02 leaves a model this narrow on a long plateau


def build_model() -> ASTForAudioClassification:
    """A new model: 6 layers of 6 heads of 32, on 4 x 11 patches of 16 mel bins by 16 frames plus two class tokens."""
    config = ASTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=384,
        patch_size=16,
        frequency_stride=16,
        time_stride=8,
        max_length=96,
        num_mel_bins=64,
        initializer_range=INITIALIZER_RANGE,
        attn_implementation="eager",  # the fused kernel's backward takes longer in bfloat16
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = ASTForAudioClassification(config)
    torch.nn.init.normal_(model.audio_spectrogram_transformer.embeddings.position_embeddings, std=0.02)
    return model


def augment(x: Tensor) -> Tensor:
    """Shift features (n, 96, 64) in time and level, warp mel frequency, then mask a band of each axis (SpecAugment)."""
    n, frames, mels = x.shape
    time = (torch.arange(frames) + draw(n, -4, 4)) % frames
    warp = 0.88 + 0.24 * torch.rand(n, 1)  # longer and shorter vocal tracts
    mel = ((torch.arange(mels) * warp).round().long() + draw(n, -3, 3)).clamp(0, mels - 1)
    x = x[torch.arange(n)[:, None, None], time[:, :, None], mel[:, None, :]]
    x = x + 0.1 * torch.randn(n, 1, 1)
    return x.masked_fill(mask(n, frames, 8)[:, :, None] | mask(n, mels, 6)[:, None, :], 0)


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """Weight decay for matrices only."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2 or p.ndim == 4], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim in (1, 3)], "weight_decay": 0.0},
    ]


def save(model: ASTForAudioClassification, folder: Path) -> None:
    """Write the checkpoint: weights as float16, config, feature extractor."""
    copy.deepcopy(model).half().save_pretrained(folder)
    extractor().save_pretrained(folder)


def train(workdir: Path, out: Path, epochs: int, rate: float, resume: bool, bfloat16: bool) -> None:
    """Train, and save the moving average of the weights of the epoch that is best on the validation voices."""
    features, labels, _ = read_features(workdir / "train.safetensors")
    validation = load_split("validation")[:2]
    model = (load_model(out) if resume else build_model()).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=rate)
    steps = len(labels) // BATCH
    best = accuracy(load_model(out), *validation) if resume else 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(labels))[: steps * BATCH].split(BATCH)
        for batch in tqdm(order, f"epoch {epoch + 1}", mininterval=5):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = model(input_values=augment(features[batch])).logits
            loss = cross_entropy(logits.float(), labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            total += loss.item()
        score = accuracy(average.module.eval(), *validation)
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}, validation {score:.2f} %", flush=True)
        if score >= best:
            best = score
            save(average.module, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the keyword model.")
    parser.add_argument("workdir", type=Path, help="holds train.safetensors")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="where the checkpoint goes (checkpoint)")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate (0.0015)")
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint instead of a new model")
    parser.add_argument("--bfloat16", action="store_true", help="halves the time on processors with AMX")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train(args.workdir, args.out, args.epochs, args.rate, args.resume, args.bfloat16)


if __name__ == "__main__":
    main()
