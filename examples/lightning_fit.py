"""Pruning in Lightning's Trainer: half of the attention in four epochs, with checkpoints that resume.

python examples/lightning_fit.py
"""

import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import attnprune
from attnprune.integrations.lightning import PruningCallback, restore_shapes


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.encoder(batch[0])).flatten(0, 1), batch[1].flatten())

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], *_: object) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        restore_shapes(self, checkpoint)  # so that load_from_checkpoint gives the pruned model back


class Batches(list):
    """Any iterable will do as a data loader, but for a plain list, which means several."""


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, 32)
    module, y = Net(), x[..., :4].argmax(-1)  # which of four channels is the largest
    pruner = attnprune.AttentionPruner(module.encoder, qkvo_ratios=0.5, steps=4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=6, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[PruningCallback(pruner), ModelCheckpoint(folder, "last")],
        )  # fmt: skip
        trainer.fit(module, Batches(zip(x.split(16), y.split(16), strict=True)))
        loaded = Net.load_from_checkpoint(f"{folder}/last.ckpt")
    print(f"loaded from the checkpoint: {attnprune.find_attention(loaded)[0].describe()}")
    losses = module.losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {pruner.report.achieved['q']:.0%} of Q removed")


if __name__ == "__main__":
    main()
