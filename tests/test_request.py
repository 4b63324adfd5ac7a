"""A request: parsed once, all of its faults reported together, the same by whichever face it is asked."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attnprune
from attnprune import AttentionPruner, Method, Options, Plan, Request, Rules, make_plan, prune_attention
from attnprune.errors import AttnPruneError, DataError, OptionError, RatioError, ScorerError
from attnprune.planning.scorers import NAMED, Magnitude
from attnprune.values.amount import TARGETS, MaxError
from attnprune.values.budget import Budget
from attnprune.values.method import SCORERS
from attnprune.values.options import PrunerOptions, ScoreOptions
from attnprune.values.presets import PRESETS
from attnprune.values.ratios import Ratios
from attnprune.values.request import OPTION_NAMES, Evidence


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 16, 0.0, batch_first=True), 2)


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 32, generator=generator) for _ in range(2)]


def square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(x).square().mean()
    return found


# one fault, and several

WRONG: dict[str, tuple[dict[str, Any], type[AttnPruneError], str]] = {
    "qkvo_ratios": ({"qkvo_ratios": 1.5}, RatioError, "qkvo_ratios[all]"),
    "granularity": ({"granularity": "layer"}, OptionError, "granularity"),
    "heads": ({"heads": 4}, OptionError, "heads"),
    "round_to": ({"round_to": 0}, OptionError, "round_to"),
    "min_heads": ({"min_heads": True}, OptionError, "min_heads"),
    "match_dims": ({"match_dims": 1}, OptionError, "match_dims"),
    "basis": ({"basis": "eigen"}, OptionError, "basis"),
    "scorer": ({"scorer": "l2"}, ScorerError, "scorer"),
    "seed": ({"seed": 0.5}, OptionError, "seed"),
    "calibration": ({"calibration": {}}, OptionError, "calibration"),
    "latency": ({"latency": 3}, OptionError, "latency"),
    "loss_fn": ({"loss_fn": "mse"}, OptionError, "loss_fn"),
    "include": ({"include": 0}, OptionError, "include"),
    "measure": ({"measure": True}, OptionError, "measure"),
    "verify": ({"verify": "yes"}, OptionError, "verify"),
    "strict": ({"strict": 1}, OptionError, "strict"),
    "preset": ({"preset": "quick"}, OptionError, "preset"),
    "unknown": ({"granularty": "head"}, OptionError, "options"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_fault_is_raised_as_itself(name: str) -> None:
    options, kind, where = WRONG[name]
    for call in (Request.parse, lambda *args, **given: prune_attention(model(), *args, **given)):
        with pytest.raises(AttnPruneError) as caught:
            call(**{"qkvo_ratios": 0.5, **options})
        assert type(caught.value) is kind
        assert caught.value.where == where
        assert not getattr(caught.value, "faults", ())


@given(st.sets(st.sampled_from(sorted(WRONG)), min_size=2))
def test_several_faults_are_one_error_that_lists_each(names: set[str]) -> None:
    options: dict[str, Any] = {"qkvo_ratios": 0.5}
    alone = []
    for name in names:
        options |= WRONG[name][0]
        with pytest.raises(AttnPruneError) as one:
            Request.parse(**{"qkvo_ratios": 0.5, **WRONG[name][0]})
        alone.append(one.value)
    with pytest.raises(OptionError) as caught:
        Request.parse(**options)
    error = caught.value
    assert {(type(one), str(one)) for one in error.faults} == {(type(one), str(one)) for one in alone}
    for one in alone:
        assert all(part in error.found for part in (one.where, one.expected, one.found))
    assert str(error).count("\n") == 0


def test_faults_between_options_are_listed_too() -> None:
    with pytest.raises(OptionError) as caught:
        Request.parse(None, target_macs=0.5, compensate=True, sequential=True, measure=True, scope="x")
    assert [one.where for one in caught.value.faults] == [
        "scope", "target_macs", "measure", "compensate=True", "sequential=True",
    ]  # fmt: skip
    with pytest.raises(OptionError) as caught:
        Request.parse({"q": 1.5, "x": 0.1, "k": -1}, min_heads=0)
    assert [one.where for one in caught.value.faults] == [
        "min_heads", "qkvo_ratios[q]", "qkvo_ratios", "qkvo_ratios[k]",
    ]  # fmt: skip
    with pytest.raises(OptionError) as caught:
        Request.parse(0.5, stock=True, heads="ragged", split="auto")
    assert [one.where for one in caught.value.faults] == ["stock=True with heads", "stock=True with split"]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"qkvo_ratios": None}, "qkvo_ratios"),
        ({"target_params": 0.5}, "target_params"),
        ({"qkvo_ratios": None, "target_latency": 0.5}, "target_latency"),
        ({"qkvo_ratios": None, "target_latency": 0.5, "example_inputs": 0, "heads": "ragged"}, "target_latency"),
        ({"qkvo_ratios": None, "target_error": 0.1, "granularity": "joint"}, "target_error"),
        ({"qkvo_ratios": None, "target_params": 0.5, "stock": True}, "stock=True with qkvo_ratios"),
        ({"qkvo_ratios": {"qk": 0.5}, "stock": True}, "stock=True with qkvo_ratios"),
        ({"qkvo_ratios": {"q": 0.5}, "stock": True}, "stock=True with qkvo_ratios"),
        ({"rules": 3}, "rules"),
        ({"method": {"basiss": "rotated"}}, "method"),
    ],
)
def test_contradictions_are_one_fault_each(options: dict[str, Any], where: str) -> None:
    with pytest.raises(OptionError) as caught:
        Request.parse(**{"qkvo_ratios": 0.5, **options})
    assert caught.value.where == where
    assert not caught.value.faults


def test_unknown_names_get_the_nearest() -> None:
    for name, near in (("granularty", "granularity"), ("roundto", "round_to"), ("target_mac", "target_macs")):
        with pytest.raises(OptionError, match=rf"{name}.*Write {near}\.$"):
            Request.parse(0.5, **{name: 1})
    with pytest.raises(OptionError, match="It takes basis, calibration"):
        Request.parse(0.5, zzz=1)


# what options mean


def test_a_request_is_a_value() -> None:
    one = Request.parse(0.5, data=data(), scope="local", include="*.0.*", round_to="auto")
    assert one == Request.parse([0.5] * 4, data=data(), scope="local", include=["*.0.*"], round_to="auto")
    assert hash(one) == hash(replace(one, evidence=Evidence()))
    assert one != Request.parse(0.5, data=data(), include="*.0.*", round_to="auto")
    with pytest.raises(FrozenInstanceError):
        one.strict = True  # type: ignore[misc]
    assert "evidence" not in repr(one)
    assert isinstance(Request.parse(target_error=0.1).amount, MaxError)
    budget = Request.parse(target_params=0.5)
    assert (budget.amount, budget.rules.split) == (Budget("params", 0.5), "auto")
    assert Request.parse(None, target_latency=0.5, example_inputs=0).timed
    assert not Request.parse(None, target_latency=0.5, example_inputs=0, measure=False).timed


RULES = {
    "granularity": st.sampled_from(["head", "channel", "joint"]),
    "scope": st.sampled_from(["local", "global"]),
    "heads": st.sampled_from(["uniform", "ragged"]),
    "split": st.sampled_from(["fixed", "auto"]),
    "round_to": st.sampled_from([1, 4, "auto"]),
    "min_heads": st.integers(1, 3),
    "match_dims": st.booleans(),
}
METHODS = {
    "scorer": st.sampled_from(["auto", *SCORERS]),
    "basis": st.sampled_from(["auto", "channels", "rotated"]),
    "compensate": st.sampled_from(["auto", True, False]),
    "seed": st.integers(0, 9),
}


@given(st.fixed_dictionaries({}, optional=RULES), st.fixed_dictionaries({}, optional=METHODS))
def test_flat_options_rules_and_mappings_say_the_same(rules: dict[str, Any], method: dict[str, Any]) -> None:
    flat = Request.parse(0.5, data=[], **rules, **method)
    assert flat == Request.parse(0.5, data=[], rules=Rules(**rules), method=Method(**method))
    assert flat == Request.parse(0.5, data=[], rules=rules, method=method)
    assert flat == Request.parse(0.5, data=[], rules=rules, **{**method, **rules})  # said twice, but alike


@given(
    scorer=st.sampled_from(["auto", *SCORERS, Magnitude()]),
    basis=METHODS["basis"],
    compensate=METHODS["compensate"],
    granularity=RULES["granularity"],
    has_data=st.booleans(),
)
def test_a_scorer_that_is_named_keeps_channels_as_they_stand(
    scorer: Any, basis: Any, compensate: Any, granularity: Any, has_data: bool
) -> None:
    evidence = Evidence([]) if has_data else Evidence()
    method = Method(scorer, basis, compensate)
    decided = Request(Ratios(), Rules(granularity), method, evidence).decided
    named = scorer != "auto"
    assert decided.rotated == (
        basis == "rotated" or (basis == "auto" and not named and has_data and granularity != "head")
    )
    assert decided.refits == (compensate is True or (compensate == "auto" and not named and has_data))
    assert replace(decided, basis=basis, compensate=compensate) == method


@pytest.mark.parametrize("scorer", ["magnitude", "taylor", "fisher", "gate", "random"])
def test_plans_of_a_named_scorer_have_no_maps(scorer: str) -> None:
    options: Any = {"data": data(), "loss_fn": square, "scorer": scorer, "progress": False}
    plan = make_plan(model(), 0.5, **options)
    assert plan.asked is not None
    assert (plan.asked.basis, plan.asked.compensate) == ("channels", "no")
    assert all(layer.fold is None for layer in plan)
    assert plan == make_plan(model(), 0.5, basis="channels", compensate=False, **options)
    rotated = make_plan(model(), 0.5, basis="rotated", **options)
    assert all(layer.fold is not None for layer in rotated)


def test_what_contradicts_a_value_is_a_fault() -> None:
    with pytest.raises(OptionError, match=r"scope: expected one value, found 'global', and 'local' in rules="):
        Request.parse(0.5, rules=Rules(scope="local"), scope="global")
    with pytest.raises(OptionError) as caught:
        Request.parse(0.5, rules={"heads": "uniform"}, heads="ragged", method=Method("fisher"), scorer="taylor")
    assert [one.where for one in caught.value.faults] == ["heads", "scorer"]
    assert Request.parse(0.5, rules=Rules(scope="local"), heads="ragged").rules == Rules(scope="local", heads="ragged")


# presets


def test_presets() -> None:
    with_data = Request.parse(0.5, preset="accurate", data=data()).rules
    assert (with_data.split, with_data.heads) == ("auto", "ragged")
    assert Request.parse(0.5, preset="accurate") == Request.parse(0.5)
    assert Request.parse(target_latency=0.5, preset="accurate", data=[], example_inputs=0).rules.heads == "uniform"
    assert Request.parse(0.5, preset="accurate", data=[], stock=True).rules == Rules(stock=True)
    assert Request.parse(0.5, preset="fast").rules == Rules(round_to="auto", match_dims=True)
    assert Request.parse({"qk": 0.5}, preset="fast").rules == Rules(round_to="auto")
    assert Request.parse({"qk": 0.5}, preset="fast", split="auto").rules.match_dims
    assert Request.parse(0.5, preset="stock") == Request.parse(0.5, stock=True)
    with pytest.raises(OptionError, match=r"accurate, fast, stock, paper:PH-G-FI.*'quick'"):
        Request.parse(0.5, preset="quick")


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("paper:")])
def test_the_papers_eight_ways(name: str) -> None:
    scheme, threshold, score = name.removeprefix("paper:").split("-")
    request = Request.parse(0.5, preset=name, data=data(), loss_fn=square, progress=False)
    assert request.rules == Rules(
        {"PH": "channel", "EH": "head"}[scheme],  # type: ignore[arg-type]
        {"G": "global", "L": "local"}[threshold],  # type: ignore[arg-type]
        rounding="down" if (scheme, threshold) == ("PH", "G") else "up",
    )
    assert request.method == Method({"FI": "fisher", "MAG": "magnitude-l1"}[score], "channels", False)
    plan = make_plan(model(), 0.5, preset=name, data=data(), loss_fn=square, progress=False)
    scorer: Any = Magnitude(p=1) if score == "MAG" else "fisher"
    assert plan == make_plan(
        model(), 0.5, granularity=request.rules.granularity, scope=request.rules.scope, scorer=scorer, data=data(),
        loss_fn=square, basis="channels", compensate=False, rounding=request.rules.rounding, progress=False,
    )  # fmt: skip
    assert Plan.from_json(plan.to_json()) == plan


def test_an_option_beside_a_preset_goes_before() -> None:
    paper: Any = {"preset": "paper:PH-G-FI", "data": []}
    assert Request.parse(0.5, scope="local", **paper).rules.scope == "local"
    assert Request.parse(0.5, rules={"scope": "local"}, **paper).rules.scope == "local"
    assert Request.parse(0.5, basis="rotated", **paper).decided.rotated
    assert Request.parse(0.5, preset="accurate", data=[], heads="uniform").rules == Rules(split="auto")


# names agree


def test_typed_keys_are_what_parse_takes() -> None:
    assert Options.__optional_keys__ == OPTION_NAMES
    assert PrunerOptions.__optional_keys__ == OPTION_NAMES - {"target_error", "calibration", "measure"}
    assert ScoreOptions.__optional_keys__ == {
        "basis",
        "split",
        "calibration",
        "loss_fn",
        "output_fn",
        "seed",
        "progress",
    }
    assert {one.name for one in (*fields(Rules), *fields(Method))} | set(TARGETS) < OPTION_NAMES
    assert tuple(NAMED) == SCORERS
    source = inspect.getsource(inspect.getmodule(Options))  # type: ignore[arg-type]
    for key in OPTION_NAMES:
        assert f"    {key}: " in source
        assert source.partition(f"    {key}: ")[2].splitlines()[1].startswith('    """'), f"{key} is not described"


