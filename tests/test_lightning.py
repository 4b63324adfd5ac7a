"""Pruning inside Lightning's Trainer, and resuming it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attnprune import AttentionPruner, find_attention
from attnprune.errors import CheckpointError, OptionError, WrappedModelError
from attnprune.integrations.lightning import PruningCallback, _check_strategy, restore_shapes

from .processes import forked, in_processes

EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", None)  # since Lightning 2.6
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own, with new versions of torch
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
]


class Batches(list):  # type: ignore[type-arg]
    """A plain list would be several data loaders to Lightning."""


class Net(lightning.LightningModule):
    """A tiny encoder with a head; the pruned module is ``net.0``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True)
        self.net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 3))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


class Restoring(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_shapes(self, checkpoint)
        self.restored = checkpoint["epoch"]


def batches(number: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator}
    return Batches([torch.randn(4, 5, 16, **draw), torch.randint(3, (4, 5), **draw)] for _ in range(number))


def build(
    folder: Path, net: type[Net] = Net, *, every: int = 1, unit: str = "epochs", callbacks: Any = (), **options: Any
) -> tuple[lightning.Trainer, Net, AttentionPruner]:
    torch.manual_seed(0)
    module = net()
    pruner = AttentionPruner(module.net[0], 0.5, steps=2, heads="ragged")
    options = {"max_epochs": 3, "logger": False, "devices": 1, **options}
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, PruningCallback(pruner, every=every, unit=unit)],
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks), **options,
    )  # fmt: skip
    return trainer, module, pruner


def same(found: Any, expected: Any) -> bool:
    """Whether two nests of mappings, sequences and tensors are bitwise equal."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(same(*pair) for pair in zip(found, expected, strict=True))
    return found == expected


def fit(trainer: lightning.Trainer, module: Net, **options: Any) -> None:
    trainer.fit(module, batches(), batches(1), **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize("unit", ["epochs", "steps"])
@pytest.mark.parametrize("after_validation", [False, True])
def test_resuming_ends_bitwise_where_the_uninterrupted_run_does(
    tmp_path: Path, unit: str, after_validation: bool
) -> None:
    if after_validation and tuple(map(int, lightning.__version__.split(".")[:2])) < (2, 5):
        pytest.skip("Lightning 2.4 resumes otherwise from such a checkpoint, without a pruner too")
    options: dict[str, Any] = {"every": 1 if unit == "epochs" else 3, "unit": unit}

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not after_validation)

    whole, module, pruner = build(tmp_path, callbacks=[saver()], **options)
    fit(whole, module)
    assert pruner.done
    assert pruner.report.achieved["q"] == 0.5
    for epoch in (0, 1):
        trainer, again, resumed = build(tmp_path / "again", callbacks=[saver()], **options)
        fit(trainer, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.plan == pruner.plan
        assert same(dict(again.state_dict()), dict(module.state_dict()))
        assert same(trainer.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
        assert again.lr_schedulers().state_dict() == module.lr_schedulers().state_dict()


class Manual(Net):
    """Two optimizers, stepped by hand after two batches each; the attention belongs to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net[i].parameters(), lr=1e-2) for i in (1, 0)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (self.loss(batch) / 2).backward()
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
            for optimizer in self.optimizers():
                optimizer.zero_grad()


class Unlucky(Net):
    until = 9

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx == 2 or self.current_epoch >= self.until else self.loss(batch)


def by_hand(module: Net, *, scaler: Any = None, dtype: Any = None, clip: float = 0.0) -> AttentionPruner:
    """The same training as a plain loop: two batches to an optimizer step, a pruner's step after every epoch."""
    pruner = AttentionPruner(module.net[0], 0.5, steps=2, heads="ragged")
    made = module.configure_optimizers()
    optimizers, schedulers = made if isinstance(made, tuple) else (made, [])
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(3):
        for first, second in zip(*[iter(batches())] * 2, strict=True):
            for batch in (first, second):
                with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
                    loss = module.loss(batch) / 2
                scaler.scale(loss).backward()
            if not pruner.done:
                pruner.observe(scaler=scaler if scaler.is_enabled() else None)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
            module.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        if not pruner.done:
            pruner.step(optimizers)
    return pruner


