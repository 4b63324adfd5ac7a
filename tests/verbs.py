"""Public calls on small models, each with all that it may change: what :mod:`tests.faults` interrupts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import attnprune
from attnprune import AttentionPruner, apply_plan, load_pruned, make_plan, masked, prune_attention, save_pruned
from attnprune.families.proof.verdict import _KNOWN
from attnprune.families.table import _ADAPTERS

from .conformance import family, fresh, inputs
from .faults import Trial, of_model, of_optimizer, of_pruner

Make = Callable[[], Trial]
NAMES = ("MHA", "Encoder", "ViT", "Bert", "Decoder", "Timm")
numbers = itertools.count()


def of_folder(folder: Path) -> Any:
    if not folder.exists():
        return None
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def data_of(name: str) -> dict[str, Any]:
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs(name, 0).items()}


def loss_of(name: str) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: family(name).run(model, batch).square().mean()


def pruned(name: str, **options: Any) -> nn.Module:
    model = fresh(name, 0)
    prune_attention(model, 0.5, **options)
    return model


def on_a_copy(
    whole: nn.Module, call: Callable[[nn.Module], object], state: Callable[[nn.Module], Any] = of_model
) -> Make:
    """A call about one model."""

    def make() -> Trial:
        model = copy.deepcopy(whole)
        return Trial(lambda: call(model), lambda: state(model))

    return make


# deciding


def planning(**options: Any) -> Callable[[str, Path], Make]:
    def of(name: str, _: Path) -> Make:
        given: dict[str, Any] = {"data": [data_of(name)], "loss_fn": loss_of(name), "progress": False}
        return on_a_copy(fresh(name, 0, train=True), lambda model: make_plan(model, 0.5, **given, **options))

    return of


def proving(name: str, _: Path) -> Make:
    """Of a class that was never seen. What a fault leaves known must be no other than what is found without."""

    def make() -> Trial:
        model = fresh(name, 0)
        _KNOWN.clear()

        def known() -> Any:
            specs, skipped = attnprune.find_attention(model), attnprune.skipped_attention(model)
            report = prune_attention(copy.deepcopy(model), {"qk": 0.5}, scorer="magnitude", heads="ragged")
            return of_model(model), specs, skipped, report.ways

        return Trial(lambda: attnprune.find_attention(model), known)

    return make


def finding(name: str, _: Path) -> Make:
    whole, given = fresh(name, 0), data_of(name)
    return on_a_copy(
        whole,
        lambda model: (
            attnprune.find_attention(model),
            attnprune.skipped_attention(model, lambda: family(name).run(model, given)),
        ),
    )


def scoring(name: str, _: Path) -> Make:
    options: dict[str, Any] = {"data": [data_of(name)], "loss_fn": loss_of(name), "progress": False}
    return on_a_copy(fresh(name, 0), lambda model: attnprune.score_attention(model, "taylor", **options))


def calibrating(name: str, _: Path) -> Make:
    options: dict[str, Any] = {"loss_fn": loss_of(name), "progress": False}
    return on_a_copy(fresh(name, 0), lambda model: attnprune.calibrate(model, [data_of(name)], **options))


def sweeping(name: str, _: Path) -> Make:
    given = data_of(name)

    def evaluate(model: nn.Module) -> float:
        return float(family(name).run(model, given).sum().detach())

    options: dict[str, Any] = {"ratios": [0.5], "ways": [{"name": "one", "scorer": "magnitude"}], "seconds": 0}
    return on_a_copy(fresh(name, 0), lambda model: attnprune.sweep(model, evaluate, progress=False, **options))


def sensing(name: str, _: Path) -> Make:
    options: dict[str, Any] = {"loss_fn": loss_of(name), "progress": False, "parts": ["qk"]}
    return on_a_copy(fresh(name, 0), lambda model: attnprune.sensitivity(model, [data_of(name)] * 4, **options))


# pruning


def of_three(model: nn.Module, optimizer: Any, average: Any) -> Any:
    return of_model(model), of_optimizer(optimizer, model), of_model(average)


def trained(name: str, kind: Callable[..., Any] = torch.optim.AdamW) -> tuple[nn.Module, Any, Any]:
    model = fresh(name, 0)
    optimizer = kind(model.parameters())
    loss_of(name)(model, data_of(name)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return model, optimizer, AveragedModel(model)


def pruning(batches: int = 1, **options: Any) -> Callable[[str, Path], Make]:
    """With all that moves along."""

    def of(name: str, _: Path) -> Make:
        whole, given = trained(name), data_of(name)

        def make() -> Trial:
            model, optimizer, average = tried = copy.deepcopy(whole)
            return Trial(
                lambda: prune_attention(
                    model, 0.5, data=[given] * batches, loss_fn=loss_of(name), optimizer=optimizer, averages=[average],
                    progress=False, **options,
                ),
                lambda: of_three(*tried),
            )  # fmt: skip

        return make

    return of


def applying(name: str, _: Path) -> Make:
    whole, given = trained(name, torch.optim.SGD), data_of(name)
    plan = make_plan(whole[0], 0.5, data=[given], loss_fn=loss_of(name), progress=False)

    def make() -> Trial:
        model, optimizer, average = tried = copy.deepcopy(whole)

        def call() -> None:
            with torch.inference_mode():
                apply_plan(model, plan, optimizer=optimizer, averages=[average])

        return Trial(call, lambda: of_three(*tried))

    return make


def by_hand(name: str, _: Path) -> Make:
    """Two calls: either both count, or one, or none."""
    whole = fresh(name, 0)
    spec, other = attnprune.find_attention(whole)[:2]
    return on_a_copy(whole, lambda model: attnprune.prune_heads(model, {spec.name: spec.head_units[0]}))


def by_channels(name: str, _: Path) -> Make:
    whole = fresh(name, 0)
    spec = attnprune.find_attention(whole)[0]
    rows = [tuple(spec.units("vo", key)[0]) for key in range(spec.kv_heads)]
    return on_a_copy(whole, lambda model: attnprune.prune_channels(model, {spec.name: {"vo": rows}}))


def masking(name: str, _: Path) -> Make:
    whole, given = fresh(name, 0), data_of(name)
    plan = make_plan(whole, 0.5, data=[given], loss_fn=loss_of(name), progress=False)

    def call(model: nn.Module) -> None:
        with masked(model, plan), attnprune.nn.execution("padded"):
            pass

    return on_a_copy(whole, call)


# in a loop


def stepped(name: str) -> tuple[nn.Module, Any, Any, AttentionPruner]:
    model = fresh(name, 0)
    average, optimizer = AveragedModel(model), torch.optim.Adam(model.parameters())
    pruner = AttentionPruner(model, 0.5, steps=2, scope="local", scorer="fisher")
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(name)(model, data_of(name)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    pruner.observe()
    return model, optimizer, average, pruner


def of_all(model: nn.Module, optimizer: Any, average: Any, pruner: AttentionPruner) -> Any:
    return of_three(model, optimizer, average), of_pruner(pruner)


def beginning(name: str, _: Path) -> Make:
    return on_a_copy(fresh(name, 0), lambda model: AttentionPruner(model, 0.5, steps=2, scorer="fisher"))


def observing(name: str, _: Path) -> Make:
    whole = stepped(name)

    def make() -> Trial:
        tried = copy.deepcopy(whole)
        loss_of(name)(tried[0], data_of(name)).backward()  # type: ignore[no-untyped-call]
        return Trial(lambda: tried[3].observe(), lambda: of_all(*tried))

    return make


def stepping(name: str, _: Path) -> Make:
    whole = stepped(name)

    def make() -> Trial:
        model, optimizer, average, pruner = tried = copy.deepcopy(whole)
        return Trial(lambda: pruner.step(optimizer, averages=[average]), lambda: of_all(*tried))

    return make


def resuming(name: str, _: Path) -> Make:
    whole = stepped(name)
    whole[3].step(whole[1], averages=[whole[2]])
    saved, fresh_one = whole[3].state_dict(), stepped(name)

    def make() -> Trial:
        model, optimizer, average, pruner = tried = copy.deepcopy(fresh_one)
        return Trial(
            lambda: pruner.load_state_dict(saved, optimizer=optimizer, averages=[average]), lambda: of_all(*tried)
        )

    return make


def recovering(name: str, _: Path) -> Make:
    dense, given = fresh(name, 0), data_of(name)
    options: dict[str, Any] = {"loss_fn": loss_of(name), "progress": False}
    return on_a_copy(
        pruned(name),
        lambda model: attnprune.recover(model, dense, [given] * 4, 2, **options),
        lambda model: (of_model(model), of_model(dense)),
    )


def recovering_by_lora(name: str, _: Path) -> Make:
    from attnprune.integrations.peft import lora_recover

    options: dict[str, Any] = {"loss_fn": loss_of(name), "progress": False, "rank": 2}
    return on_a_copy(pruned(name), lambda model: lora_recover(model, [data_of(name)], **options))


def capturing(name: str, _: Path) -> Make:
    given = data_of(name)

    def call(model: nn.Module) -> None:
        names = [spec.name for spec in attnprune.find_attention(model)]
        with attnprune.capture(model, names):
            family(name).run(model, given)

    return on_a_copy(fresh(name, 0), call)


# for inference


def packing(name: str, _: Path) -> Make:
    return on_a_copy(pruned(name, scope="local"), attnprune.pack_qkv)


def unpacking(name: str, _: Path) -> Make:
    whole = pruned(name, scope="local")
    attnprune.pack_qkv(whole)
    return on_a_copy(whole, attnprune.unpack_qkv)


def freezing(name: str, _: Path) -> Make:
    return on_a_copy(pruned(name, heads="ragged"), attnprune.freeze)


def thawing(name: str, _: Path) -> Make:
    def make() -> Trial:
        model = pruned(name, heads="ragged")
        attnprune.freeze(model)
        return Trial(lambda: attnprune.thaw(model), lambda: of_model(model))

    return make


def running(name: str, _: Path) -> Make:
    """Forward and backward of a pruned model: gradients may have come, nothing else."""
    whole, given = pruned(name, heads="ragged"), inputs(name, 0)

    def state(model: nn.Module) -> Any:
        model.zero_grad()
        return of_model(model)

    return on_a_copy(whole, lambda model: loss_of(name)(model, given).backward(), state)  # type: ignore[no-untyped-call]


def copying(name: str, _: Path) -> Make:
    whole = pruned(name, heads="ragged")

    def call(model: nn.Module) -> None:
        pickle.loads(pickle.dumps(copy.deepcopy(model)))

    return on_a_copy(whole, call)


def taking_a_state(name: str, _: Path) -> Make:
    whole = pruned(name, heads="ragged")
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    return on_a_copy(whole, lambda model: model.load_state_dict(state))


# on the disk


def saving(name: str, tmp_path: Path) -> Make:
    whole, other = pruned(name, heads="ragged"), nn.Linear(2, 2)

    def make() -> Trial:
        target, model = tmp_path / str(next(numbers)) / "model", copy.deepcopy(whole)  # which the model card names
        save_pruned(other, target)
        return Trial(lambda: save_pruned(model, target), lambda: (of_model(model), of_folder(target)))

    return make


def loading(name: str, tmp_path: Path) -> Make:
    """Into a dense model."""
    folder = save_pruned(pruned(name, heads="ragged"), tmp_path / "pruned")
    return on_a_copy(fresh(name, 0), lambda model: load_pruned(folder, model))


def loading_another_dtype(name: str, tmp_path: Path) -> Make:
    """Into a pruned model, with gradients."""
    whole = fresh(name, 0)
    prune_attention(whole, 0.25, heads="ragged")
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(2)
            parameter.grad = parameter.clone()
    folder = save_pruned(whole, tmp_path / "other")
    return on_a_copy(whole, lambda model: load_pruned(folder, model, dtype=torch.float32))


def building(name: str, tmp_path: Path) -> Make:
    """A model of transformers from its directory alone; the reports of one."""
    model = fresh(name, 0)
    report = prune_attention(model, 0.5, heads="ragged")
    folder = save_pruned(model, tmp_path / "whole", report=report)

    def call() -> None:
        attnprune.read_report(folder)
        if name in ("ViT", "Bert", "Decoder"):
            attnprune.load_skeleton(folder)
            attnprune.from_pretrained(folder)

    return lambda: Trial(call, lambda: of_folder(folder))


def streaming(name: str, tmp_path: Path) -> Make:
    model = fresh(name, 0)
    source, plan = save_pruned(model, tmp_path / "dense"), make_plan(model, 0.5, heads="ragged")
    other = nn.Linear(2, 2)

    def make() -> Trial:
        target = tmp_path / str(next(numbers)) / "model"
        skeleton = copy.deepcopy(model).to("meta")
        save_pruned(other, target)
        return Trial(
            lambda: attnprune.apply_to_checkpoint(source, plan, target, model=skeleton),
            lambda: (of_model(skeleton), of_folder(target)),
        )

    return make


def exporting_to_stock(name: str, tmp_path: Path) -> Make:
    model = fresh(name, 0)
    prune_attention(model, 0.5, stock=True, granularity="channel" if name == "ViT" else "head")

    def make() -> Trial:
        target = tmp_path / str(next(numbers))
        return Trial(lambda: attnprune.export_stock(model, target), lambda: (of_model(model), of_folder(target)))

    return make


def exporting_to_onnx(name: str, tmp_path: Path) -> Make:
    whole, given = pruned(name).float(), {key: x for key, x in data_of(name).items() if isinstance(x, Tensor)}
    given = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}

    def make() -> Trial:
        target = tmp_path / str(next(numbers))
        target.mkdir()
        model = copy.deepcopy(whole)
        return Trial(
            lambda: attnprune.export_onnx(model, target / "model.onnx", given, check=False),
            lambda: (of_model(model), [path.name for path in target.iterdir()]),
        )

    return make


# what is the process's


def registering(name: str, _: Path) -> Make:
    def make() -> Trial:
        _ADAPTERS[:] = [one for one in _ADAPTERS if getattr(one, "kind", None) is not _Own]
        return Trial(lambda: attnprune.register_adapter(_Own, **PARTS), lambda: len(_ADAPTERS))

    return make


def unregistering(name: str, _: Path) -> Make:
    def make() -> Trial:
        _ADAPTERS[:] = [one for one in _ADAPTERS if getattr(one, "kind", None) is not _Own]
        adapter = attnprune.register_adapter(_Own, **PARTS)
        return Trial(lambda: attnprune.unregister_adapter(adapter), lambda: len(_ADAPTERS))

    return make


PARTS: Any = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out", "heads": "heads"}


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        attended: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def checking(name: str, _: Path) -> Make:
    torch.manual_seed(0)
    return on_a_copy(_Own(), lambda model: attnprune.testing.check_family(model, torch.ones(1, 3, 8), plans=1))


VERBS: dict[str, Callable[[str, Path], Make]] = {
    "prove": proving,
    "find": finding,
    "plan by gradients": planning(scorer="fisher", scope="local"),
    "plan rotated": planning(split="auto", heads="ragged"),
    "plan in sequence": planning(sequential=True),
    "score": scoring,
    "calibrate": calibrating,
    "prune": pruning(),
    "prune and recover": pruning(4, recover=2),
    "apply": applying,
    "heads by hand": by_hand,
    "channels by hand": by_channels,
    "mask": masking,
    "begin": beginning,
    "observe": observing,
    "step": stepping,
    "resume": resuming,
    "recover": recovering,
    "recover by LoRA": recovering_by_lora,
    "capture": capturing,
    "pack": packing,
    "unpack": unpacking,
    "freeze": freezing,
    "thaw": thawing,
    "run": running,
    "copy": copying,
    "state dict": taking_a_state,
    "save": saving,
    "load": loading,
    "load another dtype": loading_another_dtype,
    "build": building,
    "stream": streaming,
    "stock": exporting_to_stock,
    "register": registering,
    "unregister": unregistering,
    "check": checking,
    "sensitivity": sensing,
    "sweep": sweeping,
    "onnx": exporting_to_onnx,
}
ALIKE = ("register", "unregister", "check")
"""The same for every family."""
STOCK = ("ViT", "Decoder")
UNFIT = {("stock", name) for name in NAMES if name not in STOCK} | {("onnx", name) for name in NAMES if name != "ViT"}
"""What there is not for a family: configs that can say what pruning left, and one export that is enough."""
