"""The walk through a model: which of its modules are attention, how they may run, and what is passed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple
from warnings import warn

from torch import nn

from ..errors import AdapterError, AttnPruneError, AttnPruneWarning, NoAttentionError, OptionError, ShardedError
from ..nn.kept import ordinary
from ..values.choices import Choice, Choices, means, read_choices
from .base import Adapter, AttentionView
from .expansion import expanded_view
from .linears import computable, computes_linear, is_tuner
from .looks import Skipped, attending, looks, looks_like
from .masks import heads_of_masks
from .mha.readers import read_by_hand
from .proof.record import recorded_calls
from .proof.verdict import verdict_of
from .table import adapter_of, registered
from .tied import in_one_way
from .ways import Verdict

Run = Callable[[], object]
"""Runs the user's model once, on inputs of the user's, without a trace."""


class _Found(NamedTuple):
    name: str
    module: nn.Module
    adapter: Adapter

    def view(self) -> AttentionView:
        """The live view; raises where the module is wrapped, quantised or not what it seems."""
        return expanded_view(self.name, self.module, self.adapter) or replace(
            self.adapter.view(self.name, self.module), host=self.module
        )


def _walk(model: nn.Module) -> Iterator[_Found]:
    """Modules that are attention by what their family says, in the order of ``named_modules``, each once."""
    inside: set[nn.Module] = set()  # parts of an attention already found
    for name, module in model.named_modules():
        adapter = None if module in inside else adapter_of(module)
        if adapter is None:
            continue

        inside.update(module.modules())
        yield _Found(name, module, adapter)


class Survey:
    """What a model holds: attention that can be pruned, and what looks like attention and cannot.

    Args:
        model: any module.
        only: names of the attention modules to look at; None: all.
        trusted: names that are taken at their family's word where they cannot be run, as somebody found them prunable
            before.
        run: runs the model; modules whose arguments have names that tell nothing are then seen in a call.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        only: Collection[str] | None = None,
        trusted: Collection[str] = (),
        run: Run | None = None,
    ) -> None:
        _check_partitioned(model)
        self.model = model
        self.views: list[AttentionView] = []
        self.errors: dict[str, AttnPruneError] = {}
        """Attention of known families that is wrapped, quantised and so on."""
        self.why = read_by_hand(model)
        """By name, why a module of a known family is not prunable."""
        self._skipped: dict[bool, tuple[Skipped, ...]] = {}
        pending: list[AttentionView] = []
        walk = list(_walk(model))
        masks = heads_of_masks(model, [found.module for found in walk])
        for found in walk:
            if (only is not None and found.name not in only) or found.name in self.why:
                continue
            try:
                view = found.view()
            except AdapterError as error:
                if registered(found.adapter):
                    raise
                if looks(found.module):  # others have parts of such names too: state space models, for one
                    self.why[found.name] = f"expected {error.expected}, found {error.found}"
            except AttnPruneError as error:
                self.errors[found.name] = error
            else:
                heads = view.state.dense_heads if view.state else view.spec.heads
                view = replace(view, masks_by_head=heads in masks)
                if not (view.mixin_runs or view.runs_expanded) and _plain(view):
                    view = _judged(view, verdict_of(view))
                    pending.append(view)
                self.views.append(view)
        self.views = in_one_way(list(self._settled(pending, trusted, run)))

    def _settled(
        self, pending: list[AttentionView], trusted: Collection[str], run: Run | None
    ) -> Iterator[AttentionView]:
        unknown = [view for view in pending if view.verdict is not None and not view.verdict.ran]
        calls = recorded_calls(unknown, run) if unknown and run is not None else {}
        for view in self.views:
            verdict = view.verdict
            if verdict is not None and not verdict.ran and view.name in calls:
                verdict = verdict_of(view, calls[view.name])
                view = _judged(view, verdict)
            # what somebody says who knows the class, where running it says nothing
            said = view.name in trusted or registered(view.adapter)
            silent = verdict is not None and not (verdict.ran and verdict.attends)
            if verdict is None or verdict.prunable or (said and silent and view.way(view.spec) is not None):
                yield view
            elif looks(view.top) or verdict.attends or not verdict.ran:
                self.why[view.name] = verdict.why

    def skipped(self, run: Run | None = None) -> tuple[Skipped, ...]:
        """What is not prunable, with reasons; with ``run`` also modules that are seen to attend."""
        if (run is not None) not in self._skipped:
            self._skipped[run is not None] = self._passed_over(run)
        return self._skipped[run is not None]

    @property
    def names(self) -> list[str]:
        """The attention modules that can be pruned, once nothing wraps them, in no order."""
        return [*(view.name for view in self.views), *self.errors]

    def _passed_over(self, run: Run | None) -> tuple[Skipped, ...]:
        known = [view.top for view in self.views] + [
            self.model.get_submodule(name) if name else self.model for name in self.errors
        ]
        found = {one.name: one for one in looks_like(self.model, known, self.why)}
        if run is not None:
            for one in attending(self.model, [*known, *(self.model.get_submodule(n) for n in found)], run):
                found.setdefault(one.name, one)
        order = {name: place for place, (name, _) in enumerate(self.model.named_modules())}
        return tuple(sorted(found.values(), key=lambda one: order.get(one.name, 0)))


