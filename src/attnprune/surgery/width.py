"""The model's width at an attention: what Q, K and V read, and what O writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from ..errors import NotExpressibleError
from ..families.base import AttentionView
from ..families.calls import Call
from ..families.linears import put
from ..families.proof.runs import plainly, run, short
from ..families.proof.stand_in import StandIn
from ..families.registry import again
from ..nn.attempt import MACHINE
from ..values.layout import PROJECTIONS, Projection
from ..values.spec import AttentionSpec
from .changes import along
from .pack import lay_again
from .patch import successor

Kept = Mapping[Projection, Sequence[int]]
"""Of Q, K and V the places that stay of what they read, of O those of what it writes; a projection that is not named
keeps all."""


def narrow(view: AttentionView, kept: Kept, *, apart: bool = False) -> AttentionView:
    """Takes places of the model's width from an attention; heads and their channels stay as they are.

    Columns of Q, K and V go, and rows of O with its bias.

    Args:
        view: the attention, pruned or not.
        kept: what stays.
        apart: whether its host needs a forward of ours to run at another width (:func:`needs_forward`).

    Returns:
        The view of what it is now.

    >>> from attnprune.families.registry import all_views
    >>> layer = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> view = narrow(all_views(layer)[0], dict.fromkeys("qkvo", range(12)), apart=True)
    >>> view.spec.d_model, view.spec.qk_dims, layer(*[torch.ones(1, 3, 12)] * 3)[0].shape
    (12, (4, 4, 4, 4), torch.Size([1, 3, 12]))
    """
    with torch.inference_mode(False), torch.no_grad():
        if apart and not view.mixin_runs:
            _run_by_ours(view)
            view = again(view)
        new: dict[tuple[int, str], tuple[nn.Module, str, nn.Parameter]] = {}
        for p, places in kept.items():
            slot = view.slots[f"{p}.weight"]
            new[id(slot.owner), slot.name] = slot.owner, slot.name, _picked(slot.parameter, 1 - slot.axis, places)
            bias = slot.owner._parameters.get("bias")
            if p == "o" and bias is not None:
                new[id(slot.owner), "bias"] = slot.owner, "bias", _picked(bias, 0, places)
        for owner, name, parameter in new.values():
            put(owner, name, parameter)
        _tell(view, _after(view.spec, kept))
        view = again(view)
        lay_again(view)
    return view


def _after(spec: AttentionSpec, kept: Kept) -> AttentionSpec:
    names = {"q": "q_in", "k": "k_in", "v": "v_in", "o": "d_model"}
    return replace(spec, **{names[p]: len(places) for p, places in kept.items()})  # type: ignore[arg-type]


def _tell(view: AttentionView, spec: AttentionSpec) -> None:
    """What an attention knows of its own width follows."""
    state = view.state
    if state is not None and state.expanded is not None:
        known = state.expanded
        widths = {"q_in": spec.q_in, "k_in": spec.k_in, "v_in": spec.v_in, "d_model": spec.d_model}
        view.module.attnprune_state = state._replace(  # type: ignore[assignment]
            expanded=known._replace(spec=replace(known.spec, **widths))
        )
    elif view.mixin_runs:
        view.adapter.reshape(view, spec)


def _picked(old: nn.Parameter, axis: int, places: Sequence[int]) -> nn.Parameter:
    """A parameter with these places along an axis alone; gradient, flags and hooks come along."""
    index = torch.tensor(list(places), dtype=torch.long, device=old.device)
    return successor(old, old.detach().index_select(axis, index), lambda grad: grad.index_select(axis, index), 1.0)


def _run_by_ours(view: AttentionView) -> None:
    """Gives an attention the forward of ours that was proven to compute what its host does; its shape stays."""
    assert view.mixin is not None, "needs_forward checks this before anything moves"
    tensors = {}
    for key, slot in view.slots.items():

        def own(tensor: Tensor, axis: int = slot.axis, places: Sequence[int] = slot.places) -> Tensor:
            return along(tensor, axis, places, torch.clone)

        tensors[key] = successor(slot.parameter, own(slot.parameter.detach()), own, 1.0)
    view.commit(tensors, view.spec)
    view.decouple(view.mixin)
    state = view.state
    assert state is not None
    view.module.attnprune_state = state._replace(stock=False)  # type: ignore[assignment]


def needs_forward(view: AttentionView) -> bool:
    """Whether an attention needs a forward of ours at another width of the model; found by running a copy of it.

    Raises:
        NotExpressibleError: it cannot run at another width at all.
    """
    if not (view.called or view.mixin_runs):  # a packed weight of the host's own: as high as the model is wide
        if view.mixin is None:
            raise _fixed(view, "one that keeps its weights in itself")
        return True
    with plainly():
        for small, dtype in ((True, torch.float64), (False, torch.float64), (False, torch.float32)):
            copied = partial(StandIn, view, dtype, small)
            try:
                dense = replace(copied().view, verdict=view.verdict)
            except MACHINE:
                raise
            except Exception:  # a class of the user's that cannot be copied is taken at its family's word
                return False
            number = next((n for n, call in _numbered(dense) if _fails(dense, call, dtype) is None), None)
            if number is None:
                continue
            problems = []
            for apart in (False, True) if view.mixin is not None and not view.runs_expanded else (False,):
                problem = _narrower(replace(copied().view, verdict=view.verdict), number, dtype, apart)
                if problem is None:
                    return apart
                problems.append(problem)
            raise _fixed(view, problems[0])
    return False


def _narrower(copy: AttentionView, number: int, dtype: torch.dtype, apart: bool) -> str | None:
    """What is in the way of a copy that lost a place of the width; None: it runs."""
    sizes = [copy.spec.q_in, copy.spec.k_in, copy.spec.v_in, copy.spec.d_model]
    inside = {id(module) for module in copy.module.modules()}
    kept: dict[Projection, Sequence[int]] = {
        p: range(size - 1) for p, size in zip(PROJECTIONS, sizes, strict=True) if id(copy.owner(p)) in inside
    }
    try:
        narrower = narrow(copy, kept, apart=apart)
        return _fails(narrower, dict(_numbered(narrower))[number], dtype)
    except Exception as error:
        return short(error)


def _numbered(view: AttentionView) -> Iterator[tuple[int, Call]]:
    """Calls of the module that splits heads."""
    return zip(count(), view.adapter.calls(replace(view, host=None)), strict=False)


def _fails(view: AttentionView, call: Call, dtype: torch.dtype) -> str | None:
    """What a call raises; None: it runs."""
    try:
        run(view.module, call, dtype)
    except Exception as error:  # whatever a class of the user's raises
        return short(error)
    return None


def _fixed(view: AttentionView, found: str) -> NotExpressibleError:
    return NotExpressibleError(
        view.name, "attention that runs at another width of the model", found,
        "leave the width alone (Torch-Pruning: pruner_options(model, width=False))",
    )  # fmt: skip
