"""Bases, refits and maps: exact at full rank, optimal below, and never NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnprune
from attnprune import LayerPlan, Plan, apply_plan, calibrate, make_plan, masked, prune_attention
from attnprune.calibration.bases import best_basis, head_bases
from attnprune.calibration.refit import refit_output, refit_product, with_maps
from attnprune.errors import NonFiniteError, PlanFormatError, TiedWeightsError
from attnprune.families import find_views
from attnprune.planning.decide import in_bases
from attnprune.planning.scorers import Gate, Magnitude
from attnprune.values.channel_maps import ChannelMaps

from .conformance import cases, close, family, forward_backward, fresh, inputs
from .families import FAMILIES
from .selection import spread

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "ragged, split found": {"heads": "ragged", "split": "auto"},
    "local": {"scope": "local"},
    "uncompensated": {"compensate": False},
    "channels, refitted": {"basis": "channels"},
    "channels, ragged": {"basis": "channels", "heads": "ragged"},
    "heads": {"granularity": "head"},
    "joint": {"granularity": "joint", "heads": "ragged", "split": "auto"},
    "sequential": {"sequential": True, "heads": "ragged"},
    "rotated magnitude": {"scorer": "magnitude", "basis": "rotated", "compensate": True},
    "vo alone": {"qkvo_ratios": {"vo": 0.6}},
}


def batches(name: str, case: int, count: int = 4) -> list[dict[str, Any]]:
    """Calibration data: inputs that need no gradient."""
    found = [inputs(name, case, seed) for seed in range(count)]
    return [{k: v.detach() if isinstance(v, Tensor) else v for k, v in one.items()} for one in found]


def project(name: str, oracle: nn.Module, plan: Plan) -> None:
    """Makes a dense model the oracle of a plan with maps, in its dense shape.

    ``q' . k' = (A q) . (B k) = (B^T A q) . k``, so K may stay as it is if Q is multiplied with ``B^T A``; and as
    ``O B A`` is what becomes of O, V may stay as it is. Heads that go are left to O.
    """
    with torch.no_grad():
        for layer in plan:
            parts = family(name).dense(oracle, layer.spec.name)
            qk, vo = layer.spec.qk_dims[0], layer.spec.vo_dims[0]
            maps, o = layer.maps, parts["o"][0].clone()
            values = torch.zeros(maps.o.shape[1], maps.o.shape[0], dtype=torch.float64)
            row, share = 0, layer.spec.heads // layer.spec.kv_heads
            keys = sorted({head // share for head in layer.kept_heads})
            for i, head in enumerate(layer.kept_heads):
                key = keys.index(head // share)
                times(parts["q"], head * qk, maps.k[key].T.double() @ maps.q[i].double())
                values[row : row + len(maps.v[key]), head * vo : (head + 1) * vo] = maps.v[key]
                row += len(maps.v[key])
            for key, picks in zip(keys, maps.k, strict=True):  # a norm of keys must not see what goes as it stands
                if bool(((picks == 0) | (picks == 1)).all()):
                    times(parts["k"], key * qk, picks.T.double() @ picks.double())
            weight, bias = parts["o"]
            weight.copy_(o @ maps.o.double() @ values)
            if maps.shift is not None:
                assert bias is not None
                bias += o @ maps.shift


def times(part: Any, start: int, product: Tensor) -> None:
    """Multiplies rows of a weight and its bias, from ``start``."""
    rows = slice(start, start + len(product))
    for tensor in part:
        if tensor is not None:
            tensor[rows] = product @ tensor[rows]


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_computes_what_its_maps_say(name: str, way: str) -> None:
    """Every family, every way: forward and input gradients, against a dense model with projected Q and O."""
    for case in cases(name, list(WAYS).index(way)):
        model, given_ = fresh(name, case), inputs(name, case, 50)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        options = {"qkvo_ratios": 0.5, **WAYS[way]}
        plan = make_plan(model, data=batches(name, case), progress=False, **options)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not plan.empty
        oracle = copy.deepcopy(model)
        project(name, oracle, plan)
        expected, expected_grads = forward_backward(name, oracle, given_)
        with masked(model, plan):
            close(family(name).run(model, given_).detach(), expected, 1e-9, "masked")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        apply_plan(model, Plan.from_json(plan.to_json()))
        found, grads = forward_backward(name, model, given_)
        close(found, expected, 1e-9, f"output, case {case}")
        for key, grad in expected_grads.items():
            close(grads[key], grad, 1e-9, f"gradient of {key}, case {case}")


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_at_full_rank(name: str) -> None:
    """All directions stay: the rotated model is the dense one, with one batch and with many, masked and by surgery."""
    for case, count in spread(range(len(family(name).cases())), (1, 6)):
        model, given_ = fresh(name, case), inputs(name, case, 50)
        expected, grads = forward_backward(name, model, given_)
        calibration = calibrate(model, batches(name, case, count), progress=False)
        views = find_views(model)
        bases = {view.name: head_bases(view, calibration[view.name]) for view in views}
        with in_bases(model, views, bases):
            close(family(name).run(model, given_).detach(), expected, 1e-9, f"rotated, case {case}")
        apply_plan(model, Plan(tuple(bases[view.name].layer() for view in views)))
        found, found_grads = forward_backward(name, model, given_)
        close(found, expected, 1e-9, f"output, case {case}")
        for key, grad in grads.items():
            close(found_grads[key], grad, 1e-9, f"gradient of {key}, case {case}")


def test_a_gradient_is_carried_to_the_rotated_parameter() -> None:
    """At full rank the pending gradient becomes what a backward pass of the rotated model gives."""
    model, given_ = fresh("MHA", 0), inputs("MHA", 0)
    data = batches("MHA", 0)
    forward_backward("MHA", model, given_)
    views = find_views(model)
    calibration = calibrate(model, data, progress=False)
    plan = Plan(tuple(head_bases(view, calibration[view.name]).layer() for view in views))
    apply_plan(model, plan)
    carried = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    forward_backward("MHA", model, given_)
    fresh_ = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert carried.keys() == fresh_.keys()
    for key, grad in fresh_.items():
        close(carried[key], grad, 1e-8, key)


# what is best


def random_covariance(generator: torch.Generator, dim: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(dim, rank or 3 * dim, generator=generator, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_best_basis_loses_the_discarded_energy_and_nothing_loses_less(seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = random_covariance(generator, dim), random_covariance(generator, dim)
    basis = best_basis(left, right)
    torch.testing.assert_close(basis.first.T @ basis.second, torch.eye(dim).double(), atol=1e-9, rtol=0)

    def lost(product: Tensor) -> float:
        rest = torch.eye(dim, dtype=torch.float64) - product
        return float(torch.trace(rest.T @ left @ rest @ right))

    for rank in range(1, dim):
        least = float(basis.energy[rank:].sum())
        assert abs(lost(basis.first[:rank].T @ basis.second[:rank]) - least) <= 1e-6 * float(basis.energy.sum())
        for _ in range(5):
            a, b = (torch.randn(rank, dim, generator=generator, dtype=torch.float64) for _ in range(2))
            noisy = (basis.first[:rank] + 0.1 * a).T @ (basis.second[:rank] + 0.1 * b)
            assert lost(noisy) >= least * (1 - 1e-9)
            _, refitted = refit_product(left, right, *(2 * (basis.first[:rank] + 0.1 * a,)))
            assert refitted.isfinite().all()


def attention(heads: int = 2, width: int = 12, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    return nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64, **options).eval()


class Alone(nn.Module):
    """Self-attention whose output is the attention's own."""

    def __init__(self, inner: nn.MultiheadAttention, **given: Any) -> None:
        super().__init__()
        self.inner, self.given = inner, given

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x, x, x, need_weights=False, **self.given)[0]
        return output


