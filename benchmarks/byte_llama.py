"""A small Llama over bytes, trained on the source of Python's standard library.

    python benchmarks/byte_llama.py WORKDIR

trains for 15 minutes of one thread's time and writes ``WORKDIR/config.json`` and ``WORKDIR/model.safetensors`` (half
precision), as ``LlamaForCausalLM.from_pretrained`` reads them; the copy in ``benchmarks/byte_llama`` was made so, and
``benchmarks/llama.py`` prunes it. Every module of the library is, by a hash of its path, for training (18 of 20), for
validation or for the test, as in ``byte_lm.py``. Training that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from byte_lm import bits_per_byte, corpus, windows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

SHIPPED = Path(__file__).resolve().parent / "byte_llama"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LEFT_OUT = ("test", "tests", "idle_test", "encodings")  # folders: tests, and tables of characters
BATCH = 4  # pieces of byte_lm.CONTEXT bytes
RATE = 2.5e-3
SAVE_EVERY = 60.0  # seconds


def config() -> LlamaConfig:
    """Grouped queries 4:1, rotary positions, RMSNorm and SwiGLU; 1.24 million parameters."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=304,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def text() -> dict[str, Tensor]:
    """The bytes of every split, uint8: the standard library alone; a module has the same split in every Python."""
    return corpus({"python": Path(sysconfig.get_paths()["stdlib"])}, LEFT_OUT)


def load(folder: Path = SHIPPED) -> LlamaForCausalLM:
    """The trained model in float32, in evaluation mode."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Logits(nn.Module):
    """A causal model of transformers as ``byte_lm.bits_per_byte`` calls it: bytes in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x, use_cache=False).logits


def rate(used: float, step: int) -> float:
    """The learning rate: warmed up, held, and from 60 % of the time on let down to almost nothing."""
    return RATE * min((step + 1) / 100, 1.0) * max(0.02, min(1.0, (1 - used) / 0.4))


def train(workdir: Path, minutes: float, seed: int) -> None:
    """AdamW in float32 on one thread; the thread's own time says when to end, so a busy machine makes it later only."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    data = text()
    print({key: f"{len(part):,} bytes" for key, part in data.items()}, flush=True)
    model = LlamaForCausalLM(config()).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    state, step, before = workdir / "state.pt", 0, 0.0
    if state.exists():
        stored = torch.load(state)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        step, before = stored["step"], stored["seconds"]
    began, recent, saved = time.thread_time() - before, [], before
    while (seconds := time.thread_time() - began) < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = rate(seconds / (60 * minutes), step)
        piece = windows(data["train"], BATCH, seed * 1_000_003 + step)
        logits = model(input_ids=piece[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(loss.item() / math.log(2))
        if step % 100 == 0:
            print(f"step {step}, {seconds / 60:.1f} minutes: {sum(recent) / len(recent):.3f} bits per byte", flush=True)
            recent.clear()
        if seconds - saved > SAVE_EVERY:
            stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save({**stored, "seconds": seconds}, state)
            saved = seconds
    model.eval()
    score = bits_per_byte(Logits(model), windows(data["validation"], 512, 1))
    model.half().save_pretrained(workdir)
    print(f"{step} steps; validation {score:.3f} bits per byte")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the byte-level Llama.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--minutes", type=float, default=15, help="of the thread's time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.workdir, args.minutes, args.seed)


if __name__ == "__main__":
    main()