def test_faces_take_what_parse_takes() -> None:
    def names(call: Any) -> set[str]:
        return set(inspect.signature(call).parameters)

    parsed = names(Request.parse)
    assert names(make_plan) == parsed | {"model"}
    assert names(prune_attention) == parsed | {"model", "optimizer", "averages"}
    assert names(AttentionPruner) == parsed | {"model", "schedule", "steps"}
    assert names(attnprune.apply_plan) == {
        "model", "plan", "example_inputs", "optimizer", "averages", "measure", "verify", "data", "recover",
    }  # fmt: skip


# faces


def test_a_pruner_reports_all_faults_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        AttentionPruner(model(), 1.5, schedule="slow", scop="local", heads="x", target_error=0.1)  # type: ignore
    assert [one.where for one in caught.value.faults] == [
        "schedule", "AttentionPruner", "AttentionPruner", "heads", "qkvo_ratios[all]",
    ]  # fmt: skip
    pruner = AttentionPruner(model(), 0.5, steps=2, preset="paper:PH-L-MAG", rules={"min_channels": 2})
    assert pruner.request == Request.parse(0.5, preset="paper:PH-L-MAG", min_channels=2)
    while not pruner.done:
        pruner.step()
    assert pruner.plan.asked is not None
    assert pruner.plan.asked.scorer == "magnitude-l1"
    with pytest.raises(DataError, match="observe"):
        AttentionPruner(model(), 0.5, preset="paper:PH-L-FI").step()


