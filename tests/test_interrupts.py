"""A fault at any line of ours leaves the old state of everything, and every setting: what is reported as failed did not
happen. ``python -m tests.every_line`` looks at every line, for more families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnprune import find_attention, prune_attention
from attnprune.families.proof import runs, trial, verdict
from attnprune.families.proof.stand_in import StandIn

from .faults import Call
from .selection import ALL
from .verbs import VERBS

pytestmark = [  # files that a fault left open, which the collector closes
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CASES = {
    "prove": ("MHA", 150), "plan by gradients": ("Encoder", 300), "apply": ("MHA", 300), "step": ("MHA", 300),
    "resume": ("MHA", 300), "mask": ("MHA", 300), "capture": ("MHA", 300), "recover": ("MHA", 300),
    "pack": ("Encoder", 300), "unpack": ("Encoder", 300), "freeze": ("MHA", 300), "thaw": ("MHA", 50),
    "load": ("Encoder", 300), "load another dtype": ("ViT", 400), "save": ("MHA", 300), "stream": ("ViT", 600),
    "stock": ("ViT", 900), "register": ("MHA", 30), "unregister": ("MHA", 30),
}  # fmt: skip
"""In ``make test``: which family, and every which line."""
LONG = {
    "plan rotated": ("ViT", 300), "plan in sequence": ("Encoder", 300), "prune": ("Encoder", 300),
    "prune and recover": ("MHA", 300), "score": ("ViT", 300), "calibrate": ("ViT", 300), "observe": ("ViT", 300),
    "heads by hand": ("Decoder", 300), "channels by hand": ("Decoder", 300), "recover by LoRA": ("ViT", 300),
    "state dict": ("Decoder", 50), "run": ("Decoder", 50), "begin": ("Bert", 300), "build": ("Bert", 500),
    "sweep": ("MHA", 300), "sensitivity": ("MHA", 300),
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "name", "share"),
    [
        *((verb, *case) for verb, case in CASES.items()),
        *(pytest.param(verb, *case, marks=pytest.mark.long) for verb, case in LONG.items()),
    ],
)
def test_faults(verb: str, name: str, share: int, tmp_path: Path) -> None:
    """At every ``share``-th line of a call, and at its last four; with ATTNPRUNE_ALL=1 at ten times as many."""
    call = Call(VERBS[verb](name, tmp_path))
    problems = [found for point in call.points(share // 10 if ALL else share) if (found := call.problem(point))]
    assert not problems, "\n".join(problems[:20])


@pytest.mark.parametrize(
    ("verb", "name", "place"),
    [
        ("build", "ViT", ("checkpoint/skeleton.py", "blank")),  # PyTorch calls something for each parameter made there
        ("sensitivity", "MHA", ("studies/sensitivity.py", "sensitivity")),  # masks layer by layer
        ("check", "MHA", ("nn/kept.py", "run")),  # calls that fail, and are interrupted as they do
    ],
)
def test_faults_at_every_line_of_a_function(verb: str, name: str, place: tuple[str, str], tmp_path: Path) -> None:
    call = Call(VERBS[verb](name, tmp_path))
    points = [point for point in call.points(1) if point.place[:2] == place]
    assert len(points) > 3
    problems = [found for point in points if (found := call.problem(point))]
    assert not problems, "\n".join(problems[:20])


@pytest.mark.parametrize("kind", [MemoryError, OSError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize(
    ("owner", "name", "turn"), [(StandIn, "__init__", 1), (StandIn, "copy", 2), (trial, "run", 3), (runs, "run", 9)]
)
def test_what_the_machine_lacks_is_no_verdict(
    owner: Any, name: str, turn: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is passed on, and nothing is remembered of a class that was being tried."""
    monkeypatch.setattr(verdict, "_KNOWN", {})
    original, left = getattr(owner, name), [turn]

    def lacking(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise kind("injected")
        return original(*args, **kwargs)

    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lacking)
        with pytest.raises(kind, match="injected"):
            find_attention(model)
    assert [spec.name for spec in find_attention(model)] == ["self_attn"]
    assert prune_attention(model, {"qk": 0.5}).ways == {"self_attn": "decoupled"}
