"""What ``import attnprune`` costs beside ``import torch``, what a first pruned layer costs, and how soon the command
``attnprune`` answers where it needs no model; processes of their own.

python benchmarks/import_cost.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from _paired import environment, median, paired, parser, ratio, report, table, verdict

TORCH = "import torch"
CODE = {
    TORCH: "import torch",
    "import torch, attnprune": "import torch, attnprune",
    "and prune a layer": "import torch, attnprune; attnprune.prune_attention(torch.nn.MultiheadAttention(8, 2), 0.5)",
}
LIMIT = {"import torch, attnprune": 1.15}
COMMANDS = {
    "attnprune --version": ["--version"],
    "wrong usage": ["prune", "model/", "--qkvo", "0.5", "0.5"],
    "a directory that is not there": ["inspect", "no-such-directory"],
}
SOON = 0.3
"""Seconds within which a command answers, the start of Python with it."""


def fresh(code: str) -> Callable[[], Mapping[str, float]]:
    """Runs code in a new process, which gives the seconds that it took there."""
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return lambda: {"": float(subprocess.check_output([sys.executable, "-c", timed], text=True))}


def command(words: list[str]) -> Callable[[], Mapping[str, float]]:
    """Runs ``python -m attnprune``, and gives the seconds from its start to its end."""

    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "attnprune", *words], check=False, capture_output=True)
        return {"": time.perf_counter() - start}

    return run


def main() -> None:
    args = parser(__doc__, rounds=10).parse_args()
    runs = {name: fresh(code) for name, code in CODE.items()}
    times = paired(runs | {name: command(words) for name, words in COMMANDS.items()}, args.rounds)
    rows = []
    for name in CODE:
        share = ratio(times, name, TORCH)
        target = verdict(share, LIMIT[name]) if name in LIMIT else ""
        rows.append([name, f"{median(times, name):.2f} s", f"{share:.3f}", target])
    header = ["in a fresh process", "median", "over import torch, within rounds", "target"]
    setting = f"{args.rounds} processes of each kind, in turns."
    answers = []
    for name in COMMANDS:
        seconds = median(times, name)
        answers.append([name, f"{seconds:.2f} s", verdict(seconds, SOON)])
    header_of_answers = ["the command, from start to end", "median", "target"]
    tables = [table(header, rows), table(header_of_answers, answers)]
    report(setting, environment("attnprune"), tables, args.json, times)


if __name__ == "__main__":
    main()
