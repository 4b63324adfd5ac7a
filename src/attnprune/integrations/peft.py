"""Low-rank recovery of a pruned model with PEFT: :func:`lora_recover`, :data:`AST_PROTOCOL`. Needs ``peft``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict

import torch
from peft import LoraConfig, LoraModel
from torch import nn

from ..calibration.losses import LossFn
from ..calibration.quiet import restored
from ..errors import NotExpressibleError, OptionError, TiedWeightsError
from ..families.base import AttentionView
from ..families.registry import all_views, find_views, plain
from ..nn import host_class
from ..nn.attempt import undoing_with, undone
from ..nn.kept import ordinary
from ..nn.selected import Selected, SelectedOutputs
from ..nn.unfused import Unfused
from ..recovery.blocks import find_blocks, is_linear
from ..recovery.distillation import teacher_loss
from ..surgery import check_views
from ..values.choices import Choices, means, read_choices
from .lora_training import DECAYS, sized, train


class LoraOptions(TypedDict, total=False):
    """What of :func:`lora_recover` is a recipe: all but the model, the data and the losses."""

    rank: int
    alpha: float
    lr: float
    epochs: int
    warmup: float
    decay: str
    dropout: float
    mlp: bool
    everywhere: bool
    trained: Choices | None
    checks: int
    never_worse: bool


AST_PROTOCOL: LoraOptions = {
    "rank": 16,
    "alpha": 16.0,
    "lr": 1e-4,
    "epochs": 1,
    "warmup": 0.05,
    "decay": "cosine",
    "everywhere": True,
    "trained": "classifier",
    "never_worse": False,
}
"""One round's recovery as in the public AST code of the paper's authors (arXiv 2509.26207).

