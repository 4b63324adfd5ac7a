"""Models on a device other than the CPU: nothing of ours stays behind, whatever the default device is.

The device is made up (:mod:`tests.elsewhere`), as machines that test this have none; ``test_cuda.py`` is for a
real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnprune
from attnprune.nn import execution

from .conformance import family, fresh, inputs
from .elsewhere import DEVICE, There, elsewhere, move
from .families import FAMILIES

WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": "magnitude", "basis": "rotated", "compensate": True},
    "taylor": {"scorer": "taylor", "granularity": "head", "compensate": True},
    "fisher": {"scorer": "fisher", "basis": "channels", "compensate": True, "scope": "local"},
    "default": {},
    "ragged": {"heads": "ragged", "split": "auto"},
    "joint": {"granularity": "joint", "heads": "ragged", "sequential": True},
    "without data": {"data": None, "basis": "rotated"},
    "error": {"qkvo_ratios": None, "target_error": 0.1},
}


def data_of(name: str) -> dict[str, Any]:
    return {key: x.detach() if isinstance(x, Tensor) else x for key, x in inputs(name, 0).items()}


def there(given: dict[str, Any]) -> dict[str, Any]:
    return {key: There(x) if isinstance(x, Tensor) else x for key, x in given.items()}


def options_of(name: str, way: str) -> dict[str, Any]:
    found = {"qkvo_ratios": 0.5, "data": [data_of(name)], "progress": False, **WAYS[way]}
    if found["data"] is not None:
        found["loss_fn"] = lambda model, batch: family(name).run(model, batch).square().mean()
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_pruning(name: str, way: str) -> None:
    """From batches of the CPU; the model is the one that the CPU would have made."""
    here = fresh(name, 0)
    attnprune.prune_attention(here, **options_of(name, way))
    model = fresh(name, 0)
    with elsewhere():
        attnprune.prune_attention(move(model), **options_of(name, way))
        output = family(name).run(model, there(data_of(name)))
        assert {p.device for p in model.parameters()} == {DEVICE} == {output.device}
    torch.testing.assert_close(output.inner, family(name).run(here, data_of(name)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("how", ["auto", "separate", "buckets", "groups", "padded", "products"])
def test_layouts(how: Any) -> None:
    model = fresh("Encoder", 0)
    attnprune.prune_attention(model, {"qk": 0.6, "vo": 0.4}, heads="ragged", scorer="random")
    given = data_of("Encoder")
    expected = family("Encoder").run(model, given)
    with elsewhere(), execution(how):
        found = family("Encoder").run(move(model), there(given))
    torch.testing.assert_close(found.inner, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_training_loop(kind: Any) -> None:
    with elsewhere():
        model, given = move(fresh("AST", 0)), there(data_of("AST"))
        optimizer = kind(
            model.parameters(), lr=1e-3, foreach=False, **({"momentum": 0.9} if kind.__name__ == "SGD" else {})
        )
        pruner = attnprune.AttentionPruner(model, 0.5, steps=2, scorer="fisher")
        while not pruner.done:
            optimizer.zero_grad()
            family("AST").run(model, given).square().mean().backward()
            pruner.observe()
            optimizer.step()
            pruner.step(optimizer)
        pruner.load_state_dict(pruner.state_dict())
        for parameter in model.parameters():
            moments = [x for x in optimizer.state[parameter].values() if isinstance(x, Tensor) and x.dim()]
            assert all(x.shape == parameter.shape and x.device == DEVICE for x in moments)


def test_the_other_verbs(tmp_path: Path) -> None:
    given, name = data_of("AST"), "AST"
    with elsewhere():
        model = move(fresh(name, 0))
        first = attnprune.find_attention(model)[0].name
        calibration = attnprune.calibrate(model, [given], progress=False)
        attnprune.energy_curves(model, calibration)
        attnprune.score_attention(model, scorer="taylor", basis="rotated", data=[given], progress=False,
                                  loss_fn=lambda m, b: family(name).run(m, b).square().mean())  # fmt: skip
        with attnprune.masked(model, attnprune.make_plan(model, 0.5, calibration=calibration, progress=False)):
            family(name).run(model, there(given))
        attnprune.pack_qkv(model)
        attnprune.unpack_qkv(model)
        attnprune.prune_heads(model, {first: [0]})
        attnprune.prune_channels(model, {first: {"qk": [[0], [], []]}})
        attnprune.save_pruned(model, tmp_path / "saved")
        attnprune.load_pruned(tmp_path / "saved", move(fresh(name, 0)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["AST", "MHA"])
def test_the_default_device_does_not_matter(name: str, way: str) -> None:
    """``torch.set_default_device``: what is made there by mistake, on meta, has no values."""
    options, expected, model = options_of(name, way), fresh(name, 0), fresh(name, 0)
    attnprune.prune_attention(expected, **options)
    with torch.device("meta"):
        attnprune.prune_attention(model, **options)
    for (key, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_the_made_up_device_refuses_to_be_mixed() -> None:
    with elsewhere():
        x = torch.randn(2, 3, device=DEVICE)
        assert (x @ x.T * torch.tensor(2.0)).device == DEVICE
        with pytest.raises(RuntimeError, match="same device"):
            x @ torch.randn(3, 2)
        assert x[[0, 1]].cpu().device.type == "cpu"