def _judged(view: AttentionView, verdict: Verdict) -> AttentionView:
    return replace(view.lying(verdict.order), verdict=verdict, spec=verdict.told(view.spec))


def _plain(view: AttentionView) -> bool:
    """Whether nothing wraps the module or its projections; what does is refused by name, before anything is pruned."""
    for module in view.modules:
        linear = isinstance(module, nn.Linear) and not computes_linear(module)
        if "forward" in module.__dict__ or linear or is_tuner(module):
            return False
    parameters = [slot.owner._parameters.get(slot.name) for slot in view.slots.values()]
    return all(computable(one) for one in parameters)


def _check_partitioned(model: nn.Module) -> None:
    """Raises ShardedError where parameters lie in parts with other processes (DeepSpeed's ZeRO-3)."""
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", None)
        if shape is not None and parameter.shape != shape:
            raise ShardedError(
                name,
                f"a whole parameter of shape {tuple(shape)}",
                f"one of shape {tuple(parameter.shape)}, partitioned by ZeRO-3",
                "apply the plan before deepspeed.initialize; to plan alone, gather all parameters for a while "
                "(deepspeed.zero.GatheredParameters)",
            )


def again(view: AttentionView) -> AttentionView:
    """The view of the same attention as it is now; what was found by running it is taken over."""
    found = _Found(view.name, view.top, view.adapter).view()
    return replace(found, verdict=view.verdict, masks_by_head=view.masks_by_head)


def attention_names(model: nn.Module) -> list[str]:
    """The names of the attention modules of a model."""
    return [found.name for found in _walk(model)]


def all_views(model: nn.Module, names: Collection[str] | None = None) -> list[AttentionView]:
    """The attention modules of a model, or those of these names; none is not an error."""
    survey = Survey(model, only=names, trusted=names or ())
    for error in survey.errors.values():
        raise error
    return survey.views


def sound_views(model: nn.Module) -> list[AttentionView]:
    """The attention modules of a model, without those that something wraps."""
    return Survey(model).views


@ordinary
def skipped_attention(model: nn.Module, run: Run | None = None) -> tuple[Skipped, ...]:
    """What looks like attention and cannot be pruned, each with the reason.

    Args:
        model: any module.
        run: runs the model once (``lambda: model(x)``); then what is seen to take a softmax over keys counts too, and
            modules whose arguments cannot be guessed are judged by the call that the model makes.

    >>> class Linear(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.num_heads = 2
    ...         self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
    ...     def forward(self, x):
    ...         return self.o_proj(self.q_proj(x) @ (self.k_proj(x).mT @ self.v_proj(x)))
    >>> skipped_attention(nn.Sequential(Linear()))
    (Skipped(name='0', kind='Linear', why='no softmax over keys was seen in its forward'),)
    """
    model = plain(model)
    return Survey(model, run=run).skipped(run)