def projections(module: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v per head ``(batch, heads, tokens, dim)`` of a dense module, by hand."""
    parts = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
    return tuple(part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2).detach() for part in parts)  # type: ignore[return-value]


def test_at_rank_r_the_logits_lose_the_discarded_singular_values() -> None:
    """Queries and centred keys of different sequences, all pairs: the mean square error is the tail's energy."""
    module = attention()
    with torch.no_grad():
        module.in_proj_bias.normal_()
    x = torch.randn(7, 9, 12, dtype=torch.float64)
    calibration = calibrate(Alone(module), [x[:3], x[3:]], progress=False)
    basis = head_bases(find_views(Alone(module))[0], calibration["inner"]).by_kind["qk"]
    q, k, _ = projections(module, x)
    for head in range(2):
        queries = q[:, head].flatten(0, 1)
        keys = (k[:, head] - k[:, head].mean(1, keepdim=True)).flatten(0, 1)
        exact = queries @ keys.T
        assert (basis[head].energy.diff() <= 1e-12).all()
        for rank in range(1, 6):
            first, second = basis[head].first[:rank], basis[head].second[:rank]
            error = ((queries @ first.T) @ (keys @ second.T).T - exact).square().mean()
            tail = basis[head].energy[rank:].sum()
            assert abs(float(error - tail)) <= 1e-6 * float(tail)


def test_bases_of_like_heads_lie_together() -> None:
    """One block for each map of a layer, whatever the room that computing them took."""
    model = Alone(attention(4))
    calibration = calibrate(model, [torch.randn(3, 5, 12).double()], progress=False)
    bases = head_bases(find_views(model)[0], calibration["inner"]).by_kind
    for kind in ("qk", "vo"):
        for part in ("first", "second", "energy"):
            maps = [getattr(one, part) for one in bases[kind]]
            whole = torch.stack(maps)
            assert {one.untyped_storage().data_ptr() for one in maps} == {maps[0].untyped_storage().data_ptr()}
            assert maps[0].untyped_storage().nbytes() == whole.numel() * whole.element_size()


def test_at_rank_r_the_output_loses_the_discarded_singular_values() -> None:
    """One head: the output's mean square error after surgery is the tail's energy; the mean stays in O's bias."""
    module = attention(heads=1)
    with torch.no_grad():
        module.in_proj_bias.normal_()
    model = Alone(module)
    x = torch.randn(40, 9, 12, dtype=torch.float64)
    dense = model(x).detach()
    calibration = calibrate(model, [x], progress=False)
    energy = head_bases(find_views(model)[0], calibration["inner"]).by_kind["vo"][0].energy
    for ratio in (0.25, 0.5, 0.75):
        pruned = copy.deepcopy(model)
        report = prune_attention(
            pruned, {"vo": ratio}, calibration=calibration, compensate=False, basis="rotated", progress=False
        )
        rank = report.layers[0].after.vo_dim
        difference = (pruned(x) - dense).detach()
        tail = float(energy[rank:].sum())
        assert abs(float(difference.square().sum(-1).mean()) - tail) <= 1e-6 * tail
        assert float(difference.mean((0, 1)).abs().max()) < 1e-10


def test_a_constant_added_to_all_keys_changes_no_softmax_and_no_basis() -> None:
    module = attention()
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    q, k, _ = projections(module, x)
    constant = 30 * torch.randn(k.shape[-1], dtype=torch.float64)
    torch.testing.assert_close((q @ k.mT).softmax(-1), (q @ (k + constant).mT).softmax(-1), atol=1e-12, rtol=0)
    shifted = copy.deepcopy(module)
    with torch.no_grad():
        shifted.in_proj_bias[12:24] += constant.repeat(2)
    bases = []
    for one in (module, shifted):
        model = Alone(one)
        calibration = calibrate(model, [x], progress=False)
        bases.append(head_bases(find_views(model)[0], calibration["inner"]).by_kind["qk"])
    for mine, other in zip(*bases, strict=True):
        torch.testing.assert_close(mine.energy, other.energy, rtol=1e-9, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_refits_are_least_squares(seed: int) -> None:
    """No other map fits better, by a margin that the ridge explains."""
    generator = torch.Generator().manual_seed(seed)
    covariance = random_covariance(generator, 6)
    kept = torch.eye(6, dtype=torch.float64)[[0, 2, 5]]
    fitted = refit_output(covariance, kept, kept.T, tokens=1e9)

    def lost(o: Tensor) -> float:
        rest = torch.eye(6, dtype=torch.float64) - o @ kept
        return float(torch.trace(rest @ covariance @ rest.T))

    best = covariance @ kept.T @ torch.linalg.inv(kept @ covariance @ kept.T)
    assert lost(best) - 1e-9 <= lost(fitted) <= lost(best) * 1.02 + 1e-9
    assert lost(fitted) <= lost(kept.T) + 1e-9


def test_of_few_contexts_a_refit_believes_less() -> None:
    """``level * (1e-3 + channels / tokens)``, against the formula by hand."""
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    kept, given_ = torch.eye(2, dtype=torch.float64)[:1], torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for tokens in (1e12, 4.0):
        ridge = 2 * (1e-3 + 2 / tokens)
        expected = torch.tensor([[2 + ridge], [1.0]], dtype=torch.float64) / (2 + ridge)
        torch.testing.assert_close(refit_output(covariance, kept, given_, tokens), expected, rtol=1e-12, atol=0)


def test_of_a_product_the_better_side_is_refitted() -> None:
    """Keys that tell one another, then queries that do; of neither the maps stay."""
    alike = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    apart, kept = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[:1]
    for left, right, moved in ((apart, alike, 0), (alike, apart, 1)):
        maps = refit_product(left, right, kept, kept)
        assert [torch.equal(one, kept) for one in maps] == [moved == 1, moved == 0]
        torch.testing.assert_close(maps[moved][0, 1].item(), 0.9, rtol=2e-3, atol=0)
    # queries matter so much more where keys cannot say: Q's map is the better one
    left, right = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)) + 0.1, alike
    first, second = refit_product(left, right, kept, kept)
    assert not torch.equal(first, kept)
    assert torch.equal(second, kept)


