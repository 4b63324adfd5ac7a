"""What a module is gets proven: whatever its forward computes, it is pruned exactly, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnprune
from attnprune import apply_plan, find_attention, make_plan, masked
from attnprune.errors import AttnPruneError
from attnprune.families.proof.key import key_of
from attnprune.families.registry import Survey

from .conformance import fresh
from .selection import examples

CHANGES = {
    # where it goes, and what it is
    "values doubled": ("split", "v = v * 2"),
    "values of the next head": ("split", "v = v.roll(1, 1)"),
    "values detached": ("split", "v = v.detach()"),
    "queries normalised": ("split", "q = q / (1e-6 + q.norm(dim=-1, keepdim=True))"),
    "keys rolled along channels": ("split", "k = k.roll(1, -1) + k"),
    "queries rotated by place": ("split", "q, k = turn(q), turn(k)"),
    "a slight error": ("split", "v = v * (1 + 1e-6)"),
    "another scale": ("logits", "logits = logits * 0.9"),
    "scaled by a buffer": ("logits", "logits = logits * self.temperature"),
    "logits capped": ("logits", "logits = 2 * torch.tanh(logits / 2)"),
    "logits clamped": ("logits", "logits = logits.clamp(-40, 40)"),
    "a bias for every head": ("logits", "logits = logits + self.table"),
    "a sink": ("logits", "logits = torch.cat([logits, self.table.expand(B, -1, T, 1)], -1); drop = True"),
    "the mask twice": ("masked", "logits = logits if attention_mask is None else logits + attention_mask"),
    "the mask ignored": ("masked", "logits = logits if attention_mask is None else logits - attention_mask"),
    "causal beyond six tokens": ("masked", "logits = causal(logits) if T > 6 else logits"),
    "weights squared": ("weights", "weights = weights * weights"),
    "weights of heads mixed": ("weights", "weights = (weights + weights.mean(1, keepdim=True)) / 2"),
    "noise in training": ("weights", "weights = weights + 0.1 * self.training"),
    "by the layer's number": ("context", "context = context * (1 + self.layer_idx)"),
    "context rectified": ("context", "context = context.relu()"),
    "context gated": ("flat", "context = context * torch.sigmoid(self.gate(hidden_states))"),
    "context normalised": ("flat", "context = context / (1e-6 + context.norm(dim=-1, keepdim=True))"),
    "a residual": ("out", "out = out + hidden_states"),
    "the output negated": ("out", "out = -out"),
}
REFUSED = {"values of the next head": "its heads do not lie one after the other"}
"""What has no heads of its own to remove."""
TEMPLATE = """
def forward(self, hidden_states, attention_mask=None, **kwargs):
    B, T, _ = hidden_states.shape
    drop = False
    q, k, v = (p(hidden_states).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    {split}
    logits = q @ k.mT * self.scaling
    {logits}
    if drop and attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1))
    if attention_mask is not None:
        logits = logits + attention_mask
    {masked}
    weights = logits.softmax(-1)
    {weights}
    context = (weights[..., :T] if drop else weights) @ v
    {context}
    context = context.transpose(1, 2).flatten(2)
    {flat}
    out = self.o_proj(context)
    {out}
    return out, weights
"""


EAGER = (
    TEMPLATE.replace("attention_mask=None, **kwargs", "head_mask=None, output_attentions=False")
    .replace("drop = False", "drop, attention_mask = False, None")
    .replace("    {weights}", "    weights = weights if head_mask is None else weights * head_mask\n    {weights}")
    .replace("return out, weights", "return (out, weights) if output_attentions else (out,)")
)
"""The same as transformers 4.48 wrote it, without a mask of tokens: a forward of ours takes its place."""
SAME = {
    "a bias for every head": "one for all keys changes no softmax",
    "the mask twice": "there is none",
    "the mask ignored": "there is none",
}
"""What changes nothing there."""


def turn(x: Tensor) -> Tensor:
    """A rotary embedding, half and half."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 3 ** torch.arange(3, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def causal(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


