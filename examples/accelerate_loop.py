"""Pruning in a loop of accelerate: half of the attention in four steps, with accumulated gradients.

python examples/accelerate_loop.py        # in two processes: torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import attnprune
from attnprune.integrations.accelerate import AcceleratedPruner


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 4))
    x = torch.randn(128, 8, 32)
    y = x[..., :4].argmax(-1)  # which of four channels is the largest
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = attnprune.AttentionPruner(model, qkvo_ratios=0.5, steps=4)
    pruning = AcceleratedPruner(accelerator, pruner, model, optimizer)
    for epoch in range(6):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
                accelerator.backward(loss)
                pruning.observe()  # before clipping; looks once the accumulated gradients are complete
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if not pruning.done:
            pruning.step()
        share = pruning.report.achieved["q"]
        accelerator.print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}, {share:.0%} of Q removed")


if __name__ == "__main__":
    main()
