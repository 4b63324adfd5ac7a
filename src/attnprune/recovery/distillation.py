"""Recovery without labels: a pruned model learns what the dense one says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.batches import forward
from ..calibration.losses import LossFn, token_mask
from ..calibration.quiet import undisturbed
from ..errors import DataError, OptionError
from ..families.registry import plain
from ..nn.attempt import undone
from ..nn.outputs import Output, OutputFn, outputs_of
from .blocks import find_blocks


def distillation_loss(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    output_fn: OutputFn | None = None,
) -> Tensor:
    """How far a student's output is from a teacher's; 0 if and only if they agree.

    ``T^2 KL(softmax(t / T) || softmax(s / T))`` over the last dimension (Hinton et al. 2015, arXiv 1503.02531),
    averaged over all others. Outputs without classes (``last_hidden_state``, or a last dimension of 1) are compared by
    the mean square error instead. Of several tensors (:func:`attnprune.scorers.outputs_of`) it is the sum. The teacher
    gets no gradient.

    Args:
        student: logits ``(..., classes)``, or what a model returns.
        teacher: the like, of the same shapes.
        temperature: T; above 1 what the teacher thinks unlikely counts more.
        mask: ``(...)`` without the last dimension, 0 or False where a token does not count.
        output_fn: takes what a model returns, and gives the tensor or tensors to compare.

    Raises:
        DataError: no such output, or shapes that differ.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> float(distillation_loss(logits, logits)), round(float(distillation_loss(logits, logits.flip(1))), 3)
    (0.0, 0.993)
    """
    check_temperature(temperature)
    mine, theirs = outputs_of(student, output_fn), outputs_of(teacher, output_fn)
    shapes = [[(one.name, *one.tensor.shape) for one in found] for found in (mine, theirs)]
    if [shape[1:] for shape in shapes[0]] != [shape[1:] for shape in shapes[1]]:
        remedy = "prune attention only, and give both the same batch"
        found, expected = (", ".join(f"{name} {tuple(shape)}".strip() for name, *shape in one) for one in shapes)
        raise DataError("student", f"the teacher's shape {expected}", found, remedy)
    bare = isinstance(student, Tensor)
    return torch.stack([_apart(*pair, temperature, mask, bare) for pair in zip(mine, theirs, strict=True)]).sum()


def _apart(student: Output, teacher: Output, temperature: float, mask: Tensor | None, bare: bool) -> Tensor:
    """How far one tensor is from the teacher's; one that is the whole output are logits."""
    s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student.tensor, teacher.tensor.detach()))
    dim = student._replace(name="logits").classes if bare else student.classes
    if dim is None:
        return _mean((s - t).square().mean(-1) if s.dim() else (s - t).square(), mask)
    s, t = F.log_softmax(s / temperature, dim), F.log_softmax(t / temperature, dim)
    apart = _mean(F.kl_div(s, t, reduction="none", log_target=True).sum(dim) * temperature**2, mask)
    return apart - apart.detach().clamp_max(0)  # rounding alone makes it negative; gradients are as they were


def hidden_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], *, mask: Tensor | None = None) -> Tensor:
    """The mean over blocks of ``|s - t|^2 / |t|^2``: how far what blocks hand on is from the teacher's.

    Args:
        student: outputs by name, as :func:`capture` collects them.
        teacher: the like; names and shapes must be the same.
        mask: ``(batch, tokens)``, 0 or False where a token does not count.

    Raises:
        DataError: nothing was captured, or names or shapes differ.
    """
    if not student or student.keys() != teacher.keys():
        found = f"{sorted(student)[:3]} and {sorted(teacher)[:3]}"
        remedy = "run each model once inside its capture; a compiled model runs no hooks"
        raise DataError("capture", "outputs of the same blocks of student and teacher", found, remedy)
    parts = []
    for name, s in student.items():
        t = teacher[name].detach()
        if s.shape != t.shape:
            remedy = "prune attention only, and give both the same batch"
            raise DataError(name, f"the teacher's shape {tuple(t.shape)}", str(tuple(s.shape)), remedy)
        s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, t))
        size = _mean(t.square().mean(-1), mask).clamp_min(torch.finfo(t.dtype).tiny)
        parts.append(_mean((s - t).square().mean(-1), mask) / size)
    return torch.stack(parts).mean()


