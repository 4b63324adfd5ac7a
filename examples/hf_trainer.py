"""Pruning in transformers' Trainer: half of a small ViT's attention in four epochs.

python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import attnprune
from attnprune.integrations.transformers import PruningCallback


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    images = torch.randn(64, 3, 16, 16)
    labels = torch.arange(64) % 4
    for image, label in zip(images, labels, strict=True):
        image[:, 4 * label : 4 * label + 4] += 1.0  # which of four stripes is the brightest
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    pruner = attnprune.AttentionPruner(model, qkvo_ratios=0.5, steps=4)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=6, per_device_train_batch_size=16, learning_rate=3e-3, logging_strategy="epoch",
            save_strategy="epoch", save_total_limit=1, report_to=[], disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, callbacks=[PruningCallback(pruner)])
        trainer.train()  # resume(trainer), of the same module, goes on from a checkpoint in a new process
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {pruner.report.achieved['q']:.0%} of Q removed")


if __name__ == "__main__":
    main()
