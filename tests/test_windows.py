"""Attention whose sequences are not the samples: windows, two streams, groups, tokens that lie first, or packed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    LlamaConfig,
    LlamaModel,
    LongformerConfig,
    LongformerModel,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2Model,
)

import attnprune
from attnprune.calibration.sample import samples_of
from attnprune.errors import DataError
from attnprune.families.registry import find_views
from attnprune.planning.scorers import Fisher, Gate, Scorer, outputs_of
from attnprune.surgery import as_called

from .families import randomised, timm_module

QUIET: Any = {"progress": False}
WINDOWS: Any = {
    "image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
BART: Any = {
    "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 20, "max_position_embeddings": 16,
}  # fmt: skip
LLAMA: Any = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20,
    "intermediate_size": 8,
}  # fmt: skip
LONG: Any = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20,
    "attention_window": 4, "max_position_embeddings": 24,
}  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 20, shape, generator=torch.Generator().manual_seed(seed))


def timm_swin() -> nn.Module:
    model: nn.Module = timm_module("timm.models").SwinTransformer(
        img_size=16, patch_size=2, embed_dim=12, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=5
    )
    return model


def timm_sam() -> nn.Module:
    model: nn.Module = timm_module("timm.models").create_model(
        "samvit_base_patch16", img_size=16, patch_size=2, embed_dim=12, depth=2, num_heads=2, window_size=4,
        global_attn_indexes=(1,), num_classes=5,
    )  # fmt: skip
    return model


def images(count: int) -> dict[str, Tensor]:
    return {"pixel_values": numbers(count, 3, 16, 16)}


def padded(count: int) -> dict[str, Tensor]:
    mask = torch.ones(count, 8, dtype=torch.long)
    mask[1:, 5:] = 0
    return {"input_ids": tokens(count, 8), "attention_mask": mask}


MODELS: dict[str, Any] = {
    "Swin": (lambda: SwinForImageClassification(SwinConfig(**WINDOWS, num_labels=5)), images),
    "SwinV2": (lambda: Swinv2Model(Swinv2Config(**WINDOWS)), images),
    "timm Swin": (timm_swin, lambda count: numbers(count, 3, 16, 16)),
    "timm windows and all": (timm_sam, lambda count: numbers(count, 3, 16, 16)),
    "cross-attention": (
        lambda: BartModel(BartConfig(**BART)),
        lambda count: {"input_ids": tokens(count, 7), "decoder_input_ids": tokens(count, 4, seed=1)},
    ),
    "two streams": (
        lambda: nn.Transformer(12, 2, 1, 1, 8, batch_first=True),
        lambda count: {"src": numbers(count, 7, 12), "tgt": numbers(count, 4, 12, seed=1)},
    ),
    "tokens first": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 8), 2, enable_nested_tensor=False),
        lambda count: {"src": numbers(count, 7, 12).transpose(0, 1)},
    ),
    "groups": (lambda: LlamaModel(LlamaConfig(**LLAMA)), lambda count: {"input_ids": tokens(count, 7)}),
}


def made(name: str) -> tuple[Any, Any]:
    build, batch = MODELS[name]
    torch.manual_seed(0)
    return randomised(build()).eval(), batch


def one_by_one(batch: Any, count: int, axis: int = 0) -> list[Any]:
    if isinstance(batch, Tensor):
        return [part.contiguous() for part in batch.split(1, axis)]
    return [{key: value.narrow(axis, i, 1) for key, value in batch.items()} for i in range(count)]


def same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        for a, b in zip(vars(one[name]).values(), vars(other[name]).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def called(model: Any, batch: Any) -> Any:
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def fixed(axis: int = 0) -> Any:
    """The mean over samples of a projection that is the same for every sample."""

    def loss(model: Any, batch: Any) -> Tensor:
        output = called(model, batch)
        total = torch.zeros((), dtype=torch.float64)
        for _, x in outputs_of(output):
            x = x.transpose(0, axis)
            total = total + (x * numbers(*x.shape[1:], seed=5)).sum() / len(x)
        return total

    return loss


@pytest.mark.parametrize("scorer", [Gate(), Fisher(per_sample=True)], ids=lambda one: one.name)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tokens first"])
def test_scores_of_a_batch_are_those_of_its_samples(name: str, scorer: Scorer) -> None:
    model, batch = made(name)
    options: Any = {"loss_fn": fixed(), **QUIET}
    whole = attnprune.score_attention(model, scorer, data=[batch(3)], **options)
    apart = attnprune.score_attention(model, scorer, data=one_by_one(batch(3), 3), **options)
    same(whole, apart)
    assert all(bool((scores.qk > 0).all()) and bool((scores.vo > 0).all()) for scores in whole.values())


@pytest.mark.parametrize("name", MODELS)
def test_moments_of_a_batch_are_those_of_its_samples_and_of_their_sequences(name: str) -> None:
    model, batch = made(name)
    found = attnprune.calibrate(model, [batch(3)], **QUIET)
    axis = int(name == "tokens first")
    for layer, other in zip(
        found.values(),
        attnprune.calibrate(model, one_by_one(batch(3), 3, axis), **QUIET).values(),
        strict=True,
    ):
        for a, b in zip(
            (*layer.queries(), *layer.keys(), layer.context(True)),
            (*other.queries(), *other.keys(), other.context(True)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    seen: dict[str, Tensor] = {}
    with as_called(find_views(model, run=lambda: called(model, batch(3)))) as views:
        handles = [
            view.port("k").listen(lambda m, i, x, name=view.name: seen.update({name: x.detach()})) for view in views
        ]
        called(model, batch(3))
        for handle in handles:
            handle.remove()
    for key, layer in found.items():
        if layer.relative:  # keys of rotary embeddings count as queries see them (test_rotary_refit.py)
            continue
        keys = seen[key].flatten(1, -2)  # of a window, or of a sample
        keys = (keys - keys.mean(1, keepdim=True)).unflatten(-1, (layer.spec.kv_heads, -1)).flatten(0, 1)
        assert layer.k[0].count == len(keys)
        for head, covariance in enumerate(layer.keys()):
            torch.testing.assert_close(covariance, keys[:, head].T @ keys[:, head] / len(keys))


@pytest.mark.parametrize("options", [{}, {"split": "auto", "heads": "ragged"}, {"sequential": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_default_with_data_prunes_them(name: str, options: Any) -> None:
    model, batch = made(name)
    report = attnprune.prune_attention(model, 0.5, data=[batch(3)], verify=True, **QUIET, **options)
    assert report.attention_parameters[1] < 0.6 * report.attention_parameters[0]
    assert all(layer.fold is not None for layer in report.plan if not layer.empty)


@pytest.mark.parametrize("name", ["Swin", "SwinV2"])
def test_at_full_rank_windows_compute_the_same(name: str) -> None:
    model, batch = made(name)
    expected = [one.tensor for one in outputs_of(model(**batch(2)))]
    moments = attnprune.calibrate(model, [batch(3)], **QUIET)
    assert all(layer.tokens["qk"] == layer.k[0].count for layer in moments.values())
    pruned = copy.deepcopy(model)
    attnprune.prune_attention(pruned, 0.0, data=[batch(3)], basis="rotated", **QUIET)
    for one, other in zip(outputs_of(pruned(**batch(2))), expected, strict=True):
        torch.testing.assert_close(one.tensor, other, rtol=1e-9, atol=1e-9)


def test_longformer_has_tokens_first_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = randomised(LongformerModel(LongformerConfig(**LONG))).eval()
    whole = attnprune.calibrate(model, [padded(3)], **QUIET)
    apart = attnprune.calibrate(model, one_by_one(padded(3), 3), **QUIET)
    for name, layer in whole.items():
        assert layer.tokens == apart[name].tokens == {"qk": 18.0, "vo": 18.0}
        for a, b in zip((*layer.queries(), *layer.keys()), (*apart[name].queries(), *apart[name].keys()), strict=True):
            torch.testing.assert_close(a, b)
    attnprune.prune_attention(model, target_error=0.2, data=[padded(3)], verify=True, **QUIET)


class Packed(nn.Module):
    """The second attention has all samples' tokens in one sequence, apart by a mask."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        if not self.packed:
            found: Tensor = self.second(x, x, x, need_weights=False)[0]
            return found
        rows, each = x.flatten(0, 1)[None], torch.arange(len(x)).repeat_interleave(x.shape[1])
        out = self.second(rows, rows, rows, attn_mask=each[:, None] != each, need_weights=False)[0]
        return out[0].unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


