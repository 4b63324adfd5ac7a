"""Bases and energies of weights alone, counted by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnprune import calibrate, prune_channels
from attnprune.calibration.bases import best_basis, head_bases, root, white_moments
from attnprune.families import find_views

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, **SIZES)
    return transformers.BertModel(config, add_pooling_layer=False).eval().double()  # type: ignore[no-any-return]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **SIZES)
    return transformers.LlamaModel(config).eval().double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [bert, llama])
def test_energies_of_channels_as_they_stand(make: object) -> None:
    """Of a head's queries and keys the mean squares, but for what all keys share; of groups the sum over queries."""
    model: nn.Module = make()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    (view,) = find_views(model)
    groups = view.spec.heads // view.spec.kv_heads
    found = head_bases(view, white_moments(view), rotated=False)

    def rows(p: str) -> tuple[Tensor, Tensor]:
        """Squares of rows ``(heads, channels)``, and of biases."""
        weight, bias = view.owner(p).weight.detach(), view.owner(p).bias  # type: ignore[arg-type]
        weight = weight.T if p == "o" else weight
        squares = weight.square().sum(1).view(-1, 4)
        return squares, torch.zeros_like(squares) if bias is None or p == "o" else bias.detach().square().view(-1, 4)

    (q, q_bias), (k, _), (v, v_bias), (o, _) = (rows(p) for p in "qkvo")
    centred = view.owner("o").bias is not None
    for key in range(view.spec.kv_heads):
        own = slice(key * groups, (key + 1) * groups)
        qk = (q + q_bias)[own].sum(0) * k[key]
        context = v[key] if centred else v[key] + v_bias[key]
        torch.testing.assert_close(found.by_kind["qk"][key].energy, qk)
        torch.testing.assert_close(found.by_kind["vo"][key].energy, groups * context * o[own].mean(0))


def test_nothing_has_a_basis_too() -> None:
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    assert all(torch.equal(one, torch.eye(3, dtype=torch.float64)) for one in root(zeros))
    basis = best_basis(zeros, zeros)
    assert all(bool(part.isfinite().all()) for part in basis)
    torch.testing.assert_close(basis.first.T @ basis.second, torch.eye(3, dtype=torch.float64))


def test_energy_is_a_mean_square() -> None:
    """Of x and y with L = diag(9, 1) and R = diag(1, 4), the products have mean squares of 9 and 4."""
    left, right = (torch.diag(torch.tensor(one, dtype=torch.float64)) for one in ([9.0, 1.0], [1.0, 4.0]))
    torch.testing.assert_close(best_basis(left, right).energy, torch.tensor([9.0, 4.0], dtype=torch.float64))


def test_rotary_channels_stand_and_cost_more_where_nothing_makes_up_for_them() -> None:
    model = llama()
    calibration = calibrate(model, [torch.arange(12).view(2, 6)], progress=False)
    (view,) = find_views(model)
    moments, eye = calibration[view.name], torch.eye(4, dtype=torch.float64)
    assert moments.relative
    plain, refitted = (head_bases(view, moments, refits=refits) for refits in (False, True))
    for bases in (plain, refitted):
        assert bases.fixed == {"qk"}
        assert all(torch.equal(basis.first, eye) for basis in bases.by_kind["qk"])
        assert not any(torch.equal(basis.first, eye) for basis in bases.by_kind["vo"])
    assert not plain.alone
    assert torch.equal(refitted.alone["qk"][0], plain.by_kind["qk"][0].energy)
    assert bool((refitted.by_kind["qk"][0].energy < plain.by_kind["qk"][0].energy).any())


def test_heads_of_unlike_dims_have_bases_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)
    prune_channels(model, {0: {"qk": [[0], []], "vo": [[], [1, 2]]}})
    (view,) = find_views(model)
    found = head_bases(view, white_moments(view)).by_kind
    assert [[len(basis.energy) for basis in found[kind]] for kind in ("qk", "vo")] == [[3, 4], [4, 2]]
