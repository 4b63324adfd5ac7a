"""Low-rank recovery of a pruned model with PEFT: :func:`lora_recover`. Needs ``peft``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from math import ceil, cos, pi
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from ..calibration.batches import batches, device_of
from ..calibration.losses import LossFn, loss_of
from ..calibration.quiet import restored
from ..errors import DataError, OptionError, TiedWeightsError
from ..families.registry import find_views, plain
from ..nn import host_class
from ..nn.attempt import undoing_with, undone
from ..nn.kept import ordinary
from ..nn.selected import Selected, SelectedOutputs
from ..nn.unfused import Unfused
from ..recovery.blocks import find_blocks
from ..recovery.distillation import teacher_loss
from ..surgery import check_views
from ..values.choices import Choices

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - cos(pi * left)) / 2,
    "none": lambda left: 1.0,
}
"""The learning rate by the fraction of steps that are left after warm-up, as a factor."""


def lora_targets(
    model: nn.Module,
    *,
    mlp: bool = True,
    include: Choices | None = None,
    exclude: Choices | None = None,
) -> list[str]:
    """The names of a model's attention projections, and of the other Linears of their blocks: for ``LoraConfig``.

    Args:
        model: any module with attention of a known family, pruned or not.
        mlp: whether the blocks' other Linears are named too.
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
    # a packed attention has its own adapter in PEFT, which covers its output projection
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


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

    The defaults are the paper's: rank 16, alpha 16, attention and MLP, Adam, 1e-4 with 5 % of the steps to warm up (and
    then linear decay to 0), one epoch, the best by validation loss. The model keeps its modules, shapes, modes and
    ``requires_grad`` flags; only weights of the targets change. If anything fails, none has changed.

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
        mlp: whether the other Linears of the blocks are trained too.
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
        OptionError: a number out of range, an unknown ``decay``, or both ``loss_fn`` and ``teacher``.
        DataError: no batch, or a loss that is not a finite scalar.
        TiedWeightsError: a target shares its weight with another module, which a merged update would change too.

    >>> import attnprune
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 5))
    >>> data = [(torch.randn(8, 6, 32), torch.randint(5, (8, 6))) for _ in range(4)]
    >>> report = attnprune.prune_attention(model, 0.5)
    >>> model = lora_recover(model, data, lr=1e-2, epochs=3, validation=data, progress=False)
    >>> type(model[0].self_attn.q_proj).__name__, model[0].self_attn.q_proj.weight.shape
    ('Linear', torch.Size([16, 32]))
    """
    _check(rank=rank, epochs=epochs, checks=checks)
    _check_range(alpha=(alpha, 1e9), lr=(lr, 1e9), warmup=(warmup, 1.0), dropout=(dropout, 1.0))
    if decay not in DECAYS:
        raise OptionError("decay", f"one of {', '.join(DECAYS)}", repr(decay), "check it")
    if teacher is not None and loss_fn is not None:
        raise OptionError("teacher", "no loss_fn beside it", "both", "combine them in one loss_fn (teacher_loss)")
    loss_fn = loss_fn if teacher is None else teacher_loss(teacher)
    whole = plain(model)
    check_views(whole, find_views(whole, include, exclude))
    targets = lora_targets(whole, mlp=mlp, include=include, exclude=exclude)
    _check_shared(whole, targets)
    data, validation = _sized(data), None if validation is None else _sized(validation)
    pattern = "|".join(re.escape(f"model.{name}") for name in targets)  # in full: a list would match by their ends
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    with _as_before(whole), _compact(whole, targets) as hear, torch.enable_grad():
        torch.manual_seed(seed)
        tuner: Any = LoraModel(_Bare(whole), config, "default")
        hear()
        for parameter in whole.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()  # the updates; PEFT's layers cast their inputs
        _train(whole, data, validation, loss_fn, lr, epochs, warmup, DECAYS[decay], checks, never_worse, progress)
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


def _train(
    model: nn.Module,
    data: Any,
    validation: Any,
    loss_fn: LossFn | None,
    lr: float,
    epochs: int,
    warmup: float,
    decay: Callable[[float], float],
    checks: int,
    never_worse: bool,
    progress: bool,
) -> None:
    """Leaves the best updates in place."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    total, device = epochs * len(data), device_of(model)
    rise = ceil(warmup * total)

    def rate(done: int) -> float:
        return (done + 1) / rise if done < rise else decay((total - done) / max(total - rise, 1))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    at = {ceil(len(data) * (i + 1) / checks) for i in range(checks)}
    best: tuple[float, list[Tensor]] | None = None

    def look() -> None:
        nonlocal best
        if validation is None:
            return
        loss = _mean_loss(model, validation, loss_fn)
        if best is None or loss < best[0]:
            best = loss, [p.detach().clone() for p in parameters]

    if never_worse:
        look()
    for epoch in range(epochs):
        model.train()
        for number, batch in enumerate(batches(data, device, progress, f"LoRA, epoch {epoch + 1} of {epochs}"), 1):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, batch, loss_fn)
            if not loss.requires_grad:
                raise DataError("data", "a loss that depends on the model", "no gradient", "return it without detach")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            if number in at:
                look()
                model.train()
    if best is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, best[1], strict=True):
                parameter.copy_(value)


def _mean_loss(model: nn.Module, data: Any, loss_fn: LossFn | None) -> float:
    """The mean loss over batches, without dropout."""
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, batch, loss_fn)) for batch in batches(data, device_of(model), False, "loss")]
    return sum(losses) / len(losses)


def _sized(data: Any) -> Any:
    """Data that can be counted and read again."""
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Tensor, Mapping)):
        if isinstance(data, Iterator) or not isinstance(data, Sized):
            data = list(data)
        if not len(data):
            raise DataError("data", "at least one batch", "none", "check the data set; was the iterator used up before")
        return data
    raise DataError("data", "an iterable of batches", f"a {type(data).__name__}", "put a single batch in a list")


def _check(**numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(name, "a whole number of at least 1", repr(value), "check it")


def _check_range(**numbers: tuple[object, float]) -> None:
    for name, (value, top) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= top:
            raise OptionError(name, f"a number from 0 to {top:g}", repr(value), "check it")


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
