"""A byte-level causal language model, trained on the text that comes with Python and its packages.

    python benchmarks/byte_lm.py WORKDIR

trains for about 20 minutes on 2 cores and writes ``WORKDIR/byte_lm.safetensors``; ``benchmarks/accuracy.py`` prunes
it. Files are split by a hash of their path: 1 in 20 is for validation, 1 in 20 for the test, the rest for training.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CONTEXT = 256  # bytes
WIDTH, HEADS, LAYERS, HIDDEN = 256, 4, 6, 1024
PACKAGES = ("torch", "numpy", "sympy", "transformers")
BATCH = 32
RATE = 1.5e-3
LONGEST = 200_000  # bytes per file, so that no single file dominates


class ByteLM(nn.Module):
    """``nn.TransformerEncoder`` with a causal mask over bytes: (batch, time) -> logits (batch, time, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)
        for name, parameter in self.encoder.named_parameters():
            if parameter.dim() == 2:  # every layer is a copy of the first until here
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if "out_proj" in name else 0.04)
        nn.init.normal_(self.bytes.weight, std=0.04)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.bytes(x) + self.positions[: x.shape[1]]
        return self.head(self.encoder(hidden, mask=mask, is_causal=True))


def folders() -> dict[str, Path]:
    """Where the text is, by the name that the paths of its files begin with: Python's library and some packages."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    return {library.name: library} | {package: Path(paths["purelib"]) / package for package in PACKAGES}


def corpus(folders: dict[str, Path], left_out: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The bytes of every split, uint8, files in the order of their paths, without folders named in ``left_out``."""
    found: dict[str, Path] = {}
    for name, folder in folders.items():
        for path in folder.rglob("*"):
            parts = (name, *path.relative_to(folder).parts)
            inside = not {"site-packages", "__pycache__", *left_out}.isdisjoint(parts)
            if path.suffix in (".py", ".pyi", ".txt", ".rst", ".md") and not inside and path.is_file():
                found["/".join(parts)] = path
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for name in sorted(found):
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20
        split = {0: "validation", 1: "test"}.get(place, "train")
        splits[split].append(found[name].read_bytes()[:LONGEST])
    return {key: torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8) for key, files in splits.items()}


def windows(data: Tensor, count: int, seed: int) -> Tensor:
    """Random pieces of CONTEXT + 1 bytes, int64 (count, CONTEXT + 1)."""
    start = torch.randint(len(data) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return data[start + torch.arange(CONTEXT + 1)].long()


@torch.no_grad()
def bits_per_byte(model: nn.Module, pieces: Tensor, batch: int = 64) -> float:
    """Mean bits that the model needs for a byte, over all predicted positions of the pieces."""
    model.eval()
    total = 0.0
    for piece in pieces.split(batch):
        logits = model(piece[:, :-1])
        total += cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum").item()
    return total / math.log(2) / (len(pieces) * (pieces.shape[1] - 1))


def load(workdir: Path) -> ByteLM:
    """The trained model, in evaluation mode."""
    model = ByteLM()
    model.load_state_dict(load_file(workdir / "byte_lm.safetensors"))
    return model.eval()


def quicker_in_bfloat16() -> bool:
    """Whether bfloat16 is multiplied faster than float32; where it is emulated, training takes 25 times as long."""

    def seconds(dtype: torch.dtype) -> float:
        x, start = torch.ones(512, 512, dtype=dtype), time.perf_counter()
        x @ x
        return time.perf_counter() - start

    half, single = (min(seconds(dtype) for _ in range(3)) for dtype in (torch.bfloat16, torch.float32))
    return half < single


def train(workdir: Path, minutes: float, seed: int) -> None:
    """AdamW, in bfloat16 autocast where that is quicker; the learning rate follows the time that is used up."""
    torch.manual_seed(seed)
    data = corpus(folders())
    print({key: f"{len(part):,} bytes" for key, part in data.items()}, flush=True)
    model = ByteLM().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    half = quicker_in_bfloat16()
    began, step, recent = time.monotonic(), 0, 0.0
    while (used := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 100, 1.0) * max(0.02, math.cos(math.pi / 2 * used) ** 2)
        piece = windows(data["train"], BATCH, seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(piece[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, recent = step + 1, recent + loss.item() / math.log(2)
        if step % 100 == 0:
            print(f"step {step}, {used:.0%} of the time: {recent / 100:.3f} bits per byte", flush=True)
            recent = 0.0
    workdir.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), workdir / "byte_lm.safetensors")
    score = bits_per_byte(model, windows(data["validation"], 512, 1))
    print(f"{step} steps; validation {score:.3f} bits per byte")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the byte-level language model.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.workdir, args.minutes, args.seed)


if __name__ == "__main__":
    main()