class Base(nn.Module):
    """What all of them are made of; weights large enough that everything matters."""

    def __init__(self, layer_idx: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(layer_idx)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate = (nn.Linear(24, 24) for _ in range(5))
        self.table = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.register_buffer("temperature", torch.tensor(0.7))
        self.num_heads, self.head_dim, self.scaling, self.layer_idx = 4, 6, 6**-0.5, layer_idx
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("every host has a forward of its own")


def host_of(changes: Sequence[str], template: str = TEMPLATE) -> type[nn.Module]:
    """A class whose forward is written with these changes."""
    parts = dict.fromkeys(("split", "logits", "masked", "weights", "context", "flat", "out"), "pass")
    for name in changes:
        place, code = CHANGES[name]
        parts[place] += f"; {code}" if parts[place] != "pass" else f"\n    {code}"
    space: dict[str, Any] = {"torch": torch, "turn": turn, "causal": causal}
    exec(template.format(**parts), space)
    return type("ViTAttention", (Base,), {"forward": space["forward"]})


class Two(nn.Module):
    def __init__(self, host: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = host(0), host(1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.second(x + self.first(x, mask)[0], attention_mask=mask)[0]


def outputs(model: nn.Module) -> list[Tensor]:
    """What a model computes, with masks and without, short and long, in evaluation and training; with gradients."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for training, tokens, shape in ((False, 5, None), (False, 9, (2, 1)), (True, 8, (2, 4)), (False, 3, (1, 1))):
        model.train(training)
        x = torch.randn(2, tokens, 24, generator=generator, dtype=torch.float64, requires_grad=True)
        mask = None
        if shape is not None:
            mask = torch.randn(*shape, tokens, tokens, generator=generator, dtype=torch.float64) * 3
        y = model(x, mask)
        found += [y.detach(), torch.autograd.grad(y.square().sum(), x)[0]]
    model.eval()
    return found


@settings(max_examples=examples(72))
@given(
    changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=4, unique=True),
    ratios=st.sampled_from([0.5, {"qk": 0.5}, {"vo": 0.5}]),
    heads=st.sampled_from(["uniform", "ragged"]),
    granularity=st.sampled_from(["channel", "head"]),
)
def test_no_forward_is_silently_another(changes: list[str], ratios: Any, heads: str, granularity: str) -> None:
    """Law 8."""
    model = Two(host_of(changes))
    ratios = 0.5 if granularity == "head" else ratios
    try:
        plan = make_plan(model, ratios, heads=heads, granularity=granularity, scorer="random", basis="channels")
    except AttnPruneError:
        return
    with masked(model, plan):
        expected = outputs(model)
    apply_plan(model, plan)
    for mine, theirs in zip(outputs(model), expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-9 * max(1.0, float(theirs.abs().max())), changes


@pytest.mark.parametrize("name", ["nothing", *sorted(CHANGES)])
def test_every_change_is_seen(name: str) -> None:
    """A forward of ours takes the place of the host without changes and of no other one, each with its reason."""
    survey = Survey(host_of([name] if name in CHANGES else [], EAGER)(1))
    if name in REFUSED:
        assert REFUSED[name] in survey.why[""]
        return
    (view,) = survey.views
    verdict = view.verdict
    assert verdict is not None
    assert (verdict.decoupled is not None) == (name == "nothing" or name in SAME)
    assert verdict.expanded
    assert any(key.startswith("decoupled") for key in verdict.reasons) == (verdict.decoupled is None)


def test_what_may_turn_is_proven() -> None:
    fixed = {name: set(Survey(host_of([name])()).views[0].fixed) for name in CHANGES if name not in REFUSED}
    assert fixed["values doubled"] == set()
    assert fixed["a residual"] == set()
    assert fixed["queries rotated by place"] == {"qk"}
    assert fixed["queries normalised"] == {"qk"}
    assert fixed["context rectified"] == {"vo"}
    assert fixed["context gated"] == {"vo"}


def test_a_second_model_of_a_class_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(["a residual"])
    find_attention(Two(host))

    def never(*_: Any) -> Any:
        raise AssertionError("proven again")

    monkeypatch.setattr("attnprune.families.proof.verdict._prove", never)
    find_attention(Two(host))


def test_a_patched_class_is_proven_anew() -> None:
    host = host_of([])
    assert Survey(host()).views[0].verdict
    original = host.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(self, *args, **kwargs)
        return 3 * out, weights

    host.forward = patched  # type: ignore[method-assign]
    model = Two(host)
    plan = make_plan(model, 0.5, scorer="random")
    with masked(model, plan):
        expected = outputs(model)
    apply_plan(model, plan)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-9, atol=1e-9)


class Told(nn.Module):
    """Computes what a list of its own says."""

    def __init__(self, gains: list[float]) -> None:
        super().__init__()
        self.num_heads, self.gains = 4, gains
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        gains = torch.tensor(self.gains, dtype=x.dtype)
        gains = torch.nn.functional.pad(gains, (0, q.shape[-1] - len(gains)), value=1.0)
        context = nn.functional.scaled_dot_product_attention(q * gains, k, v, scale=0.4)
        return self.o_proj(context.transpose(1, 2).flatten(2))


def test_lists_among_attributes_make_another_host() -> None:
    """Of two hosts of a class, one may mix its channels and the other may not."""
    alike, apart = (Survey(Told(gains).double()).views[0] for gains in ([1.0], [3.0]))
    assert not alike.fixed
    assert apart.fixed.keys() == {"qk"}


class ToldByName(Told):
    """Says so by an attribute that in a config only tells where a model is from, or goes."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__([])
        self.told = name
        setattr(self, name, value)

    @property
    def gains(self) -> list[float]:
        return [float(getattr(self, self.told))]

    @gains.setter
    def gains(self, _: list[float]) -> None: ...


@pytest.mark.parametrize("name", ["dtype", "architectures", "name_or_path", "attnprune"])
def test_attributes_of_hosts_are_not_those_of_configs(name: str) -> None:
    alike, apart = (Survey(ToldByName(name, value).double()).views[0] for value in ("1", "3"))
    assert not alike.fixed
    assert apart.fixed.keys() == {"qk"}


def test_proof_leaves_no_trace() -> None:
    model = Two(host_of(["context gated"]))
    seen: list[Any] = []
    model.first.register_forward_hook(lambda *_: seen.append(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    threads, flags = torch.get_num_threads(), [p.requires_grad for p in model.parameters()]
    find_attention(model)
    assert not seen
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("context", ["inference", "no_grad", "meta", "autocast", "fake"])
def test_proof_in_any_mode(context: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    contexts = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    }
    host = host_of(["a residual", "values doubled"])  # a class of its own, so that it is proven here
    model = host()
    with contexts[context]():
        (view,) = Survey(model).views
    assert view.verdict is not None
    assert view.verdict.expanded


class Odd(nn.Module):
    """Sigmoid attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))
        self.num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj((torch.sigmoid(q @ k.mT) @ v).transpose(1, 2).flatten(2))
        return out


class OddlyCalled(Odd):
    """Softmax attention whose arguments have names that tell nothing."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(((q @ k.mT + shift).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class Both(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), other

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x, torch.ones(())) if isinstance(self.b, OddlyCalled) else self.b(x)  # type: ignore[no-any-return]


def test_nothing_is_passed_over_without_a_word() -> None:
    model = Both(Odd())
    (skipped,) = attnprune.skipped_attention(model)
    assert (skipped.name, skipped.kind) == ("b", "Odd")
    assert "no softmax" in skipped.why
    with pytest.warns(attnprune.errors.AttnPruneWarning, match="b \\(Odd\\): no softmax"):
        report = attnprune.prune_attention(model, 0.5, scorer="magnitude")
    assert report.skipped == (skipped,)
    assert "skipped: b (Odd)" in str(report)
    assert report.to_dict()["skipped"] == [skipped._asdict()]
    with pytest.raises(AttnPruneError, match="no softmax"):
        make_plan(model, 0.5, strict=True)
    assert make_plan(model, 0.5, strict=True, exclude="b")


def test_a_call_of_the_model_tells_what_names_do_not() -> None:
    model = Both(OddlyCalled()).double()
    (skipped,) = attnprune.skipped_attention(model)
    assert "example_inputs" in skipped.why
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    plan = make_plan(model, 0.5, example_inputs=x, scorer="random", strict=True)
    assert [layer.spec.name for layer in plan] == ["a.self_attn", "b"]
    with masked(model, plan):
        expected = model.eval()(x)
    report = apply_plan(model, plan, example_inputs=x)
    assert report.ways["b"].startswith("expanded")
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


class Hidden(nn.Module):
    """Attention that does not look like any, and takes a softmax over keys."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(24, 72)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_attention_is_also_known_by_what_it_does() -> None:
    model = Both(Hidden())
    assert attnprune.skipped_attention(model) == ()
    with pytest.warns(attnprune.errors.AttnPruneWarning, match=r"b \(Hidden\)"):
        report = attnprune.prune_attention(model, 0.5, example_inputs=torch.randn(2, 5, 24))
    assert [one.name for one in report.skipped] == ["b"]


class Holding(nn.Module):
    """Attention that does more where something that it holds says so."""

    def __init__(self, held: Any, ask: Any) -> None:
        super().__init__()
        self.num_heads, self.ask = 4, ask
        if isinstance(held, Tensor):
            self.register_buffer("held", held)
        else:
            self.held = held
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.ask(self.held):
            q, k = q.abs() + q.cumsum(-1), 2 * k.flip(-1)
        context: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Slotted:
    __slots__ = ("more",)

    def __init__(self, more: bool) -> None:
        self.more = more


HELD: dict[str, tuple[Any, Any]] = {
    "a list": (lambda more: [more], lambda held: held[0]),
    "a dict in a list": (lambda more: [{"more": more}], lambda held: held[0]["more"]),
    "a list with other things": (lambda more: [more, nn.Identity(), len], lambda held: held[0]),
    "an object": (lambda more: SimpleNamespace(more=more), lambda held: held.more),
    "an object with slots": (Slotted, lambda held: held.more),
    "a tensor": (lambda more: [torch.tensor(float(more))], lambda held: bool(held[0])),
    "a buffer": (torch.tensor, bool),
    "an array": (lambda more: np.array([more]), lambda held: bool(held[0])),
    "a dtype": (lambda more: torch.float64 if more else torch.float32, lambda held: held is torch.float64),
    "a closure": (lambda more: lambda: more, lambda held: held()),
    "a function": (lambda more: (lambda: 1) if more else (lambda: 0), lambda held: held()),
    "a partial": (lambda more: partial(int, more), lambda held: held()),
}


@pytest.mark.parametrize("held", HELD)
def test_hosts_that_differ_in_what_they_hold_share_no_proof(held: str) -> None:
    make, ask = HELD[held]
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for more in (False, True, False):
        model = Holding(make(more), ask).double().eval()
        plan = make_plan(model, 0.5, scorer="magnitude", heads="ragged")
        with masked(model, plan):
            expected = model(x)
        apply_plan(model, plan)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert key_of(Holding(make(True), ask)) == key_of(Holding(make(True), ask))


@pytest.mark.parametrize("kind", ["submodule", "parameter", "attribute"])
@pytest.mark.parametrize("name", ["facts", "head_rows", "_attend", "laid_out", "other"])
def test_nothing_of_the_host_is_hidden(name: str, kind: str) -> None:
    """A forward of ours has names too: hosts that use them keep their own."""
    made: Any = {"submodule": nn.Linear(16, 16), "parameter": nn.Parameter(torch.ones(16)), "attribute": 2.0}[kind]
    timm = fresh("TimmAttention", 0)
    model = next(module for module in timm.modules() if type(module).__name__ == "Attention")
    setattr(model, name, made)
    dense = [spec.name for spec in find_attention(model)]
    report = attnprune.prune_attention(model, 0.5, heads="ragged", scorer="magnitude")
    assert getattr(model, name) is made
    assert report.ways[dense[0]].startswith("decoupled" if name == "other" else "expanded")