def test_heads_that_lose_nothing_keep_their_channels_as_they_stand() -> None:
    torch.manual_seed(0)
    model = Alone(attention(heads=3))
    calibration = calibrate(model, [torch.randn(4, 6, 12, dtype=torch.float64)], progress=False)
    view, moments = find_views(model)[0], calibration["inner"]
    layer = LayerPlan(view.spec, qk=((0,), (), ()), vo=((), (1,), ()))
    maps = with_maps(layer, head_bases(view, moments), moments, refit=False).fold
    assert maps is not None
    eye = torch.eye(4, dtype=torch.float64)
    assert [torch.equal(a, eye) and torch.equal(b, eye) for a, b in zip(maps.q, maps.k, strict=True)] == [
        False, True, True,
    ]  # fmt: skip
    assert [torch.equal(one, eye) for one in maps.v] == [True, False, True]


def output_error(model: nn.Module, x: Tensor, dense: Tensor, **options: Any) -> float:
    pruned = copy.deepcopy(model)
    prune_attention(pruned, data=[x], progress=False, **options)
    return float((pruned(x).detach() - dense).square().mean())


@pytest.mark.parametrize("seed", range(5))
def test_uncompensated_compensated_rotated_each_beats_the_one_before(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    mixing = torch.randn(32, 32, dtype=torch.float64)
    x = torch.randn(40, 8, 32, dtype=torch.float64) @ mixing
    dense = model(x).detach()
    free: dict[str, Any] = {"scorer": "gate", "qkvo_ratios": 0.5}
    plain = output_error(model, x, dense, **free)  # a scorer that is named removes channels as they stand
    refitted = output_error(model, x, dense, compensate=True, **free)
    rotated = output_error(model, x, dense, basis="rotated", compensate=True, **free)
    assert rotated < refitted < plain


# gates


def test_gates_are_derivatives_with_respect_to_gates() -> None:
    """Against explicit gates, one sample at a time, by autograd."""
    module = attention(heads=2)
    with torch.no_grad():
        module.in_proj_bias.normal_()
    model = Alone(module)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    direction = torch.randn(4, 5, 12, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch) * direction).sum() / len(batch)

    scores = Gate().score(model, find_views(model), data=[x], loss_fn=loss_fn)["inner"]
    q, k, v = projections(module, x)
    with torch.no_grad():
        mean = ((q @ k.mT / 6**0.5).softmax(-1) @ v).mean((0, 2))  # (heads, dim)
    squares: dict[str, list[Tensor]] = {"qk": [], "vo": [], "head": []}
    for i in range(4):
        gates = {key: torch.ones(2, 6, dtype=torch.float64, requires_grad=True) for key in ("qk", "vo")}
        gates["head"] = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
        weights = ((q[i] * gates["qk"][:, None]) @ k[i].mT / 6**0.5).softmax(-1)
        context = (weights @ v[i] - mean[:, None]) * gates["vo"][:, None] * gates["head"][:, None] + mean[:, None]
        output = context.transpose(0, 1).flatten(1) @ module.out_proj.weight.detach().T
        grads = torch.autograd.grad((output * direction[i]).sum(), list(gates.values()))
        for key, grad in zip(gates, grads, strict=True):
            squares[key].append(grad.square())
    for key in ("qk", "vo"):
        torch.testing.assert_close(scores.of(key), torch.stack(squares[key]).mean(0))  # type: ignore[arg-type]
    torch.testing.assert_close(scores.head, torch.stack(squares["head"]).mean(0)[:, 0])


