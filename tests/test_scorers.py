"""Scorers against a few lines of plain autograd, against Torch-Pruning itself, and that they leave no trace."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import ASTConfig, ASTForAudioClassification, BertConfig, BertForSequenceClassification

from attnprune import LayerPlan, Plan, Scores, apply_plan, find_attention, make_plan, masked, prune_channels
from attnprune.errors import DataError, NonFiniteError
from attnprune.families import find_views
from attnprune.planning.scorers import Fisher, Gate, Magnitude, Random, Scorer, Taylor, TorchPruning

HEADS, CHANNELS, WIDTH = 4, 8, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 37}
AUDIO = {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}

Parts = dict[str, Tensor]
Read = Callable[[Tensor], Tensor]
Loss = Callable[[nn.Module, Any], Tensor]

# three families, and where a reader finds their weights


@dataclass(frozen=True)
class Family:
    """A tiny float64 model, batches of several sizes, a loss, and plain access to its projections."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    split: Callable[[Any], list[Any]]
    """A batch as batches of one sample."""
    parts: Callable[[nn.Module, Read], list[Parts]]
    """By layer: q, k, v ``(channels, in)``, o ``(channels, out)``, biases qb, kb, vb ``(channels,)``."""
    loss_fn: Loss | None = None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What ``loss_fn`` (or without one the model itself) computes, written anew."""
        if self.loss_fn is not None:
            return self.loss_fn(model, batch)
        if isinstance(batch, dict):
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            return F.cross_entropy(logits, batch["labels"])
        return F.cross_entropy(model(batch[0]).logits, batch[1])


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Float64, biases not zero, dropout off (evaluation mode)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ast() -> nn.Module:
    return seeded(lambda: ASTForAudioClassification(ASTConfig(**SIZES, **AUDIO, num_labels=3)))


def ast_batches() -> list[Any]:
    return [(numbers(n, 24, 16, seed=i), torch.arange(n) % 3) for i, n in enumerate((3, 2, 4))]


def ast_parts(model: Any, read: Read) -> list[Parts]:
    found = []
    for layer in model.audio_spectrogram_transformer.layers:
        a = layer.attention
        found.append(linears(read, q=a.q_proj, k=a.k_proj, v=a.v_proj, o=a.o_proj))
    return found


def linears(read: Read, **linear: nn.Linear) -> Parts:
    parts = {key: read(linear[key].weight) for key in "qkv"} | {"o": read(linear["o"].weight).T}
    return parts | {f"{key}b": read(linear[key].bias) for key in "qkv"}


def bert() -> nn.Module:
    config = BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16, num_labels=3)
    return seeded(lambda: BertForSequenceClassification(config))


def bert_batches() -> list[Any]:
    batches = []
    for seed, n in enumerate((3, 2)):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([7, 4, 2][:n])
        batches.append({
            "input_ids": torch.randint(0, 50, (n, 7), generator=generator),
            "attention_mask": (torch.arange(7) < lengths[:, None]).long(),
            "labels": torch.arange(n) % 3,
        })  # fmt: skip
    return batches


def bert_parts(model: Any, read: Read) -> list[Parts]:
    layers = [layer.attention for layer in model.bert.encoder.layer]
    return [linears(read, q=a.self.query, k=a.self.key, v=a.self.value, o=a.output.dense) for a in layers]


def encoder(batch_first: bool) -> nn.Module:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 38, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)

    return seeded(build)


def encoder_batches(batch_first: bool) -> list[Any]:
    batches = []
    for seed, n in enumerate((3, 2)):
        x = numbers(n, 6, WIDTH, seed=seed)
        batches.append({
            "x": x if batch_first else x.transpose(0, 1),
            "pad": torch.arange(6) >= torch.tensor([6, 3, 2][:n])[:, None],
            "y": numbers(n, seed=seed + 9),
            "first": batch_first,
        })  # fmt: skip
    return batches


def encoder_loss(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch["x"], src_key_padding_mask=batch["pad"])
    out = out if batch["first"] else out.transpose(0, 1)
    out = (out * torch.linspace(0.5, 2, WIDTH, dtype=out.dtype)).masked_fill(batch["pad"][..., None], 0.0)
    return F.mse_loss(out.sum((1, 2)), batch["y"].to(out.dtype))


def encoder_split(batch: Any) -> list[Any]:
    rows = range(len(batch["pad"]))
    pick = (lambda i: (slice(i, i + 1),)) if batch["first"] else (lambda i: (slice(None), slice(i, i + 1)))
    return [
        {"x": batch["x"][pick(i)], "pad": batch["pad"][i : i + 1], "y": batch["y"][i : i + 1], "first": batch["first"]}
        for i in rows
    ]


def encoder_parts(model: Any, read: Read) -> list[Parts]:
    found = []
    for layer in model.layers:
        a = layer.self_attn
        q, k, v = read(a.in_proj_weight).chunk(3)
        qb, kb, vb = read(a.in_proj_bias).chunk(3)
        found.append({"q": q, "k": k, "v": v, "o": read(a.out_proj.weight).T, "qb": qb, "kb": kb, "vb": vb})
    return found


def split_pairs(batch: Any) -> list[Any]:
    return [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[0]))]


def split_mappings(batch: Any) -> list[Any]:
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]


FAMILIES = {
    "ast": Family(ast, ast_batches, split_pairs, ast_parts),
    "bert": Family(bert, bert_batches, split_mappings, bert_parts),
    **{
        f"encoder, batch {'first' if first else 'second'}": Family(
            partial(encoder, first), partial(encoder_batches, first), encoder_split, encoder_parts, encoder_loss
        )
        for first in (True, False)
    },
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def itself(parameter: Tensor) -> Tensor:
    return parameter.detach().double()


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.double()


def grads_of(family: Family, batches: list[Any]) -> Iterator[list[Parts]]:
    """By batch and layer: gradients by ``backward`` on a copy of the model."""
    for batch in batches:
        model = family.build()
        family.loss(model, batch).backward()
        yield family.parts(model, gradient)


def score(scorer: Scorer, model: nn.Module, data: Any = None, loss_fn: Loss | None = None, **find: Any) -> list[Scores]:
    views = find_views(model, **find)
    found = scorer.score(model, views, data=data, loss_fn=loss_fn, progress=False)
    assert list(found) == [view.name for view in views]
    for view in views:
        found[view.name].check(view.spec)
    return list(found.values())


def by_head(values: Tensor) -> Tensor:
    return values.reshape(HEADS, CHANNELS)


def equal(found: list[Scores], expected: list[tuple[Tensor, Tensor, Tensor]], rtol: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for one, (qk, vo, head) in zip(found, expected, strict=True):
        assert float(qk.std()) > 0, "a test that sees differences"
        for mine, theirs in ((one.qk, by_head(qk)), (one.vo, by_head(vo)), (one.head, head)):
            assert mine.dtype == torch.float64
            torch.testing.assert_close(mine, theirs.double(), rtol=rtol, atol=rtol * float(theirs.abs().mean()))


# magnitude


@every_family
@pytest.mark.parametrize("p", [1, 2])
def test_magnitude(family: Family, p: int) -> None:
    model, expected = family.build(), []
    for w in family.parts(model, itself):
        norm = {key: w[key].abs().pow(p).sum(1).pow(1 / p) for key in "qkvo"}
        heads = [w[key].reshape(HEADS, -1).abs().pow(p).sum(1).pow(1 / p) for key in "qkvo"]
        expected.append(((norm["q"] + norm["k"]) / 2, (norm["v"] + norm["o"]) / 2, sum(heads) / 4))
    equal(score(Magnitude(p), model), expected)


# Fisher


@every_family
@pytest.mark.parametrize("damping", [1e-6, 0.0, 0.5])
def test_fisher_per_batch(family: Family, damping: float) -> None:
    batches = family.batches()
    every = list(grads_of(family, batches))
    expected = []
    for layer in range(2):
        # per weight first, then the sum over the unit's weights, as the paper has it
        mean = {key: sum(grads[layer][key].square() for grads in every) / len(batches) + damping for key in "qkvo"}
        rows = {key: value.sum(1) for key, value in mean.items()}
        qk, vo = rows["q"] + rows["k"], rows["v"] + rows["o"]
        expected.append((qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1)))
    equal(score(Fisher(damping=damping), family.build(), batches, family.loss_fn), expected)


@every_family
@pytest.mark.parametrize("damping", [1e-6, 0.0])
def test_fisher_per_sample(family: Family, damping: float) -> None:
    batches = family.batches()
    singles = [single for batch in batches for single in family.split(batch)]
    every = list(grads_of(family, singles))
    expected = []
    for layer in range(2):
        rows = {
            key: (sum(grads[layer][key].square() for grads in every) / len(singles) + damping).sum(1) for key in "qkvo"
        }
        qk, vo = rows["q"] + rows["k"], rows["v"] + rows["o"]
        expected.append((qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1)))
    found = score(Fisher(per_sample=True, damping=damping), family.build(), batches, family.loss_fn)
    equal(found, expected, rtol=1e-5)
    # and so the batch size does not matter
    again = score(Fisher(per_sample=True, damping=damping), family.build(), singles, family.loss_fn)
    equal(again, expected, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_fisher_per_sample_with_few_and_many_tokens(tokens: int) -> None:
    """Both ways to form a row's squared norm: by Gram matrices (few tokens) and by the gradient itself (many)."""
    family = FAMILIES["encoder, batch first"]
    batch = {"x": numbers(3, tokens, WIDTH, seed=1), "pad": torch.zeros(3, tokens, dtype=torch.bool)}
    batch |= {"y": numbers(3, seed=2), "first": True}
    every = list(grads_of(family, encoder_split(batch)))
    expected = []
    for layer in range(2):
        rows = {key: sum(grads[layer][key].square() for grads in every).sum(1) / 3 for key in "qkvo"}
        qk, vo = rows["q"] + rows["k"], rows["v"] + rows["o"]
        expected.append((qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1)))
    if tokens == 1:  # softmax over one key is constant: no gradient reaches Q and K
        assert all(float(qk.abs().max()) < 1e-20 for qk, _, _ in expected)
        found = score(Fisher(per_sample=True, damping=0.0), family.build(), [batch], encoder_loss)
        for one, (_, vo, _) in zip(found, expected, strict=True):
            assert float(one.qk.abs().max()) < 1e-12
            torch.testing.assert_close(one.vo, by_head(vo), rtol=1e-5, atol=0.0)
        return
    equal(score(Fisher(per_sample=True, damping=0.0), family.build(), [batch], encoder_loss), expected, rtol=1e-5)


