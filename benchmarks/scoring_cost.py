"""What data-driven scores cost over a plain forward and backward pass through the same batches.

The plain pass computes the gradients of all parameters, as training does. Memory is the largest resident size of a
fresh process that does one thing only, over two batches (so that what outlives its batch counts), less that of a
process that builds the model and the batches and stops there.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _paired import environment, median, paired, parser, ratio, report, table, verdict
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import attnprune
from attnprune.planning.scorers import Fisher, Taylor

Batch = tuple[Tensor, Tensor]
NOTHING, PLAIN = "nothing", "forward + backward"
SCORERS: dict[str, tuple[attnprune.Scorer, float]] = {
    "taylor": (Taylor(), 1.15),
    "fisher per batch": (Fisher(), 1.15),
    "fisher per sample": (Fisher(per_sample=True), 1.4),
}


class Encoder(nn.Module):
    """Six layers of :class:`torch.nn.TransformerEncoder`, whose attention is packed, and a classifier."""

    def __init__(self, width: int = 512, classes: int = 35) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x).mean(1))


def ast(count: int) -> tuple[nn.Module, list[Batch]]:
    model = ASTForAudioClassification(ASTConfig(max_length=128, num_labels=35))
    tokens = model.audio_spectrogram_transformer.embeddings.position_embeddings.shape[1]
    assert tokens == 146, tokens
    return model, [(torch.randn(8, 128, 128), torch.randint(35, (8,))) for _ in range(count)]


def encoder(count: int) -> tuple[nn.Module, list[Batch]]:
    return Encoder(), [(torch.randn(16, 128, 512), torch.randint(35, (16,))) for _ in range(count)]


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, list[Batch]]], str]] = {
    "ast": (ast, "AST-base, batch 8, 146 tokens"),
    "encoder": (encoder, "nn.TransformerEncoder, d 512, 8 heads, 6 layers, batch 16, 128 tokens"),
}


def jobs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Callable[[], None]]:
    """The plain pass and the scorers, over the same batches."""
    views = attnprune.adapters.find_views(model)

    def step(inputs: Tensor, targets: Tensor) -> None:
        output = model(inputs)
        F.cross_entropy(getattr(output, "logits", output), targets).backward()
        model.zero_grad()

    def plain() -> None:
        for batch in batches:
            step(*batch)  # a function, so that no graph outlives its batch

    def job(scorer: attnprune.Scorer) -> Callable[[], None]:
        def run() -> None:
            scorer.score(model, views, data=batches, progress=False)

        return run

    return {PLAIN: plain, **{name: job(scorer) for name, (scorer, _) in SCORERS.items()}}


def peak() -> float:
    """The largest resident size that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's number also knows of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_of(model: str, job: str, batches: int, threads: int) -> float:
    """The peak of a fresh process that runs one job."""
    options = ["--models", model, "--memory-of", job, "--batches", str(batches), "--threads", str(threads)]
    found = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    return float(found.stdout)


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS], help="default: all")
    options.add_argument("--batches", type=int, default=1, help="batches in one timed call (default: %(default)s)")
    options.add_argument("--no-memory", action="store_true", help="time only")
    options.add_argument("--memory-of", metavar="JOB", help="run one job once and print the peak in MiB, nothing else")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    env = environment("attnprune", "transformers")
    tables, result = [], {}
    for name in args.models:
        torch.manual_seed(0)
        make, what = MODELS[name]
        model, batches = make(args.batches)
        model.eval()  # as scorers have it; dropout would count for the plain pass alone
        work = jobs(model, batches)
        if args.memory_of is not None:
            work.get(args.memory_of, lambda: None)()
            print(peak())
            return
        times = paired(work, args.rounds)
        memory: dict[str, float] = {}
        if not args.no_memory:
            memory = {job: peak_of(name, job, 2, args.threads) for job in (NOTHING, *work)}
        rows = []
        for job in work:
            over = ratio(times, job, PLAIN)
            target = verdict(over, SCORERS[job][1]) if job in SCORERS else ""
            room = [f"{memory[job] - memory[base]:+,.0f}" for base in (NOTHING, PLAIN)] if memory else ["", ""]
            rows.append([job, f"{median(times, job) / args.batches:.3f}", f"{over:.3f}", target, *room])
        header = ["pass", "median s per batch", "times plain", "target", "peak MiB over idle", "over plain"]
        tables += [f"{what}:", table(header, rows)]
        result[name] = {"seconds": times, "peak_mib": memory}
    setting = f"batches in a call: {args.batches}; float32; {args.rounds} rounds, interleaved; ratios within a round"
    report(setting, env, tables, args.json, result)


if __name__ == "__main__":
    main()
