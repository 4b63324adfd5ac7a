"""What one trial of a host sees and says: :mod:`attnprune.families.proof.trial`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.vit import modeling_vit

from attnprune.families.proof.removal import Removal
from attnprune.families.proof.runs import Result
from attnprune.families.proof.stand_in import StandIn
from attnprune.families.proof.trial import Trial
from attnprune.families.registry import Survey
from attnprune.families.ways import Verdict

from .test_proof import CHANGES, host_of

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}


def test_heads_do_not_go_where_zeros_are_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHANGES, "keys by their length", ("split", "k = k / k.norm(dim=-1, keepdim=True)"))
    verdict = Survey(host_of(["keys by their length"])()).views[0].verdict
    assert verdict is not None
    assert verdict.reasons["heads"] == "its output is not finite where all of a head is zero"
    assert not verdict.heads
    assert verdict.expanded, "channels do"


class Asking(modeling_vit.ViTAttention):
    def forward(self, hidden_states: Any, magic: Any = None) -> Any:
        return super().forward(hidden_states)


def verdict_of(kind: type[Any] | None) -> Verdict:
    """Of a ViT's attention, whose class is this one."""
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL), add_pooling_layer=False)
    if kind is not None:
        kind.__name__ = "ViTAttention"
        model.layers[0].attention.__class__ = kind
    found = Survey(model).views[0].verdict
    assert found is not None
    return found


def test_an_argument_that_nobody_knows_keeps_the_forward() -> None:
    plain, verdict = verdict_of(None), verdict_of(Asking)
    assert plain.stock
    assert plain.decoupled is not None
    assert (verdict.stock, verdict.decoupled, verdict.expanded) == (False, None, True)
    assert verdict.reasons["stock"] == verdict.reasons["decoupled"] == "nobody knows what its argument magic does"


def test_a_layer_without_a_place_in_a_cache_takes_none() -> None:
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, attn_implementation="sdpa", **SMALL)
    verdict = Survey(modeling_llama.LlamaAttention(config, layer_idx=None)).views[0].verdict
    assert verdict is not None
    assert verdict.decoupled is not None


# comparisons


def trial_of(host: type[nn.Module]) -> Trial:
    view = Survey(host()).views[0]
    again = partial(StandIn, view, torch.float64, True)
    stand_in = again()
    return Trial(again, stand_in, list(view.adapter.calls(stand_in.view)), torch.float64)


@pytest.fixture(scope="module")
def trial() -> Trial:
    return trial_of(host_of([]))


def test_a_host_that_rounds_is_run_exactly(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHANGES, "single precision", ("logits", "logits = logits.float().double()"))
    assert all(call.exactly for call in trial_of(host_of(["single precision"])).calls)
    assert not any(call.exactly for call in trial.calls)


def test_every_call_is_compared(trial: Trial) -> None:
    """One that differs where there is a mask alone is another."""
    other, removal = trial._committed(None)[0], Removal(trial.view.spec, False, False, channels=False)
    assert trial._same("stock", other, removal)
    forward = other.host.forward

    def masked(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        out, weights = forward(hidden_states, attention_mask, **kwargs)
        return out if attention_mask is None else 2 * out, weights

    other.host.forward = masked
    assert not trial._same("stock", other, removal)
    assert "mask" in trial.reasons.pop("stock")


def result(*outputs: Any, weights: Any = (), grads: Any = (), shape: Any = ("tensor",)) -> Result:
    found = object.__new__(Result)
    as_tensors = ([torch.as_tensor(one, dtype=torch.float64) for one in some] for some in (outputs, weights, grads))
    found.outputs, found.weights, found.grads = as_tensors
    found.shape = [*shape]
    return found


def rows(*numbers: float) -> Tensor:
    """Weights ``(1, heads, 1, 1)``."""
    return torch.tensor(numbers).view(1, -1, 1, 1)


inf, nan = float("inf"), float("nan")
SAME: dict[str, Any] = {
    "rounding": (result([1.0, 2.0]), result([1.0, 2.0 + 1e-11])),
    "infinities": (result([inf, nan, 1.0]), result([inf, nan, 1.0])),
    "next to nothing": (result([1e-14]), result([0.0])),
    "weights of heads that stay": (result([1.0], weights=[rows(2, 4)]), result([1.0], weights=[rows(1, 2, 3, 4)])),
}
OTHER: dict[str, Any] = {
    "a slight error": (result([1.0, 2.0]), result([1.0, 2.0 + 1e-9])),
    "infinite elsewhere": (result([inf, 1.0]), result([1.0, inf])),
    "not a number": (result([1.0, nan]), result([1.0, 2.0])),
    "minus infinity": (result([inf]), result([-inf])),
    "another shape": (result([1.0]), result([1.0, 1.0])),
    "another structure": (result([1.0]), result([1.0], shape=("tensor", "NoneType"))),
    "gradients": (result([1.0], grads=[[1.0]]), result([1.0], grads=[[2.0]])),
    "weights of other heads": (result([1.0], weights=[rows(1, 2)]), result([1.0], weights=[rows(1, 2, 3, 4)])),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_what_is_alike(trial: Trial, name: str) -> None:
    found, expected = (SAME | OTHER)[name]
    trial.reasons.clear()
    assert trial._alike("some way", trial.calls[0], found, expected, heads=[1, 3]) == (name in SAME)
    assert (trial.reasons.get("some way", "") == "") == (name in SAME), "a reason is given"


def test_dropout_is_off_after_training(trial: Trial) -> None:
    """And what a weight learns is compared, not only what inputs do."""
    assert isinstance(trial.stand_in.host, nn.Module)
    other = trial._committed(None)[0]
    assert trial._in_training("expanded", other)
    for host in (trial.stand_in.host, other.host):
        assert not any(module.training or "attnprune_rates" in module.__dict__ for module in host.modules())
    assert trial._same_gradients("decoupled", other)
    hidden = other.view.owner("v")
    forward = type(hidden).forward

    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.detach(), self.bias)

    assert forward is nn.Linear.forward
    hidden.__class__ = Fixed  # type: ignore[assignment]
    assert not trial._in_training("decoupled", other)
    assert trial.reasons["decoupled"] == "its weights get other gradients"
    assert trial._in_training("expanded", other), "whose weights are the host's"
