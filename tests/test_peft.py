"""LoRA on pruned attention: recovery by PEFT, merged; adapters that are not merged are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import (
    AttentionPruner,
    apply_plan,
    calibrate,
    find_attention,
    make_plan,
    masked,
    prune_attention,
)
from attnprune.errors import DataError, NotExpressibleError, OptionError, TiedWeightsError, WrappedModelError
from attnprune.integrations.peft import AST_PROTOCOL, lora_recover, lora_targets

from .conformance import family, fresh, inputs
from .families import FAMILIES
from .test_laws import same, snapshot


def loss_of(name: str) -> Callable[[nn.Module, Any], Tensor]:
    """A distance of the output to something that the model does not give."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        output = family(name).run(model, batch)
        return (
            (output - torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).square().mean()
        )

    return loss_fn


def batches(name: str, count: int) -> list[Any]:
    return [
        {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs(name, 0, seed).items()}
        for seed in range(count)
    ]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("MHA", "Own")])
def test_recovery_lowers_the_loss_and_leaves_a_plain_model(name: str) -> None:
    model = fresh(name, 0)
    prune_attention(model, 0.5, scorer="random", heads="ragged")
    data, loss_fn, state = batches(name, 3), loss_of(name), torch.get_rng_state()
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    values = {key: value.detach().clone() for key, value in parameters}
    next(iter(model.parameters())).requires_grad_(False)
    before = float(loss_fn(model, data[0]).detach())
    assert lora_recover(model, data, lr=1e-2, epochs=4, loss_fn=loss_fn, progress=False) is model
    assert float(loss_fn(model, data[0]).detach()) < before
    assert [(key, id(one)) for key, one in modules] == [(key, id(one)) for key, one in model.named_modules()]
    assert [(key, id(one)) for key, one in parameters] == [(key, id(one)) for key, one in model.named_parameters()]
    moved = {key for key, value in values.items() if not torch.equal(value, dict(parameters)[key])}
    assert {key.rpartition(".")[0] for key in moved} == set(lora_targets(model))
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(values) - 1)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model, "peft_config")
    prune_attention(model, 0.25, scorer="magnitude", heads="ragged")  # the next round


def test_a_host_that_reads_weights_is_refused() -> None:
    """Dense or pruned: it would not hear updates beside its weights."""
    model = fresh("Own", 1)
    for _ in range(2):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(NotExpressibleError, match=r"^layers\.0: expected a host that calls its projections"):
            lora_recover(model, batches("Own", 1), loss_fn=loss_of("Own"), progress=False)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        prune_attention(model, 0.5, scorer="random")


def test_dense_packed_attention_is_trained_too() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2).eval()
    data = [(torch.randn(4, 3, 16), torch.randn(4, 3, 16))]
    before = {key: (id(p), p.detach().clone()) for key, p in model.named_parameters()}
    lora_recover(model, data, lr=1e-2, epochs=2, progress=False)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for key, (identity, value) in before.items():
        assert id(after[key]) == identity
        assert torch.equal(after[key], value) == ("norm" in key or "bias" in key)


def test_updates_are_of_the_rank_and_scale_asked_for() -> None:
    model = fresh("ViT", 0)
    prune_attention(model, 0.25, scorer="random")
    dense = copy.deepcopy(model)
    lora_recover(model, batches("ViT", 2), rank=2, lr=1e-2, loss_fn=loss_of("ViT"), progress=False)
    ranks = [
        int(torch.linalg.matrix_rank(model.get_submodule(name).weight - dense.get_submodule(name).weight, rtol=1e-9))
        for name in lora_targets(model)
    ]
    assert set(ranks) == {2}