def test_fisher_per_sample_of_one_layer_among_dense_ones() -> None:
    """The layers that are not scored stay packed; frozen, they may run PyTorch's fused path with nested tensors."""
    family = FAMILIES["encoder, batch first"]
    scorer = Fisher(per_sample=True)
    whole = score(scorer, family.build(), family.batches(), encoder_loss)
    for layer in range(2):
        one = score(scorer, family.build(), family.batches(), encoder_loss, include=f"layers.{layer}.*")
        torch.testing.assert_close(one[0].qk, whole[layer].qk, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(one[0].vo, whole[layer].vo, rtol=1e-6, atol=0.0)


class Twice(nn.Module):
    """One attention that runs twice, so that a weight's gradient is the sum over both runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return x + self.attention(x, x[:, :2], x[:, :2])[0]


def test_fisher_per_sample_of_an_attention_that_runs_twice() -> None:
    """With one sample to a batch, per sample and per batch are the same."""
    model = seeded(Twice)
    data = [(numbers(1, 5, WIDTH, seed=i), numbers(1, 5, WIDTH, seed=i + 9)) for i in range(3)]
    same(score(Fisher(per_sample=True), model, data), score(Fisher(), model, data), rtol=1e-5)


def first_layer(model: Any, batch: Any) -> Tensor:
    return model(batch[0], output_hidden_states=True).hidden_states[1].square().mean()


@pytest.mark.parametrize("scorer", [Fisher(), Fisher(per_sample=True), Taylor(), Gate()], ids=lambda s: s.name)
def test_a_layer_that_the_loss_never_reaches_is_an_error_that_names_it(scorer: Scorer) -> None:
    """Its scores would be zero, and all of it would go."""
    with pytest.raises(DataError, match=r"1 of 2 .*layers\.1\.attention.*exclude="):
        score(scorer, ast(), ast_batches(), first_layer)


@pytest.mark.parametrize("scorer", [Fisher(), Fisher(per_sample=True), Taylor(), Gate()], ids=lambda s: s.name)
def test_a_layer_that_some_batches_reach_scores_by_them(scorer: Scorer) -> None:
    data, seen = ast_batches(), iter(range(3))

    def sometimes(model: Any, batch: Any) -> Tensor:
        return model(batch[0]).logits.square().mean() if next(seen) else first_layer(model, batch)

    reached, other = score(scorer, ast(), data, sometimes)
    assert float(reached.qk.min()) > 0 < float(other.qk.min())


# Taylor


@every_family
@pytest.mark.parametrize("squared", [False, True])
def test_taylor(family: Family, squared: bool) -> None:
    batches = family.batches()
    size = torch.square if squared else torch.abs
    weights = family.parts(family.build(), itself)
    expected = []
    for layer, w in enumerate(weights):
        totals = [torch.zeros(HEADS * CHANNELS), torch.zeros(HEADS * CHANNELS), torch.zeros(HEADS)]
        for grads in grads_of(family, batches):
            g = grads[layer]
            product = {key: (w[key] * g[key]).sum(1) if key in "qkvo" else w[key] * g[key] for key in w}
            qk = product["q"] + product["k"] + product["qb"] + product["kb"]
            vo = product["v"] + product["o"] + product["vb"]
            now = size(qk), size(vo), size(by_head(qk).sum(1) + by_head(vo).sum(1))
            totals = [total + one / len(batches) for total, one in zip(totals, now, strict=True)]
        expected.append(tuple(totals))
    equal(score(Taylor(squared), family.build(), batches, family.loss_fn), expected)  # type: ignore[arg-type]


def test_cross_attention_of_other_widths_with_appended_keys() -> None:
    """Separate weights of other widths for K and V; the learned key and value run along the channels, too."""

    def build() -> nn.Module:
        return seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=16, add_bias_kv=True, batch_first=True))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (
            (model(*batch, need_weights=False)[0] * torch.linspace(-1, 1, WIDTH, dtype=torch.float64)).square().mean()
        )

    def parts(of: Any, read: Read) -> Parts:
        weights = {key: read(getattr(of, f"{key}_proj_weight")) for key in "qkv"}
        biases = dict(zip(("qb", "kb", "vb"), read(of.in_proj_bias).chunk(3), strict=True))
        more = {"k+": read(of.bias_k).flatten(), "v+": read(of.bias_v).flatten()}
        return weights | biases | more | {"o": read(of.out_proj.weight).T}

    batch = tuple(numbers(1, 5, width, seed=width) for width in (WIDTH, 24, 16))
    model = build()
    loss(model, batch).backward()
    w, g = parts(model, itself), parts(model, gradient)
    rows = {key: (g[key].square() + 1e-6).sum(1) for key in "qkvo"}
    qk, vo = rows["q"] + rows["k"], rows["v"] + rows["o"]
    expected = [(qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1))]
    equal(score(Fisher(), build(), [batch], loss), expected)
    equal(score(Fisher(per_sample=True), build(), [batch], loss), expected, rtol=1e-5)
    product = {key: (w[key] * g[key]).sum(1) if w[key].dim() > 1 else w[key] * g[key] for key in w}
    qk = product["q"] + product["k"] + product["qb"] + product["kb"] + product["k+"]
    vo = product["v"] + product["o"] + product["vb"] + product["v+"]
    whole = (by_head(qk).sum(1) + by_head(vo).sum(1)).abs()
    equal(score(Taylor(), build(), [batch], loss), [(qk.abs(), vo.abs(), whole)])


def test_taylor_predicts_what_removal_costs() -> None:
    """To first order: with tiny weights in a head, the loss changes by what its score says."""
    model = encoder(True)
    attention = model.layers[0].self_attn
    with torch.no_grad():
        for weight in (attention.in_proj_weight[64:72], attention.in_proj_bias[64:72]):
            weight.mul_(1e-4)
    batch = encoder_batches(True)[0]
    scores = score(Taylor(), model, [batch], encoder_loss)[0].vo[0]
    before = encoder_loss(model, batch)
    layer = [spec for spec in find_attention(model) if spec.name == "layers.0.self_attn"]
    for channel in range(3):
        plan = Plan(tuple(_one_channel(spec, channel) for spec in layer))
        with masked(model, plan):
            cost = float((encoder_loss(model, batch) - before).detach().abs())
        # w of V is tiny but the column of O is not: V's own product is half of the sum, O's the other half
        assert cost == pytest.approx(float(scores[channel]) / 2, rel=1e-2)


def _one_channel(spec: Any, channel: int) -> Any:
    return LayerPlan(spec, (), ((),) * HEADS, ((channel,), (), (), ()))


# Torch-Pruning

I = tp.importance
IMPORTANCES: dict[str, Callable[[], Any]] = {
    "GroupMagnitude": I.GroupMagnitudeImportance,
    "GroupMagnitude p=1, sum": partial(I.GroupMagnitudeImportance, p=1, group_reduction="sum", normalizer=None),
    "GroupMagnitude max": partial(I.GroupMagnitudeImportance, group_reduction="max", normalizer="max"),
    "GroupMagnitude first": partial(I.GroupMagnitudeImportance, group_reduction="first"),
    "GroupMagnitude bias": partial(I.GroupMagnitudeImportance, group_reduction="sum", bias=True),
    "GroupTaylor": I.GroupTaylorImportance,
    "GroupTaylor multivariable": partial(I.GroupTaylorImportance, multivariable=True, normalizer=None),
    "GroupTaylor bias": partial(I.GroupTaylorImportance, group_reduction="sum", bias=True),
    "GroupHessian": I.GroupHessianImportance,
    "GroupHessian bias": partial(I.GroupHessianImportance, group_reduction="sum", bias=True),
    "LAMP": I.LAMPImportance,
    "FPGM": I.FPGMImportance,
}


class Product(nn.Module):
    """Q times K, or O after V: models in which Torch-Pruning finds the groups by itself."""

    def __init__(self, weights: Parts, grads: Parts | None, both: str) -> None:
        super().__init__()
        self.both = both
        for key in both:
            linear = nn.Linear(WIDTH, HEADS * CHANNELS, bias=key != "o", dtype=torch.float64)
            linear.weight = nn.Parameter(weights[key].T.clone() if key == "o" else weights[key].clone())
            if grads is not None:
                linear.weight.grad = (grads[key].T if key == "o" else grads[key]).clone()
            if key != "o":
                linear.bias = nn.Parameter(weights[f"{key}b"].clone())
                if grads is not None:
                    linear.bias.grad = grads[f"{key}b"].clone()
            setattr(self, key, linear)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, key) for key in self.both)
        return second(first(x)) if self.both == "vo" else first(x) * second(x)


def theirs(importance: Any, weights: Parts, grads: Parts | None, both: str) -> Tensor:
    """What Torch-Pruning gives for its own group in its own dependency graph."""
    model = Product(weights, grads, both)
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, WIDTH, dtype=torch.float64))
    root = getattr(model, both[0])
    group = graph.get_pruning_group(root, tp.prune_linear_out_channels, list(range(HEADS * CHANNELS)))
    return importance(group).double()


@every_family
@pytest.mark.parametrize("name", IMPORTANCES)
def test_torch_pruning_importances(family: Family, name: str) -> None:
    batches = family.batches()
    make = IMPORTANCES[name]
    every = list(grads_of(family, batches))
    power = 2 if "Hessian" in name else 1
    expected = []
    for layer, weights in enumerate(family.parts(family.build(), itself)):
        mean = {key: sum(grads[layer][key] ** power for grads in every) / len(every) for key in weights}
        qk, vo = (theirs(make(), weights, mean, both) for both in ("qk", "vo"))
        expected.append((qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1)))
    data = batches if "Taylor" in name or "Hessian" in name else None
    equal(score(TorchPruning(make()), family.build(), data, family.loss_fn), expected, rtol=1e-5)


def test_torch_pruning_formulas() -> None:
    """Three of them written out, so that their own groups above are not the only witness."""
    family = FAMILIES["ast"]
    batches = family.batches()
    weights = family.parts(family.build(), itself)[0]
    every = [grads[0] for grads in grads_of(family, batches)]
    grad = {key: sum(g[key] for g in every) / len(every) for key in "qk"}
    square = {key: sum(g[key] ** 2 for g in every) / len(every) for key in "qk"}
    lamp = sum(weights[key].square().sum(1) for key in "qk") / 2
    order = lamp.argsort()
    remaining = lamp[order].flip(0).cumsum(0).flip(0)
    wanted = {
        I.GroupMagnitudeImportance(normalizer=None): sum(weights[key].square().sum(1) for key in "qk") / 2,
        I.GroupTaylorImportance(normalizer=None): sum((weights[k] * grad[k]).abs().sum(1) for k in "qk") / 2,
        I.GroupHessianImportance(normalizer=None): sum((weights[k] ** 2 * square[k]).sum(1) for k in "qk") / 2,
        I.LAMPImportance(): torch.zeros_like(lamp).index_copy(0, order, lamp[order] / remaining),
    }
    for importance, expected in wanted.items():
        found = score(TorchPruning(importance), family.build(), batches)[0].qk
        torch.testing.assert_close(found, by_head(expected), rtol=1e-5, atol=0.0)


def test_torch_pruning_reads_the_gradients_that_the_model_holds() -> None:
    family = FAMILIES["encoder, batch first"]
    model, batch = family.build(), family.batches()[0]
    family.loss(model, batch).backward()
    held = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found = score(TorchPruning(I.GroupTaylorImportance()), model)
    equal(found, _expected_taylor(family, batch), rtol=1e-5)
    for parameter, grad in zip(model.parameters(), held, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


def _expected_taylor(family: Family, batch: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    expected = []
    (grads,) = grads_of(family, [batch])
    for weights, grad in zip(family.parts(family.build(), itself), grads, strict=True):
        qk, vo = (theirs(I.GroupTaylorImportance(), weights, grad, both) for both in ("qk", "vo"))
        expected.append((qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1)))
    return expected


def test_torch_pruning_hessian_accumulated_by_its_own_means() -> None:
    """Torch-Pruning's documented way: ``accumulate_grad`` after the backward pass of every sample."""
    family = FAMILIES["ast"]
    model = family.build()
    importance = I.GroupHessianImportance(normalizer=None)
    singles = split_pairs(ast_batches()[0])[:1]
    for single in singles:
        model.zero_grad()
        family.loss(model, single).backward()
        importance.accumulate_grad(model)
    held = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    (grads,) = grads_of(family, singles)
    expected = []
    for weights, grad in zip(family.parts(model, itself), grads, strict=True):
        rows = {key: (weights[key] ** 2 * grad[key] ** 2).sum(1) for key in "qkvo"}
        qk, vo = (rows["q"] + rows["k"]) / 2, (rows["v"] + rows["o"]) / 2
        expected.append((qk, vo, by_head(qk).sum(1) + by_head(vo).sum(1)))
    equal(score(TorchPruning(importance), model), expected, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in held:
            assert torch.equal(parameter.grad, held[name]), f"{name}.grad changed"  # type: ignore[arg-type]


def test_torch_pruning_random() -> None:
    model = ast()
    before = torch.get_rng_state()
    first = score(TorchPruning(I.RandomImportance()), model)
    assert torch.equal(torch.get_rng_state(), before)
    again = score(TorchPruning(I.RandomImportance()), model)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.qk, two.qk)
        assert 0 <= float(one.qk.min()) < float(one.qk.max()) < 1
    assert not torch.equal(first[0].qk, first[1].qk)
    assert not torch.equal(first[0].qk, first[0].vo)


# random


def test_random_is_seeded_and_leaves_the_global_state_alone() -> None:
    model = ast()
    before = torch.get_rng_state()
    one, two, other = (score(Random(seed), model) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(one, two, other, strict=True):
        for key in ("qk", "vo", "head"):
            assert torch.equal(getattr(a, key), getattr(b, key))
            assert not torch.equal(getattr(a, key), getattr(c, key))
            assert 0 <= float(getattr(a, key).min()) <= float(getattr(a, key).max()) < 1
    assert not torch.equal(one[0].qk, one[1].qk)
    alone = score(Random(3), model, include="*layers.1.*")
    assert torch.equal(alone[0].qk, one[1].qk), "a layer's scores do not depend on which others are scored"
    assert make_plan(model, 0.5, scorer="random", seed=3) == make_plan(model, 0.5, scorer=Random(3))
    assert make_plan(model, 0.5, scorer="random", seed=3) != make_plan(model, 0.5, scorer="random", seed=4)


# no trace

DRIVEN: dict[str, Callable[[], Scorer]] = {
    "fisher": Fisher,
    "fisher per sample": partial(Fisher, per_sample=True),
    "taylor": Taylor,
    "torch-pruning taylor": lambda: TorchPruning(I.GroupTaylorImportance()),
    "torch-pruning hessian": lambda: TorchPruning(I.GroupHessianImportance()),
}
every_driven = pytest.mark.parametrize("make", DRIVEN.values(), ids=list(DRIVEN))
ALL = {
    **DRIVEN,
    "magnitude": Magnitude,
    "random": Random,
    "torch-pruning random": lambda: TorchPruning(I.RandomImportance()),
}
every_scorer = pytest.mark.parametrize("make", ALL.values(), ids=list(ALL))


def untidy(model: nn.Module) -> nn.Module:
    """Mixed modes, flags and gradients, and hooks of every kind."""
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 1)
        parameter.grad = torch.full_like(parameter, 0.5) if i % 3 == 0 else None
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_must_not_run)
    model.register_forward_hook(_pass_on)
    next(model.children()).register_forward_pre_hook(_pass_on_inputs)
    return model