def test_without_a_bias_of_o_gates_close_the_mean_too() -> None:
    model = Alone(attention(bias=False))
    data = [torch.randn(4, 5, 12, dtype=torch.float64) + 1]
    found, plain = (Gate(centred=on).score(model, find_views(model), data=data)["inner"] for on in (True, False))
    torch.testing.assert_close(found.vo, plain.vo, rtol=0, atol=0)


def test_gates_of_directions_are_gates_of_the_rotated_model() -> None:
    model = fresh("Bert", 1)
    data = batches("Bert", 1)
    calibration, views = calibrate(model, data, progress=False), find_views(model)
    bases = {view.name: head_bases(view, calibration[view.name]) for view in views}
    direct = Gate(bases=bases).score(model, views, data=data, progress=False)
    with in_bases(model, views, bases):
        other = Gate().score(model, views, data=data, progress=False)
    for name, scores in direct.items():
        for key in ("qk", "vo", "head"):
            torch.testing.assert_close(getattr(scores, key), getattr(other[name], key), rtol=1e-7, atol=1e-12)


def test_gates_of_a_share_of_the_data() -> None:
    model = Alone(attention())
    data = [torch.randn(4, 5, 12, dtype=torch.float64) for _ in range(8)]
    views, some = find_views(model), Gate(samples=8)
    found = some.score(model, views, data=data)["inner"]
    expected = Gate().score(model, views, data=[data[2], data[6]])["inner"]
    torch.testing.assert_close(found.qk, expected.qk)
    first = some.score(model, views, data=(batch for batch in data))["inner"]
    torch.testing.assert_close(first.qk, Gate().score(model, views, data=data[:2])["inner"].qk)


