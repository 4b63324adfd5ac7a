"""Any importance of Torch-Pruning, applied to the channels that Q and K, and V and O, share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...calibration.processes import pooled
from ...errors import NonFiniteError, ScorerError
from ...families.base import AttentionView
from ...families.slots import gathered
from ...surgery import as_called
from ...values.layout import PROJECTIONS, Projection
from ...values.scores import Scores
from .base import Evidence, FeatureScores, Scorer
from .gradient import Gradients, gradients, head_sums

if TYPE_CHECKING:
    from typing_extensions import Unpack


def is_importance(candidate: object) -> bool:
    """Whether this is one of Torch-Pruning's importances; it is not imported to find out."""
    module = sys.modules.get("torch_pruning.pruner.importance")
    return module is not None and isinstance(candidate, module.Importance)


class TorchPruning(Scorer):
    """Wraps an importance of Torch-Pruning (``GroupMagnitudeImportance``, ``TaylorImportance``, ``FPGMImportance`` …).

    For every attention two of Torch-Pruning's own Groups are made, Q and K by their output channels, V by its output
    and O by its input channels, and the importance is asked for both; a head scores the sum of its channels. With
    grouped queries the first query head of every key head is one Linear of the group, the second another, and so on.

    Importances that read ``weight.grad`` find there the mean gradient over ``data`` (for ``HessianImportance`` the
    mean squared gradient), or, without data, the gradients that the model holds. These need room for the attention's
    gradients, as Torch-Pruning's interface is ``weight.grad``.

    Args:
        importance: an instance.
    """

    def __init__(self, importance: Callable[..., Tensor | None]) -> None:
        self.importance = importance

    @property
    def name(self) -> str:
        return f"torch-pruning {type(self.importance).__name__}"

    def score(
        self, model: nn.Module, views: Sequence[AttentionView], **evidence: Unpack[Evidence]
    ) -> dict[str, Scores]:
        if evidence.get("data") is not None:
            grads = self._gradients(model, views, **evidence)
        else:
            grads = {view.name: self._held(view) for view in views}
        with as_called(views) as linears, torch.random.fork_rng(devices=()):
            return {
                view.name: self._one(view, {p: list(_lend(view, p, grads[view.name])) for p in PROJECTIONS})
                for view in linears
            }

    def score_features(
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **evidence: Unpack[Evidence],
    ) -> FeatureScores:
        if evidence.get("data") is not None:
            grads = self._gradients(model, views, **evidence)
        else:
            grads = {view.name: self._held(view) for view in views}
        found: FeatureScores = {}
        with as_called(views) as linears, torch.random.fork_rng(devices=()):
            for view in linears:
                for p in which:
                    side = "out" if p == "o" else "in"
                    layers = [(linear, side) for linear in _lend(view, p, grads[view.name])]
                    scores = self._ask(view, f"{p} feature", layers, view.spec.width(p))
                    found.setdefault(view.name, {})[p] = scores
        return found

    def _held(self, view: AttentionView) -> dict[str, Tensor]:
        """The gradients that the importance has gathered itself, or that the model holds, as ``(channels, ...)``."""
        held, counts = getattr(self.importance, "_accu_grad", {}), getattr(self.importance, "_counter", {})
        found = {}
        for key, slot in view.slots.items():
            p = slot.parameter
            grad = held[p] / counts[p] if p in held else p.grad
            if grad is not None:
                found[key] = slot.cut(gathered(grad))
        return found

    def _gradients(
        self, model: nn.Module, views: Sequence[AttentionView], **evidence: Unpack[Evidence]
    ) -> dict[str, dict[str, Tensor]]:
        """By view and slot: the mean gradient (or mean squared gradient) over batches."""
        squared = "Hessian" in type(self.importance).__name__
        total: dict[str, dict[str, Tensor]] = {view.name: {} for view in views}

        def add(number: int, found: Mapping[str, Gradients]) -> None:
            for name, grads in found.items():
                for key, grad in grads.items():
                    value = grad.square() if squared else grad.clone()
                    total[name][key] = total[name][key].add_(value) if key in total[name] else value

        count = gradients(model, views, self.name, add, **evidence)
        total, count = pooled((total, count))
        return {name: {key: value / count for key, value in keys.items()} for name, keys in total.items()}

    def _one(self, view: AttentionView, linears: Mapping[Projection, Sequence[nn.Linear]]) -> Scores:
        spec = view.spec
        sides = {"qk": [("q", "out"), ("k", "out")], "vo": [("v", "out"), ("o", "in")]}
        layers: dict[str, list[tuple[nn.Linear, str]]] = {
            kind: [(linear, side) for p, side in pair for linear in linears[p]]  # type: ignore[index]
            for kind, pair in sides.items()
        }
        qk = self._ask(view, "qk", layers["qk"], sum(spec.qk_dims))
        vo = self._ask(view, "vo", layers["vo"], sum(spec.vo_dims))
        share = torch.tensor([spec.groups[key] for key in spec.layout.key_of], device="cpu")
        return Scores(view.by_head(qk, "qk"), view.by_head(vo, "vo"), head_sums(view, {"k": qk, "v": vo}) / share)

    def _ask(self, view: AttentionView, kind: str, layers: list[tuple[nn.Linear, str]], channels: int) -> Tensor:
        try:
            importance = copy.copy(self.importance)  # one that has gathered gradients writes them to the model
            if hasattr(importance, "zero_grad"):
                importance.zero_grad()
            value = importance(_group(layers, channels))
        except AttributeError as error:
            raise ScorerError(
                f"{view.name}: {self.name}",
                "what the importance reads from each layer (for gradient-based ones weight.grad)",
                str(error),
                "pass data=, or run a backward pass before",
            ) from error
        if not isinstance(value, Tensor) or value.shape != (channels,):
            found = "none" if value is None else f"shape {tuple(getattr(value, 'shape', ()))}"
            raise ScorerError(
                f"{view.name}: {self.name}",
                f"one importance for each of {channels} {kind if 'feature' in kind else f'{kind} channel'}s",
                found,
                "use an importance that scores Linear layers by weight or gradient",
            )
        value = value.detach().double().cpu()
        if not bool(value.isfinite().all()):
            raise NonFiniteError(
                f"{view.name}: {self.name}",
                f"a finite importance for each {kind if 'feature' in kind else f'{kind} channel'}",
                f"{int((~value.isfinite()).sum())} of {channels} NaN or infinite",
                "it divides by their mean, which is 0 where all weights or gradients are: give it normalizer=None, or "
                "exclude this module; else look for overflow in the loss",
            )
        return value


