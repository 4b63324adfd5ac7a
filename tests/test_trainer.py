"""Pruning inside transformers' Trainer, and resuming it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from attnprune import AttentionPruner
from attnprune.errors import CheckpointError, OptionError
from attnprune.integrations.transformers import FILE, PruningCallback, resume

CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
          "image_size": 8, "patch_size": 4, "num_labels": 3}  # fmt: skip


def build(folder: Path, *, every: int = 1, unit: str = "epochs", **options: Any) -> tuple[Trainer, AttentionPruner]:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**CONFIG))
    pruner = AttentionPruner(model, 0.5, steps=2, heads="ragged")
    generator = torch.Generator().manual_seed(1)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3} for i in range(16)]
    args = TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=4, save_strategy="epoch", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", learning_rate=1e-2, dataloader_pin_memory=False,
        **options,
    )  # fmt: skip
    callback = PruningCallback(pruner, every=every, unit=unit)
    return Trainer(model, args, train_dataset=data, callbacks=[callback]), pruner


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_resuming_ends_bitwise_where_the_uninterrupted_run_does(tmp_path: Path, unit: str) -> None:
    options: dict[str, Any] = {"every": 1 if unit == "epochs" else 5, "unit": unit}
    whole, pruner = build(tmp_path, **options)
    whole.train()
    assert pruner.done
    assert pruner.report.achieved["q"] == 0.5
    moments = whole.optimizer.state_dict()["state"]
    for step in (4, 8):
        again, resumed = build(tmp_path, **options)
        resume(again, tmp_path / f"checkpoint-{step}")
        assert resumed.plan.after == pruner.plan.after
        found, expected = again.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        for key, state in again.optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, moments[key][name]) for name, value in state.items())


def test_accumulated_gradients_count_once_and_are_not_clipped_on_demand(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[float] = []
    real = AttentionPruner.observe

    def observe(self: AttentionPruner, **options: Any) -> None:
        seen.append(sum(float(p.grad.square().sum()) for p in self.model.parameters()) ** 0.5)
        real(self, **options)

    monkeypatch.setattr(AttentionPruner, "observe", observe)
    trainer, _ = build(tmp_path, gradient_accumulation_steps=2, max_grad_norm=1e-3)
    trainer.train()
    assert len(seen) == 4  # two optimizer steps an epoch, for two epochs: then the pruner is done
    assert max(seen) < 1.1e-3
    seen.clear()
    trainer, _ = build(tmp_path, max_grad_norm=0.0)
    trainer.train()
    assert len(seen) == 8
    assert min(seen) > 1e-2


def test_what_is_refused(tmp_path: Path) -> None:
    trainer, pruner = build(tmp_path)
    for options, words in (({"every": 0}, "every"), ({"unit": "batches"}, "unit")):
        with pytest.raises(OptionError, match=words):
            PruningCallback(pruner, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="AttentionPruner"):
        PruningCallback(trainer.model)
    with pytest.raises(CheckpointError, match=FILE):
        resume(trainer)
    other, _ = build(tmp_path)
    (callback,) = (one for one in other.callback_handler.callbacks if isinstance(one, PruningCallback))
    callback.pruner = pruner
    with pytest.raises(OptionError, match="of another"):
        other.train()
    best, _ = build(tmp_path)
    best.args.load_best_model_at_end = True
    with pytest.raises(OptionError, match="load_best"):
        best.train()
    trainer.callback_handler.callbacks = []
    with pytest.raises(OptionError, match="PruningCallback"):
        resume(trainer, tmp_path)
