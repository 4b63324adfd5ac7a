"""Half of the attention by attnprune, a third of the MLP and a quarter of the width by Torch-Pruning.

python examples/with_torch_pruning.py
"""

import tempfile

import torch
import torch_pruning as tp
from transformers import ViTConfig, ViTForImageClassification

import attnprune
from attnprune.cost.counting import count_macs, count_parameters
from attnprune.integrations.torch_pruning import pruner_options


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config).eval()  # or .from_pretrained(...)
    images = torch.randn(8, 3, 32, 32)

    def say(what: str) -> None:
        parameters, macs = count_parameters(model), count_macs(model, images[:1])
        print(f"{what:<34} {parameters:>9,} parameters {macs:>10,} multiply-adds")

    def prune_by_theirs(ratio: float, width: bool) -> None:
        options = pruner_options(model, width=width, ignored_layers=[model.classifier])
        importance = tp.importance.GroupMagnitudeImportance()
        tp.pruner.BasePruner(model, images[:1], importance, pruning_ratio=ratio, **options).step()

    say("dense")
    data = [{"pixel_values": batch} for batch in images.split(4)]
    attnprune.prune_attention(model, 0.5, heads="ragged", data=data, progress=False)
    say("half of the attention")
    prune_by_theirs(1 / 3, width=False)
    say("a third of the MLP as well")
    prune_by_theirs(1 / 4, width=True)  # takes a quarter of the MLP's hidden units too
    say("a quarter of width and MLP as well")
    folder = attnprune.save_pruned(model, tempfile.mkdtemp())
    again = attnprune.from_pretrained(folder)
    print("loaded again, the same:", torch.equal(again(images).logits, model(images).logits))


if __name__ == "__main__":
    main()