@pytest.mark.long
def test_samples_that_cannot_be_told_apart_are_added_up() -> None:
    """A random projection's parts of other samples are independent: on average it is the same."""
    torch.manual_seed(0)
    model = randomised(Packed(packed=False)).eval()
    other = Packed(packed=True).double().eval()
    other.load_state_dict(model.state_dict())
    data = [numbers(3, 4, 8, seed=i % 4) for i in range(400)]
    one, two = (attnprune.score_attention(m, "gate", data=data, **QUIET)["second"] for m in (model, other))
    torch.testing.assert_close(two.qk, one.qk, rtol=0.3, atol=0)
    torch.testing.assert_close(two.vo, one.vo, rtol=0.3, atol=0)
    with pytest.raises(DataError, match=r"\[1, 3\] sequences, and a batch of 3"):
        attnprune.score_attention(other, "gate", data=data[:1], loss_fn=fixed(), **QUIET)
    with pytest.raises(DataError, match=r"per_sample=False"):
        attnprune.score_attention(other, Fisher(per_sample=True), data=data[:1], loss_fn=fixed(), **QUIET)


def test_tokens_without_a_batch_are_added_up() -> None:
    model = Window().double().eval()

    def loss(model: Any, x: Tensor) -> Tensor:
        found: Tensor = (model.o_proj(model.v_proj(x) * model.q_proj(x) * model.k_proj(x)) * numbers(5, 8)).sum()
        return found / len(x)

    one, batch = (
        attnprune.score_attention(model, "gate", data=[x], loss_fn=loss, **QUIET)[""]
        for x in (numbers(5, 8, seed=1), numbers(1, 5, 8, seed=1))
    )
    torch.testing.assert_close(one.qk * 5, batch.qk)  # their mean is over as many as the first dimension has