@pytest.mark.parametrize("decay", ["linear", "cosine", "none"])
def test_peft_by_hand_gives_the_same_bits(decay: str) -> None:
    """The oracle: PEFT's own functions, torch's Adam and the schedule written out."""
    model, oracle = fresh("ViT", 0), fresh("ViT", 0)
    for one in (model, oracle):
        prune_attention(one, 0.5, scorer="magnitude")
    data, loss_fn = batches("ViT", 10), loss_of("ViT")
    lora_recover(model, data, epochs=2, warmup=0.2, decay=decay, loss_fn=loss_fn, seed=3, progress=False)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=lora_targets(oracle))
    adapted = peft.inject_adapter_in_model(config, oracle)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-4)
    falls = {
        "linear": [1 - i / 16 for i in range(16)],
        "cosine": [math.cos(math.pi * i / 32) ** 2 for i in range(16)],
        "none": [1.0] * 16,
    }
    rates = [1e-4 * x for x in (0.25, 0.5, 0.75, 1.0, *falls[decay])]
    for rate, batch in zip(rates, data * 2, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss_fn(adapted, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name in lora_targets(model):
        layer: Any = oracle.get_submodule(name)
        layer.merge()
        found, expected = model.get_submodule(name).weight, layer.base_layer.weight
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def recognisers() -> list[Any]:
    """Two copies of a pruned recogniser with a Linear outside of blocks, and a norm in its classifier."""
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_mel_bins=16,
        max_length=16, patch_size=8, frequency_stride=8, time_stride=8, num_labels=3, hidden_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ASTForAudioClassification(config).double().eval()
    model.pooler = nn.Linear(32, 32).double()
    model.classifier.register_forward_pre_hook(lambda _, args: (model.pooler(args[0]),))
    prune_attention(model, 0.5, scorer="magnitude")
    twin = copy.deepcopy(model)
    twin.classifier._forward_pre_hooks.clear()
    twin.classifier.register_forward_pre_hook(lambda _, args: (twin.pooler(args[0]),))
    return [model, twin]


def clips(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 16, 16, dtype=torch.float64, generator=generator)
    return [{"input_values": one, "labels": torch.tensor([0, 1, 2, number % 3])} for number, one in enumerate(x)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_protocol_of_the_papers_public_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle: PEFT as that code calls it, torch's Adam, and the rates of 24 steps written out."""
    model, oracle = recognisers()
    data, validation = clips(24), clips(3)
    seen: list[tuple[float, int]] = []
    real = torch.optim.Adam.step

    def step(self: torch.optim.Adam, closure: Any = None) -> Any:
        seen.append((self.param_groups[0]["lr"], sum(p.numel() for p in self.param_groups[0]["params"])))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert lora_recover(model, data, validation=validation, progress=False, **AST_PROTOCOL) is model
    monkeypatch.undo()
    rates = [5e-5, 1e-4, *(1e-4 * math.cos(math.pi * i / 44) ** 2 for i in range(22))]
    assert [rate for rate, _ in seen] == pytest.approx(rates, rel=1e-12)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    adapted = peft.get_peft_model(oracle, config)
    trainable = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert {count for _, count in seen} == {sum(p.numel() for p in trainable.values())}
    optimizer = torch.optim.Adam(trainable.values(), 1e-4)
    for rate, batch in zip(rates, data, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()
    merged = adapted.merge_and_unload().state_dict()
    found = model.state_dict()
    assert list(found) == list(merged)  # plain modules again
    for key, value in found.items():
        assert torch.allclose(value, merged[key], rtol=0, atol=1e-12), key
    moved = {
        key.rpartition(".")[0] for key, value in recognisers()[0].state_dict().items() if (value != found[key]).any()
    }
    assert moved == {*lora_targets(model, everywhere=True), "classifier.layernorm"}
    assert {"pooler", "classifier.dense"} <= moved - set(lora_targets(model))
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


def interrupted(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss whose third call is interrupted."""
    calls = 0

    def fails(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(model, batch)

    return fails


def test_what_is_trained_in_full_comes_back_after_a_failure() -> None:
    model, _ = recognisers()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        lora_recover(
            model,
            clips(4),
            loss_fn=interrupted(lambda model, batch: model(**batch).loss),
            progress=False,
            **AST_PROTOCOL,
        )
    assert same(before, snapshot(model))
    for trained, words in (
        ("head", "audio_spectrogram_transformer, classifier, pooler"),
        ("*.layers.1.attention.q_proj", "which is of attention"),
        ("audio*", "layers.0.attention, which is of attention"),
        (3, "a glob pattern"),
    ):
        options: Any = {**AST_PROTOCOL, "trained": trained}
        with pytest.raises(OptionError, match=words):
            lora_recover(model, clips(1), progress=False, **options)
    with pytest.raises(OptionError, match=r"float32 or float64, found classifier.layernorm.weight of torch.bfloat16"):
        lora_recover(model.bfloat16(), clips(1), progress=False, **AST_PROTOCOL)
    with pytest.raises(OptionError, match="everywhere"):
        lora_recover(model, clips(1), everywhere=True, mlp=False)


def test_the_best_by_validation_loss_is_kept() -> None:
    data, looked = batches("ViT", 4), []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        sign, given = batch if isinstance(batch, tuple) else (1.0, batch)
        loss = sign * loss_of("ViT")(model, given)
        if isinstance(batch, tuple):
            looked.append((model.training, float(loss.detach())))
        return loss

    def trained(**options: Any) -> dict[str, Tensor]:
        model = fresh("ViT", 0)
        lora_recover(model, data, lr=1e-2, epochs=2, loss_fn=loss_fn, progress=False, **options)
        return model.state_dict()

    last, dense = trained(), fresh("ViT", 0).state_dict()
    better = trained(validation=[(1.0, batch) for batch in data])
    assert all(torch.equal(better[key], last[key]) for key in last)
    assert len(looked) == 3 * len(data)
    looked.clear()
    worse = trained(validation=[(-1.0, data[0])], checks=4)
    assert all(torch.equal(worse[key], dense[key]) for key in dense)
    assert [mode for mode, _ in looked] == [False] * 9
    looked.clear()
    forced = trained(validation=[(-1.0, data[0])], checks=4, never_worse=False)
    assert len(looked) == 8
    model = fresh("ViT", 0)
    model.load_state_dict(forced)
    kept = -float(loss_of("ViT")(model, data[0]).detach())
    assert abs(kept - min(loss for _, loss in looked)) < 1e-12
    assert any(not torch.equal(forced[key], dense[key]) for key in dense)
    looked.clear()
    mixed = trained(validation=[(1.0, data[0])] * 2, checks=4)
    model = fresh("ViT", 0)
    model.load_state_dict(mixed)
    best = float(loss_of("ViT")(model, data[0]).detach())
    assert abs(best - min(loss for _, loss in looked)) < 1e-12


def test_a_teacher_takes_the_place_of_labels() -> None:
    teacher, model = fresh("ViT", 0), fresh("ViT", 0)
    prune_attention(model, 0.5, scorer="random")
    data = batches("ViT", 4)

    def apart() -> float:
        outputs = [[family("ViT").run(one, batch).detach() for batch in data] for one in (model, teacher)]
        return sum(float((a - b).square().mean()) for a, b in zip(*outputs, strict=True))

    before = apart()
    lora_recover(model, data, teacher=teacher, lr=1e-2, epochs=3, progress=False)
    assert apart() < before / 2


def test_half_precision() -> None:
    model = fresh("ViT", 0, torch.bfloat16)
    prune_attention(model, 0.5, scorer="magnitude")
    data = [{key: value.bfloat16() for key, value in batch.items()} for batch in batches("ViT", 2)]
    before = copy.deepcopy(model.state_dict())
    lora_recover(model, data, lr=1e-2, loss_fn=loss_of("ViT"), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["ViT", "Encoder"])
def test_a_failure_leaves_the_model_as_it_was(name: str, monkeypatch: Any) -> None:
    model = fresh(name, 0)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        lora_recover(model, batches(name, 4), loss_fn=interrupted(loss_of(name)), progress=False)
    assert same(before, snapshot(model))
    assert all(p.requires_grad for p in model.parameters())
    real = peft.tuners.lora.Linear.merge

    def midway(self: Any, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        real(self, *args, **options)
        if calls == 9:
            raise KeyboardInterrupt

    calls = 0
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", midway)
    with pytest.raises(KeyboardInterrupt):
        lora_recover(model, batches(name, 2), lr=1e-2, loss_fn=loss_of(name), progress=False)
    assert calls == 9
    assert same(before, snapshot(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("wrap", [True, False])
def test_adapters_that_are_not_unloaded_are_refused(wrap: bool, merged: bool) -> None:
    model = fresh("ViT", 0)
    plan = make_plan(model, 0.5, scorer="magnitude")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    adapted: Any = peft.LoraModel(model, config, "default") if wrap else peft.inject_adapter_in_model(config, model)
    if merged:
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.merge()
    before = snapshot(model)
    data = batches("ViT", 1)
    for call in (
        lambda: make_plan(model, 0.5),
        lambda: prune_attention(adapted, 0.5),
        lambda: apply_plan(model, plan),
        lambda: AttentionPruner(adapted, 0.5),
        lambda: calibrate(model, data),
        lambda: masked(model, plan).__enter__(),
        lambda: lora_recover(model, data),
    ):
        with pytest.raises(WrappedModelError, match="merge_and_unload"):
            call()
    assert same(before, snapshot(model))


def test_a_pruner_refuses_adapters_that_came_later() -> None:
    model = fresh("ViT", 0)
    pruner = AttentionPruner(model, 0.5, steps=2, scorer="magnitude")
    pruner.step()
    tuner = peft.LoraModel(model, peft.LoraConfig(target_modules=lora_targets(model)), "default")
    before = snapshot(model)
    with pytest.raises(WrappedModelError, match="merge_and_unload"):
        pruner.step()
    assert same(before, snapshot(model))
    assert pruner.steps_done == 1
    tuner.merge_and_unload()
    pruner.step()
    assert pruner.done
    assert pruner.plan.after == find_attention(model)


def test_packed_attention_with_adapters_is_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["self_attn"]), model)
    with pytest.raises(WrappedModelError, match="merge_and_unload"):
        make_plan(model, 0.5)


def test_adapters_beside_attention_are_no_hindrance() -> None:
    model = fresh("ViT", 0)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1"]), model)
    prune_attention(model, 0.5)


def test_what_is_refused() -> None:
    model: Any = fresh("ViT", 0)
    data, loss_fn = batches("ViT", 1), loss_of("ViT")
    before = snapshot(model)
    for options, words in (
        ({"rank": 0}, "rank"),
        ({"epochs": True}, "epochs"),
        ({"checks": 0}, "checks"),
        ({"lr": -1.0}, "lr"),
        ({"warmup": 1.5}, "warmup"),
        ({"dropout": "0"}, "dropout"),
        ({"decay": "step"}, "linear, cosine, none"),
        ({"loss_fn": loss_fn, "teacher": model}, "teacher"),
    ):
        with pytest.raises(OptionError, match=words):
            lora_recover(model, data, **options)
    for wrong in ([], data[0], 3, None):
        with pytest.raises(DataError, match="data"):
            lora_recover(model, wrong, loss_fn=loss_fn)
    with pytest.raises(DataError, match="gradient"):
        lora_recover(model, data, loss_fn=lambda model, batch: loss_fn(model, batch).detach(), progress=False)
    first, second = (model.get_submodule(spec.name) for spec in find_attention(model))
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(TiedWeightsError, match="q_proj"):
        lora_recover(model, data, loss_fn=loss_fn)
    second.q_proj.weight = nn.Parameter(first.q_proj.weight.detach().clone())
    after = snapshot(model)
    assert [one[:3] for one in before] == [one[:3] for one in after]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_prefixes_of_the_dense_dims_are_named() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    ids = torch.ones(2, 5, dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    for how in ({"heads": "ragged"}, {"scope": "local"}):
        model = transformers.LlamaForCausalLM(config)
        attnprune.prune_attention(model, 0.5, scorer="magnitude", **how)
        tuned = peft.get_peft_model(model, peft.PromptTuningConfig(**options))
        assert tuned(**given).logits.shape[:2] == (2, 8)
        tuned = peft.get_peft_model(tuned.base_model, peft.PrefixTuningConfig(**options))
        with pytest.raises(DataError, match="prefix tuning"):
            tuned(**given)
