"""Time and memory of pruning a Llama of 1.1 billion parameters (TinyLlama's shape, random, bfloat16) by magnitude.

Half of every projection goes. Each measurement runs in a process of its own, libraries included: *in memory* loads the
model, plans and applies; *from shards* reads the attention's weights alone to plan, and applies the plan to the files
(``apply_to_checkpoint``). Needs about 5 GB in the temporary directory, all of it removed afterwards, and Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import streaming
import torch
from safetensors import safe_open

import attnprune

SECONDS, MEMORY, STREAMED = 60.0, 1.15, 1.5e9
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def in_memory(folder: Path) -> dict[str, float]:
    """Plans and prunes the model."""
    model = attnprune.from_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before, start = streaming.held(), time.perf_counter()
    plan = attnprune.make_plan(model, 0.5, scorer="magnitude")
    planned = time.perf_counter()
    attnprune.apply_plan(model, plan)
    seconds = {"plan": planned - start, "apply": time.perf_counter() - planned}
    left = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"model": size, "left": left, "before": before, "peak": streaming.peak(), **seconds}


def from_shards(folder: Path, target: Path) -> dict[str, float]:
    """Plans and prunes the files."""
    before, start = streaming.held(), time.perf_counter()
    model = streaming.skeleton(folder)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            own = {name: file.get_tensor(name) for name in file.keys() if ".self_attn." in name}  # noqa: SIM118
            model.load_state_dict(own, strict=False, assign=True)
    plan = attnprune.make_plan(model, 0.5, scorer="magnitude")
    del model, own
    planned = time.perf_counter()
    attnprune.apply_to_checkpoint(folder, plan, target)
    seconds = {"plan": planned - start, "apply": time.perf_counter() - planned}
    left = sum(path.stat().st_size for path in target.iterdir())
    return {"left": left, "before": before, "peak": streaming.peak(), **seconds}


def measured(way: str, *paths: Path) -> dict[str, float]:
    """What a process of its own found."""
    command = [sys.executable, __file__, "--child", way, *map(str, paths)]
    told = subprocess.run(command, check=True, capture_output=True)
    found: dict[str, float] = json.loads(told.stdout.decode().splitlines()[-1])
    return found


def verdict(value: float, target: float) -> str:
    return "met" if value <= target else "missed"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=22, help="layers of the model; 22 are 2.2 GB")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        way, *paths = args.child
        found = (in_memory if way == "memory" else from_shards)(*map(Path, paths))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        dense, pruned = Path(name) / "dense", Path(name) / "pruned"
        dense.mkdir()
        size = streaming.write_checkpoint(dense, {**CONFIG, "num_hidden_layers": args.layers}, torch.bfloat16)
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(list(dense.glob('*.safetensors')))} files")
        found = measured("memory", dense)
        seconds, above = found["plan"] + found["apply"], 1 + (found["peak"] - found["before"]) / found["model"]
        met = verdict(seconds, SECONDS), verdict(above, MEMORY)
        print(
            f"in memory: plan {found['plan']:.1f} s, apply {found['apply']:.1f} s (target {SECONDS:.0f} s {met[0]}); "
            f"the model {found['model'] / 1e6:,.0f} MB, {found['left'] / 1e6:,.0f} MB left; at the peak "
            f"{above:.3f} times the model (target {MEMORY} {met[1]}), the process {found['before'] / 1e6:,.0f} MB "
            f"before, {found['peak'] / 1e6:,.0f} MB at the peak"
        )
        found = measured("shards", dense, pruned)
        print(
            f"from shards: plan {found['plan']:.1f} s, apply {found['apply']:.1f} s; "
            f"peak {found['peak'] / 1e6:,.0f} MB (target {STREAMED / 1e6:,.0f} MB {verdict(found['peak'], STREAMED)}), "
            f"of it {found['before'] / 1e6:,.0f} MB libraries; {found['left'] / 1e6:,.0f} MB written"
        )


if __name__ == "__main__":
    main()
