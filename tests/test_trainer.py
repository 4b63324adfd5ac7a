"""Pruning inside transformers' Trainer, and resuming it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from attnprune import AttentionPruner
from attnprune.errors import CheckpointError, OptionError, WrappedModelError
from attnprune.integrations.transformers import FILE, PruningCallback, resume

from .processes import forked, in_processes

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
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback]), pruner


def callback_of(trainer: Trainer) -> PruningCallback:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, PruningCallback))


@pytest.mark.parametrize("unit", [pytest.param("epochs", marks=pytest.mark.long), "steps"])
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


def test_scores_are_of_all_accumulated_batches_and_of_the_weights_before_the_step(tmp_path: Path) -> None:
    trainer, _ = build(
        tmp_path, every=100, gradient_accumulation_steps=4, max_grad_norm=0.0, lr_scheduler_type="constant",
        optim="adamw_torch",
    )  # fmt: skip
    expected = copy.deepcopy(trainer.model)
    pruners = [AttentionPruner(one, 0.5, scorer="taylor") for one in (trainer.model, expected)]
    callback_of(trainer).pruner = pruners[0]
    trainer.train()
    optimizer = torch.optim.AdamW(expected.parameters(), 1e-2, weight_decay=0.0)
    inputs = torch.stack([one["pixel_values"] for one in trainer.train_dataset])
    labels = torch.tensor([one["labels"] for one in trainer.train_dataset])
    for _ in range(3):  # an epoch is one step on all the data
        optimizer.zero_grad()
        expected(pixel_values=inputs, labels=labels).loss.backward()
        pruners[1].observe()
        optimizer.step()
    found, wanted = (pruner.state_dict() for pruner in pruners)
    assert found["observations"] == wanted["observations"] == 3
    for name, parts in wanted["seen"].items():
        for part, other in zip(parts, found["seen"][name], strict=True):
            torch.testing.assert_close(other, part, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9])
def test_scaled_gradients_are_unscaled_once(tmp_path: Path, max_grad_norm: float) -> None:
    trainer, _ = build(tmp_path)
    model, batch = trainer.model, torch.randn(2, 3, 8, 8)
    pruners = [AttentionPruner(model, 0.5) for _ in range(2)]
    callback = PruningCallback(pruners[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    args = SimpleNamespace(max_grad_norm=max_grad_norm)
    for factor in (1.0, torch.inf):  # the second overflows
        optimizer.zero_grad()
        scaler.scale(model(pixel_values=batch).logits.square().mean() * factor).backward()
        if max_grad_norm:
            scaler.unscale_(optimizer)
        callback.on_pre_optimizer_step(args, None, None, optimizer=SimpleNamespace(scaler=scaler))
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    model(pixel_values=batch).logits.square().mean().backward()
    pruners[1].observe()
    found, wanted = (pruner.state_dict() for pruner in pruners)
    assert found["observations"] == 1
    for name, parts in wanted["seen"].items():
        for part, other in zip(parts, found["seen"][name], strict=True):
            torch.testing.assert_close(other, part, rtol=1e-5, atol=0.0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name of all versions
def test_checkpointed_blocks_under_autocast_train_alike(tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        trainer, pruner = build(
            tmp_path, bf16=True, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer.train()
        assert pruner.done
        assert any(getattr(one, "gradient_checkpointing", False) for one in trainer.model.modules()) == checkpointing
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())


def test_the_best_model_is_one_of_the_final_shape(tmp_path: Path) -> None:
    trainer, pruner = build(
        tmp_path,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=True,
    )
    trainer.args.num_train_epochs = 5
    ranks = iter([9.0, 2.0, 8.0, 3.0, 4.0])  # pruned after the first and the second epoch; the best since: the third
    weights = []

    def evaluate(**_: Any) -> dict[str, float]:
        weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        return {"eval_rank": next(ranks)}

    trainer.evaluate = evaluate
    trainer.train()
    assert pruner.done
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-12"
    assert all(torch.equal(weights[2][key], value) for key, value in trainer.model.state_dict().items())


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
    callback_of(other).pruner = pruner
    with pytest.raises(OptionError, match="of another"):
        other.train()
    args: Any = SimpleNamespace(world_size=2)
    with pytest.raises(WrappedModelError, match="a ViTForImageClassification"):
        PruningCallback(pruner).attach(trainer).on_train_begin(args, None, None, model=trainer.model)
    with pytest.raises(WrappedModelError, match=r"attach\(trainer\)"):
        PruningCallback(pruner).on_train_begin(args, None, None, model=trainer.model)
    trainer.callback_handler.callbacks = []
    with pytest.raises(OptionError, match="PruningCallback"):
        resume(trainer, tmp_path)


# two processes


def _two(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in ("whole", "again"):
        trainer, pruner = build(Path(folder) / "run")
        if name == "whole":
            callback_of(trainer).attach(trainer)
            trainer.train()
        else:
            resume(trainer, Path(folder) / "run" / "checkpoint-4")
        found[name] = (pruner.plan, trainer.model.state_dict())
        trainer.accelerator.wait_for_everyone()
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter


@forked
@pytest.mark.long
def test_two_processes_train_prune_and_resume_alike(tmp_path: Path) -> None:
    in_processes(2, _two, str(tmp_path))
    found = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2)]
    plan, weights = found[0]["whole"]
    assert plan.fraction("q") == 0.5
    for one in (found[0]["again"], found[1]["whole"], found[1]["again"]):
        assert one[0] == plan
        assert one[1].keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in one[1].items())