def test_score_attention_takes_what_scores_depend_on() -> None:
    with pytest.raises(OptionError) as caught:
        attnprune.score_attention(model(), "l2", granularity="head", basis="eigen")  # type: ignore
    assert [one.where for one in caught.value.faults] == ["score_attention", "basis", "scorer"]
    found = attnprune.score_attention(model(), "fisher", data=data(), loss_fn=square, progress=False)
    expected = make_plan(model(), 0.5, scorer="fisher", data=data(), loss_fn=square, progress=False)
    plan = attnprune.allocate(expected.specs, found, Ratios.parse(0.5))
    assert plan.layers == expected.layers


def test_rules_without_a_model_round_by_numbers() -> None:
    specs = attnprune.find_attention(model())
    scores = attnprune.score_attention(model(), "magnitude")
    with pytest.raises(OptionError, match="round_to"):
        attnprune.allocate(specs, scores, Ratios.parse(0.5), Rules(round_to="auto"))
    alike = attnprune.allocate(specs, scores, Ratios.parse(0.5), Rules(stock=True))
    assert alike == attnprune.allocate(specs, scores, Ratios.parse(0.5), Rules(scope="local", match_dims=True))


def test_prune_attention_takes_optimizer_and_averages_along() -> None:
    pruned = model()
    average = torch.optim.swa_utils.AveragedModel(pruned)
    optimizer = torch.optim.Adam(pruned.parameters())
    square(pruned, data()[0]).backward()
    optimizer.step()
    prune_attention(pruned, 0.5, optimizer=optimizer, averages=[average], verify=False, strict=True)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in pruned.parameters()}
    assert [one.shape for one in average.module.parameters()] == [one.shape for one in pruned.parameters()]
    with pytest.raises(OptionError, match="verify"):
        attnprune.apply_plan(pruned, Plan(()), verify="no")  # type: ignore[arg-type]