def test_the_kl_metric_is_the_fisher_information_of_the_outputs() -> None:
    """The mean over many directions of the squared derivative, against the matrix diag(p) - p p^T."""
    logits = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits

    loss_fn = attnprune.scorers.projection_loss(metric="kl")
    draws = []
    for _ in range(4000):
        (grad,) = torch.autograd.grad(loss_fn(Model(), torch.zeros(1)), logits)
        draws.append(grad[0] * 3)
    p = logits[0].softmax(-1).detach()
    found = torch.stack(draws).T @ torch.stack(draws) / len(draws)
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p), atol=0.02, rtol=0)


# asking for an error


@pytest.mark.parametrize("heads", ["uniform", "ragged"])
@pytest.mark.parametrize("target", [0.001, 0.05, 0.3])
def test_target_error_keeps_as_few_directions_as_it_allows(heads: Any, target: float) -> None:
    model = fresh("ViT", 0)
    data = batches("ViT", 0)
    calibration = calibrate(model, data, progress=False)
    plan = make_plan(model, target_error=target, heads=heads, calibration=calibration)
    assert plan.asked is not None
    assert plan.asked.target_error == target
    for view, layer in zip(find_views(model), plan, strict=True):
        bases = head_bases(view, calibration[view.name]).by_kind
        for kind in ("qk", "vo"):
            groups = [[h] for h in range(4)] if heads == "ragged" else [list(range(4))]
            for group in groups:
                total = sum(float(bases[kind][h].energy.sum()) for h in group)  # type: ignore[index]
                keep = {layer.after.dims(kind)[h] for h in group}  # type: ignore[arg-type]
                assert len(keep) == 1
                rank = keep.pop()
                lost = [sum(float(bases[kind][h].energy[r:].sum()) for h in group) for r in (rank, rank - 1)]  # type: ignore[index]
                assert lost[0] <= target * total * (1 + 1e-9)
                assert rank == 1 or lost[1] > target * total
    report = apply_plan(model, plan)
    assert "of energy" in str(report)