def find_views(
    model: nn.Module,
    include: Choices | None = None,
    exclude: Choices | None = None,
    *,
    run: Run | None = None,
) -> list[AttentionView]:
    """The attention modules of a model that are meant.

    Args:
        model: any module.
        include: glob patterns (``"encoder.*"``), classes, or functions of name and module; one of them must mean a
            module. None: all.
        exclude: the same; none of them may mean it.
        run: runs the model once, for modules whose arguments have names that tell nothing.

    Raises:
        NoAttentionError: none found, or none left; says of what looks like attention why it is not prunable.
        OptionError: a pattern matches no attention.
    """
    return select(Survey(model, run=run), include, exclude)


def select(survey: Survey, include: Choices | None = None, exclude: Choices | None = None) -> list[AttentionView]:
    """The attention modules of a survey that are meant (:func:`find_views`)."""
    model = survey.model
    names = survey.names
    if not names:
        looks = [f"{one.name or 'the model itself'} ({one.kind}): {one.why}" for one in survey.skipped()]
        raise NoAttentionError(
            type(model).__name__,
            "at least one attention module that can be pruned",
            f"none; modules that look like one: {_shorten(looks) or 'none'}",
            "pass example_inputs= to make_plan or prune_attention where a module could not be run, or tell how its "
            "class is built (attnprune.register_adapter)",
        )
    meant = chosen(survey, include, exclude)
    for name, error in survey.errors.items():
        if meant(name):
            raise error
    left = [view for view in survey.views if meant(view.name)]
    if not left:
        raise NoAttentionError(
            "include and exclude", f"at least one of {_shorten(names)}", "none", "loosen the patterns"
        )
    return left


def chosen(survey: Survey, include: Choices | None, exclude: Choices | None) -> Callable[[str], bool]:
    """Which names are meant. A pattern has to match some attention, prunable or not; a class or function need not.

    Raises:
        OptionError: a pattern matches none.
    """
    model, names = survey.model, survey.names
    if include is not None or exclude is not None:
        names = [*names, *(one.name for one in survey.skipped())]
    parts = {view.name: view.module for view in survey.views}
    wanted, unwanted = read_choices("include", include), read_choices("exclude", exclude)
    for option, choices in (("include", wanted), ("exclude", unwanted)):
        for pattern in choices or ():
            if isinstance(pattern, str) and not any(means(pattern, name, None) for name in names):
                near = get_close_matches(pattern, names, n=3, cutoff=0.0)
                expected, remedy = "patterns that match an attention module", f"names here are like {near}"
                raise OptionError(option, expected, repr(pattern), remedy)

    def any_of(choices: Sequence[Choice], name: str) -> bool:
        module = model.get_submodule(name)
        return any(means(choice, name, module, parts.get(name)) for choice in choices)

    def meant(name: str) -> bool:
        return (wanted is None or any_of(wanted, name)) and not (unwanted and any_of(unwanted, name))

    return meant


def report_skipped(skipped: Sequence[Skipped], strict: bool) -> None:
    """Says what is passed over: a warning, or with ``strict`` an error.

    Raises:
        NoAttentionError: strict, and something is passed over.
    """
    if not skipped:
        return
    found = _shorten([f"{one.name or 'the model itself'} ({one.kind}): {one.why}" for one in skipped])
    if strict:
        remedy = "exclude it by name, leave strict off, or tell how its class is built (attnprune.register_adapter)"
        raise NoAttentionError("strict=True", "every attention to be prunable", found, remedy)
    warn(f"Attention that is not pruned: {found}.", AttnPruneWarning, stacklevel=3)


def _shorten(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plain(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile returned, or the model itself."""
    if not isinstance(model, nn.Module):
        raise OptionError("model", "a torch.nn.Module", f"a {type(model).__name__}", "pass the model itself")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def undressed(model: nn.Module) -> nn.Module:
    """The module inside ``nn.DataParallel`` too: what a file of a model is about."""
    model = plain(model)
    return plain(model.module) if isinstance(model, nn.DataParallel) else model
