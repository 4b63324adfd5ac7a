"""What pruning half of AST-base's attention costs: attnprune against Torch-Pruning's coupled pruning.

Torch-Pruning traces a dependency graph first, then scores and removes; it couples Q, K, V and O by the reshape to
heads, so that all four lose the same channels. attnprune needs no graph, and qk and vo channels go independently.
"""

from __future__ import annotations

import copy
import time
import warnings

import torch
import torch_pruning
from _paired import environment, median, paired, parser, ratio, report, table, verdict
from torch import Tensor, nn
from transformers import ASTConfig, ASTModel

import attnprune
from attnprune import LayerPlan, Plan

OURS, PEER = "attnprune", "Torch-Pruning"
TARGET = 0.3  # seconds, plan and apply together


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ours(model: nn.Module, scope: str) -> tuple[dict[str, float], Plan]:
    start = time.perf_counter()
    plan = attnprune.make_plan(model, 0.5, scorer="magnitude", scope=scope)  # type: ignore[arg-type]
    planned = time.perf_counter()
    attnprune.apply_plan(model, plan)
    return {"plan": planned - start, "apply": time.perf_counter() - planned}, plan


def peer(model: nn.Module, scope: str, example: Tensor) -> tuple[dict[str, float], torch_pruning.pruner.BasePruner]:
    """Everything but Q, K and V is ignored as a place to start from, so the embedding keeps its width."""
    attentions = [module for module in model.modules() if type(module).__name__ in ("ASTAttention", "ViTAttention")]
    heads = {p: a.num_attention_heads for a in attentions for p in (a.q_proj, a.k_proj, a.v_proj)}
    ignored: list[nn.Module | nn.Parameter] = [m for m in model.modules() if not [*m.children()] and m not in heads]
    ignored += [p for module in model.modules() if [*module.children()] for p in module.parameters(recurse=False)]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on embeddings that no Linear holds; they are ignored anyway
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            global_pruning=scope == "global",
            pruning_ratio=0.5,
            num_heads=heads,
            prune_head_dims=True,
            ignored_layers=ignored,
        )
    traced = time.perf_counter()
    pruner.step()
    stepped = time.perf_counter()
    for attention in attentions:  # Torch-Pruning leaves this to the user
        attention.head_dim = attention.q_proj.out_features // attention.num_attention_heads
    return {"graph": traced - start, "step": stepped - traced}, pruner


def removed_by_peer(dense: nn.Module, pruner: torch_pruning.pruner.BasePruner) -> Plan:
    """What Torch-Pruning removed, as a plan, to compare its result with the masked model too."""
    layers = []
    for spec in attnprune.find_attention(dense):
        rows = [
            row for name, _, gone in pruner.DG.pruning_history() if name.startswith(f"{spec.name}.") for row in gone
        ]
        heads = range(spec.heads)
        gone = tuple(tuple(sorted(row % spec.qk_dim for row in rows if row // spec.qk_dim == h)) for h in heads)
        layers.append(LayerPlan(spec, (), gone, gone))
    return Plan(tuple(layers))


@torch.no_grad()
def deviation(pruned: nn.Module, dense: nn.Module, plan: Plan, x: Tensor) -> float:
    """The largest difference of the pruned model's output from that of the masked dense model."""
    with attnprune.masked(dense, plan):
        expected = dense(x).last_hidden_state
    return float((pruned(x).last_hidden_state - expected).abs().max())


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--scope", choices=("global", "local"), default="global", help="whether layers compete")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ASTConfig()
    dense = ASTModel(config).eval()
    example = torch.randn(1, config.max_length, config.num_mel_bins)
    env = environment("attnprune", "torch-pruning", "transformers")

    times = paired(
        {
            OURS: lambda: ours(copy.deepcopy(dense), args.scope)[0],
            PEER: lambda: peer(copy.deepcopy(dense), args.scope, example)[0],
        },
        args.rounds,
    )
    mine, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    plan = ours(mine, args.scope)[1]
    their_plan = removed_by_peer(dense, peer(theirs, args.scope, example)[1])
    size = parameters(dense)
    removed = {OURS: size - parameters(mine), PEER: size - parameters(theirs)}
    off = {OURS: deviation(mine, dense, plan, example), PEER: deviation(theirs, dense, their_plan, example)}

    rows = [
        [name, f"{median(times, name):.3f}", f"{min(times[name]):.3f}", f"{ratio(times, name, OURS):.2f}"]
        for name in (f"{OURS}: plan", f"{OURS}: apply", OURS, f"{PEER}: graph", f"{PEER}: step", PEER)
    ]
    header = ["step", "median s", "fastest s", f"times {OURS}"]
    results = [[name, f"{removed[name]:,}", f"{removed[name] / size:.2%}", f"{off[name]:.1e}"] for name in (OURS, PEER)]
    tables = [
        table(header, rows),
        f"Target for {OURS}, plan and apply together, in seconds: {verdict(median(times, OURS), TARGET)}.",
        table(["result", "parameters removed", "of the model", "largest deviation from masked"], results),
    ]
    setting = (
        f"AST-base, {size:,} parameters, half of the attention's channels, magnitude, {args.scope}; "
        f"{args.rounds} rounds, interleaved; the copy of the model is not counted"
    )
    report(setting, env, tables, args.json, {"seconds": times, "parameters_removed": removed, "deviation": off})


if __name__ == "__main__":
    main()
