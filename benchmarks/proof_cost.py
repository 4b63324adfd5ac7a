"""What proving costs: a model's attention found for the first time and again, and a pruned model verified.

python benchmarks/proof_cost.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

from _paired import environment, paired, parser, report, table, verdict
from _paired import median as middle

AST = "from transformers import ASTConfig, ASTModel; model = ASTModel(ASTConfig())"
WIDE = (
    "from transformers import LlamaConfig; from transformers.models.llama.modeling_llama import LlamaAttention;"
    "config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=1, vocab_size=9);"
    "config._attn_implementation = 'sdpa'; model = LlamaAttention(config, 0)"
)
PACKED = "model = torch.nn.MultiheadAttention(4096, 32)"
CODE = {
    "AST-base, all twelve layers": (AST, "find(model)", 0.3),
    "the same class again": (f"{AST}; find(model)", "find(model)", None),
    "one Llama layer, 4,096 channels": (WIDE, "find(model)", 1.0),
    "nn.MultiheadAttention, 4,096 channels": (PACKED, "find(model)", 1.0),
}
FIND = (
    "import time, torch, attnprune; from attnprune.families.registry import Survey;"
    "find = lambda model: Survey(model); Survey(torch.nn.MultiheadAttention(8, 2))"
)


def fresh(setup: str, code: str) -> Callable[[], Mapping[str, float]]:
    """Runs code in a new process, where nothing of the class is known; gives the seconds that it took there."""
    timed = f"{FIND}; {setup}; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return lambda: {"": float(subprocess.check_output([sys.executable, "-c", timed], text=True, stderr=-3))}


def main() -> None:
    args = parser(__doc__, rounds=5).parse_args()
    times = paired({name: fresh(setup, code) for name, (setup, code, _) in CODE.items()}, args.rounds)
    rows = []
    for name, (_, _, limit) in CODE.items():
        seconds = middle(times, name)
        rows.append([name, f"{seconds:.3f} s", "" if limit is None else verdict(seconds, limit)])
    setting = f"{args.rounds} processes of each kind, in turns."
    header = ["attention found in a fresh process", "median", "target"]
    report(setting, environment("attnprune", "transformers"), [table(header, rows)], args.json, times)


if __name__ == "__main__":
    main()