def test_target_error_obeys_floors_and_rounding() -> None:
    model = fresh("ViT", 0)
    plan = make_plan(model, target_error=0.9, data=batches("ViT", 0), round_to=4, min_channels=3, progress=False)
    assert {dim for spec in plan.after for dim in (*spec.qk_dims, *spec.vo_dims)} == {4}


# what may come


def prepared(model: nn.Module, data: list[Any], **options: Any) -> nn.Module:
    prune_attention(model, 0.5, data=data, progress=False, **options)
    return model


ODD_WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"basis": "channels"},
    {"heads": "ragged", "split": "auto"},
    {"sequential": True},
)


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", ODD_WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_degenerate_input_gives_results(options: dict[str, Any], dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().to(dtype)

    dead, deficient = build(), build()
    with torch.no_grad():
        for one in dead.layers:  # type: ignore[union-attr]
            one.self_attn.in_proj_weight[[0, 3, 17, 18, 35]] = 0  # type: ignore[union-attr]
            one.self_attn.in_proj_bias[[0, 3, 17, 18, 35]] = 0  # type: ignore[union-attr]
        for one in deficient.layers:  # type: ignore[union-attr]
            one.self_attn.in_proj_weight.copy_(torch.ones(48, 1) @ torch.randn(1, 16))  # type: ignore[union-attr]
            one.self_attn.out_proj.weight.zero_()  # type: ignore[union-attr]
    normal = torch.randn(6, 5, 16).to(dtype)
    cases: dict[str, tuple[nn.Module, list[Tensor]]] = {
        "fewer samples than dimensions": (build(), [normal[:1, :2]]),
        "constant tokens": (build(), [normal[:1, :1].expand(4, 5, 16).contiguous()]),
        "zeros": (build(), [torch.zeros(4, 5, 16, dtype=dtype)]),
        "one-token sequences": (build(), [normal[:, :1]]),
        "dead channels": (dead, [normal]),
        "rank-deficient weights": (deficient, [normal]),
    }
    for name, (model, data) in cases.items():
        pruned = prepared(model, data, **options)
        assert pruned(normal).isfinite().all(), name
        assert all(p.isfinite().all() for p in pruned.parameters()), name


@pytest.mark.parametrize("options", ODD_WAYS, ids=str)
def test_rows_that_may_attend_to_nothing_do_not_count(options: dict[str, Any]) -> None:
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True  # the third query sees no key: its context is NaN
    model = Alone(attention(), attn_mask=mask)
    x = torch.randn(6, 5, 12, dtype=torch.float64)
    calibration = calibrate(model, [x], progress=False)
    assert calibration["inner"].tokens == {"qk": 24.0, "vo": 24.0}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return model(batch)[:, [0, 1, 3, 4]].square().mean()

    prune_attention(model, 0.5, data=[x], loss_fn=loss_fn, progress=False, **options)
    assert model(x)[:, [0, 1, 3, 4]].isfinite().all()


def test_full_rank_is_exact_on_other_data_than_the_few_that_calibrated() -> None:
    model = Alone(attention())
    few = torch.randn(1, 2, 12, dtype=torch.float64)
    calibration, views = calibrate(model, [few], progress=False), find_views(model)
    other = torch.randn(5, 7, 12, dtype=torch.float64)
    expected = model(other).detach()
    with in_bases(model, views, {view.name: head_bases(view, calibration[view.name]) for view in views}):
        close(model(other).detach(), expected, 1e-9, "rotated")


