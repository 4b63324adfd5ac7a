"""Packed Q, K and V: the same function, the same names, and back again bitwise."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnprune
from attnprune import errors, pack_qkv, unpack_qkv
from attnprune.families.registry import all_views
from attnprune.nn import projection as packed

from .conformance import check_gradients, close, family, forward_backward, fresh, inputs, random_plan, without_fast_path
from .families import FAMILIES
from .selection import examples

seeds = st.integers(0, 10_000)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    attnprune.prune_attention(model, {"qk": 0.5, "vo": 0.25}, scorer="random")
    return model


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows of every merged product."""
    found: list[int] = []

    def spy(parts: Any) -> Any:
        view = packed_view(parts)
        if view is not None and view.dim() == 2:
            found.append(len(view))
        return view

    packed_view = packed.side_by_side
    monkeypatch.setattr(packed, "side_by_side", spy)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name: str) -> None:
    @settings(max_examples=examples(8))
    @given(
        seed=seeds, case=st.integers(0, len(family(name).cases()) - 1), heads=st.sampled_from(["uniform", "ragged"]),
        ratio=st.sampled_from([0.0, 0.5]),
    )  # fmt: skip
    def check(seed: int, case: int, heads: str, ratio: float) -> None:
        model, given = fresh(name, case), inputs(name, case, seed)
        attnprune.apply_plan(model, random_plan(model, seed, qkvo_ratios=ratio, heads=heads))
        with torch.no_grad(), without_fast_path():
            expected = family(name).run(model, given)
            before = {key: value.clone() for key, value in model.state_dict().items()}
            kinds = [type(module) for module in model.modules()]
            names = pack_qkv(model)
            close(family(name).run(model, given), expected, 1e-10, "packed")
            assert names == unpack_qkv(model)
            close(family(name).run(model, given), expected, 0.0, "unpacked")
        assert kinds == [type(module) for module in model.modules()]
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        for view in all_views(model):
            for slot in view.slots.values():
                parameter = slot.parameter
                assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()

    check()


def test_one_product_in_inference_and_three_calls_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    expected = model(x).detach()
    assert pack_qkv(model) == ("layers.0.self_attn", "layers.1.self_attn")
    merged = calls(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert merged == [sum(spec.qk_dims) * 2 + sum(spec.vo_dims) for spec in attnprune.find_attention(model)]

    merged.clear()
    model(x).sum().backward()  # training
    assert model.layers[0].self_attn.q_proj.weight.grad is not None
    seen = []
    handle = model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(x)
    assert seen == [1]
    assert len(merged) == 1  # the layer with the hook calls its Linears
    handle.remove()
    merged.clear()
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x.double()).float(), expected)  # moved apart
    assert merged == []
    pack_qkv(model)
    with torch.no_grad():
        model(x.double())
    assert len(merged) == 2


def test_weights_may_change_in_place_and_copies_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    pack_qkv(model)
    merged = calls(monkeypatch)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    other = encoder()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        model.load_state_dict(other.state_dict())
        before = copies[0](x)
        torch.testing.assert_close(model(x), other(x))
        torch.testing.assert_close(copies[0](x), before)
        torch.testing.assert_close(copies[1](x), before)
    assert len(merged) == 2  # copies have storage of their own; they call their Linears


def test_gradients_of_packed_models() -> None:
    name = "ViT"
    model, given = fresh(name, 0), inputs(name, 0)
    oracle = copy.deepcopy(model)
    pack_qkv(model)
    expected, _ = forward_backward(name, oracle, given)
    found, _ = forward_backward(name, model, given)
    close(found, expected, 1e-10, "output")
    for view in all_views(model):
        check_gradients(name, oracle, view, attnprune.LayerPlan(view.spec), 1e-10)


def test_saved_and_pruned_again_while_packed(tmp_path: Any) -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    twin = copy.deepcopy(model)
    pack_qkv(model)
    attnprune.save_pruned(model, tmp_path)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(attnprune.load_pruned(tmp_path, dense)(x), twin(x))
        for one in (model, twin):
            attnprune.prune_attention(one, 0.5, scorer="random", scope="local")
        torch.testing.assert_close(model(x), twin(x))
    assert unpack_qkv(model) == ()


def test_what_cannot_be_packed_is_refused_before_anything_changes() -> None:
    model = encoder()
    model.layers[1].self_attn.q_proj = nn.utils.parametrizations.weight_norm(model.layers[1].self_attn.q_proj)
    with pytest.raises(errors.ParametrizedError):
        pack_qkv(model)
    assert not model.layers[0].self_attn.attnprune_state.packed


@pytest.mark.parametrize("arrange", [attnprune.pack_qkv, attnprune.freeze])
def test_on_the_meta_device(arrange: Any) -> None:
    """Where PyTorch refuses to say whether there is autocast."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), 1).eval()
    attnprune.prune_attention(model, {"qk": 0.5})
    arrange(model)
    with torch.no_grad():
        assert model.to("meta")(torch.zeros(2, 5, 16, device="meta")).shape == (2, 5, 16)