def test_of_how_many_samples_sequences_are() -> None:
    assert samples_of(4, (4,)) == samples_of(12, (4,)) == 4
    assert samples_of(12, (1, 4)) == samples_of(12, (5, 4)) == 4
    assert samples_of(7, (1,)) == 1
    for rows, counts in ((12, (4, 3)), (7, (4,)), (1, (4,)), (7, ())):
        assert samples_of(rows, counts) is None


class Window(nn.Module):
    """Attention with masks of its windows, the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads = 2

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        weights = q @ k.mT * 0.5
        if attention_mask is not None:
            windows = weights.unflatten(0, (-1, len(attention_mask)))
            weights = windows.masked_fill(~attention_mask[:, None], -torch.inf).flatten(0, 1)
        found: Tensor = self.o_proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return found


class Windowed(nn.Module):
    """Of the second of two windows the last token is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Window()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(2, 3, 3, dtype=torch.bool)
        mask[1, :, 2] = False
        found: Tensor = self.attention(x.unflatten(1, (2, 3)).flatten(0, 1), attention_mask=mask)
        return found.unflatten(0, (-1, 2)).flatten(1, 2)


def test_masks_of_windows_are_those_of_every_sample() -> None:
    torch.manual_seed(0)
    model, x = randomised(Windowed()).eval(), numbers(4, 6, 8)
    layer = attnprune.calibrate(model, [x], **QUIET)["attention"]
    assert layer.tokens == {"qk": 20.0, "vo": 20.0}
    keys = model.attention.k_proj(x).detach().unflatten(-1, (2, -1))
    parts = [part - part.mean(1, keepdim=True) for part in (keys[:, :3], keys[:, 3:5])]
    for head, covariance in enumerate(layer.keys()):
        rows = torch.cat([part[:, :, head].flatten(0, 1) for part in parts])
        torch.testing.assert_close(covariance, rows.T @ rows / 20)
    attnprune.prune_attention(model, 0.5, data=[x], verify=True, **QUIET)


def test_masks_that_fit_nothing_are_refused_where_they_hide() -> None:
    torch.manual_seed(0)
    model = randomised(Windowed()).eval()

    def misled(hide: bool) -> Any:
        def loss(m: Any, x: Tensor) -> Tensor:
            mask = torch.ones(5, 3, 3, dtype=torch.bool)
            mask[0, 0, 0] = not hide
            m.attention.__dict__["forward"] = lambda hidden, attention_mask: Window.forward(m.attention, hidden)
            try:
                found: Tensor = m.attention(x, attention_mask=mask).sum()
            finally:
                del m.attention.__dict__["forward"]
            return found

        return loss

    x = numbers(4, 3, 8)
    assert attnprune.calibrate(model, [x], loss_fn=misled(False), **QUIET)["attention"].tokens["qk"] == 12
    with pytest.raises(DataError, match=r"4 sequences of 3 queries and 3 keys.*\(5, 1, 3, 3\).*exclude="):
        attnprune.calibrate(model, [x], loss_fn=misled(True), **QUIET)
