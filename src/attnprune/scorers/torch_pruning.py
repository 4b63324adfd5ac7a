"""Any importance of Torch-Pruning, applied to the channels that Q and K, and V and O, share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ScorerError
from ..scores import Scores
from ..spec import PROJECTIONS, Kind
from ..surgery import as_linears
from ..views import AttentionView
from .base import LossFn, Scorer
from .passes import gradients, head_sums


def is_importance(candidate: object) -> bool:
    """Whether this is one of Torch-Pruning's importances; it is not imported to find out."""
    module = sys.modules.get("torch_pruning.pruner.importance")
    return module is not None and isinstance(candidate, module.Importance)


class TorchPruning(Scorer):
    """Wraps an importance of Torch-Pruning (``GroupMagnitudeImportance``, ``TaylorImportance``, ``FPGMImportance`` …).

    For every attention two of Torch-Pruning's own Groups are made, Q and K by their output channels, V by its output
    and O by its input channels, and the importance is asked for both; a head scores the sum of its channels.

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
        self,
        model: nn.Module,
        views: Sequence[AttentionView],
        *,
        data: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        progress: bool = True,
    ) -> dict[str, Scores]:
        found: dict[str, dict[str, Tensor]] = {}
        if data is not None:
            found = self._gradients(model, views, data, loss_fn, progress)
        with as_linears(views) as linears:
            return {
                view.name: self._one(view, {p: self._lend(original, view, p, found) for p in PROJECTIONS})
                for original, view in zip(views, linears, strict=True)
            }

    def _gradients(
        self, model: nn.Module, views: Sequence[AttentionView], data: Any, loss_fn: LossFn | None, progress: bool
    ) -> dict[str, dict[str, Tensor]]:
        """By view and projection: the mean gradient (or mean squared gradient) over batches."""
        squared = "Hessian" in type(self.importance).__name__
        total: dict[str, dict[str, Tensor]] = {view.name: {} for view in views}
        count = 0
        for batch in gradients(model, views, data, loss_fn, progress, self.name):
            count += 1
            for view in views:
                for key, grad in batch[view.name].items():
                    value = grad.square() if squared else grad.clone()
                    old = total[view.name].get(key)
                    total[view.name][key] = value if old is None else old.add_(value)
        return {name: {key: value / count for key, value in keys.items()} for name, keys in total.items()}

    @staticmethod
    def _lend(original: AttentionView, view: AttentionView, p: str, found: dict[str, dict[str, Tensor]]) -> nn.Linear:
        """A plain Linear over a projection's weights and gradients; the importance may write to its ``.grad``."""
        slots = {part: view.slots.get(f"{p}.{part}") for part in ("weight", "bias")}
        weight = slots["weight"]
        assert weight is not None
        channels, width = view.weight(p).shape  # type: ignore[arg-type]
        outputs, inputs = (width, channels) if p == "o" else (channels, width)
        linear = nn.Linear(inputs, outputs, bias=slots["bias"] is not None, device="meta")
        for part, slot in slots.items():
            if slot is None:
                continue
            parameter = nn.Parameter(slot.parameter.detach())
            source = original.slots[f"{p}.{part}"]
            grad = found.get(view.name, {}).get(f"{p}.{part}")
            if grad is None and source.parameter.grad is not None:
                grad = source.cut(source.parameter.grad)
            if grad is not None:
                parameter.grad = (grad.movedim(0, 1) if p == "o" and part == "weight" else grad).clone()
            setattr(linear, part, parameter)
        return linear

    def _one(self, view: AttentionView, linears: dict[Any, nn.Linear]) -> Scores:
        spec = view.spec
        qk = self._ask(view, "qk", [(linears["q"], "out"), (linears["k"], "out")], sum(spec.qk_dims))
        vo = self._ask(view, "vo", [(linears["v"], "out"), (linears["o"], "in")], sum(spec.vo_dims))
        head = head_sums(view, "qk", qk) + head_sums(view, "vo", vo)
        return Scores(view.by_head(qk, "qk"), view.by_head(vo, "vo"), head)

    def _ask(self, view: AttentionView, kind: Kind, layers: list[tuple[nn.Linear, str]], channels: int) -> Tensor:
        try:
            value = self.importance(_group(layers, channels))
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
                f"one importance for each of {channels} {kind} channels",
                found,
                "use an importance that scores Linear layers by weight or gradient",
            )
        return value.detach().double().cpu()


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