@contextmanager
def capture(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collects what modules of a model give, by name, while it runs inside the block; hooks are gone after it.

    Args:
        model: any module.
        names: of which modules; None: the blocks around attention.

    Yields:
        A dict that every forward pass fills: the output of each module, or the first tensor of a tuple.

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).train()
    >>> with capture(model) as seen:
    ...     _ = model(torch.randn(3, 5, 16))
    >>> {name: tuple(x.shape) for name, x in seen.items()}
    {'layers.0': (3, 5, 16), 'layers.1': (3, 5, 16)}
    """
    model = plain(model)
    names = [block.name for block in find_blocks(model)] if names is None else names
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = first_tensor(output)

        return hook

    with undone() as undo:
        for name in names:
            undo.append(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield seen


def first_tensor(output: Any) -> Tensor:
    """What a block hands on: its output, or the first tensor of a tuple."""
    return outputs_of(output[0] if isinstance(output, (tuple, list)) else output)[0].tensor


def teacher_loss(
    teacher: nn.Module, *, temperature: float = 1.0, hidden: float = 0.0, output_fn: OutputFn | None = None
) -> LossFn:
    """A ``loss_fn(model, batch)`` that needs no labels: :func:`distillation_loss` against a teacher's output.

    The teacher runs without gradients and dropout and is left as found. Batches are taken as by
    :func:`attnprune.prune_attention`; tokens that a mapping's ``attention_mask`` leaves out do not count.

    Args:
        teacher: usually the model before pruning (``copy.deepcopy``).
        temperature: as in :func:`distillation_loss`.
        hidden: the weight of :func:`hidden_loss` over the blocks around attention; 0 leaves it out.
        output_fn: as in :func:`distillation_loss`.

    >>> import copy, attnprune
    >>> _ = torch.manual_seed(0)
    >>> teacher = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 5)).eval()
    >>> student = copy.deepcopy(teacher)
    >>> loss_fn, x = attnprune.teacher_loss(teacher, hidden=1.0), torch.randn(8, 4, 16)
    >>> float(loss_fn(student, x).detach())
    0.0
    >>> report = attnprune.prune_attention(student, 0.5)
    >>> float(loss_fn(student, x).detach()) > 0
    True
    """
    check_temperature(temperature)
    if not isinstance(teacher, nn.Module):
        raise OptionError("teacher", "a torch.nn.Module", f"a {type(teacher).__name__}", "pass the dense model")
    if isinstance(hidden, bool) or not isinstance(hidden, (int, float)) or not 0 <= hidden < float("inf"):
        raise OptionError("hidden", "a finite weight of at least 0", repr(hidden), "use 1.0, or 0.0 for outputs alone")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with undisturbed(teacher, ()), torch.no_grad(), capture(teacher, None if hidden else ()) as theirs:
            said = forward(teacher, batch)
        with capture(model, list(theirs)) as mine:
            output = forward(model, batch)
        mask = token_mask(batch)
        total = distillation_loss(output, said, temperature=temperature, mask=mask, output_fn=output_fn)
        if not hidden:
            return total
        apart = hidden_loss(mine, theirs, mask=mask)
        if total.requires_grad and not apart.requires_grad:
            remedy = "with checkpointing use use_reentrant=False, or hidden=0.0"
            raise DataError("capture", "outputs of blocks with a gradient", "none", remedy)
        return total + hidden * apart

    return loss


def check_temperature(temperature: object) -> None:
    """Raises OptionError unless it is a positive number."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < float("inf"):  # type: ignore[operator]
        raise OptionError("temperature", "a positive number", repr(temperature), "use 1.0, or 2.0 to soften")


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over what the mask (of the same shape, or of fewer trailing dimensions) lets count."""
    if mask is None or values.shape[: mask.dim()] != mask.shape:
        return values.mean()
    weights = (mask != 0).to(values).reshape(*mask.shape, *[1] * (values.dim() - mask.dim())).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp_min(1)
