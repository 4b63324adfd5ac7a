"""Memory and time of pruning a checkpoint on the disk: a synthetic ViT of about 4 GB, in several files.

Each measurement runs in a process of its own. The target holds for all of it, libraries and the plan included. Needs
about 9 GB in the temporary directory, all of it removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune import LayerPlan, Plan, apply_to_checkpoint, find_attention
from attnprune.checkpoint import hf
from attnprune.checkpoint.folder import Folder
from attnprune.checkpoint.skeleton import places
from attnprune.checkpoint.tensors import Item, shards, write_tensors
from attnprune.values.channel_maps import ChannelMaps

TARGET = 1e9  # bytes, peak of the process
SHARD = 500_000_000
CONFIG = {
    "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 2048, "num_hidden_layers": 20,
    "num_attention_heads": 16, "intermediate_size": 8192, "image_size": 224, "patch_size": 16,
}  # fmt: skip


def peak() -> int:
    """Bytes that this process has held at most.

    On Linux from ``/proc``: there ``getrusage`` also counts what the parent held when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held() -> int:
    """Bytes that this process holds now; on Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def skeleton(folder: Path) -> torch.nn.Module:
    with torch.device("meta"):
        return hf.maker(hf.read_config(Folder.at(folder)))()


def write_checkpoint(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> int:
    """A sharded checkpoint of transformers; returns its size in bytes."""
    (folder / hf.CONFIG).write_text(json.dumps(config))
    noise = (torch.randn((1 << 22) + 1, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)

    def values(shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].reshape(shape)

    tensors = {name: tuple(place.tensor.shape) for name, place in places(skeleton(folder)).items()}
    items = [Item(name, dtype, shape, lambda shape=shape: values(shape)) for name, shape in tensors.items()]
    runs, where = shards(items, SHARD), {}
    for i, run in enumerate(runs):
        name = f"model-{i + 1:05}-of-{len(runs):05}.safetensors"
        with (folder / name).open("xb", buffering=0) as file:
            write_tensors(file, run)
        where.update({item.name: name for item in run})
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(path.stat().st_size for path in folder.iterdir())


def plan_for(folder: Path, rotated: bool) -> Plan:
    """Half of the channels of every head, other ones in each; rotated: half of the directions of a random basis."""
    generator, layers = torch.Generator().manual_seed(0), []
    for spec in find_attention(skeleton(folder)):
        dim = spec.qk_dim
        picks = [tuple(sorted(torch.randperm(dim, generator=generator)[: dim // 2].tolist())) for _ in spec.qk_dims]
        layer = LayerPlan(spec, (), tuple(picks), tuple(picks))
        if rotated:
            bases = [torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q[: dim // 2] for _ in spec.qk_dims]
            o = torch.block_diag(*(basis.T for basis in bases))  # type: ignore[no-untyped-call]
            shift = torch.randn(sum(spec.vo_dims), generator=generator)
            maps = ChannelMaps(tuple(bases), tuple(bases), tuple(bases), o, shift)
            layer = LayerPlan(spec, (), layer.qk, layer.vo, maps)
        layers.append(layer)
    return Plan(tuple(layers))


def prune(source: Path, plan: Path, target: Path) -> None:
    """What a process of its own does."""
    made = Plan.from_json(plan.read_text())
    before, start = peak(), time.perf_counter()
    apply_to_checkpoint(source, made, target)
    print(json.dumps({"before": before, "peak": peak(), "seconds": time.perf_counter() - start}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=20, help="layers of the model; 20 are 4 GB")
    options.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.child:
        prune(*args.child)
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    need = args.layers * 450_000_000
    if free < need:
        sys.exit(f"{need / 1e9:.1f} GB are needed in {tempfile.gettempdir()}, {free / 1e9:.1f} GB are free")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dense").mkdir()
        size = write_checkpoint(folder / "dense", {**CONFIG, "num_hidden_layers": args.layers})
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(list((folder / 'dense').glob('*.safetensors')))} files")
        for way in ("channels", "rotated"):
            (folder / "plan.json").write_text(plan_for(folder / "dense", way == "rotated").to_json())
            paths = [str(folder / one) for one in ("dense", "plan.json", "pruned")]
            told = subprocess.run([sys.executable, __file__, "--child", *paths], check=True, capture_output=True)
            found = json.loads(told.stdout.decode().splitlines()[-1])
            written = sum(path.stat().st_size for path in (folder / "pruned").iterdir())
            met = "met" if found["peak"] < TARGET else "missed"
            held = f"peak {found['peak'] / 1e6:,.0f} MB, of it {found['before'] / 1e6:,.0f} MB before (libraries, plan)"
            print(f"{way}: {held}; target {TARGET / 1e6:,.0f} MB {met}; {found['seconds']:.1f} s", end="; ")
            print(f"{written / 1e9:.2f} GB written")


if __name__ == "__main__":
    main()
