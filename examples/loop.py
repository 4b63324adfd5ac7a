"""Pruning in a plain training loop: half of the attention in four steps, optimizer state and all.

python examples/loop.py
"""

import torch
from torch import nn

import attnprune


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 4))
    x = torch.randn(64, 8, 32)
    y = x[..., :4].argmax(-1)  # which of four channels is the largest
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pruner = attnprune.AttentionPruner(model, qkvo_ratios=0.5, steps=4)
    for epoch in range(6):
        for inputs, targets in zip(x.split(16), y.split(16), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            if not pruner.done:
                pruner.observe()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if not pruner.done:
            pruner.step(optimizer)
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}, {pruner.report.achieved['q']:.0%} of Q removed")


if __name__ == "__main__":
    main()