def test_a_plan_keeps_what_was_asked() -> None:
    request = Request.parse(target_error=0.1, data=[], heads="ragged")
    plan = make_plan(model(), target_error=0.1, data=data(), heads="ragged", progress=False)
    assert plan.asked is not None
    asked = replace(request, rules=replace(request.rules, scope="local", split="auto"))
    assert plan.asked == asked.asked("energy", plan.asked.ratios)
    assert plan.asked.to_dict()["target_error"] == 0.1


def test_the_command_line_is_a_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).eval().save_pretrained(tmp_path / "dense")
    words = ["plan", str(tmp_path / "dense")]
    given_ = ["--qkvo", ".5", "--preset", "paper:EH-L-MAG", "--scope", "global", "-o", str(tmp_path / "plan.json")]
    assert attnprune.cli.main([*words, *given_]) == 0
    dense = attnprune.from_pretrained(tmp_path / "dense")
    expected = make_plan(dense, 0.5, preset="paper:EH-L-MAG", scope="global")
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == expected
    capsys.readouterr()
    wrong = ["--qkvo", "1.5", "--compensate", "yes", "--sequential"]
    assert attnprune.cli.main([*words, *wrong]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert all(word in err for word in ("found 3: (1) qkvo_ratios", "(2) compensate=True", "(3) sequential=True"))
