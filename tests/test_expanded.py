"""Hosts that compute what no forward of ours does are pruned exactly all the same, and what was pruned is verified."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import (
    apply_plan,
    apply_to_checkpoint,
    find_attention,
    from_pretrained,
    make_plan,
    masked,
    prune_attention,
    prune_heads,
    save_pruned,
)
from attnprune.errors import AttnPruneError, DataError, VerificationError
from attnprune.families.registry import Survey, all_views
from attnprune.nn.expanded import Expanded

from .conformance import family, fresh, inputs
from .families import FAMILIES, randomised

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


def cohere() -> Any:
    """Norms of queries and keys that take the mean away, which no forward of ours computes; a cache."""
    config = transformers.CohereConfig(
        **SMALL,
        vocab_size=30,
        max_position_embeddings=32,
        use_qk_norm=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomised(transformers.CohereForCausalLM(config))


def t5() -> Any:
    """A table of relative biases that all layers share, and no scale."""
    config = transformers.T5Config(d_model=24, d_kv=6, num_heads=4, num_layers=2, d_ff=32, vocab_size=30)
    return randomised(transformers.T5EncoderModel(config))


def beit() -> Any:
    """Relative biases that reach the attention as a mask with a row for every dense head."""
    config = transformers.BeitConfig(**SMALL, image_size=16, patch_size=8, use_relative_position_bias=True)
    return randomised(transformers.BeitModel(config))


IDS = {"input_ids": torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(1))}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
HOSTS = {"cohere": (cohere, IDS), "t5": (t5, IDS), "beit": (beit, IMAGES)}


def output(model: nn.Module, given: Any) -> Tensor:
    found = model(**given)
    return getattr(found, "logits", None) if hasattr(found, "logits") else found.last_hidden_state  # type: ignore[return-value]


@pytest.mark.parametrize("granularity", ["channel", "head", "joint"])
@pytest.mark.parametrize("heads", ["uniform", "ragged"])
@pytest.mark.parametrize("name", HOSTS)
def test_exact(name: str, heads: str, granularity: str) -> None:
    """Law 1, also for what is pruned a second time, and after copying and pickling."""
    build, given = HOSTS[name]
    model = build()
    for seed, ratio in enumerate((0.4, 0.3)):
        now = "ragged" if seed else heads
        plan = make_plan(model, ratio, heads=now, granularity=granularity, scorer="random", seed=seed)
        with masked(model, plan):
            expected = output(model, given)
        report = apply_plan(model, plan, example_inputs=given)
        torch.testing.assert_close(output(model, given), expected, rtol=1e-10, atol=1e-10)
        assert report.verified is not None
        assert report.verified.error < 1e-12
        assert set(report.ways) == {layer.spec.name for layer in plan if not layer.empty}
        assert sum(p.numel() for p in model.parameters()) == report.model_parameters[1]
    torch.testing.assert_close(output(copy.deepcopy(model), given), output(model, given))
    torch.testing.assert_close(output(pickle.loads(pickle.dumps(model)), given), output(model, given))


def test_files_know_which_channels_are_left(tmp_path: Path) -> None:
    dense = cohere()
    model = copy.deepcopy(dense)
    plan = make_plan(model, 0.4, heads="ragged", granularity="joint", scorer="random")
    apply_plan(model, plan)
    expected = output(model, IDS)
    model.save_pretrained(tmp_path / "theirs")
    dense.save_pretrained(tmp_path / "dense")
    places = (
        save_pruned(model, tmp_path / "ours"),
        tmp_path / "theirs",
        apply_to_checkpoint(tmp_path / "dense", plan, tmp_path / "streamed"),
    )
    for place in places:
        loaded = from_pretrained(place)
        assert torch.equal(output(loaded, IDS), expected), place
        assert [spec.qk_dims for spec in find_attention(loaded)] == [spec.qk_dims for spec in plan.after]
    again = from_pretrained(places[0])
    prune_attention(again, 0.2, heads="ragged", scorer="random")
    assert torch.equal(output(from_pretrained(save_pruned(again, tmp_path / "again")), IDS), output(again, IDS))


def test_data_reach_what_runs_expanded() -> None:
    """Calibration, gates, refits and gradients hear the channels of compact projections."""
    data = [{"input_ids": torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    for options in ({}, {"scorer": "fisher"}, {"heads": "ragged", "split": "auto"}):
        model = t5()
        loss_fn = (lambda m, b: m(**b).last_hidden_state.square().mean()) if options.get("scorer") else None
        for ratio in (0.4, 0.25):
            report = prune_attention(model, ratio, data=data, progress=False, loss_fn=loss_fn, **options)  # type: ignore[arg-type]
            options = {**options, "heads": "ragged"}
            assert report.verified is not None
            assert report.verified.error < 1e-10


def test_rotary_channels_keep_their_places_under_a_rotated_basis() -> None:
    data = [{"input_ids": torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    model = cohere()
    dense = copy.deepcopy(model)
    report = prune_attention(model, 0.4, data=data, progress=False)
    assert any("qk keeps its own channels" in note for note in report.notes)
    for before, after in zip(all_views(dense), all_views(model), strict=True):
        rows = {tuple(row.tolist()) for row in before.weight("q")}
        assert {tuple(row.tolist()) for row in after.weight("q")} <= rows
    assert report.verified is not None
    assert report.verified.error < 1e-10


def test_training_goes_on_with_optimizer_and_compiler() -> None:
    model = t5()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        output(model, IDS).square().mean().backward()
        optimizer.step()
    report = prune_attention(model, 0.5, heads="ragged", scorer="magnitude", optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= held
    assert all(way.startswith("expanded") for way in report.ways.values())
    before = output(model, IDS).square().mean()
    optimizer.zero_grad()
    before.backward()
    optimizer.step()
    assert output(model, IDS).square().mean() < before
    projection = all_views(model)[0].owner("q")
    assert isinstance(projection, Expanded)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    compiled = torch.compile(projection, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), projection(x))


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        context = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Packed(attnprune.Adapter):
    """Slots by hand, nothing else."""

    def matches(self, module: nn.Module) -> bool:
        return type(module) is Mine

    def view(self, name: str, module: Any) -> Any:
        slots = {f"{p}.weight": attnprune.Slot(module.to_qkv, "weight", 32, start=32 * i) for i, p in enumerate("qkv")}
        slots["o.weight"] = attnprune.Slot(module.to_out, "weight", 32, axis=1)
        spec = attnprune.AttentionSpec.of(
            name, heads=4, head_dim=8, d_model=32, bias=(False,) * 3 + (True,), fused=True
        )
        return attnprune.AttentionView(spec, module, self, slots)


@pytest.fixture
def packed() -> Iterator[None]:
    adapter = attnprune.register_adapter(Packed())
    yield
    attnprune.unregister_adapter(adapter)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_packed_slots_by_hand(granularity: str) -> None:
    torch.manual_seed(0)
    model, x = Mine().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    for _ in range(2):
        plan = make_plan(model, 0.5, granularity=granularity, scorer="random")
        with masked(model, plan):
            expected = model(x)
        apply_plan(model, plan)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert model.to_qkv.weight.shape == (24, 32)


def test_a_patched_class_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packed weight leaves no room for compact projections, so it is refused, with what it differs by."""
    original = nn.MultiheadAttention.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        y, weights = original(self, *args, **kwargs)
        return 2 * y, weights

    monkeypatch.setattr(nn.MultiheadAttention, "forward", patched)
    with pytest.raises(AttnPruneError, match="something else"):
        make_plan(nn.MultiheadAttention(32, 4, batch_first=True), 0.5)
    monkeypatch.undo()
    assert make_plan(nn.MultiheadAttention(32, 4, batch_first=True), 0.5)


