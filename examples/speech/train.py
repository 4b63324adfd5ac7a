"""Train a small Whisper to spell the synthesised phrases.

    python train.py WORKDIR

reads ``WORKDIR/{train,validation}.safetensors`` (written by ``synthesise.py``) and writes ``checkpoint/`` next to this
file, regularly. Word error rate is printed on the validation voices only; the test split is not read here.

Besides the decoder, which is taught by the phrases, a connectionist temporal classification of the encoder's output is
trained and then thrown away: it tells the encoder early where the letters are.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
from phrases import (
    CHECKPOINT,
    END,
    FRAMES,
    LETTERS,
    MELS,
    Phrases,
    build_model,
    load_model,
    processor,
    spell,
    teacher,
    transcribe,
    word_error_rate,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import WhisperForConditionalGeneration

sys.path.append(str(Path(__file__).resolve().parents[1] / "keywords"))
from bands import draw, mask

BATCH = 16
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EMA_DECAY = 0.997
TIMESTAMPS = 0.25  # share of phrases that are spelt with timestamps
CHECKED = 128  # validation phrases
ALIGN = 0.6  # weight of the encoder's own loss
FLOOR = -0.5  # level of a masked band


def augment(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 40, 100) and times (n, 2), altered at random.

    Moves phrases in time, warps mel frequency, changes gain, adds noise, then masks a band of each axis (SpecAugment).
    """
    n = len(x)
    begin, end = (times * 50).round().long().split(1, dim=1)
    shift = torch.maximum(torch.minimum(draw(n, -12, 12), FRAMES - end), -begin)
    frame = (torch.arange(FRAMES) - shift) % FRAMES
    warp = 0.93 + 0.14 * torch.rand(n, 1)  # longer and shorter vocal tracts
    mel = ((torch.arange(MELS) * warp).round().long() + draw(n, -1, 1)).clamp(0, MELS - 1)
    x = x[torch.arange(n)[:, None, None], mel[:, :, None], frame[:, None, :]]
    x = x + 0.1 * torch.randn(n, 1, 1) + 0.05 * torch.rand(n, 1, 1) * torch.randn_like(x)
    x = x.masked_fill(mask(n, FRAMES, 4)[:, None, :] | mask(n, MELS, 3)[:, :, None], FLOOR)
    return x, times + shift / 50


def loss_of(
    model: WhisperForConditionalGeneration, align: nn.Linear, batch: dict[str, Tensor], texts: list[str]
) -> Tensor:
    """The loss of the decoder under teacher forcing, and that of the encoder's letters: (2,)."""
    labels = batch["labels"]
    outputs = model(**batch)
    loss = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=LABEL_SMOOTHING)
    letters = align(outputs.encoder_last_hidden_state).log_softmax(-1).transpose(0, 1)
    targets = [torch.tensor(spell(text)) for text in texts]
    lengths = torch.tensor([len(target) for target in targets])
    heard = torch.full_like(lengths, len(letters))
    aligned = ctc_loss(letters, torch.cat(targets), heard, lengths, blank=END, zero_infinity=True)
    return torch.stack([loss, aligned])


def parameter_groups(modules: list[nn.Module]) -> list[dict]:
    """Weight decay for matrices only."""
    parameters = {p for module in modules for p in module.parameters() if p.requires_grad}
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def save(model: WhisperForConditionalGeneration) -> None:
    """Write the checkpoint: weights as float16, config, generation config, processor."""
    copy.deepcopy(model).half().save_pretrained(CHECKPOINT)
    processor().save_pretrained(CHECKPOINT)


def one_cycle(done: float) -> float:
    """The learning rate, relative to its peak, when a share of the time is over: up for 5 %, then down by a cosine."""
    return 0.04 + 0.96 * done / 0.05 if done < 0.05 else 0.5 + 0.5 * math.cos(math.pi * min((done - 0.05) / 0.95, 1))


def train(workdir: Path, minutes: float, rate: float, resume: bool) -> None:
    """Train for some CPU time; saves the moving average of weights of the epoch that is best on validation."""
    data, validation = Phrases(workdir / "train.safetensors"), Phrases(workdir / "validation.safetensors")
    model = (load_model() if resume else build_model()).train()
    align = nn.Linear(model.config.d_model, len(LETTERS) + 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(parameter_groups([model, align]), lr=rate, betas=(0.9, 0.98), fused=True)
    best, began, done, epoch = float("inf"), time.process_time(), 0.0, 0
    while done < 1:
        epoch, losses = epoch + 1, torch.zeros(2)
        batches = torch.randperm(len(data))[: len(data) // BATCH * BATCH].split(BATCH)
        for batch in batches:
            done = (time.process_time() - began) / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = rate * one_cycle(done)
            texts = [data.texts[i] for i in batch.tolist()]
            features, times = augment(data.features[batch], data.times[batch])
            times = times.masked_fill(torch.rand(BATCH, 1) > TIMESTAMPS, -1)
            parts = loss_of(model, align, teacher(features, texts, times), texts)
            optimizer.zero_grad()
            (parts[0] + ALIGN * parts[1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            losses = 0.98 * losses + 0.02 * parts.detach()
            print(f"{done:.1%}: loss {losses[0]:.3f}, alignment {losses[1]:.3f}", end="\r", flush=True)
        heard = transcribe(average.module.eval(), validation.features[:CHECKED])
        score = word_error_rate(heard, validation.texts[:CHECKED])
        print(f"epoch {epoch}, {done:.0%}: loss {losses[0]:.3f}, alignment {losses[1]:.3f}, validation {score:.2f} %")
        if score <= best:
            best = score
            save(average.module)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the phrase model.")
    parser.add_argument("workdir", type=Path, help="holds train.safetensors and validation.safetensors")
    parser.add_argument("--minutes", type=float, default=9, help="CPU time for training (9), on one thread")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (0.002)")
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint instead of a new model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    train(args.workdir, args.minutes, args.rate, args.resume)


if __name__ == "__main__":
    main()
