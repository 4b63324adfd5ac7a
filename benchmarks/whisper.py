"""What pruning costs a small Whisper in word error rate, without any fine-tuning: the paper's ways and ours.

    python benchmarks/whisper.py
    python examples/speech/synthesise.py DIR --only test --count 2000 --seed 1    # other test phrases; needs espeak-ng
    python benchmarks/whisper.py --features DIR/test.safetensors

The model is the one that is shipped in ``examples/speech``: it spells phrases of two to four words. Self-attention of
the encoder and the decoder and cross-attention are pruned together. Calibration phrases come from the training voices,
another draw for every seed; the test phrases, which only measure, are spoken by voices and put together in ways that
training never heard. Greedy figures are medians over the seeds, those of beams are the first seed's; magnitude needs no
data and has no seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import attnprune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "speech"))
import phrases
from phrases import Phrases

PAPER = [f"{scheme}-{scope}-{score}" for scheme in ("EH", "PH") for scope in "LG" for score in ("MAG", "FI")]
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"paper: {name}", {"preset": f"paper:{name}"}) for name in PAPER),
    ("channels by gates, refitted, ragged", {"basis": "channels", "split": "auto", "heads": "ragged"}),
    ("rotated: the default with data", {}),
    ("rotated, split found", {"split": "auto"}),
    ("rotated, split found, ragged", {"split": "auto", "heads": "ragged"}),
)
RATIOS = (0.25, 0.4, 0.5)
CALIBRATION = 192  # of the 256 shipped training phrases


def sample(train: Phrases, seed: int) -> list[dict[str, torch.Tensor]]:
    """Calibration batches: phrases drawn by a seed, those of like length together, so that little is padding."""
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:CALIBRATION].tolist()
    chosen.sort(key=lambda i: len(train.texts[i]))
    groups = [chosen[i : i + 16] for i in range(0, len(chosen), 16)]
    return [phrases.teacher(train.features[group], [train.texts[i] for i in group]) for group in groups]


def errors(model: Any, test: Phrases, beams: int) -> float:
    """Word error rate in percent, by greedy search (one beam) or by several."""
    return phrases.word_error_rate(phrases.transcribe(model, test.features, beams), test.texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="phrases to measure on (the shipped test split)")
    parser.add_argument("--seeds", type=int, default=3, help="calibration samples per way (3)")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--only", default="", help="only the ways whose name contains this")
    args = parser.parse_args()
    train, dense = phrases.load_phrases("train"), phrases.load_model()
    test = Phrases(args.features) if args.features else phrases.load_phrases("test")
    samples = [sample(train, seed) for seed in range(args.seeds)]
    before = errors(dense, test, 1), errors(dense, test, args.beams)
    words = sum(len(text.split()) for text in test.texts)
    print(f"word error rate on {len(test)} phrases ({words} words) of unheard voices, greedy | {args.beams} beams")
    print(f"dense {before[0]:.2f} | {before[1]:.2f} %; {args.seeds} calibration samples, no fine-tuning\n")
    header = f"{'way: change in points (share removed)':<40}" + "".join(f"{f'{ratio:.0%}':>27}" for ratio in RATIOS)
    print(header, "-" * len(header), sep="\n")
    for name, options in WAYS:
        if args.only not in name:
            continue
        line = f"{name:<40}"
        for ratio in RATIOS:
            found, wide, removed = [], 0.0, 0.0
            for seed, data in enumerate(samples[:1] if name.endswith("MAG") else samples):
                model, given = copy.deepcopy(dense), None if name.endswith("MAG") else data
                report = attnprune.prune_attention(model, ratio, data=given, progress=False, **options)
                found.append(errors(model, test, 1))
                if seed == 0:
                    wide = errors(model, test, args.beams)
                    removed = 1 - report.attention_parameters[1] / report.attention_parameters[0]
            greedy = statistics.median(found)
            cell = f"{greedy - before[0]:+.2f} | {wide - before[1]:+.2f} ({removed:.1%})"
            line += f"{cell:>27}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
