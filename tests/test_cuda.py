"""On an NVIDIA GPU: the laws, layouts, half precision, compiled models, training loops, tables and files.

Where there is none, what is not of CUDA alone runs on the CPU, with fewer tokens and in fewer combinations.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnprune
from attnprune import apply_plan, make_plan, prune_attention
from attnprune.nn import attend, execution
from attnprune.nn.products import Plain
from attnprune.values.layout import HeadLayout

from .conformance import family, fresh, inputs, random_plan, zero
from .families import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY = 600 if DEVICE == "cuda" else 40
few = pytest.mark.covering(1) if DEVICE == "cpu" else (lambda test: test)
only_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


def there(given: Any) -> Any:
    """Tensors of a mapping or list on the device, without gradients."""
    if isinstance(given, Tensor):
        return given.detach().to(DEVICE)
    return {key: there(value) for key, value in given.items()} if isinstance(given, dict) else given


def encoder(width: int = 64, heads: int = 4, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(DEVICE)


PLAIN = {"basis": "channels", "compensate": False}
OPTIONS: list[dict[str, Any]] = [
    {"scorer": "magnitude"},
    {"scorer": "taylor", **PLAIN},
    {"scorer": "fisher", "granularity": "head", **PLAIN},
    {"heads": "ragged", "split": "auto"},
    {"granularity": "joint", "heads": "ragged", "sequential": True},
]


@few
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_made_on_the_gpu_is_exact_on_both(name: str, options: dict[str, Any]) -> None:
    """Planned with batches of the CPU; the pruned model is the oracle where nothing was rotated or refitted."""
    one, case = family(name), 0
    model = fresh(name, case).to(DEVICE)
    given = inputs(name, case)
    if options.get("scorer") != "magnitude":
        batch = {key: value.detach() if isinstance(value, Tensor) else value for key, value in given.items()}
        options = {**options, "data": [batch], "loss_fn": lambda m, b: one.run(m, b).square().mean()}
    plan = make_plan(model, 0.5, progress=False, **options)
    here, oracle = fresh(name, case), fresh(name, case)
    apply_plan(model, plan)
    apply_plan(here, plan)
    expected = one.run(here, given)
    with torch.no_grad():
        found = one.run(model, there(given))
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), expected.detach(), rtol=1e-6, atol=1e-6)
    if "scorer" in options:
        zero(name, oracle, plan)
        torch.testing.assert_close(found.cpu(), one.run(oracle, given).detach(), rtol=1e-6, atol=1e-6)


LAYOUTS = {
    "decoupled": HeadLayout(qk=(16,) * 4, vo=(48,) * 4),
    "odd": HeadLayout(qk=(35,) * 3, vo=(21,) * 3),
    "ragged": HeadLayout(qk=(6, 33, 6, 60, 1), vo=(8, 16, 8, 64, 5)),
}


def by_hand(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, mask: Tensor | None, causal: bool) -> Tensor:
    """Head by head."""
    found = q.new_empty(*q.shape[:2], v.shape[-1])
    for part in layout.buckets:
        for place, head in enumerate(part.heads):
            qk = slice(part.qk_start + place * part.qk_dim, part.qk_start + (place + 1) * part.qk_dim)
            vo = slice(part.vo_start + place * part.vo_dim, part.vo_start + (place + 1) * part.vo_dim)
            logits = 0.3 * q[..., qk] @ k[..., qk].mT
            if mask is not None:
                logits = logits + mask[:, head if mask.shape[1] > 1 else 0].cpu().double()
            if causal:
                logits = logits + torch.full(logits.shape[-2:], -torch.inf).triu(1)
            found[..., vo] = logits.softmax(-1) @ v[..., vo]
    return found


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["auto", "separate", "buckets", "groups", "padded", "products"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokens", [7, MANY])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "masks"])
def test_every_layout(name: str, how: Any, dtype: torch.dtype, tokens: int, kind: str) -> None:
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    widths = (sum(layout.qk), sum(layout.qk), sum(layout.vo))
    q, k, v = (torch.randn(2, tokens, w, generator=generator).to(DEVICE, dtype).requires_grad_() for w in widths)
    mask = None
    if "mask" in kind:
        rows = len(layout.qk) if kind == "masks" else 1
        mask = torch.randn(2, rows, tokens, tokens, generator=generator).to(DEVICE, dtype)

    def rows_of(mask: Tensor, bucket: Any) -> Tensor:
        return mask if mask.shape[1] == 1 else mask[:, list(bucket.heads)]

    def kernel(q: Tensor, k: Tensor, v: Tensor, bucket: Any) -> tuple[Tensor, None]:
        some = None if mask is None else rows_of(mask, bucket)
        return F.scaled_dot_product_attention(q, k, v, some, is_causal=kind == "causal", scale=0.3), None

    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = by_hand(*leaves, layout, mask, kind == "causal")
    direction = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, leaves, direction.double())
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    with execution(how):
        for grads in (torch.enable_grad(), torch.no_grad()):
            with grads:
                found, _ = attend(q, k, v, layout, kernel, Plain(0.3, mask, kind == "causal", rows_of))
            assert found.dtype == dtype
            torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
            if found.requires_grad:
                for a, b in zip(torch.autograd.grad(found, (q, k, v), direction.to(found)), wanted, strict=True):
                    torch.testing.assert_close(a.cpu().double(), b, rtol=4 * tolerance, atol=4 * tolerance)


@only_cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # PyTorch's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", [{"qkvo_ratios": {"qk": 0.75, "vo": 0.25}}, {"qkvo_ratios": 0.5, "heads": "ragged"}])
def test_compiled(mode: str, dtype: torch.dtype, plan: dict[str, Any]) -> None:
    """One graph, for inference and for training, and CUDA graphs of it."""
    model = encoder().to(dtype).eval()
    prune_attention(model, scorer="random", **plan)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for number in range(3):
        x = torch.randn(2, 40, 64, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=tolerance, atol=tolerance)
        if mode == "default" and number == 2:
            leaf = x.clone().requires_grad_()
            compiled(leaf).sum().backward()
            other = x.clone().requires_grad_()
            model(other).sum().backward()
            torch.testing.assert_close(leaf.grad, other.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("tokens", [40, 7 * MANY])
def test_ragged_heads_by_padded_weights_or_activations(hooked: bool, tokens: int) -> None:
    """By weights in one product, unless somebody listens to a projection; both as the model in float64."""
    model = encoder(layers=1).eval()
    prune_attention(model, 0.5, heads="ragged", scorer="random", round_to=8)
    x, seen = torch.randn(1, tokens, 64), []
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().double()(x.double())
        if hooked:
            model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
        found = model(x.to(DEVICE)).cpu().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == hooked


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_precision_training(fused: bool) -> None:
    """GradScaler, float16 autocast, fused AdamW: scores are finite, moments are cut, training goes on."""
    model = encoder(dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    pruner = attnprune.AttentionPruner(model, 0.5, steps=2, scorer="fisher")
    x = torch.randn(8, 12, 64, device=DEVICE)
    losses = []
    dtype = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    while not pruner.done:
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype):
                loss = (model(x) - x.roll(1, 1)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            pruner.observe()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
        pruner.step(optimizer)
    assert pruner.report is not None
    assert pruner.report.achieved["q"] == 0.5
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == parameter.shape
        assert state["exp_avg"].device.type == DEVICE
    assert all(map(torch.isfinite, map(torch.tensor, losses)))


def test_random_state_is_as_it_was() -> None:
    model, x = encoder(dropout=0.5).train(), torch.randn(4, 9, 64)
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]
    before = copy.deepcopy(model.state_dict())
    make_plan(model, 0.5, data=[x], progress=False)
    fisher: dict[str, Any] = {"scorer": "fisher", "basis": "rotated", "compensate": True}
    make_plan(model, 0.5, data=[x], loss_fn=lambda m, b: m(b).square().mean(), progress=False, **fisher)
    after = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]
    assert all(map(torch.equal, states, after))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_latency_table_and_a_budget(tmp_path: Path) -> None:
    model, x = encoder(layers=1).eval(), torch.randn(2, 40, 64, device=DEVICE)
    table = attnprune.latency.measure(model, x, seconds=0.5, cache=str(tmp_path), progress=False)
    assert (torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu") in table.machine["device"]
    report = prune_attention(model, target_macs=0.8, example_inputs=x, scorer="magnitude")
    assert report.macs is not None
    assert report.macs[1] < report.macs[0]


def test_files(tmp_path: Path) -> None:
    """Saved from the GPU, loaded to either."""
    model, x = encoder().eval(), torch.randn(2, 9, 64)
    prune_attention(model, 0.5, heads="ragged", data=[x], progress=False)
    attnprune.save_pruned(model, tmp_path / "saved")
    for device in (DEVICE, "cpu"):
        loaded = attnprune.load_pruned(tmp_path / "saved", encoder().cpu(), device=device).eval()
        assert {p.device.type for p in loaded.parameters()} == {device}
        for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a.cpu(), b.cpu()), name


@only_cuda
def test_by_an_empty_default_device() -> None:
    """``torch.set_default_device`` does not decide where our own tensors go; on a CPU, test_elsewhere.py asks that."""
    for name in ("AST", "Encoder"):
        model, given = fresh(name, 0).to(DEVICE), there(inputs(name, 0))
        with torch.device("meta"):
            plan = random_plan(model, 0, qkvo_ratios=0.5)
            prune_attention(model, 0.5, data=[given], progress=False)
        assert plan
        assert not any(p.is_meta for p in model.parameters())


@only_cuda
def test_lora_recovery() -> None:
    """Trains on the GPU, from batches of the CPU; in another process, as peft takes long to import."""
    code = """
import torch, attnprune
from torch import nn
from attnprune.integrations.peft import lora_recover
torch.manual_seed(0)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2,
                              enable_nested_tensor=False).cuda()
attnprune.prune_attention(model, 0.5)
x = torch.randn(8, 6, 64)
loss = lambda m, b: (m(b) - b.roll(1, 1)).square().mean()
before = float(loss(model.eval(), x.cuda()))
state = torch.cuda.get_rng_state()
lora_recover(model, [x] * 20, lr=1e-2, loss_fn=loss, progress=False)
assert torch.equal(state, torch.cuda.get_rng_state())
after = float(loss(model.eval(), x.cuda()))
assert after < before, (before, after)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
