"""What ``import attnprune`` costs over its run-time dependencies: the best and the median of several processes.

python benchmarks/import_cost.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CODE = """
import time, torch, torch_pruning, einops, numpy, safetensors.torch, tqdm, torch.utils.flop_counter
start = time.perf_counter()
import attnprune
print(1e3 * (time.perf_counter() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    runs = [float(subprocess.check_output([sys.executable, "-c", CODE], text=True)) for _ in range(rounds)]
    print(f"import attnprune: best {min(runs):.1f} ms, median {statistics.median(runs):.1f} ms of {rounds} processes")


if __name__ == "__main__":
    main()