def test_named_heads_of_a_host_with_biases() -> None:
    model = beit()
    prune_heads(model, {0: [1, 2]})
    assert output(model, IMAGES).isfinite().all()
    assert [spec.heads for spec in find_attention(model)] == [2, 4]


# verify


def test_a_wrong_result_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnprune.families import expansion

    right = expansion.expand

    def wrong(owner: nn.Module, channels: Any, width: int, **options: Any) -> None:
        right(owner, list(reversed(channels)), width, **options)

    model = cohere()
    plan = make_plan(model, 0.4, heads="ragged", scorer="random")
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    monkeypatch.setattr(expansion, "expand", wrong)
    with pytest.raises(VerificationError, match="differ by"):
        apply_plan(model, plan, example_inputs=IDS)
    assert kinds == [type(module) for module in model.modules()]
    for name, parameter in model.named_parameters():
        assert before[name][0] == id(parameter)
        assert torch.equal(before[name][1], parameter)
    apply_plan(model, plan, example_inputs=IDS, verify=False)  # as asked


def test_verify_takes_three_passes_at_most() -> None:
    counts = []
    for verify in (False, True):
        model, calls = fresh("ViT", 0), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        given = {key: value.detach() for key, value in inputs("ViT", 0).items()}
        report = prune_attention(model, 0.5, example_inputs=given, verify=verify)
        counts.append(len(calls))
        assert (report.verified is not None) == verify
    assert counts[1] - counts[0] <= 3


class Steep(nn.Module):
    """Makes of differences in the last digit some in the ninth; may round to float32, as norms of transformers do."""

    def __init__(self, rounds: bool) -> None:
        super().__init__()
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        steep = x + 0.1 * (x * 1e8).sin()
        return steep + (x.float().double() - x) if self.rounds else steep


