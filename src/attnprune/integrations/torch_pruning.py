"""Torch-Pruning around attention: :func:`pruner_options`. Needs ``torch_pruning``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.pruner.function import BasePruningFunc, PrunerBox

from ..cost.counting import run
from ..errors import AdapterError, NotExpressibleError, TiedWeightsError
from ..families.base import AttentionView
from ..families.registry import again, find_views, plain
from ..nn import decoupled_class, host_class
from ..nn.expanded import Read
from ..surgery import check_views
from ..surgery.width import narrow, needs_forward


def pruner_options(
    model: nn.Module,
    *,
    width: bool = True,
    ignored_layers: Sequence[nn.Module] = (),
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Any]:
    """What a pruner of Torch-Pruning is to be given, so that it sees each attention as one layer.

    Such a layer reads and writes the model's width and nothing else: pruning the width takes columns of Q, K and V and
    rows of O, and heads and their channels are left to attnprune. It may have been pruned by attnprune before, in any
    way, or may be pruned afterwards, or between two steps of the pruner.

    Args:
        model: any module with attention that attnprune finds.
        width: whether the pruner may change the model's width; False: what attention writes stays, and all that is
            added to it.
        ignored_layers: layers that the pruner is to leave alone besides.
        forward_fn: how to run the model, ``forward_fn(model, example_inputs)``; None: it is called on the inputs.

    Returns:
        Arguments for ``torch_pruning.pruner.BasePruner`` and its kin, by name: ``customized_pruners``,
        ``unwrapped_parameters``, ``forward_fn``, ``output_transform`` and, if there are any, ``ignored_layers``.

    Raises:
        NoAttentionError: attnprune finds no attention.
        NotExpressibleError: an attention cannot run at another width.
        TiedWeightsError: a projection whose width may change is used in two places.

    >>> import attnprune, torch_pruning as tp
    >>> layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    >>> report = attnprune.prune_attention(model, 0.5, heads="ragged")
    >>> pruner = tp.pruner.BasePruner(
    ...     model, torch.randn(2, 5, 8), tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.25,
    ...     **pruner_options(model),
    ... )
    >>> pruner.step()
    >>> [spec.d_model for spec in attnprune.find_attention(model)], model[1].layers[0].linear1
    ([24], Linear(in_features=24, out_features=36, bias=True))
    """
    model = plain(model)
    views = find_views(model)
    check_views(model, views)
    layers = AttentionLayers(views, {view.module for view in _distinct(views, width) if needs_forward(view)})
    kinds = {kind for view in views for kind in _kinds(view)}
    _check_known(model, kinds, {view.module for view in views})
    if width:
        _check_shared(model, views)
    else:
        ignored_layers = [*ignored_layers, *(view.module if _inside(view) else view.owner("o") for view in views)]
    found: dict[str, Any] = {
        "customized_pruners": dict.fromkeys(kinds, layers),
        "unwrapped_parameters": _unwrapped(model, kinds),
        "forward_fn": partial(_traced, [view.module for view in views], forward_fn or run),
        "output_transform": _differentiable,
    }
    return {**found, "ignored_layers": list(ignored_layers)} if ignored_layers else found


class AttentionLayers(BasePruningFunc):  # type: ignore[misc]
    """Attention as layers of Torch-Pruning's graph: as wide as the model outside, untouched inside.

    Args:
        views: all attention that it may be asked about.
        apart: modules that need a forward of ours at another width.
    """

    TARGET_MODULES = nn.Module

    def __init__(self, views: Sequence[AttentionView], apart: set[nn.Module]) -> None:
        super().__init__()
        self._views, self._apart = {view.module: view for view in views}, apart

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Takes places of what Q, K and V read: columns of their weights."""
        view = self._now(layer)
        kept = _left(view.spec.q_in, idxs)
        narrow(view, {"q": kept, "k": kept, "v": kept}, apart=layer in self._apart)
        return layer

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Takes places of what O writes: rows of its weight, and of its bias."""
        known = self._views[layer]
        if not _inside(known):  # O is a layer of its own, and what comes out here are channels of heads
            raise NotExpressibleError(
                known.name, "channels of heads to be pruned by attnprune", "Torch-Pruning pruning what O reads",
                "use attnprune.prune_attention",
            )  # fmt: skip
        view = self._now(layer)
        narrow(view, {"o": _left(view.spec.d_model, idxs)}, apart=layer in self._apart)
        return layer

    def get_in_channels(self, layer: nn.Module) -> int:
        """The width that Q reads, and K and V as well."""
        return self._now(layer).spec.q_in

    def get_out_channels(self, layer: nn.Module) -> int:
        """The width that O writes; where O lies in a sibling module, the channels that it reads."""
        view = self._now(layer)
        return view.spec.d_model if _inside(view) else view.spec.layout.channels("o")

    def _now(self, layer: nn.Module) -> AttentionView:
        return again(self._views[layer])


def _inside(view: AttentionView) -> bool:
    """Whether O is a part of the module that splits heads."""
    return any(module is view.owner("o") for module in view.module.modules())


def _left(size: int, gone: Sequence[int]) -> list[int]:
    return [place for place in range(size) if place not in set(gone)]


def _kinds(view: AttentionView) -> Iterator[type[nn.Module]]:
    """The classes that an attention has now, had, or may get: Torch-Pruning goes by them."""
    host = host_class(view.module)
    yield from (type(view.module), host)
    if view.mixin is not None:
        yield decoupled_class(view.mixin, host)


def _distinct(views: Sequence[AttentionView], width: bool) -> Iterator[AttentionView]:
    """The attention whose width may change.

    Raises:
        NotExpressibleError: Q, K and V read different widths; or Torch-Pruning would read O's weight as its host does.
    """
    for view in views if width else ():
        spec = view.spec
        if isinstance(view.owner("o"), Read) and not _inside(view):
            raise NotExpressibleError(
                view.name, "an O that its host calls", "one whose weight is read, in a module beside the attention",
                "leave the width alone: pruner_options(model, width=False)",
            )  # fmt: skip
        if not spec.q_in == spec.k_in == spec.v_in:
            raise NotExpressibleError(
                view.name, "queries, keys and values of one width",
                f"widths of {spec.q_in}, {spec.k_in} and {spec.v_in}",
                "leave the width alone: pruner_options(model, width=False)",
            )  # fmt: skip
        yield view


def _check_known(model: nn.Module, kinds: set[type[nn.Module]], known: set[nn.Module]) -> None:
    for name, module in model.named_modules():
        if type(module) in kinds and module not in known:
            raise AdapterError(
                name, f"every {type(module).__name__} to be attention that attnprune finds", "one that it does not",
                "see attnprune.skipped_attention(model)",
            )  # fmt: skip


def _check_shared(model: nn.Module, views: Sequence[AttentionView]) -> None:
    """Raises if a projection lies in several places: it would be cut for each of them."""
    users: dict[int, int] = {}
    for module in model.modules():
        for child in (*module._modules.values(), *module._parameters.values()):
            users[id(child)] = users.get(id(child), 0) + 1
    for view in views:
        for key, slot in view.slots.items():
            alone = slot.owner is view.module or users.get(id(slot.owner), 1) == 1
            if not alone or users.get(id(slot.parameter), 1) > 1:
                raise TiedWeightsError(
                    f"{view.name}: {key}", "a projection that is used once", "one that is used in several places",
                    "untie it, or leave the width alone: pruner_options(model, width=False)",
                )  # fmt: skip


def _unwrapped(model: nn.Module, kinds: set[type[nn.Module]]) -> list[tuple[nn.Parameter, int]]:
    """Parameters of no layer that Torch-Pruning knows, and their last dimension that is no 1: what it would find, and
    warn of, by itself."""
    wrapped: set[int] = set()
    for module in model.modules():
        if type(module) in kinds or ops.module2type(module) in PrunerBox:
            wrapped.update(map(id, module.parameters()))
    found = []
    for parameter in model.parameters():
        wide = [axis for axis, size in enumerate(parameter.shape) if size > 1]
        if id(parameter) not in wrapped and wide:
            found.append((parameter, wide[-1]))
    return found


class _Whole(torch.autograd.Function):
    """In the graph that Torch-Pruning reads, an attention from what it reads to what it writes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *read: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError("A graph that was traced for Torch-Pruning is not differentiated.")


def _traced(
    modules: Sequence[nn.Module], forward_fn: Callable[[nn.Module, Any], Any], model: nn.Module, example_inputs: Any
) -> Any:
    """Runs a model so that nothing inside an attention is in the graph, and frozen parameters outside are."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.requires_grad:
                stack.callback(parameter.requires_grad_(True).requires_grad_, False)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            torch.set_grad_enabled(False)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            torch.set_grad_enabled(True)
            given = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.requires_grad)
            read = {id(one): one for one in given}.values()
            first, *others = output if isinstance(output, tuple) else (output,)
            whole = _Whole.apply(  # type: ignore[no-untyped-call]
                first, *read, torch.zeros((), device=first.device, requires_grad=True)
            )
            return (whole, *others) if isinstance(output, tuple) else whole

        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            # before the hook that Torch-Pruning has registered, which notes what made the output
            stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
        return forward_fn(model, example_inputs)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of a model's output that are in the graph; a cache of keys and values is not."""
    if isinstance(output, Tensor):
        return [output] if output.grad_fn is not None else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [one for part in output for one in _differentiable(part)] if isinstance(output, (tuple, list)) else []
