"""Calibration: streaming moments that count what is real, merge, resume, and leave no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from attnprune import (
    Adapter,
    Calibration,
    calibrate,
    make_plan,
    prune_attention,
    prune_channels,
    register_adapter,
    unregister_adapter,
)
from attnprune.calibration.moments import Moments
from attnprune.errors import CalibrationError, DataError, NonFiniteError

from .conformance import fresh, inputs
from .families import FAMILIES
from .processes import forked, in_processes


def batches(name: str, case: int, seeds: range) -> list[dict[str, Any]]:
    found = [inputs(name, case, seed) for seed in seeds]
    return [{k: v.detach() if isinstance(v, Tensor) else v for k, v in one.items()} for one in found]


def same(one: Calibration, other: Calibration, tolerance: float = 1e-9) -> None:
    assert list(one) == list(other)
    for name, layer in one.items():
        for key in ("q", "k", "c"):
            for a, b in zip(getattr(layer, key), getattr(other[name], key), strict=True):
                assert a.count == b.count, (name, key)
                torch.testing.assert_close(a.mean, b.mean, atol=tolerance, rtol=tolerance)
                torch.testing.assert_close(a.scatter, b.scatter, atol=tolerance, rtol=tolerance)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_moments_of_parts_merge_to_those_of_the_whole(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    offset = 1e3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(sum(sizes), 2, 4, generator=generator, dtype=torch.float64) + offset
    whole = Moments.zero(2, 4)
    for part in x.split(sizes):
        whole = whole.merge(Moments.of(part))
    assert whole.count == sum(sizes)
    if sum(sizes) > 1:
        for group in range(2):
            expected = torch.cov(x[:, group].T, correction=0)
            torch.testing.assert_close(whole.covariance[group], expected, atol=1e-9, rtol=1e-9)
            second = x[:, group].T @ x[:, group] / len(x)
            torch.testing.assert_close(whole.second[group], second, atol=1e-6, rtol=1e-9)


def test_a_large_mean_costs_no_precision_in_float32() -> None:
    x = 1000 + torch.randn(4000, 1, 3)
    expected = torch.cov(x[:, 0].double().T, correction=0)
    torch.testing.assert_close(Moments.of(x).covariance[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_calibrated_merged_resumed_and_left_alone(name: str) -> None:
    model = fresh(name, 1, train=True)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    first, second = batches(name, 1, range(2)), batches(name, 1, range(2, 5))
    whole = calibrate(model, first + second, progress=False)
    same(calibrate(model, first, progress=False).merge(calibrate(model, second, progress=False)), whole)
    kept = calibrate(model, first, progress=False)
    again = Calibration.from_state_dict(load(save(kept.state_dict())))
    same(again, kept, 0)
    same(calibrate(model, second, resume=again, progress=False), whole)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert "attention modules" in repr(whole)


class Recorder(nn.Module):
    """Self-attention by hand, batch first, over unpadded sequences: what calibration should have seen."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.module = module

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.module
        q, k, v = (
            part.unflatten(-1, (m.num_heads, -1)).transpose(0, 1)
            for part in (x @ m.in_proj_weight.T + m.in_proj_bias).chunk(3, dim=-1)
        )
        context = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return q, k - k.mean(1, keepdim=True), context


