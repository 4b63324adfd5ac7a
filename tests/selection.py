"""Which cases of long products ``make test`` runs; with ``ATTNPRUNE_ALL=1``, as in ``make test-all``, all of them."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

ALL = os.environ.get("ATTNPRUNE_ALL") == "1"
ALIKE = {
    "DeiT": "ViT", "DINOv2": "ViT", "Roberta": "Bert", "TorchvisionViT": "MHA", "TimmAttention": "Timm",
    "Between": "Decoder", "Packed": "Latent", "Sight": "ViT", "Streams": "Seq2Seq", "Own": "Latent",
}  # fmt: skip
"""Families that another one stands for, as the same forward of ours runs both, or both run expanded; of the last five
``test_stages.py`` runs some configurations."""
LIKE = ("AST", "CLIPText", "Seq2Seq")
"""Families that others stand for where nothing but the dtype, or the file, is another."""
Case = TypeVar("Case", bound=Hashable)


def telling(names: Iterable[str]) -> list[str]:
    """Without those that others stand for (:data:`LIKE`), or all of them."""
    return [name for name in names if ALL or name not in LIKE]


def examples(number: int) -> int:
    """How many random cases hypothesis draws of a law that every family is tried for: an eighth, or all."""
    return number if ALL else -(-number // 8)


def spread(*axes: Iterable[Case], strength: int = 1) -> list[tuple[Case, ...]]:
    """Combinations of one value of each axis: every value at least once (or every pair of values), or all of them.

    >>> found = spread("abc", "xy")
    >>> ALL or found == [("a", "x"), ("b", "y"), ("c", "x")]
    True
    """
    product = list(itertools.product(*axes))
    return product if ALL else covering({case: dict(enumerate(case)) for case in product}, strength)


def covering(cases: Mapping[Case, Mapping[object, Hashable]], strength: int) -> list[Case]:
    """Few of the cases, which meet every combination of values of any ``strength`` axes; each time the case with most.

    Args:
        cases: by case, its value on each axis.
        strength: 1 for every value of every axis, 2 for every pair of values of two axes.

    >>> pairs = covering({case: dict(enumerate(case)) for case in itertools.product("ab", "cd", "ef")}, 2)
    >>> ["".join(case) for case in pairs]
    ['ace', 'adf', 'bcf', 'bde']
    """
    met = {case: set(itertools.combinations(values.items(), strength)) for case, values in cases.items()}
    times: Counter[object] = Counter()
    missing = set().union(*met.values())
    chosen: set[Case] = set()
    while missing:
        best = max(cases, key=lambda case: (len(met[case] & missing), -sum(times[one] for one in met[case])))
        chosen.add(best)
        missing -= met[best]
        times.update(met[best])
    return [case for case in cases if case in chosen]
