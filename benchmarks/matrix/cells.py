"""What is checked of a family: one function a cell, which gives "passed", "-" with or without a reason, or a reason."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnprune
from attnprune.errors import AttnPruneError, CheckpointError
from attnprune.families.registry import Survey
from attnprune.report.report import Report

from .running import Host, gap, outputs, run
from .seen import attended, unsaid

TOLERANCE = 1e-8
"""By which share of its largest number an output in float64 may differ."""
SINGLE = 1e-5
"""The same where a model in double precision rounds to single on its way."""
PASSED, NOTHING = "passed", "-"
PLANS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "channels": (0.5, {}),
    "heads": (0.5, {"granularity": "head", "scope": "local"}),
    "ragged": (0.4, {"heads": "ragged", "scope": "local"}),
    "qk != vo": ({"qk": 0.5, "vo": 0.25}, {}),
}
"""What is asked for, and how, by cell."""


@dataclass
class Case:
    """A family and what its cells share."""

    host: Host
    given: Any
    """What the model is called with."""
    expected: list[Tensor]
    """What the dense model gives."""
    ran: set[str] = field(default_factory=set)
    """Modules that run."""
    limit: float = TOLERANCE
    """What outputs may differ by."""
    _pruned: nn.Module | None = None

    def pruned(self) -> nn.Module:
        """A model with half of its channels gone."""
        if self._pruned is None:
            model = self.host.make()
            with quiet():
                attnprune.apply_plan(model, self.plan(model, *PLANS["channels"]))
            self._pruned = model
        return self._pruned

    def plan(self, model: nn.Module, ratio: Any, options: Mapping[str, Any]) -> attnprune.Plan:
        """A plan for a model of the family; without data, by magnitude."""
        with quiet():
            return attnprune.make_plan(model, ratio, example_inputs=self.given, **options)

    def single(self) -> tuple[list[str], bool]:
        """Names of attention with one head, which cannot lose it, and whether there is no other."""
        model = self.host.make()
        with quiet():
            found = Survey(model, run=lambda: run(model, self.given)).views
        names = [view.name for view in found if len(view.spec.head_units) == 1]
        return names, len(names) == len(found)


@contextmanager
def quiet() -> Any:
    """Nothing is said: skipped attention is in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def short(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, AttnPruneError):
        return " ".join(str(error).split())[:240]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# what there is, before anything is pruned


def found_in(case: Case) -> dict[str, Any]:
    """How many attention modules there are, and which are skipped or passed over without a word."""
    model = case.host.make()
    seen = attended(model, lambda: run(model, case.given))
    case.ran, case.limit = seen.ran, SINGLE if seen.single else TOLERANCE
    with quiet():
        survey = Survey(model, run=lambda: run(model, case.given))
        skipped = survey.skipped(lambda: run(model, case.given))
    names = [view.name for view in survey.views]
    tops = [*names, *survey.errors, *(one.name for one in skipped)]
    reasons = Counter((one.kind, one.why) for one in skipped)
    reasons.update((type(model.get_submodule(name)).__name__, short(error)) for name, error in survey.errors.items())
    return {
        "attention": len(names) + sum(reasons.values()),
        "prunable": len(names),
        "run": sum(name in case.ran or any(one.startswith(f"{name}.") for one in case.ran) for name in names),
        "skipped": [[kind, why, count] for (kind, why), count in reasons.items()],
        "silent": unsaid(model, seen.attends, tops),
        "seen": len(seen.attends),
        "single": seen.single,
    }


# plans


def _compared(case: Case, ratio: Any, options: Mapping[str, Any]) -> tuple[str, Report | None, nn.Module]:
    """Whether a pruned model computes what the masked dense one does, the law of laws."""
    model = case.host.make()
    plan = case.plan(model, ratio, options)
    if plan.empty:
        return f"{NOTHING} nothing to remove", None, model
    with attnprune.masked(model, plan):
        expected = outputs(model, case.given)
    with quiet():
        report = attnprune.apply_plan(model, plan)
    error = gap(outputs(model, case.given), expected)
    if not error <= case.limit:
        return f"wrong: off by {error:.1e}", report, model
    if gap(expected, case.expected) <= 1e-12:
        return "not seen: these inputs do not reach what is pruned", report, model
    return PASSED, report, model