LoRA of rank 16 and alpha 16 on all Linears, the classifier trained in full, Adam with 1e-4 after 5 % of the steps to
warm up, then a cosine to 0, one epoch, the best by validation loss, whatever it was before, and merged:
``lora_recover(model, data, validation=validation, **AST_PROTOCOL)``; where the classifier has another name,
``**{**AST_PROTOCOL, "trained": "score"}``.
"""


def lora_targets(
    model: nn.Module,
    *,
    mlp: bool = True,
    everywhere: bool = False,
    include: Choices | None = None,
    exclude: Choices | None = None,
) -> list[str]:
    """The names of a model's attention projections, and of the other Linears of their blocks: for ``LoraConfig``.

    Args:
        model: any module with attention of a known family, pruned or not.
        mlp: whether the blocks' other Linears are named too.
        everywhere: whether Linears outside of blocks are named too (poolers, classifiers), but for the output
            embeddings of a language model.
        include: as in :func:`attnprune.prune_attention`; only these and their blocks.
        exclude: what to leave out, likewise.

    >>> import attnprune
    >>> model = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    >>> report = attnprune.prune_attention(model, 0.5)
    >>> lora_targets(model)
    ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj', 'linear1', 'linear2']
    """
    model = plain(model)
    found: dict[str, None] = {}
    for block in find_blocks(model, find_views(model, include, exclude)):
        found.update(dict.fromkeys(block.attention + (block.linears if mlp else ())))
    if everywhere:
        found.update(dict.fromkeys(_beside(model)))
    # a packed attention has its own adapter in PEFT, which covers its output projection
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _beside(model: nn.Module) -> list[str]:
    """The Linears outside of attention, but for the output embeddings."""
    told = getattr(model, "get_output_embeddings", None)
    left_out = {*_in_attention(model), id(told() if callable(told) else None)}
    return [name for name, module in model.named_modules() if is_linear(module) and id(module) not in left_out]


def _in_attention(model: nn.Module) -> set[int]:
    """Modules of attention and those inside, by id."""
    return {id(module) for view in all_views(model) for top in view.modules for module in top.modules()}


@ordinary
def lora_recover(
    model: nn.Module,
    data: Iterable[Any],
    *,
    rank: int = 16,
    alpha: float = 16.0,
    lr: float = 1e-4,
    epochs: int = 1,
    warmup: float = 0.05,
    decay: str = "linear",
    dropout: float = 0.0,
    mlp: bool = True,
    everywhere: bool = False,
    trained: Choices | None = None,
    validation: Iterable[Any] | None = None,
    checks: int = 1,
    never_worse: bool = True,
    loss_fn: LossFn | None = None,
    teacher: nn.Module | None = None,
    include: Choices | None = None,
    exclude: Choices | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Trains low-rank updates of a pruned model's attention and MLP, and merges them: ready for the next round.

    The defaults are what the paper says: rank 16, alpha 16, attention and MLP, Adam, 1e-4 with 5 % of the steps to warm
    up, one epoch, the best by validation loss; and a linear decay to 0, of which it says nothing. :data:`AST_PROTOCOL`
    is what its authors' public code does instead. The model keeps its modules, shapes, modes and ``requires_grad``
    flags; only weights of the targets change, and what is trained in full. If anything fails, none has changed.

    Args:
        model: any module with attention of a known family, changed in place.
        data: an iterable of batches, as :func:`attnprune.prune_attention` takes; read once an epoch, in its order.
        rank: of every update.
        alpha: updates are scaled by alpha / rank.
        lr: Adam's learning rate after warm-up.
        epochs: passes over the data.
        warmup: the fraction of all steps in which the rate rises linearly.
        decay: how it falls after that: ``"linear"`` or ``"cosine"`` to 0, or ``"none"``.
        dropout: on the updates' inputs.
        mlp: whether the other Linears of the blocks have updates too.
        everywhere: whether all Linears have, also outside of blocks (:func:`lora_targets`).
        trained: modules beside attention that are trained in full, with no updates of low rank: names, as glob patterns
            (``"classifier"``), classes, or functions of name and module.
        validation: batches; the updates with the lowest mean loss over them are kept. None: the last ones are kept.
        checks: passes over ``validation`` in an epoch, the last at its end.
        never_worse: whether "no update" is in the running too, so that the loss over ``validation`` never rises.
            False: the best of the checks is kept, whatever the loss was before.
        loss_fn: ``loss_fn(model, batch) -> scalar``; None for the model's own loss.
        teacher: instead of labels, the output of this model (usually the dense one) is to be matched:
            ``loss_fn=attnprune.teacher_loss(teacher)``.
        include: as in :func:`attnprune.prune_attention`; only these and their blocks.
        exclude: what to leave out, likewise.
        seed: of the updates' start and of dropout; the global random state is left as found.
        progress: whether to show a progress bar.

    Returns:
        The model itself, with plain Linears again.

    Raises:
        OptionError: a number out of range, an unknown ``decay``, both ``loss_fn`` and ``teacher``, ``everywhere``
            without ``mlp``, or ``trained`` modules that are not there, hold attention, or are of half precision.
        DataError: no batch, or a loss that is not a finite scalar.
        TiedWeightsError: a target shares its weight with another module, which a merged update would change too.
        NotExpressibleError: an attention reads the weights of its projections, where no update beside them is heard.

    >>> import attnprune
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 5))
    >>> data = [(torch.randn(8, 6, 32), torch.randint(5, (8, 6))) for _ in range(4)]
    >>> report = attnprune.prune_attention(model, 0.5)
    >>> model = lora_recover(model, data, lr=1e-2, epochs=3, validation=data, progress=False)
    >>> type(model[0].self_attn.q_proj).__name__, model[0].self_attn.q_proj.weight.shape
    ('Linear', torch.Size([16, 32]))
    >>> protocol = {**AST_PROTOCOL, "trained": "1"}  # its classifier is module 1
    >>> model = lora_recover(model, data, validation=data, progress=False, **protocol)
    """
    _check(rank=rank, epochs=epochs, checks=checks)
    _check_range(alpha=(alpha, 1e9), lr=(lr, 1e9), warmup=(warmup, 1.0), dropout=(dropout, 1.0))
    if decay not in DECAYS:
        raise OptionError("decay", f"one of {', '.join(DECAYS)}", repr(decay), "check it")
    if teacher is not None and loss_fn is not None:
        raise OptionError("teacher", "no loss_fn beside it", "both", "combine them in one loss_fn (teacher_loss)")
    if everywhere and not mlp:
        raise OptionError("everywhere", "mlp=True beside it", "mlp=False", "leave one of the two out")
    loss_fn = loss_fn if teacher is None else teacher_loss(teacher)
    whole = plain(model)
    views = find_views(whole, include, exclude)
    check_views(whole, views)
    _check_called(views)
    in_full = _meant(whole, trained)
    targets = lora_targets(whole, mlp=mlp, everywhere=everywhere, include=include, exclude=exclude)
    targets = [name for name in targets if not any(f"{name}.".startswith(f"{top}.") for top in in_full)]
    _check_shared(whole, [*targets, *in_full])
    values = [parameter for name in in_full for parameter in whole.get_submodule(name).parameters()]
    data, validation = sized(data), None if validation is None else sized(validation)
    pattern = "|".join(re.escape(f"model.{name}") for name in targets)  # in full: a list would match by their ends
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    undoing_with(_values(values))
    with _as_before(whole), _compact(whole, targets) as hear, torch.enable_grad():
        torch.manual_seed(seed)
        tuner: Any = LoraModel(_Bare(whole), config, "default")
        hear()
        for parameter in whole.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()  # the updates; PEFT's layers cast their inputs
        for parameter in values:
            parameter.requires_grad_(True)
        train(whole, data, validation, loss_fn, lr, epochs, warmup, DECAYS[decay], checks, never_worse, progress)
        undoing_with(_values(p for name in targets for p in whole.get_submodule(name).parameters()))
        tuner.merge_and_unload()
    return model


