"""The shipped byte-level Llama: it loads, is pruned, and generates with a cache what it generates without."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprune

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import llama

        yield llama
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_it_is_small() -> None:
    assert (BENCHMARKS / "byte_llama" / "model.safetensors").stat().st_size < 2_600_000


@pytest.mark.long
@torch.no_grad()
def test_cached_generation_equals_uncached(llama: Any) -> None:
    dense = llama.byte_llama.load()
    text = torch.frombuffer(bytearray(Path(attnprune.__file__).read_bytes()), dtype=torch.uint8)
    model = llama.pruned(dense, 0.5, llama.batches(text, 0)[:1], llama.WAYS["ragged, split found"])
    again = attnprune.from_pretrained(attnprune.save_pruned(model, tempfile.mkdtemp()))
    prompt = torch.tensor([list(llama.PROMPT)])
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "pad_token_id": 0}
    for beams in (1, 2):
        found = [
            one.generate(prompt, use_cache=cached, do_sample=False, num_beams=beams, **settings)
            for one in (model, again)
            for cached in (True, False)
        ]
        assert all(torch.equal(one, found[0]) for one in found[1:])
    removed = 1 - llama.attention_weights(model) / llama.attention_weights(dense)
    assert abs(removed - 0.5) < 0.01