@pytest.mark.parametrize("kind", ["accumulated and clipped", "fp16", "bf16", "by hand"])
def test_training_is_that_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)  # the first step overflows

    plugins = [MixedPrecision("16-mixed", "cpu", scaler())] if kind == "fp16" else []
    given = {"precision": "bf16-mixed"} if kind == "bf16" else {"plugins": plugins}
    if kind != "by hand":
        given |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    net = Manual if kind == "by hand" else Net
    trainer, module, pruner = build(tmp_path, net, **given)
    expected = Net() if net is Net else Manual()
    expected.load_state_dict(module.state_dict())
    fit(trainer, module)
    other = by_hand(
        expected, clip=0.0 if kind == "by hand" else 0.1, scaler=scaler() if kind == "fp16" else None,
        dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind),
    )  # fmt: skip
    if kind == "fp16":
        assert trainer.scaler.get_scale() == 2.0**10
    assert trainer.callbacks[-1].state_dict()["optimizer_steps"] == 6
    assert pruner.done
    assert pruner.plan == other.plan
    assert same(dict(module.state_dict()), dict(expected.state_dict()))


def one_of_two(rank: int, folder: str, port: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer, module, pruner = build(Path(folder), strategy="ddp", devices=2, num_sanity_val_steps=0)
    trainer.fit(module, Batches(batches()[rank::2]), batches(1))
    found = {"model": module.state_dict(), "plan": pruner.plan.to_json(), "done": pruner.done}
    for way in ("whole", "resumed") if EMAWeightAveraging else ():  # with a moving average, from its first checkpoint
        saver = ModelCheckpoint(Path(folder) / way, "{epoch}", save_top_k=-1)
        average = EMAWeightAveraging(decay=0.5)
        trainer, module, _ = build(
            Path(folder), callbacks=[average, saver], strategy="ddp", devices=2, num_sanity_val_steps=0
        )
        start = Path(folder) / "whole" / "epoch=0.ckpt" if way == "resumed" else None
        trainer.fit(module, Batches(batches()[rank::2]), batches(1), ckpt_path=start)
        found[way] = [module.state_dict(), trainer.optimizers[0].state_dict(), trainer.global_step]
    torch.save(found, Path(folder) / f"{rank}.pt")


@forked
@pytest.mark.long
def test_two_processes_train_as_one_does_on_both_halves_of_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = Net()
    pruner = by_hand(expected)
    in_processes(2, one_of_two, str(tmp_path), find_free_network_port())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert first["done"]
    if EMAWeightAveraging:
        assert same(first["resumed"], first["whole"])
        assert not same(first["whole"][0], first["model"])  # it is the average
        assert [value.shape for value in first["whole"][0].values()] == [v.shape for v in first["model"].values()]
    assert first["plan"] == pruner.plan.to_json()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(first["model"][key], value, rtol=1e-3, atol=1e-5)


def test_batches_without_a_loss_and_a_run_cut_short(tmp_path: Path) -> None:
    trainer, module, pruner = build(tmp_path, Unlucky, every=2, unit="steps", max_epochs=2)
    fit(trainer, module)
    assert pruner.done
    trainer, module, pruner = build(tmp_path, Unlucky)
    module.until = 1  # no gradients to score by after the first epoch
    fit(trainer, module)
    assert pruner.steps_done == 1
    for options in ({"every": 2}, {"every": 3, "unit": "steps", "max_epochs": 1}):
        trainer, module, pruner = build(tmp_path, **options)
        fit(trainer, module)
        assert pruner.steps_done == 1
    trainer, module, pruner = build(tmp_path, max_steps=6)
    fit(trainer, module)
    assert pruner.steps_done == 1  # the second epoch did not come to its end
    trainer, module, pruner = build(tmp_path, limit_train_batches=3, max_epochs=1)
    fit(trainer, module)
    assert pruner.steps_done == 1
    trainer, module, pruner = build(tmp_path, fast_dev_run=True)
    fit(trainer, module)
    assert pruner.steps_done == 1


class Average(Callback):
    """Holds a moving average of the head and the encoder, and updates it after every batch."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.ema = AveragedModel(pl_module.net, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.ema.update_parameters(pl_module.net)


@pytest.mark.parametrize("kind", [*filter(None, [EMAWeightAveraging]), StochasticWeightAveraging, Average])
def test_moving_averages_are_cut_along(tmp_path: Path, kind: Any) -> None:
    def averaging() -> list[Callback]:
        options = {
            EMAWeightAveraging: {"decay": 0.5},
            StochasticWeightAveraging: {"swa_lrs": 1e-2, "swa_epoch_start": 1},
        }
        return [kind(**options.get(kind, {})), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]

    whole, module, pruner = build(tmp_path, callbacks=averaging())
    fit(whole, module)
    assert pruner.done
    if kind is Average:
        (average,) = (one.ema for one in whole.callbacks if isinstance(one, Average))
        found = find_attention(average.module)
        assert [(spec.qk_dims, spec.vo_dims) for spec in found] == [
            (spec.qk_dims, spec.vo_dims) for spec in find_attention(module.net)
        ]
        return  # it saves nothing
    for epoch in (0, 1):
        trainer, again, _ = build(tmp_path / "again", callbacks=averaging())
        fit(trainer, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(dict(again.state_dict()), dict(module.state_dict()))


class Teacher(Net):
    """The LightningModule itself holds the average."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = AveragedModel(self.net)
        self.frozen = copy.deepcopy(self.net[0])
        self.other = nn.Sequential(nn.Linear(2, 2))  # of the averaged module's class

    def on_train_batch_end(self, *_: Any) -> None:
        self.teacher.update_parameters(self.net)


def test_averages_inside_the_module_are_told_from_copies(tmp_path: Path) -> None:
    trainer, module, pruner = build(tmp_path, Teacher, max_epochs=2)
    fit(trainer, module)
    assert pruner.done
    assert {spec.qk_dims for spec in find_attention(module.frozen)} == {(8, 8)}
    for ours, theirs in zip(find_attention(module.net), find_attention(module.teacher.module), strict=True):
        assert (ours.qk_dims, ours.vo_dims) == (theirs.qk_dims, theirs.vo_dims)
    module = Teacher()
    trainer.callbacks[:] = [PruningCallback(AttentionPruner(module, 0.5))]
    with pytest.raises(WrappedModelError, match="one of a part of it"):
        fit(trainer, module)
    module = Teacher()
    module.net = nn.Sequential(module.frozen)
    module.frozen, module.teacher = copy.deepcopy(module.net[0]), AveragedModel(module.net[0])
    trainer.callbacks[:] = [PruningCallback(AttentionPruner(module.net[0], 0.5))]
    with pytest.raises(WrappedModelError, match="one of any of 2"):
        fit(trainer, module)


def test_pruned_checkpoints_come_back(tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", monitor="loss", save_top_k=-1, save_last=True)

    trainer, module, pruner = build(tmp_path, Restoring, callbacks=[saver()])
    fit(trainer, module)
    weights = dict(module.state_dict())
    loaded = Restoring.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(dict(loaded.state_dict()), weights)
    again, fresh, resumed = build(tmp_path, Restoring, callbacks=[saver()], max_epochs=4)
    fit(again, fresh, ckpt_path="last")
    assert fresh.restored == 2
    assert resumed.plan == pruner.plan
    again, fresh, _ = build(tmp_path, callbacks=[saver()])
    again.test(fresh, batches(1), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert same(dict(fresh.state_dict()), weights)
    trainer.test(module, batches(1), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    with pytest.raises(CheckpointError, match="pruned 2 times"):
        trainer.test(module, batches(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert same(dict(module.state_dict()), weights)
    other = Net()  # what is only evaluated need not be the pruner's
    trainer.test(other, batches(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert find_attention(other.net)[0].qk_dims != find_attention(module.net)[0].qk_dims
    trainer.test(Net(), batches(1), ckpt_path="best", verbose=False)
    assert pruner.done
    for one in (module, fresh, other):
        assert "on_load_checkpoint" not in vars(one)


def test_what_is_refused(tmp_path: Path) -> None:
    trainer, module, pruner = build(tmp_path)
    for options, words in (({"every": 0}, "every"), ({"unit": "batches"}, "unit")):
        with pytest.raises(OptionError, match=words):
            PruningCallback(pruner, **options)
    with pytest.raises(OptionError, match="AttentionPruner"):
        PruningCallback(module)
    with pytest.raises(OptionError, match="of another"):
        fit(trainer, Net())
    trainer, module, pruner = build(tmp_path, callbacks=[StochasticWeightAveraging(swa_lrs=1e-2)])
    before = dict(module.state_dict())
    trainer.callbacks[0].setup = lambda *_, **__: None
    with pytest.raises(WrappedModelError, match="StochasticWeightAveraging"):
        fit(trainer, module)
    assert "on_load_checkpoint" not in vars(module)
    trainer, module, pruner = build(tmp_path, callbacks=[ModelCheckpoint(tmp_path, "bare", save_weights_only=True)])
    fit(trainer, module)
    trainer, module, pruner = build(tmp_path)
    with pytest.raises(CheckpointError, match="save_weights_only"):
        fit(trainer, module, ckpt_path=tmp_path / "bare.ckpt")
    forking = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False).strategy
    for strategy, words in ((FSDPStrategy(), "FSDPStrategy"), (forking, "inside fit")):
        with pytest.raises(WrappedModelError, match=words):
            _check_strategy(strategy)
    trainer.strategy.model = nn.Identity()
    trainer.strategy.model._comm_hooks = ["half precision"]
    with pytest.raises(WrappedModelError, match="communication hook"):
        trainer.callbacks[-1].on_fit_start(trainer, module)
    assert same(dict(module.state_dict()), before)