def _lend(view: AttentionView, projection: Projection, grads: Mapping[str, Tensor]) -> Iterator[nn.Linear]:
    """Plain Linears over a projection's weights and gradients, with the channels of one query head of every key head
    each; the importance may write to their ``.grad``."""
    layout, across = view.spec.layout, projection == "o"
    spans, width = layout.spans(projection), view.weight(projection).shape[1]
    keys = [key for key in (f"{projection}.weight", f"{projection}.bias") if key in view.slots]
    for number in range(1 if projection in "kv" else max(layout.groups)):
        rows: list[int] = []
        for key in layout.key_order:  # a group that lacks this head lends its last one
            heads = [key] if projection in "kv" else layout.queries(key)
            rows += range(*spans[heads[min(number, len(heads) - 1)]])
        outputs, inputs = (width, len(rows)) if across else (len(rows), width)
        linear = nn.Linear(inputs, outputs, bias=len(keys) == 2, device="meta")
        for name in keys:
            part = name.partition(".")[2]
            slot = view.slots[name]
            turned = across and part == "weight"
            own, grad = (
                None if each is None else (each[rows].movedim(0, 1) if turned else each[rows]).clone()
                for each in (slot.cut(slot.values), grads.get(name))
            )
            parameter = nn.Parameter(own)  # type: ignore[arg-type]
            parameter.grad = grad
            setattr(linear, part, parameter)
        yield linear


def _group(layers: list[tuple[nn.Linear, str]], channels: int) -> Any:
    """Torch-Pruning's Group over all channels that the layers share."""
    from torch_pruning.dependency import Dependency, Group, Node
    from torch_pruning.pruner import function

    handlers = {"out": function.prune_linear_out_channels, "in": function.prune_linear_in_channels}
    root = Node(layers[0][0], grad_fn=None, name=kind_name(layers))
    group = Group()
    for i, (linear, side) in enumerate(layers):
        target = Node(linear, grad_fn=None, name=f"{kind_name(layers)}.{i}")
        group.add_dep(Dependency(handlers["out"], handlers[side], root, target), list(range(channels)))
        group[i].root_idxs = list(range(channels))
    return group


def kind_name(layers: list[tuple[nn.Linear, str]]) -> str:
    """The name that a group's nodes show."""
    return "attention " + "-".join(side for _, side in layers)
