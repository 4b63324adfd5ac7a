"""A small Llama pruned without fine-tuning: the paper's ways and the closed forms, on text that it never read.

    python benchmarks/llama.py
    python benchmarks/llama.py --generate

The model is in ``benchmarks/byte_llama`` (grouped queries 4:1, rotary positions; ``byte_llama.py`` trained it). The
first prints bits per byte added on held-out modules of Python's standard library, medians (and the largest) over
calibration samples, with the share of attention's weights that really went; choices were made by looking at ``--split
validation``. The second generates text greedily from the pruned models, with a cache and without, which must agree,
and prints what the cache takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import byte_llama
import torch
from byte_lm import bits_per_byte, windows
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

import attnprune

RATIOS = (0.25, 0.5, 0.75)
PAPER = [f"{scheme}-{scope}-{score}" for scheme in ("EH", "PH") for scope in "LG" for score in ("MAG", "FI")]
GATES = {"scorer": "gate", "basis": "channels", "split": "auto", "heads": "ragged"}
WAYS: dict[str, dict[str, Any]] = {
    **{f"paper: {name}": {"preset": f"paper:{name}"} for name in PAPER},
    "channels by gates, uncompensated": {**GATES, "compensate": False},
    "channels by gates, compensated": {**GATES, "compensate": True},
    "the default with data": {},
    "uniform, split found": {"split": "auto"},
    "ragged, split found": {"split": "auto", "heads": "ragged"},
    "uniform, split measured": {"split": "measured"},
    "ragged, split measured": {"split": "measured", "heads": "ragged"},
}
MEASURED, CALIBRATED = 96, 64  # pieces of 256 bytes
PROMPT = b"class Reader:\n    def __init__(self, "
NEW = 120  # bytes


def batches(text: Tensor, seed: int, size: int = 16) -> list[dict[str, Any]]:
    """Calibration batches of random pieces; labels are the bytes themselves, which transformers shifts."""
    pieces = windows(text, CALIBRATED, 10_000 + seed)[:, :-1]
    return [{"input_ids": piece, "labels": piece, "use_cache": False} for piece in pieces.split(size)]


def attention_weights(model: nn.Module) -> int:
    """The number of weights of Q, K, V and O in all layers."""
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in byte_llama.PROJECTIONS)


def pruned(dense: LlamaForCausalLM, ratio: float, data: Any, options: dict[str, Any]) -> LlamaForCausalLM:
    """A pruned copy of the model."""
    model = copy.deepcopy(dense)
    given = None if "MAG" in options.get("preset", "") else data
    attnprune.prune_attention(model, ratio, data=given, progress=False, **options)
    return model


def compare(dense: LlamaForCausalLM, split: str, seeds: int, only: str) -> dict[str, Any]:
    """The table of bits per byte, and its figures."""
    text = byte_llama.text()
    measured = windows(text[split], MEASURED, 1_000)

    def quality(model: nn.Module) -> float:
        return bits_per_byte(byte_llama.Logits(model), measured)

    base, size = quality(dense), attention_weights(dense)
    samples = [batches(text["train"], seed) for seed in range(seeds)]
    print(f"{split} split: dense {base:.3f} bits per byte; {seeds} calibration samples")
    head = f"{'way':<34}" + "".join(f"{f'{ratio:.0%} removed':>26}" for ratio in RATIOS) + f"{'seconds':>9}"
    print(head, "-" * len(head), sep="\n")
    figures: dict[str, Any] = {"dense": base, "seeds": list(range(seeds)), "ways": {}}
    for name, options in WAYS.items():
        if only not in name:
            continue
        start, cells, own = time.perf_counter(), [], figures["ways"].setdefault(name, {})
        for ratio in RATIOS:
            used = samples[:1] if "MAG" in options.get("preset", "") else samples
            try:
                models = [pruned(dense, ratio, data, options) for data in used]
            except attnprune.errors.AllocationError:
                cells.append(f"{'-':>26}")
                continue
            added = [quality(model) - base for model in models]
            removed = statistics.mean(1 - attention_weights(model) / size for model in models)
            cells.append(f"{statistics.median(added):>+10.3f} ({max(added):+.3f}) {removed:>6.1%}")
            own[f"{ratio:.0%}"] = {"added": statistics.median(added), "removed": removed, "each": added}
        print(f"{name:<34}{''.join(cells)}{time.perf_counter() - start:>9.0f}", flush=True)
    return figures


def cache_size(cache: DynamicCache) -> int:
    """Bytes of keys and values."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@torch.no_grad()
def generate(dense: LlamaForCausalLM) -> dict[str, Any]:
    """Text from pruned models, and the sizes of their caches."""
    figures: dict[str, Any] = {"seeds": [0]}
    data = batches(byte_llama.text()["train"], 0)
    prompt = torch.tensor([list(PROMPT)])
    for ratio in (0.0, *RATIOS):
        model = pruned(dense, ratio, data, WAYS["ragged, split found"]) if ratio else dense
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
        mask = torch.ones_like(prompt)
        cached = model.generate(prompt, attention_mask=mask, use_cache=True, **settings)
        uncached = model.generate(prompt, attention_mask=mask, use_cache=False, **settings).sequences
        bytes_ = cache_size(cached.past_key_values)
        agree = "equals" if torch.equal(cached.sequences, uncached) else "DIFFERS FROM"
        tokens = cached.sequences.shape[1] - 1
        print(
            f"--- {ratio:.0%} removed: cached generation {agree} uncached; "
            f"{bytes_ / tokens:,.0f} bytes of cache a token"
        )
        print(bytes(cached.sequences[0].tolist()).decode(errors="replace"))
        figures[f"{ratio:.0%}"] = {"agree": "yes" if agree == "equals" else "no", "bytes": bytes_ / tokens}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=byte_llama.SHIPPED, help="folder of the model (the shipped one)")
    parser.add_argument("--generate", action="store_true", help="generate text instead of measuring")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--seeds", type=int, default=3, help="calibration samples per way (3)")
    parser.add_argument("--only", default="", help="only the ways whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = byte_llama.load(args.model)
    figures = generate(dense) if args.generate else compare(dense, args.split, args.seeds, args.only)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