def _values(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Puts back what parameters hold now."""
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def back() -> None:
        for parameter, value in saved:
            parameter.copy_(value)

    return back


class _Bare(nn.Module):
    """A model without its config, by whose type PEFT would turn names of Linears into those of experts' weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@contextmanager
def _compact(model: nn.Module, targets: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Projections that take or hand on other sizes than they hold are plain compact ones inside the block, so that
    updates have their shapes.

    Yields what makes whatever took their places take and hand on what they do.
    """
    ours: dict[str, Any] = {name: one for name in targets if isinstance(one := model.get_submodule(name), Selected)}
    ours = {name: one for name, one in ours.items() if hasattr(one, "listen")}
    was: dict[str, Any] = {}
    """By name, what the projection was: another object with its attributes."""
    with ExitStack() as stack:
        for name, one in ours.items():
            kind = type(one)
            was[name] = object.__new__(kind)
            was[name].__dict__.update(one.__dict__)
            stack.callback(object.__setattr__, one, "__class__", kind)
            object.__setattr__(one, "__class__", host_class(one))
            if isinstance(was[name], SelectedOutputs) and was[name].attnprune_features is not None:
                stack.callback(one.__dict__.update, _parameters=one._parameters)
                one.__dict__["_parameters"] = {**one._parameters, "bias": None}

        def hear() -> None:
            for name, one in was.items():
                for handle in one.listen(model.get_submodule(name), one):
                    stack.callback(handle.remove)

        yield hear


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Modules, modes, flags and random state come back after the block; merged values stay, unless it fails."""
    saved = [(module, dict(module._parameters), dict(module._modules)) for module in model.modules()]

    def back() -> None:
        for module, parameters, children in saved:
            for key in parameters:
                module.__dict__.pop(key, None)
            module._parameters, module._modules = parameters, children
        model.__dict__.pop("peft_config", None)

    with undone() as undo:
        undo.append(back)
        with restored(model), Unfused():  # fused paths read weights past their updates
            yield
        made = [
            (parameter, now)  # PEFT makes new parameters for packed attention
            for module, parameters, _ in saved
            for key, parameter in parameters.items()
            if parameter is not None and (now := module._parameters.get(key)) is not None and now is not parameter
        ]
        undoing_with(_values(parameter for parameter, _ in made))
        with torch.no_grad():
            for parameter, now in made:
                parameter.copy_(now)


def _meant(model: nn.Module, trained: Choices | None) -> list[str]:
    """The modules that are trained in full; of one inside another the outer one."""
    choices = read_choices("trained", trained)
    if choices is None:
        return []
    found = [n for n, module in model.named_modules() if n and any(means(choice, n, module) for choice in choices)]
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not found:
        tops = ", ".join(name for name, _ in model.named_children())
        raise OptionError("trained", f"a module of the model ({tops[:200]}, or inside)", repr(trained)[:80], "check it")
    attention = _in_attention(model)
    for name in found:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            if id(module) in attention:
                remedy = "attention has updates of low rank: choose other modules"
                raise OptionError("trained", "modules beside attention", f"{inner}, which is of attention", remedy)
        for inner, parameter in model.get_submodule(name).named_parameters(prefix=name):
            if parameter.dtype not in (torch.float32, torch.float64):
                remedy = "recover in float32 (model.float()), and cast afterwards"
                raise OptionError("trained", "weights of float32 or float64", f"{inner} of {parameter.dtype}", remedy)
    return found


def _check(**numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(name, "a whole number of at least 1", repr(value), "check it")


def _check_range(**numbers: tuple[object, float]) -> None:
    for name, (value, top) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= top:
            raise OptionError(name, f"a number from 0 to {top:g}", repr(value), "check it")


def _check_called(views: Sequence[AttentionView]) -> None:
    """Raises if a host reads the weights of its projections instead of calling them."""
    for view in views:
        if view.read:
            raise NotExpressibleError(
                view.name, "a host that calls its projections", "one that reads their weights, past any updates",
                "exclude= it, or tune it with attnprune.recover",
            )  # fmt: skip


def _check_shared(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises if a target, or a weight of one, is used in another place too."""
    users: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for key, child in [*module._modules.items(), *module._parameters.items()]:
            if child is not None:
                users.setdefault(id(child), set()).add((id(module), key))
    for name in targets:
        module = model.get_submodule(name)
        for key, one in [("", module), *module.named_parameters()]:
            if len(users.get(id(one), ())) > 1:
                where = f"{name}.{key}".rstrip(".")
                raise TiedWeightsError(
                    where, "a weight that is used once", "one that another module uses too", "exclude it, or untie it"
                )