@pytest.mark.parametrize("across_heads", [True, False])
@pytest.mark.parametrize("floating", [True, False])
def test_padding_does_not_count(across_heads: bool, floating: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        layer.self_attn.in_proj_bias.normal_()
    lengths, x = (5, 2, 7, 1), torch.randn(4, 7, 12, dtype=torch.float64)
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(4, 7, dtype=torch.float64).masked_fill(padding, -torch.inf) if floating else padding

    def loss_fn(model: nn.Module, batch: Tensor) -> Any:
        return model(batch, src_key_padding_mask=mask)

    found = calibrate(layer, [x], loss_fn=loss_fn, across_heads=across_heads, progress=False)["self_attn"]
    q, k, c = zip(*(Recorder(layer.self_attn).parts(row[:n]) for row, n in zip(x, lengths, strict=True)), strict=True)
    queries, keys, contexts = (torch.cat(parts, dim=1).detach() for parts in (q, k, c))
    assert found.tokens == {"qk": 15.0, "vo": 15.0}
    for head in range(3):
        torch.testing.assert_close(found.queries()[head], queries[head].T @ queries[head] / 15)
        torch.testing.assert_close(found.keys()[head], keys[head].T @ keys[head] / 15)
        torch.testing.assert_close(found.contexts(True)[head], torch.cov(contexts[head].T, correction=0))
        torch.testing.assert_close(found.context_means()[head], contexts[head].mean(0))
    together = contexts.transpose(0, 1).flatten(1)
    if across_heads:
        torch.testing.assert_close(found.context(True), torch.cov(together.T, correction=0))
    else:
        assert bool((found.context(True)[:4, 4:] == 0).all())


def test_padding_of_a_hugging_face_model_does_not_count() -> None:
    """BERT with a padded batch knows what it knows of the sequences one by one."""
    for case in range(2):
        model = fresh("Bert", case * 2)
        tokens = torch.randint(2, 20, (3, 6), generator=torch.Generator().manual_seed(0))
        lengths = (6, 3, 1)
        mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
        padded = calibrate(model, [{"input_ids": tokens, "attention_mask": mask}], progress=False)
        single = [{"input_ids": row[None, :n]} for row, n in zip(tokens, lengths, strict=True)]
        same(padded, calibrate(model, single, progress=False), 1e-8)


def test_cross_attention_counts_queries_of_one_stream_and_keys_of_the_other() -> None:
    model = fresh("Transformer", 0)
    data = batches("Transformer", 0, range(3))
    found = calibrate(model, data, progress=False)
    cross = next(layer for name, layer in found.items() if "multihead_attn" in name)
    assert (cross.q[0].count, cross.k[0].count, cross.c[0].count) == (24.0, 30.0, 24.0)


def test_learned_and_zero_keys_count_as_keys() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = calibrate(module, [x], loss_fn=lambda m, b: m(b, b, b)[0], progress=False)[""]
    k = (x @ module.in_proj_weight.T + module.in_proj_bias)[..., 8:16]
    assert module.bias_k is not None
    k = torch.cat([k, module.bias_k.expand(3, 1, 8), torch.zeros(3, 1, 8)], dim=1).detach()
    k = (k - k.mean(1, keepdim=True)).unflatten(-1, (2, 4)).flatten(0, 1)
    assert found.k[0].count == 18
    for head in range(2):
        torch.testing.assert_close(found.keys()[head], k[:, head].T @ k[:, head] / 18)


def test_a_ragged_model_is_calibrated_head_by_head() -> None:
    model, data = fresh("ViT", 0), batches("ViT", 0, range(3))
    whole = calibrate(model, data, progress=False)
    prune_channels(model, {0: {"qk": [[0], [], [1, 2], [0]], "vo": [[5], [4, 5], [], [5]]}})
    first, *_ = calibrate(model, data, progress=False).values()
    dense, *_ = whole.values()
    keep = [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 3, 4, 5], [1, 2, 3, 4, 5]]
    for head, rows in enumerate(keep):
        torch.testing.assert_close(first.queries()[head], dense.queries()[head][rows][:, rows])
        torch.testing.assert_close(first.keys()[head], dense.keys()[head][rows][:, rows])
    assert [len(one) for one in first.contexts(True)] == [5, 4, 6, 5]
    assert first.context(True).shape == (20, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_summed_in_high(dtype: torch.dtype) -> None:
    model, data = fresh("ViT", 0, dtype), batches("ViT", 0, range(3))
    low = [{"pixel_values": batch["pixel_values"].to(dtype)} for batch in data]
    found, exact = calibrate(model, low, progress=False), calibrate(fresh("ViT", 0), data, progress=False)
    for name, layer in found.items():
        assert layer.c[0].scatter.dtype == torch.float64
        assert len(layer.c[0].scatter[0]) == 24
        if dtype == torch.float32:
            torch.testing.assert_close(layer.context(True), exact[name].context(True), rtol=1e-3, atol=1e-3)


def test_autocast_does_not_reach_the_sums() -> None:
    model, data = fresh("ViT", 0, torch.float32), batches("ViT", 0, range(2))
    low = [{"pixel_values": batch["pixel_values"].float()} for batch in data]

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    found, exact = calibrate(model, low, loss_fn=loss_fn, progress=False), calibrate(model, low, progress=False)
    for name, layer in found.items():
        torch.testing.assert_close(layer.context(True), exact[name].context(True), rtol=0.2, atol=0.2)
    assert make_plan(model, 0.5, calibration=found)


class Normed(nn.Module):
    """Attention with a norm between projection and product, as models with q_norm and k_norm have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
        context = (q @ k.mT * 6**0.5).softmax(-1) @ v
        output: Tensor = self.o(context.transpose(1, 2).flatten(2))
        return output


class NormedAdapter(Adapter):
    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Normed)

    def view(self, name: str, module: nn.Module) -> Any:
        m: Any = module
        return self.of_linears(name, m, q=m.q, k=m.k, v=m.v, o=m.o, heads=2, scale=6**0.5)

    def expresses(self, view: Any, spec: Any) -> bool:
        return not spec.ragged

    def fixed(self, view: Any) -> Any:
        return {"qk": "a norm follows the projection"}


def test_kinds_that_must_not_be_mixed_keep_their_channels_and_the_report_says_so() -> None:
    register = register_adapter(NormedAdapter())
    try:
        torch.manual_seed(0)
        model = Normed().double()
        x = torch.randn(6, 5, 12, dtype=torch.float64)
        by_name = {"scorer": "magnitude", "basis": "rotated", "compensate": True}
        for options in ({}, by_name, {"basis": "channels"}, {"sequential": True}):
            pruned: Any = copy.deepcopy(model)
            report = prune_attention(pruned, 0.5, data=[x], progress=False, **options)  # type: ignore[arg-type]
            for projection, mixed in (("q", False), ("k", False), ("v", options.get("basis") != "channels")):
                rows = {tuple(row.tolist()) for row in model.get_submodule(projection).weight}
                kept = {tuple(row.tolist()) for row in pruned.get_submodule(projection).weight}
                assert not kept & rows if mixed else kept <= rows, (options, projection)
            assert ("a norm follows" in str(report)) == (options.get("basis") != "channels")
    finally:
        unregister_adapter(register)


def _one_of_two(rank: int, meet: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    model = fresh("ViT", 0)
    found = calibrate(model, batches("ViT", 0, range(rank * 2, rank * 2 + 2)), progress=False).reduce()
    torch.save(found.state_dict(), f"{out}{rank}")
    torch.distributed.destroy_process_group()


@forked
@pytest.mark.long
def test_two_processes_know_together_what_one_knows_alone(tmp_path: Path) -> None:
    in_processes(2, _one_of_two, str(tmp_path / "meet"), str(tmp_path / "out"))
    whole = calibrate(fresh("ViT", 0), batches("ViT", 0, range(4)), progress=False)
    for rank in range(2):
        same(Calibration.from_state_dict(torch.load(tmp_path / f"out{rank}")), whole, 1e-8)


# refusals


def test_what_does_not_fit_is_refused() -> None:
    model, data = fresh("ViT", 0), batches("ViT", 0, range(1))
    by_heads = calibrate(model, data, across_heads=False, progress=False)
    with pytest.raises(CalibrationError, match="across_heads"):
        make_plan(model, 0.5, calibration=by_heads)
    assert make_plan(model, 0.5, calibration=by_heads, compensate=False)
    with pytest.raises(CalibrationError, match="Merge"):
        by_heads.merge(calibrate(model, data, progress=False))
    other = calibrate(fresh("ViT", 1), batches("ViT", 1, range(1)), progress=False)
    with pytest.raises(CalibrationError, match=r"[23] heads"):
        make_plan(model, 0.5, calibration=other)
    with pytest.raises(DataError, match="none"):
        calibrate(model, [], progress=False)
    bad = copy.deepcopy(data)
    bad[0]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 0"):
        calibrate(model, bad, progress=False)
    state = by_heads.state_dict()
    key = next(key for key in state if key.endswith("scatter"))
    for broken in (
        {**state, key: state[key][:, :1]},
        {**state, key: torch.full_like(state[key], torch.nan)},
        {k: v for k, v in state.items() if k != key},
        {**state, "header": torch.zeros(3, dtype=torch.uint8)},
        {},
    ):
        with pytest.raises(CalibrationError, match="calibration"):
            Calibration.from_state_dict(broken)


def test_masks_that_cannot_be_read_are_refused() -> None:
    model = fresh("ViT", 0)
    data = [{**batches("ViT", 0, range(1))[0]}]

    def loss_fn(m: Any, batch: Any) -> Any:
        hidden = torch.zeros(1, 5, 24, dtype=torch.float64)
        name = next(name for name, _ in m.named_modules() if name.endswith("attention"))
        return m.get_submodule(name)(hidden, attention_mask=object())

    with pytest.raises(DataError, match="attention implementation"):
        calibrate(model, data, loss_fn=loss_fn, progress=False)
