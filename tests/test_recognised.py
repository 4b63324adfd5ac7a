"""Attention of the installed transformers is recognised as in the file of its version (:mod:`tests.recognised`)."""

from __future__ import annotations

import pytest
import transformers

from .recognised import KINDS, file_of, lost, nearest, read, recognised
from .selection import ALL

VERSION = transformers.__version__


@pytest.mark.filterwarnings("ignore")  # of transformers, about tiny configs
def test_what_is_recognised() -> None:
    """In a version without a file of its own, nothing of an older one's is lost. ``make test`` looks at each third."""
    kinds = list(KINDS) if ALL else list(KINDS)[::3]
    path, found = nearest(VERSION), recognised(kinds)
    if path is None:
        pytest.skip("older than any version with a file")
    expected = {kind: classes for kind, classes in read(path).items() if kind in kinds}
    if path == file_of(VERSION):
        remedy = "if that is right, write it down: python -m tests.recognised"
        assert found == expected, remedy
    assert not lost(expected, found)


def test_files_are_of_these_kinds() -> None:
    path = nearest("999.0.0")
    assert path is not None
    assert read(path).keys() == KINDS.keys()


BEFORE = {
    "ViT": {"Attention": "stock, decoupled, expanded"},
    "T5": {"Cross": "skipped: why", "Self": "stock; expanded"},
}


@pytest.mark.parametrize(
    ("kind", "now", "number"),
    [
        ("ViT", {"Attention": "stock, decoupled, expanded"}, 0),
        ("ViT", {"NewName": "stock, decoupled, expanded"}, 0),
        ("ViT", {"Attention": "stock, expanded"}, 1),
        ("ViT", {"NewName": "expanded"}, 1),
        ("ViT", {"Attention": "skipped: why"}, 1),
        ("ViT", {"Attention": "skipped: why; stock, decoupled, expanded"}, 1),
        ("ViT", {}, 1),
        ("T5", {"Cross": "skipped: another", "Self": "stock, decoupled; expanded"}, 0),
        ("T5", {"Cross": "stock", "Self": "stock, expanded"}, 0),
        ("T5", {"Cross": "skipped: why", "Self": "expanded"}, 1),
    ],
)
def test_what_is_lost_is_said(kind: str, now: dict[str, str], number: int) -> None:
    assert len(lost({kind: BEFORE[kind]}, {kind: now})) == number
