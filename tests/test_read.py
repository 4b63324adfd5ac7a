"""Hosts that read the weights of their projections instead of calling them are pruned exactly, with data too."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import apply_plan, errors, load_pruned, make_plan, masked, prune_attention, save_pruned, score_attention
from attnprune.errors import DataError

from .families import randomised


class Reads(nn.Module):
    """As torchvision's Swin: one function takes the weights."""

    def __init__(self, width: int = 24, heads: int = 3, own: bool = False) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=not own), nn.Linear(width, width)
        self.own = own
        if own:  # as timm's BEiT and EVA: no bias for keys
            self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def project(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]) if self.own else self.qkv.bias
        return F.linear(x, weight=self.qkv.weight, bias=bias)

    def output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context = (0.3 * q @ k.mT).softmax(-1) @ v
        return self.output(context.transpose(1, 2).flatten(2))


class Calls(Reads):
    """The same by calls."""

    def project(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]) if self.own else 0
        return self.qkv(x) + bias  # type: ignore[no-any-return]

    def output(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


def stack(kind: type[Reads] = Reads, own: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(own=own), nn.GELU(), kind(own=own)).double()


def wavlm() -> nn.Module:
    """Calls ``F.multi_head_attention_forward`` with its weights; a table of relative biases by head."""
    config = transformers.WavLMConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(4, 4), conv_kernel=(4, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return randomised(transformers.WavLMModel(config))  # type: ignore[no-any-return]


X = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HOSTS: dict[str, Any] = {"fused": (stack, X), "own biases": (lambda: stack(own=True), X), "WavLM": (wavlm, SOUND)}


def output(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return getattr(found, "last_hidden_state", found)


@pytest.mark.parametrize("granularity", ["channel", "head", "joint"])
@pytest.mark.parametrize("name", HOSTS)
def test_exact(name: str, granularity: str) -> None:
    """Law 1, forward and gradient, also the second time and for copies."""
    build, x = HOSTS[name]
    model = build()
    if granularity != "channel" and name == "WavLM":  # its biases have a row for every dense head
        return
    for seed, heads in enumerate(("uniform", "ragged")):
        plan = make_plan(
            model, 0.4 - seed / 10, granularity=granularity, heads=heads, scorer="random", seed=seed, example_inputs=x
        )
        given = x.clone().requires_grad_()
        with masked(model, plan):
            expected = output(model, given)
            (grad,) = torch.autograd.grad(expected.square().sum(), given)
        report = apply_plan(model, plan, example_inputs=x)
        assert all(("reads" in way or seed) and way.startswith("expanded") for way in report.ways.values())
        found = output(model, given)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), given)[0], grad, rtol=1e-10, atol=1e-10)
        assert sum(p.numel() for p in model.parameters()) == report.model_parameters[1]
    assert torch.equal(output(copy.deepcopy(model), x), output(model, x))
    if name != "WavLM":  # its parametrised convolution cannot be pickled
        assert torch.equal(output(pickle.loads(pickle.dumps(model)), x), output(model, x))


@pytest.mark.parametrize("ratios", [(0.6, 0.3, 0.2, 0.5), (0.5, 0.25, 0.25, 0.25), (0.5, 0.5, 0.5, 0.25)])
def test_features_that_differ_inside_one_weight_are_refused(ratios: tuple[float, ...]) -> None:
    """And what the error says to do is done."""
    model = stack()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (make_plan, prune_attention):
        with pytest.raises(errors.NotExpressibleError, match=r"^0: expected Q, K and V that read the same features"):
            call(model, ratios, scorer="magnitude", scope="local", example_inputs=X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    q, _, v, o = ratios
    report = prune_attention(model, (q, q, min(v, o), o), scorer="magnitude", scope="local", example_inputs=X)
    assert report.verified is not None
    assert model[0].qkv.weight.shape[1] == 24


def test_files_and_training(tmp_path: Path) -> None:
    model = stack()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model(X).square().mean().backward()
    optimizer.step()
    prune_attention(model, 0.5, heads="ragged", optimizer=optimizer)
    before = model(X).square().mean()
    before.backward()
    optimizer.step()
    assert model(X).square().mean() < before
    weight = dict(model.named_parameters())["0.qkv.weight"]
    assert weight.shape[0] < 72
    assert optimizer.state[weight]["exp_avg"].shape == weight.shape
    loaded = load_pruned(save_pruned(model, tmp_path / "pruned"), stack())
    assert torch.equal(loaded(X), model(X))
    loaded.load_state_dict(model.state_dict())


@pytest.mark.parametrize("options", [{"scorer": "gate"}, {"scorer": "fisher"}, {}], ids=["gate", "fisher", "default"])
@pytest.mark.parametrize("own", [False, True])
def test_data_reach_what_is_read(own: bool, options: Any) -> None:
    """Calibration hears the same as where projections are called, also the second time."""
    read, called = stack(own=own), stack(Calls, own=own)
    called.load_state_dict(read.state_dict())
    batches = [(torch.randn(4, 5, 24).double(), torch.randn(4, 5, 24).double()) for _ in range(6)]
    data: Any = batches if options.get("scorer") == "fisher" else [x for x, _ in batches]
    for ratio in (0.4, 0.3):
        if options:
            scores = [score_attention(model, data=data, **options) for model in (read, called)]
            for one, other in zip(*(found.values() for found in scores), strict=True):
                if own and options["scorer"] == "gate":  # what is read is heard with its bias, what is called without
                    continue
                torch.testing.assert_close(one.qk, other.qk)
                torch.testing.assert_close(one.vo, other.vo)
        for model in (read, called):
            prune_attention(model, ratio, data=data, **options)
        if not own:
            torch.testing.assert_close(read(X), called(X))
    assert not [
        key for module in read.modules() for key in vars(module) if key in ("attnprune_heard", "attnprune_bias")
    ]


def test_what_the_host_computes_between_may_differ() -> None:
    """A difference in what is read is seen: weights that are used in another way too."""

    class Twice(Reads):
        def output(self, x: Tensor) -> Tensor:
            return super().output(x) + self.proj.weight.square().sum() * x.sum(-1, keepdim=True)

    model = nn.Sequential(Twice().double())
    plan = make_plan(model, 0.5, heads="ragged", scorer="random")
    with masked(model, plan):
        expected = model(X)
    apply_plan(model, plan)
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    assert attnprune.skipped_attention(model) == ()


def test_data_that_cannot_be_heard() -> None:
    """WavLM hands its weights to a function of torch's that multiplies inside; the remedy works."""
    data = [SOUND]
    with pytest.raises(DataError, match=r"encoder\.layers\.0\.attention.*hands them to something else") as found:
        prune_attention(wavlm(), 0.5, data=data)
    assert 'scorer="magnitude"' in str(found.value)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return output(model, x).square().mean()

    for options in (
        {"scorer": "magnitude"},
        {"scorer": "fisher", "loss_fn": loss},
        {"scorer": "taylor", "loss_fn": loss},
    ):
        assert prune_attention(wavlm(), 0.5, data=data, **options).verified is not None  # type: ignore[arg-type]


def test_compiled_exported_and_traced() -> None:
    model = stack().eval()
    prune_attention(model, 0.5, heads="ragged", scorer="random")
    expected = model(X)
    for found in (
        torch.compile(model, backend="eager", fullgraph=True)(X),
        torch.export.export(model, (X,)).module()(X),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
