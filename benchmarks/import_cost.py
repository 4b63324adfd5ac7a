"""What ``import attnprune`` costs beside ``import torch``, and what a first pruned layer costs; processes of their own.

python benchmarks/import_cost.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

from _paired import environment, median, paired, parser, ratio, report, table, verdict

TORCH = "import torch"
CODE = {
    TORCH: "import torch",
    "import torch, attnprune": "import torch, attnprune",
    "and prune a layer": "import torch, attnprune; attnprune.prune_attention(torch.nn.MultiheadAttention(8, 2), 0.5)",
}
LIMIT = {"import torch, attnprune": 1.15}


def fresh(code: str) -> Callable[[], Mapping[str, float]]:
    """Runs code in a new process, which gives the seconds that it took there."""
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return lambda: {"": float(subprocess.check_output([sys.executable, "-c", timed], text=True))}


def main() -> None:
    args = parser(__doc__, rounds=10).parse_args()
    times = paired({name: fresh(code) for name, code in CODE.items()}, args.rounds)
    rows = []
    for name in CODE:
        share = ratio(times, name, TORCH)
        target = verdict(share, LIMIT[name]) if name in LIMIT else ""
        rows.append([name, f"{median(times, name):.2f} s", f"{share:.3f}", target])
    header = ["in a fresh process", "median", "over import torch, within rounds", "target"]
    setting = f"{args.rounds} processes of each kind, in turns."
    report(setting, environment("attnprune"), [table(header, rows)], args.json, times)


if __name__ == "__main__":
    main()