def by_plan(name: str) -> Callable[[Case], dict[str, Any]]:
    """The cell of one of :data:`PLANS`; that of channels also says how modules run."""

    def cell(case: Case) -> dict[str, Any]:
        ratio, options = PLANS[name]
        if name == "heads":
            exclude, every = case.single()
            if every:
                return {name: f"{NOTHING} one head"}
            options = {**options, "exclude": exclude}
        said, report, model = _compared(case, ratio, options)
        found: dict[str, Any] = {name: said}
        if report is not None and name == "channels":
            ways = Counter(way.partition(": ")[0] for way in report.ways.values())
            why = Counter(way.partition(": ")[2] for way in report.ways.values())
            found |= {"ways": dict(ways), "expanded": {reason: count for reason, count in why.items() if reason}}
            case._pruned = model
        return found

    return cell


def rotated(case: Case) -> dict[str, Any]:
    """Heads rotated by data before directions go; nothing is refitted, so that the masked model is to compare with."""
    options = {"basis": "rotated", "compensate": False, "data": [case.given], "progress": False}
    said, report, _ = _compared(case, 0.5, options)
    if report is not None and said.startswith((PASSED, "not seen")):  # directions of no energy may go unseen
        said = PASSED
        folds = [layer.fold is not None for layer in report.plan if not layer.empty]
        notes = [note for note in report.notes if "keeps its own channels" in note]
        kinds = {note.partition(" ")[0] for note in notes}
        if not any(folds) or kinds == {"qk", "vo"}:
            said = f"channels as they stand: {'; '.join(notes) or 'no map was made'}"
        elif kinds:
            said = f"{PASSED}, {'vo' if 'qk' in kinds else 'qk'} alone"
    return {"rotated": said}


# cache


def cache(case: Case) -> dict[str, Any]:
    """Generation with a cache, greedy and by beams, beside generation without one."""
    pruned: Any = case.pruned()
    can = getattr(pruned, "can_generate", None)
    if can is None or not can():
        return {"cache": NOTHING}
    given = {name: one for name, one in case.given.items() if name not in ("attention_mask", "decoder_input_ids")}
    if isinstance(case.given.get("attention_mask"), Tensor) and "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    try:
        dense = _cached(case.host.make(), given, case.limit)
    except Exception as error:
        return {"cache": f"{NOTHING} the dense model does not generate ({short(error)})"}
    if dense:
        return {"cache": f"{NOTHING} {dense} of the dense model too"}
    found, model = _cached(pruned, given, case.limit), case.host.make()
    if not found:
        return {"cache": PASSED}
    with attnprune.masked(model, case.plan(model, *PLANS["channels"])):  # where rounding decides who is attended to
        masked = _cached(model, given, case.limit)
    return {"cache": f"{NOTHING} {masked} of the dense model with zeros too" if masked else found}


def _cached(model: Any, given: Mapping[str, Any], limit: float) -> str:
    """In what cached generation differs from uncached; empty if in nothing."""
    start = {"decoder_start_token_id": 1} if getattr(model.config, "is_encoder_decoder", False) else {}
    for beams in (1, 2):
        options = {
            **start,
            "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams,
            "return_dict_in_generate": True, "output_logits": True,
        }  # fmt: skip
        found = []
        for use in (True, False):
            torch.manual_seed(0)
            with quiet(), torch.no_grad():
                made = model.generate(**given, **options, use_cache=use)
            found.append(made)
        one, other = found
        logits = [[x[x.isfinite()] for x in side.logits] for side in found]
        if one.sequences.shape != other.sequences.shape or not torch.equal(one.sequences, other.sequences):
            return f"tokens with and without a cache differ, {beams} beam{'s' * (beams > 1)}"
        if (error := gap(*logits)) > limit:
            return f"logits with and without a cache differ by {error:.1e}"
    return ""


# saving


def saved(case: Case) -> dict[str, Any]:
    """Save and load, by attnprune and, of models of transformers, by their own ``save_pretrained``."""
    pruned: Any = case.pruned()
    expected = outputs(pruned, case.given)
    with tempfile.TemporaryDirectory() as folder, quiet():
        attnprune.save_pruned(pruned, Path(folder, "ours"))
        whole = hasattr(pruned, "save_pretrained") and case.host.source == "transformers"
        again = attnprune.load_pruned(Path(folder, "ours"), None if whole else case.host.make())
        error = gap(outputs(ready(again, pruned), case.given), expected)
        if error > case.limit:
            return {"save/load": f"save_pruned: loaded again it is off by {error:.1e}"}
        if whole:
            pruned.save_pretrained(Path(folder, "theirs"))
            try:
                again = attnprune.from_pretrained(Path(folder, "theirs"))
            except CheckpointError:  # files hold experts one by one, the model all in one tensor
                from attnprune.integrations.auto import AttnPruneConfig

                options = {"quantization_config": AttnPruneConfig(), "dtype": next(pruned.parameters()).dtype}
                again = type(pruned).from_pretrained(Path(folder, "theirs"), **options)
            error = gap(outputs(ready(again, pruned), case.given), expected)
            if error > case.limit:
                dense: Any = case.host.make()
                dense.save_pretrained(Path(folder, "dense"))
                again = type(dense).from_pretrained(Path(folder, "dense"), dtype=torch.float64)
                theirs = gap(outputs(ready(again, dense), case.given), case.expected)
                said = f"save_pretrained: loaded again it is off by {error:.1e}"
                return {"save/load": f"{NOTHING} {said}, and dense by {theirs:.1e}" if theirs > case.limit else said}
    return {"save/load": PASSED}


