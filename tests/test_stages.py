"""Every stage is under the laws with two families at least; the documentation has the table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from attnprune import AttentionView
from attnprune.families.registry import all_views

from .conformance import check_exact, fresh, inputs, random_plan
from .kinds import KINDS
from .selection import ALL, covering
from .stages import STAGES, labels
from .test_exact import MODES, reachable

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "laws.rst"
NEW = {label: (name, number) for label, name, number in labels() if name in {cls.__name__ for cls in KINDS}}
"""Configurations of families that others stand for in most tests of ``make test``."""


def some() -> list[str]:
    """In ``make test`` as few of them as show every stage that no other model has, else all."""
    if ALL:
        return list(NEW)
    theirs = [stage for stage in STAGES if {*stage.models} <= NEW.keys()]
    return covering({label: {s.what: True for s in theirs if label in s.models} for label in NEW}, 1)


@cache
def views(label: str) -> tuple[tuple[AttentionView, object], ...]:
    """The attention of all models of a label, each with its model's config."""
    found = []
    for other, name, number in labels():
        if other == label:
            model = fresh(name, number)
            found += [(view, getattr(model, "config", None)) for view in all_views(model)]
    return tuple(found)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.what)
def test_each_has_two_families(stage: object) -> None:
    assert len({*stage.models}) >= 2  # type: ignore[attr-defined]
    assert {*stage.models} <= {label for label, _, _ in labels()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", some())
def test_configuration(label: str) -> None:
    """It has its stages, and law 1 holds for it."""
    for stage in STAGES:
        assert label not in stage.models or any(stage.shows(*one) for one in views(label)), stage.what
    name, number = NEW[label]
    for seed, (granularity, scope, heads) in enumerate(MODES if ALL else (MODES[-1],)):
        model = fresh(name, number, train=seed % 2 > 0)
        ratio = reachable(model, 0.5) if granularity == "head" else 0.5
        plan = random_plan(model, seed, qkvo_ratios=ratio, granularity=granularity, scope=scope, heads=heads)
        check_exact(name, model, inputs(name, number, seed), plan, 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("label", dict.fromkeys(label for label, _, _ in labels() if label not in NEW))
def test_older_configurations_have_their_stages(label: str) -> None:
    for stage in STAGES:
        assert label not in stage.models or any(stage.shows(*one) for one in views(label)), stage.what


def rows() -> Iterator[str]:
    """The lines of the table in the documentation."""
    titles = {"MHA": "``nn.MultiheadAttention``", "Seq2Seq": "BART", "Bert": "BERT", "Timm": "timm's ViT"}
    for stage in STAGES:
        names = [titles.get(label, label) for label in stage.models]
        yield from (f"   * - {stage.what}", f"     - {', '.join(names)}")


def test_the_page_has_the_table() -> None:
    found = re.search(r"\* - stage\n +- models\n(.*?)\n\n", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    assert found[1].splitlines() == list(rows()), "\n".join(rows())
