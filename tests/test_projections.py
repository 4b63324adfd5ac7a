"""Projections that leave channels or features out, one at a time: what they hand on, know and keep to themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnprune.errors import StateDictError
from attnprune.families.linears import put
from attnprune.nn.attempt import Snapshot
from attnprune.nn.expanded import ExpandedApart, Read, expand, expand_apart
from attnprune.nn.selected import features_of, select

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(kind: Any = nn.Linear, inputs: int = 4, outputs: int = 4, bias: bool = True) -> Any:
    """One of those that are called like a Linear, with a bias that is not zero."""
    torch.manual_seed(1)
    made = (Conv1D(outputs, inputs) if kind is Conv1D else kind(inputs, outputs, bias=bias)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def rows(module: Any, places: list[int]) -> Any:
    """A copy with these outputs alone."""
    made = copy.deepcopy(module)
    axis = 1 if isinstance(module, Conv1D) else 0
    put(made, "weight", nn.Parameter(module.weight.detach().index_select(axis, torch.tensor(places))))
    return made


def cut(module: Any, places: list[int]) -> Any:
    """A copy that reads these inputs alone."""
    made = copy.deepcopy(module)
    axis = 0 if isinstance(module, Conv1D) else 1
    put(made, "weight", nn.Parameter(module.weight.detach().index_select(axis, torch.tensor(places))))
    return made


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_reads_some_features(kind: Any) -> None:
    dense = linear(kind)
    some = cut(dense, [0, 3])
    select(some, [0, 3], 4, outputs=False)
    zeroed = X.clone()
    zeroed[..., [1, 2]] = 0
    torch.testing.assert_close(some(X), dense(zeroed))
    assert features_of(some) == (4, (1, 2))
    assert features_of(dense) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_writes_some_features_has_its_bias_for_all(kind: Any, bias: bool) -> None:
    if kind is Conv1D and not bias:
        return
    dense = linear(kind, bias=bias)
    some = rows(dense, [0, 3])
    select(some, [0, 3], 4, outputs=True)
    expected = dense(X).detach()
    expected[..., [1, 2]] = dense.bias.detach()[[1, 2]] if bias else 0
    torch.testing.assert_close(some(X), expected)


def expanded(kind: Any = nn.Linear, features: bool = False) -> tuple[Any, Any]:
    """A projection of four channels that lost the first and the last, and the dense one."""
    dense = linear(kind)
    some = rows(dense, [1, 2])
    some.bias = nn.Parameter(dense.bias.detach()[[1, 2]])
    expand(some, [1, 2], 4, columns=False)
    if features:
        some.weight = nn.Parameter(cut(some, [0, 3]).weight)
        select(some, [0, 3], 4, outputs=False)
    return some, dense


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_hands_on_dense_channels(kind: Any, features: bool) -> None:
    some, dense = expanded(kind, features)
    zeroed = X.clone()
    zeroed[..., [1, 2] if features else []] = 0
    expected = dense(zeroed).detach()
    expected[..., [0, 3]] = 0
    torch.testing.assert_close(some(X), expected)


def apart(kind: Any = nn.Linear) -> tuple[Any, Any]:
    """Two weights in one, each with features of its own; of five channels the second went."""
    dense = linear(kind, outputs=5)
    some = rows(dense, [0, 2])
    some.weight = nn.Parameter(cut(some, [1, 3]).weight)
    some.register_parameter("weight_1", nn.Parameter(cut(rows(dense, [3, 4]), [0, 1, 2]).weight))
    some.bias = nn.Parameter(dense.bias.detach()[[0, 2, 3, 4]])
    expand_apart(some, [0, 2, 3, 4], 5, [[1, 3], [0, 1, 2]])
    assert isinstance(some, ExpandedApart)
    return some, dense


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_reads_features_of_its_own_for_each_weight(kind: Any) -> None:
    some, dense = apart(kind)
    first, second = X.clone(), X.clone()
    first[..., [0, 2]], second[..., 3] = 0, 0
    expected = torch.cat([dense(first)[..., :3], dense(second)[..., 3:]], -1).detach()
    expected[..., 1] = 0
    torch.testing.assert_close(some(X), expected)
    assert some.sizes() == [2, 2]
    assert some.dense_numbers("weight", [1]) == [2]
    assert some.dense_numbers("weight_1", [0, 1]) == [3, 4]
    assert some.dense_numbers("bias", [1, 3]) == [2, 4]


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_read_is_dense(axis: int) -> None:
    """Rows of Q, K and V and columns of O are zero where channels went, and so are features that are left out."""
    dense = linear()
    some = rows(dense, [1, 2]) if axis == 0 else cut(dense, [1, 2])
    if axis == 0:
        some.bias = nn.Parameter(dense.bias.detach()[[1, 2]])
    expand(some, [1, 2], 4, columns=axis == 1, axis=axis)
    assert isinstance(some, Read)
    gone = torch.tensor([0, 3])
    torch.testing.assert_close(some.weight, dense.weight.index_fill(axis, gone, 0))
    torch.testing.assert_close(some.bias, dense.bias.index_fill(0, gone, 0) if axis == 0 else dense.bias)
    some.weight = nn.Parameter(some._parameters["weight"].detach().index_select(1 - axis, torch.tensor([0, 3])))
    select(some, [0, 3], 4, outputs=axis == 1)
    expected = dense.weight.index_fill(axis, gone, 0).index_fill(1 - axis, torch.tensor([1, 2]), 0)
    torch.testing.assert_close(some.weight, expected)
    some.__dict__["attnprune_bias"] = borrowed = torch.zeros(4)
    assert some.bias is borrowed


MADE: dict[str, Any] = {
    "reads": lambda: (some := cut(linear(), [0, 3]), select(some, [0, 3], 4, outputs=False))[0],
    "writes": lambda: (some := rows(linear(), [0, 3]), select(some, [0, 3], 4, outputs=True))[0],
    "expanded": lambda: expanded(features=True)[0],
    "apart": lambda: apart()[0],
}


@pytest.mark.parametrize("name", MADE)
def test_no_file_holds_where_channels_lie_and_state_dicts_tell(name: str) -> None:
    some = MADE[name]()
    assert [*some.state_dict()] == [*some._parameters]
    assert len([*some.buffers()]), "they move along"
    other = MADE[name]()
    other.load_state_dict(some.state_dict())
    for key in ("attnprune_features", "attnprune_channels", "attnprune_parts"):
        if key in some.__dict__ and some.__dict__[key] is not None:
            changed = copy.deepcopy(some)
            changed.__dict__[key] = some.__dict__[key][::-1]
            with pytest.raises(StateDictError):
                changed.load_state_dict(some.state_dict())


@pytest.mark.parametrize("name", MADE)
def test_autocast_gives_its_dtype(name: str) -> None:
    some = MADE[name]().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert some(X.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MADE)
def test_indices_are_ordinary_and_have_data_where_they_are_made(name: str) -> None:
    """Whatever mode is on, and whatever device is the default."""
    some = MADE[name]()
    expected = some(X)
    before, buffers = Snapshot([some]), some._buffers
    with torch.inference_mode(), torch.device("meta"):
        some.index()
    assert all(not buffer.is_meta and not buffer.is_inference() for buffer in some.buffers())
    assert torch.equal(some(X), expected)
    before.restore()
    assert some._buffers is buffers


def test_a_projection_that_is_put_back_has_no_indices() -> None:
    some = linear()
    before = Snapshot([some])
    select(some, [0, 3], 4, outputs=False)
    before.restore()
    assert (type(some), some._buffers, some._non_persistent_buffers_set) == (nn.Linear, {}, set())


def test_skeletons_have_indices_with_data() -> None:
    some = cut(linear(), [0, 3]).to("meta")
    select(some, [0, 3], 4, outputs=False)
    assert some.attnprune_taken.device == torch.device("cpu")


def test_a_weight_that_is_read_says_whose_it_is_where_that_is_asked() -> None:
    some: Any = rows(linear(), [1, 2])
    expand(some, [1, 2], 4, columns=False, axis=0)
    assert not hasattr(some.weight, "attnprune_owner")
    some.__dict__["attnprune_heard"] = True
    weight: Tensor = some.weight
    assert weight.attnprune_owner is some  # type: ignore[attr-defined]
