"""Prunes an AST checkpoint from the hub (or a local folder) with the same calls as ``demo.py``.

    python examples/prune_ast.py --model MIT/ast-finetuned-speech-commands-v2 --ratio 0.5 --out pruned

Needs the network for a hub name. The plan is written beside the weights; ``attnprune.apply_plan`` puts it on a fresh
copy of the same checkpoint, and ``load_state_dict`` then takes the pruned weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_model
from transformers import ASTForAudioClassification

import attnprune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MIT/ast-finetuned-speech-commands-v2", help="hub name or folder")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the attention weights to remove")
    parser.add_argument("--granularity", choices=["head", "channel", "joint"], default="channel")
    parser.add_argument("--scope", choices=["local", "global"], default="global")
    parser.add_argument("--heads", choices=["uniform", "ragged"], default="uniform")
    parser.add_argument("--round-to", type=int, default=1, help="multiple for the channels that a head keeps")
    parser.add_argument("--out", type=Path, help="folder for model.safetensors and plan.json")
    args = parser.parse_args()

    model = ASTForAudioClassification.from_pretrained(args.model).eval()
    config = model.config
    clip = torch.zeros(1, config.max_length, config.num_mel_bins)
    report = attnprune.prune_attention(
        model,
        args.ratio,
        granularity=args.granularity,
        scope=args.scope,
        heads=args.heads,
        round_to=args.round_to,
        scorer="magnitude",
        example_inputs={"input_values": clip},
    )
    print(report)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        save_model(model, str(args.out / "model.safetensors"))
        (args.out / "plan.json").write_text(report.plan.to_json())
        print(f"wrote {args.out / 'model.safetensors'} and {args.out / 'plan.json'}")


if __name__ == "__main__":
    main()