def _must_not_run(parameter: Tensor) -> None:
    raise AssertionError("a gradient was accumulated, so that optimizers in the backward pass would step")


def _pass_on(module: nn.Module, inputs: Any, output: Any) -> None: ...


def _pass_on_inputs(module: nn.Module, inputs: Any) -> None: ...


def _hooks(module: nn.Module) -> list[tuple[str, Any]]:
    return [(kind, hooks) for kind, hooks in sorted(module.__dict__.items()) if kind.endswith("_hooks") and hooks]


def trace(model: nn.Module) -> Any:
    """All that a scorer must leave as found."""

    def raw(tensor: Tensor | None) -> bytes | None:
        return None if tensor is None else tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return {
        "parameters": [
            (name, id(p), p.data_ptr(), p._version, p.requires_grad, raw(p), id(p.grad), raw(p.grad))
            for name, p in model.named_parameters()
        ],
        "buffers": [(name, id(b), raw(b)) for name, b in model.named_buffers()],
        "modules": [(name, id(m), type(m), m.training, list(m.__dict__)) for name, m in model.named_modules()],
        "children": [list(m._modules) + list(m._parameters) for m in model.modules()],
        "hooks": [
            [(kind, list(hooks.items() if isinstance(hooks, dict) else hooks)) for kind, hooks in _hooks(m)]
            for m in model.modules()
        ],
        "random": torch.get_rng_state().numpy().tobytes(),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip


def noisy(family: Family, fail_at: int | None = None) -> Loss:
    """The family's loss, which also draws random numbers, and may fail."""
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        if next(calls) == fail_at:
            raise ZeroDivisionError("midway")
        return family.loss(model, batch)

    return loss


@every_family
@every_scorer
def test_no_trace(family: Family, make: Callable[[], Scorer]) -> None:
    model = untidy(family.build())
    before = trace(model)
    score(make(), model, family.batches(), noisy(family))
    assert trace(model) == before


@every_family
@every_driven
@pytest.mark.parametrize("fail_at", [0, 1])
def test_no_trace_after_a_failure(family: Family, make: Callable[[], Scorer], fail_at: int) -> None:
    model = untidy(family.build())
    before = trace(model)
    with pytest.raises(ZeroDivisionError, match="midway"):
        score(make(), model, family.batches(), noisy(family, fail_at))
    assert trace(model) == before


@every_driven
def test_no_trace_after_a_failure_in_the_model(make: Callable[[], Scorer]) -> None:
    """A hook of the user's that raises in the second layer, when the first has run."""
    model = untidy(encoder(True))

    def fail(module: nn.Module, inputs: Any) -> None:
        raise ZeroDivisionError("in the model")

    model.layers[1].register_forward_pre_hook(fail)
    before = trace(model)
    with pytest.raises(ZeroDivisionError, match="in the model"):
        score(make(), model, encoder_batches(True), encoder_loss)
    assert trace(model) == before


@every_driven
def test_gradients_outside_the_model_stay_as_they_are(make: Callable[[], Scorer]) -> None:
    """A trainable head, and inputs that want a gradient, belong to the caller."""
    head = nn.Linear(3, 1, dtype=torch.float64)
    x = numbers(2, 24, 16, seed=0).requires_grad_()
    score(make(), ast(), [(x, None)], lambda model, batch: head(model(batch[0]).logits).square().mean())
    assert head.weight.grad is None
    assert x.grad is None


@every_driven
def test_under_no_grad_and_frozen(make: Callable[[], Scorer]) -> None:
    family = FAMILIES["ast"]
    expected = score(make(), family.build(), family.batches())
    frozen = family.build().requires_grad_(False)
    with torch.no_grad():
        found = score(make(), frozen, family.batches())
        assert not torch.is_grad_enabled()
    same(found, expected)
    assert not any(p.requires_grad for p in frozen.parameters())


def same(found: list[Scores], expected: list[Scores], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for one, two in zip(found, expected, strict=True):
        for key in ("qk", "vo", "head"):
            torch.testing.assert_close(getattr(one, key), getattr(two, key), rtol=rtol, atol=atol)


@every_family
@pytest.mark.parametrize("make", [Magnitude, *DRIVEN.values()], ids=["magnitude", *DRIVEN])
def test_bfloat16(family: Family, make: Callable[[], Scorer]) -> None:
    def cast(batch: Any) -> Any:
        if isinstance(batch, dict):
            return {key: cast(value) for key, value in batch.items()}
        if isinstance(batch, tuple):
            return tuple(cast(value) for value in batch)
        return batch.bfloat16() if isinstance(batch, Tensor) and batch.is_floating_point() else batch

    model = family.build().bfloat16()
    full = copy.deepcopy(model).double()
    loss = encoder_loss if family.loss_fn is not None else None
    found = score(make(), model, [cast(batch) for batch in family.batches()], loss)
    expected = score(make(), full, family.batches(), loss)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for one, two in zip(found, expected, strict=True):
        for key in ("qk", "vo"):
            both = torch.stack([getattr(one, key).flatten(), getattr(two, key).flatten()])
            assert float(torch.corrcoef(both)[0, 1]) > 0.98


@every_driven
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make: Callable[[], Scorer], reentrant: bool) -> None:
    family = FAMILIES["bert"]
    expected = score(make(), family.build(), family.batches())
    model: Any = family.build()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.train()
    before = trace(model)
    same(score(make(), model, family.batches()), expected)
    assert trace(model) == before
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# forms of data


def labelled_batches() -> list[dict[str, Tensor]]:
    return [{"input_values": x, "labels": y} for x, y in ast_batches()]


class Again(Iterable[Any]):
    """Gives new batches whenever asked."""

    def __iter__(self) -> Iterator[Any]:
        return iter(ast_batches())


@every_driven
def test_forms_of_data(make: Callable[[], Scorer]) -> None:
    expected = score(make(), ast(), ast_batches())
    x, y = (torch.cat(parts) for parts in zip(*ast_batches(), strict=True))
    picks = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    forms: dict[str, Any] = {
        "mappings": labelled_batches(),
        "lists for pairs": [list(batch) for batch in ast_batches()],
        "generator": (batch for batch in ast_batches()),
        "iterator": iter(ast_batches()),
        "iterable": Again(),
        "tuple": tuple(ast_batches()),
        "loader": DataLoader(TensorDataset(x, y), batch_sampler=picks),
    }
    for form, data in forms.items():
        model = ast()
        before = trace(model)
        found = score(make(), model, data)
        same(found, expected)
        assert trace(model) == before, form


def test_auto_takes_the_same_forms_and_touches_no_random_state() -> None:
    x, y = (torch.cat(parts) for parts in zip(*ast_batches(), strict=True))
    letter: dict[str, Any] = {"basis": "channels", "compensate": False}
    expected = make_plan(ast(), 0.5, data=ast_batches(), **letter)
    assert expected == make_plan(ast(), 0.5, data=ast_batches(), scorer=Fisher(per_sample=True), **letter)
    assert expected != make_plan(ast(), 0.5)
    forms: dict[str, Any] = {
        "generator": (batch for batch in ast_batches()),
        "mappings": labelled_batches(),
        "loader": DataLoader(TensorDataset(x, y), batch_sampler=[[0, 1, 2], [3, 4], [5, 6, 7, 8]]),
    }
    for form, data in forms.items():
        before = torch.get_rng_state()
        assert make_plan(ast(), 0.5, data=data, **letter) == expected, form
        assert torch.equal(torch.get_rng_state(), before), form


def test_auto_reads_every_batch_once() -> None:
    class Counted:
        passes = batches = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            for batch in ast_batches():
                self.batches += 1
                yield batch

    data = Counted()
    make_plan(ast(), 0.5, data=data, basis="channels", compensate=False)
    assert (data.passes, data.batches) == (1, 3)


def test_auto_without_labels_scores_the_output_itself() -> None:
    data = [x for x, _ in ast_batches()]
    before = torch.get_rng_state()
    letter: dict[str, Any] = {"basis": "channels", "compensate": False, "seed": 1}
    plan = make_plan(ast(), 0.5, data=data, **letter)
    assert plan == make_plan(ast(), 0.5, data=data, **letter)
    assert plan == make_plan(ast(), 0.5, data=[{"input_values": x} for x in data], **letter)
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.asked is not None
    assert plan.asked.scorer == "fisher-per-sample"


# what is held between batches


def storages() -> set[int]:
    """Where every storage as large as a weight begins; asks for true types, as some objects' ``__class__`` warns."""
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    large = [tensor.untyped_storage() for tensor in found]
    return {storage.data_ptr() for storage in large if storage.nbytes() >= WIDTH * WIDTH * 8}


@every_family
@pytest.mark.parametrize(
    "make", [Fisher, partial(Fisher, per_sample=True), Taylor], ids=["fisher", "per sample", "taylor"]
)
def test_memory_between_batches(family: Family, make: Callable[[], Scorer]) -> None:
    """When a batch begins, nothing as large as a weight is left of those before: O(heads x channels) is."""
    model, batches, held = family.build(), family.batches()[:2] * 2, []
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        held.append(storages() - owned)
        return family.loss(model, batch)

    gc.collect()
    gc.freeze()  # what exists so far is not looked at
    try:
        score(make(), model, batches, loss)
    finally:
        gc.unfreeze()
    assert held == [set()] * 4


# models pruned before


@every_scorer
@pytest.mark.parametrize("build", [ast, partial(encoder, True)])
def test_scores_of_a_ragged_model(make: Callable[[], Scorer], build: Callable[[], nn.Module]) -> None:
    """What is left scores as it does in the dense model with the rest zeroed."""
    data, loss = (ast_batches(), None) if build is ast else (encoder_batches(True), encoder_loss)
    removed = {"qk": [[0], [1, 2], [], [7]], "vo": [[], [3], [0, 1, 2], []]}
    dense, pruned = build(), build()
    report = prune_channels(pruned, {0: removed, 1: {}})
    found = score(make(), pruned, data, loss)
    with masked(dense, report.plan):
        expected = score(make(), dense, data, loss)
    assert found[0].qk.shape == (HEADS, 8)
    if isinstance(make(), (Random, TorchPruning)):
        return  # normalised over, or drawn for, all units of a layer
    for kind in ("qk", "vo"):
        for head in range(HEADS):
            kept = list(report.layers[0].kept(kind, head))
            mine, dense_scores = found[0].of(kind)[head, : len(kept)], expected[0].of(kind)[head, kept]
            torch.testing.assert_close(mine, dense_scores, rtol=1e-6, atol=1e-12)
    rotated: dict[str, Any] = {"basis": "rotated", "compensate": True}
    plan = make_plan(pruned, 0.3, heads="ragged", scorer=make(), data=data, loss_fn=loss, **rotated)
    apply_plan(pruned, plan)


def test_torch_pruning_of_zeros_says_why_nothing_is_finite() -> None:
    model = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    with torch.no_grad():
        model.self_attn.in_proj_weight.zero_()
    with pytest.raises(NonFiniteError, match=r"self_attn: .*GroupMagnitude.*8 of 8.*normalizer=None"):
        make_plan(model, 0.5, scorer=tp.importance.GroupMagnitudeImportance(p=2))
    plan = make_plan(model, 0.5, scorer=tp.importance.GroupMagnitudeImportance(p=2, normalizer=None))
    assert len(plan.layers) == 1
