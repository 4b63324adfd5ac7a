"""Where a latency table is kept between runs, and what it depends on."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ... import families, nn
from ...calibration.batches import device_of
from ...nn.nested import tensors_in


def fingerprint(model: Module, example_inputs: Any, more: Mapping[str, str]) -> dict[str, str]:
    """What latency depends on: machine, threads, versions, the model's structure, its inputs."""
    device = device_of(model)
    inputs = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    structure = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    weights = [(name, str(p.dtype), tuple(p.shape)) for name, p in model.named_parameters()]
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "attnprune": _own_version(),
        "kernels": f"{kernel}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_float32_matmul_precision()}",
        "inputs": repr([(str(x.dtype), tuple(x.shape)) for x in tensors_in(inputs)]),
        "model": hashlib.sha256(repr((structure, weights)).encode()).hexdigest(),
    }
    return found | {key: hashlib.sha256(value.encode()).hexdigest()[:16] for key, value in more.items()}


def _own_version() -> str:
    """The version, and a digest of the code that runs pruned attention."""
    digest = hashlib.sha256()
    for room in (nn, families):
        for path in sorted(Path(room.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    try:
        return f"{version('attnprune')} {digest.hexdigest()[:12]}"
    except PackageNotFoundError:  # run from a checkout
        return digest.hexdigest()[:12]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_file(machine: Mapping[str, str], cache: bool | str | os.PathLike[str]) -> Path:
    """Where the table of a machine lies."""
    digest = hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()
    return (_user_cache() if cache is True else Path(str(cache))) / f"latency-{digest[:24]}.json"


def _user_cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attnprune"


def read_cache(machine: Mapping[str, str], cache: bool | str | os.PathLike[str]) -> str | None:
    """The text of a cache file; None if there is none that can be read."""
    try:
        return cache_file(machine, cache).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def write_cache(machine: Mapping[str, str], cache: bool | str | os.PathLike[str], text: str) -> None:
    """Replaces a cache file in one step; a directory that cannot be written to is no error."""
    path = cache_file(machine, cache)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
