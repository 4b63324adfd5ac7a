"""What the surgeon makes of single parameters: gains, shared ones, what comes along; and what it puts back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from attnprune import AttentionSpec, LayerPlan, make_plan, prune_attention
from attnprune.errors import TiedWeightsError
from attnprune.families import find_views
from attnprune.families.expansion import joints
from attnprune.families.slots import Slot
from attnprune.surgery import OptimizerPatch, ParamChange, Surgeon
from attnprune.surgery.changes import gain_of, gains, joint_gain
from attnprune.surgery.maps import FeatureChange, Mix, Pick, logical_channels
from attnprune.surgery.patch import Operation, _Tensors, successor
from attnprune.values.feature_maps import FeatureMaps

from .faults import of_model
from .test_optimizers import layer, train


def slot(owner: nn.Module, size: int = 4, start: int = 0, axis: int = 0) -> Slot:
    return Slot(owner, "weight", size, axis, start)


# shared parameters


def test_what_projections_make_alike_of_a_shared_parameter_stays_one() -> None:
    owner = nn.Linear(4, 4)
    tensors, features = _Tensors(), FeatureChange((0, 1))
    first = tensors.cut("a", slot(owner), Pick((0, 2)), 2.0, features)
    assert tensors.cut("b", slot(owner), Pick((0, 2)), 2.0, FeatureChange((0, 1))) is first
    assert len(tensors.map) == 1


OTHERS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "rows": ({}, (Pick((0, 1)),)),
    "a gain": ({}, (Pick((0, 2)), 2.0)),
    "features": ({}, (Pick((0, 2)), 1.0, FeatureChange((0, 1)))),
    "an axis": ({"axis": 1}, (Pick((0, 2)),)),
    "the last place too": ({"start": 3, "size": 1}, (Pick((0,)),)),
    "a place before": ({"start": 0, "size": 3}, (Pick((0, 2)),)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_they_make_otherwise_is_refused(what: str) -> None:
    owner = nn.Linear(4, 4)
    place, change = OTHERS[what]
    tensors = _Tensors()
    tensors.cut("a", slot(owner), Pick((0, 2)))
    with pytest.raises(TiedWeightsError, match=r"^b: "):
        tensors.cut("b", slot(owner, **place), *change)


def test_neighbours_in_a_shared_parameter_are_apart() -> None:
    owner, tensors = nn.Linear(4, 4), _Tensors()
    parts = [tensors.cut(f"{start}", slot(owner, 2, start), Pick((1,))) for start in (0, 2)]
    assert torch.equal(torch.cat(parts), owner.weight[[1, 3]])


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, **sizes)
    found: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return found.eval()


def test_a_bias_of_o_that_is_k_s_is_refused_where_it_gains_something() -> None:
    model = bert()
    view = find_views(model)[0]
    view.owner("o").bias = view.owner("k").bias
    data = [torch.randint(0, 20, (2, 5)) for _ in range(2)]
    before = of_model(model)
    with pytest.raises(TiedWeightsError, match="a bias of its own"):
        prune_attention(model, {"vo": 0.5}, data=data, progress=False)
    assert of_model(model) == before


def test_another_place_in_the_same_module_shares_too() -> None:
    model = nn.MultiheadAttention(16, 4)
    model.out_proj.register_parameter("second", model.out_proj.weight)
    with pytest.raises(TiedWeightsError, match="second using it too"):
        prune_attention(model, 0.5)


# what comes along


def test_what_a_parameter_carries_comes_along() -> None:
    old: Any = nn.Parameter(torch.arange(4.0))
    seen = []
    old.register_hook(lambda grad: seen.append("grad"))
    old.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    old.lr_scale, old.grad = 0.5, torch.arange(4.0)
    new: Any = successor(old, old.detach()[1:3], lambda grad: grad[1:3], 2.0)
    assert new.lr_scale == 0.5
    assert new.detach().tolist() == [2.0, 4.0], "times the gain"
    assert new.grad.tolist() == [0.5, 1.0], "by the chain rule divided by it"
    new.sum().backward()
    assert seen == ["grad", "accumulated"]
    fixed = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert not successor(fixed, torch.zeros(1), torch.clone, 1.0).requires_grad


def test_attributes_follow_through_pruning() -> None:
    model = bert()
    for parameter in model.parameters():
        parameter.weight_decay = 0.25  # type: ignore[attr-defined]
    prune_attention(model, 0.5, heads="ragged")
    assert all(parameter.weight_decay == 0.25 for parameter in model.parameters())  # type: ignore[attr-defined]


def change(gain: float, **more: Any) -> ParamChange:
    owner = nn.Linear(3, 4)
    index = torch.tensor([3, 1])
    return ParamChange(owner.weight, owner.weight, 0, index, gain, Pick((3, 1)), range(4), **more)


def test_a_gain_divides_gradients_and_its_square_their_squares() -> None:
    given = torch.arange(12.0).reshape(4, 3) + 1
    picked = given[[3, 1]]
    one = change(2.0)
    assert torch.equal(one.carry(given), picked / 2)
    assert torch.equal(one.carry(given, squared=True), picked / 4)
    assert torch.equal(one.move(given), picked * 2), "an average of the weight is the weight's"
    assert torch.equal(one.average(given), picked * 2), "so are steps as large as it"


def test_gradients_and_steps_of_features_that_stay_are_as_they_were() -> None:
    """A refit changes weights, not what their gradients are."""
    refit = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    one = change(1.0, features=FeatureChange((0, 2), refit))
    given = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(one.values(given), given[[3, 1]] @ refit)
    assert torch.equal(one.carry(given), given[[3, 1]][:, [0, 2]])
    assert torch.equal(one.carry(given, squared=True), given[[3, 1]][:, [0, 2]])
    assert torch.equal(one.average(given), given[[3, 1]][:, [0, 2]])


def test_mixed_channels_carry_gradients_by_the_dual_map() -> None:
    matrix, dual = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    owner = nn.Linear(3, 2)
    mix = Mix(((0, 2, matrix),), lambda: ((0, 2, dual),))
    one = ParamChange(owner.weight, owner.weight, 0, None, 1.0, mix, range(2))
    given = torch.arange(6.0).reshape(2, 3) + 1
    assert torch.equal(one.values(given), matrix @ given)
    assert torch.equal(one.carry(given), dual @ given)
    assert torch.equal(one.carry(given, squared=True), dual.square() @ given)
    assert torch.equal(one.average(given), dual.square() @ given / dual.square().sum()), "a mean, positive as they are"


# what biases gain


def test_what_o_s_bias_gains_where_heads_are_not_stored_in_order() -> None:
    """Shifts and means count channels head by head; heads of like dims are stored side by side."""
    spec = AttentionSpec("a", 2, (1, 2, 1), (1, 2, 1), 1.0, 2, 2, 2)
    assert spec.layout.stored("o") != [0, 1, 2]
    places = logical_channels(spec.layout, "o")
    weight, shift = torch.randn(4, 2, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    expected = torch.stack([shift[place] * row for place, row in zip(places, weight, strict=True)]).sum(0)
    maps = LayerPlan(spec).maps
    moved = LayerPlan(spec, fold=replace(maps, shift=shift))
    torch.testing.assert_close(gain_of(weight, moved), expected)
    left = LayerPlan(spec, features=((), (), (), (1,)), refit=FeatureMaps(means=(((1,), shift),)))
    torch.testing.assert_close(gain_of(weight, left), expected * torch.tensor([0.0, 1.0]))
    assert gains(left)
    assert not gains(LayerPlan(spec, fold=maps))


def test_what_a_bias_of_several_projections_gains() -> None:
    """GPT-2 holds Q, K and V in one: what K gains stands where K stands."""
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    (view,) = find_views(transformers.GPT2Model(config))
    kept = [feature for feature in range(8) if feature != 3]
    reads, shift = torch.eye(8)[:, kept], torch.arange(8.0)
    layer = LayerPlan(view.spec, features=((), (3,), (), ()), refit=FeatureMaps({"k": reads}, {"k": shift}))
    (joint,) = (one for one in joints(view) if one.name == "bias" and len(one.keys) == 3)
    gain = joint_gain(view, joint, layer)
    assert gain is not None
    weight = view.slots["k.weight"].cut(view.slots["k.weight"].values)
    torch.testing.assert_close(gain(), torch.cat([torch.zeros(8), weight @ shift, torch.zeros(8)]).double())


# what is put back


def test_a_surgeon_that_is_interrupted_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a call of ours around it, too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    before = of_model(model)
    run, ran = Operation.run, []

    def interrupted(self: Operation) -> None:
        run(self)
        ran.append(self)
        if len(ran) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Operation, "run", interrupted)
    surgeon = Surgeon.prepare(model, find_views(model), make_plan(model, 0.5))
    with pytest.raises(KeyboardInterrupt):
        surgeon.commit()
    assert len(ran) == 2
    assert of_model(model) == before


def prepared(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Surgeon, OptimizerPatch]:
    surgeon = Surgeon.prepare(model, find_views(model), make_plan(model, 0.5))
    return surgeon, OptimizerPatch(optimizer, surgeon.changes, model)


def test_a_patch_is_of_what_the_model_has_and_is_undone_whole() -> None:
    model = layer()
    named = list(model.named_parameters())
    groups = [[pair for pair in named if "bias" in pair[0]][::-1], [pair for pair in named if "bias" not in pair[0]]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    train(model, optimizer)
    before = [(group["params"][:], group["param_names"][:]) for group in optimizer.param_groups]
    states = dict(optimizer.state)
    surgeon, patch = prepared(model, optimizer)
    patch.undo()  # which did nothing so far
    for _ in range(2):
        surgeon.commit()
        patch.commit()
        assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}, "nothing of what went stays"
        first, second = (group["param_names"] for group in optimizer.param_groups)
        names = [name for name, _ in model.named_parameters()]
        assert second == [name for name in names if "bias" not in name], "a group in the model's order stays so"
        assert [name.split(".")[0] for name in first][:2] == ["norm2", "norm1"], "one in another order, too"
        patch.undo()
        surgeon.undo()
        assert [(group["params"], group["param_names"]) for group in optimizer.param_groups] == before
        assert [*optimizer.state] == [*states]
        assert all(optimizer.state[parameter] is state for parameter, state in states.items())


def test_what_lbfgs_counted_is_forgotten_and_comes_back() -> None:
    model = layer()
    optimizer: Any = torch.optim.LBFGS(model.parameters())
    count = optimizer._numel()
    surgeon, patch = prepared(model, optimizer)
    surgeon.commit()
    patch.commit()
    assert optimizer._numel() < count
    patch.undo()
    assert optimizer._numel_cache == count