@pytest.mark.parametrize("rounds", [True, False])
def test_verify_knows_of_hosts_that_round_in_float64(rounds: bool) -> None:
    attention = randomised(nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True))
    model, x = nn.Sequential(attention, Steep(rounds)), torch.randn(3, 9, 24, dtype=torch.float64)

    def pruned() -> attnprune.Report:
        return prune_attention(
            model, {"qk": 0.5, "vo": 0.25}, heads="ragged", scorer="random", example_inputs=x, verify=True
        )

    if rounds:
        verified = pruned().verified
        assert verified is not None
        assert 1e-10 < verified.error < 1e-6
        return
    with pytest.raises(VerificationError):
        pruned()


@pytest.mark.parametrize("apart", [False, True])
def test_verify_looks_at_outputs_and_not_at_a_loss(apart: bool) -> None:
    """A loss of outputs that agree is nothing but rounding."""
    attention = randomised(nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True))
    model, x = nn.Sequential(attention, nn.Linear(24, 24)).double(), torch.randn(3, 9, 24, dtype=torch.float64)
    plan, other = make_plan(model, 0.5), copy.deepcopy(model)
    apply_plan(other, plan)

    def loss(model: Any, batch: Tensor) -> Tensor:
        """With the model as a whole, or part by part."""
        return ((model[1](model[0](batch)) if apart else model(batch)) - other(batch)).detach().square().mean()

    verified = prune_attention(model, 0.5, scorer="magnitude", data=[x], loss_fn=loss, verify=True).verified
    assert verified is not None
    assert verified.error < 1e-12
    assert float(loss(model, x)) < 1e-20


def test_verify_names_a_pruned_model_that_does_not_run() -> None:
    """One that makes masks for all heads that there were."""

    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = x.new_zeros(4 * len(x), x.shape[1], x.shape[1])
            return self.attention(x, x, x, attn_mask=mask, average_attn_weights=False)[1].reshape(len(x), 4, -1)  # type: ignore[no-any-return]

    model = Masking().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(VerificationError, match="the pruned model to run"):
        prune_attention(model, 0.5, granularity="head", scorer="random", example_inputs=torch.randn(2, 5, 24))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_verify_says_what_it_saw() -> None:
    model = fresh("ViT", 0, torch.float32)
    data = [{key: value.detach() for key, value in inputs("ViT", 0, dtype=torch.float32).items()}]
    report = prune_attention(model, 0.5, data=data, progress=False)
    assert report.verified is not None
    assert report.verified.samples == 2
    assert f"verified: {report.verified.error:.0e} over 2 samples" in str(report)
    assert report.to_dict()["verified"]["samples"] == 2
    with pytest.raises(DataError, match="inputs to run"):
        prune_attention(fresh("ViT", 0), 0.5, verify=True)


def test_verify_uses_up_no_data_and_no_random_numbers() -> None:
    batches = [{key: value.detach() for key, value in inputs("ViT", 0, seed).items()} for seed in range(3)]
    plans, dense = set(), fresh("ViT", 0)
    for data in (batches, iter(batches), (batch for batch in batches)):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        plans.add(make_plan(copy.deepcopy(dense), 0.5, data=data, progress=False).to_json())
        assert torch.equal(state, torch.get_rng_state())
    assert len(plans) == 1


# the laws, as a function

CHECKED = ("Transformer", "MHA", "Seq2Seq", "cohere", "t5")
"""Of the others ``make test-all``: their laws are tested one by one."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CHECKED else pytest.mark.long)
        for name in dict.fromkeys((*FAMILIES, *CHECKED))
    ],
)
def test_check_family(name: str) -> None:
    if name in HOSTS:
        build, given = HOSTS[name]
        checked = attnprune.testing.check_family(build(), given, plans=3)
        assert "expanded" in checked.ways
        return
    model = fresh(name, 0)
    given = {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs(name, 0).items()}

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **given: Any) -> Tensor:
            return family(name).run(self.model, given)

    checked = attnprune.testing.check_family(Run(), given, plans=2)
    assert checked.error < 1e-10
    assert len(checked.attention) == len(Survey(model).views)


def test_check_family_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnprune.nn import Decoupled

    monkeypatch.setattr(Decoupled, "head_rows", lambda self, mask, bucket: mask * 0.5)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    mask = torch.randn(5, 5, dtype=torch.float64)
    monkeypatch.setattr("attnprune.families.proof.verdict._KNOWN", {})
    with pytest.raises((AssertionError, AttnPruneError)):
        attnprune.testing.check_family(model, (torch.randn(2, 5, 16, dtype=torch.float64), mask), plans=2)