def test_pruning_again_starts_from_what_is_left() -> None:
    torch.manual_seed(0)
    model = fresh("ViT", 0)
    data, given_ = batches("ViT", 0), inputs("ViT", 0, 50)
    first = make_plan(model, 0.3, data=data, heads="ragged", split="auto", progress=False)
    both = copy.deepcopy(model)
    apply_plan(model, first)
    second = make_plan(model, 0.3, data=data, heads="ragged", split="auto", progress=False)
    apply_plan(model, second)
    third = make_plan(model, 0.2, heads="ragged")
    apply_plan(model, third)
    apply_plan(both, first.then(second).then(third))
    one, other = (forward_backward("ViT", each, given_)[0] for each in (model, both))
    close(one, other, 1e-9, "plans in a row")
    asked = first.then(second).then(third).asked
    assert asked is not None
    assert (asked.basis, asked.compensate) == ("rotated+channels", "yes+no")


def test_what_went_before_may_be_calibrated_by_hand() -> None:
    """One calibration serves any number of plans, and the same plan as data do."""
    model, data = fresh("ViT", 0), batches("ViT", 0)
    calibration = calibrate(model, data, progress=False)
    for options in ({"basis": "rotated"}, {"basis": "channels"}, {"basis": "rotated", "heads": "ragged"}):
        options = {"compensate": True, **options}  # type: ignore[dict-item]
        scorer: Any = Magnitude()
        one = make_plan(model, 0.5, scorer=scorer, calibration=calibration, **options)  # type: ignore[arg-type]
        assert one == make_plan(model, 0.5, scorer=scorer, data=data, progress=False, **options)  # type: ignore[arg-type]


def test_without_data_a_rotated_basis_follows_from_the_weights() -> None:
    model = fresh("DINOv2", 0)
    plan = make_plan(model, 0.5, basis="rotated")
    assert plan.asked is not None
    assert (plan.asked.scorer, plan.asked.basis, plan.asked.compensate) == ("energy", "rotated", "no")
    given_ = inputs("DINOv2", 0)
    oracle = copy.deepcopy(model)
    project("DINOv2", oracle, plan)
    apply_plan(model, plan)
    close(forward_backward("DINOv2", model, given_)[0], forward_backward("DINOv2", oracle, given_)[0], 1e-9, "output")


def test_an_asked_ratio_of_zero_changes_no_bit() -> None:
    model = fresh("ViT", 0)
    before = copy.deepcopy(model.state_dict())
    report = prune_attention(model, 0.0, data=batches("ViT", 0), progress=False)
    assert report.plan.empty
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# refusals


def test_rotating_shared_weights_is_refused_before_anything_moves() -> None:
    model = fresh("ViT", 0)
    names = [spec.name for spec in attnprune.find_attention(model)]
    first, second = (model.get_submodule(name) for name in names)
    second.q_proj.weight = first.q_proj.weight  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    for options in ({}, {"scorer": "magnitude", "basis": "rotated", "compensate": True}):
        with pytest.raises(TiedWeightsError):
            prune_attention(model, 0.5, data=batches("ViT", 0), progress=False, **options)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = Alone(attention())
    model.other = nn.Linear(12, 12).double()
    model.other.bias = model.inner.out_proj.bias
    with pytest.raises(TiedWeightsError, match="other"):
        prune_attention(model, 0.5, data=[torch.randn(2, 3, 12, dtype=torch.float64)], progress=False)


def test_maps_of_other_shapes_or_numbers_are_refused() -> None:
    spec = attnprune.AttentionSpec.of("a", heads=1, head_dim=2, d_model=4)
    good = torch.ones(1, 2)
    LayerPlan(spec, qk=((0,),), vo=((1,),), fold=ChannelMaps((good,), (good,), (good,), torch.ones(2, 1)))
    with pytest.raises(PlanFormatError, match="1x2"):
        LayerPlan(spec, qk=((0,),), vo=((1,),), fold=ChannelMaps((good,), (good,), (good,), torch.ones(2, 2)))
    bad = ChannelMaps((good,), (good,), (good,), torch.full((2, 1), torch.nan))
    with pytest.raises(NonFiniteError, match="fold"):
        LayerPlan(spec, qk=((0,),), vo=((1,),), fold=bad)