def ready(model: Any, saved: Any) -> nn.Module:
    """A loaded model, to be run as the one that was saved: by the same kernel, as some misread masks of single
    precision beside doubles; and the fused kernel of experts has no double precision."""
    kernel = getattr(getattr(saved, "config", None), "_attn_implementation", None)
    if kernel == "eager" and model.config._attn_implementation != kernel:
        model.set_attn_implementation(kernel)
    if hasattr(getattr(model, "config", None), "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model.eval()


def stock_export(case: Case) -> dict[str, Any]:
    """A checkpoint that the class of transformers loads by itself: of fewer channels, or else of fewer whole heads."""
    if case.host.source != "transformers":
        return {"stock export": NOTHING}
    try:
        return {"stock export": _stock(case, {})}
    except AttnPruneError as error:
        reason = error
    try:
        found = _stock(case, {"granularity": "head"})
    except AttnPruneError:
        raise reason from None
    return {"stock export": f"{PASSED}, whole heads" if found == PASSED else found}


def _stock(case: Case, options: dict[str, Any]) -> str:
    model: Any = case.host.make()
    with tempfile.TemporaryDirectory() as folder, quiet():
        attnprune.apply_plan(model, case.plan(model, 0.5, {"stock": True, **options}))
        expected = outputs(model, case.given)
        attnprune.export_stock(model, folder)
        host = next(one for one in type(model).__mro__ if not one.__module__.startswith("attnprune"))
        again = host.from_pretrained(folder, dtype=torch.float64)
        error = gap(outputs(ready(again, model), case.given), expected)
    return PASSED if error <= case.limit else f"plain transformers is off by {error:.1e}"


# compilers


def compiled(case: Case) -> dict[str, Any]:
    """``torch.compile``, as one graph where the dense model is one; TorchDynamo without a code generator."""
    pruned = case.pruned()
    expected = outputs(pruned, case.given)
    for whole in (True, False):
        try:
            torch._dynamo.reset()
            error = gap(outputs(torch.compile(pruned, backend="eager", fullgraph=whole), case.given), expected)
            if error > case.limit:
                torch._dynamo.reset()
                dense = gap(outputs(torch.compile(case.host.make(), backend="eager"), case.given), case.expected)
                said = f"compiled it is off by {error:.1e}"
                return {"compile": f"{NOTHING} {said}, and dense by {dense:.1e}" if dense > case.limit else said}
            return {"compile": PASSED if whole else f"{PASSED}, in several graphs as the dense model"}
        except Exception as error:
            reason = error
            try:
                torch._dynamo.reset()
                outputs(torch.compile(case.host.make(), backend="eager", fullgraph=whole), case.given)
            except Exception:
                continue
            return {"compile": f"{'in one graph: ' if whole else ''}{short(reason)}"}
    return {"compile": f"{NOTHING} the dense model cannot be compiled"}


def exported(case: Case) -> dict[str, Any]:
    """``torch.export``, the program run."""
    pruned = case.pruned()
    expected = outputs(pruned, case.given)
    try:
        error = gap(outputs(_program(pruned, case.given), case.given), expected)
    except Exception as reason:
        try:
            _program(case.host.make(), case.given)
        except Exception:
            return {"export": f"{NOTHING} the dense model cannot be exported"}
        return {"export": short(reason)}
    return {"export": PASSED if error <= case.limit else f"exported it is off by {error:.1e}"}


def _program(model: nn.Module, given: Any) -> nn.Module:
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (given, None)
    with quiet(), torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), args, kwargs, strict=False)
    found: nn.Module = program.module()
    return found


CELLS: Mapping[str, Callable[[Case], dict[str, Any]]] = {
    **{name: by_plan(name) for name in PLANS},
    "rotated": rotated,
    "cache": cache,
    "save/load": saved,
    "compile": compiled,
    "export": exported,
    "stock export": stock_export,
}
"""In the order in which they are filled in; "channels" is the first."""
