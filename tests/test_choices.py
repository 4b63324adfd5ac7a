"""``include`` and ``exclude``: patterns of names, classes, functions of name and module."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import AttentionPruner, calibrate, find_attention, make_plan, prune_attention, score_attention
from attnprune.errors import AttnPruneError, NoAttentionError, OptionError
from attnprune.values.request import Request

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}


class Linearised(nn.Module):
    """Looks like attention and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.o_proj(torch.sigmoid(self.q_proj(x) @ self.k_proj(x).mT) @ self.v_proj(x))
        return found


class Mixed(nn.Module):
    """BERT's two-module attention, torch's, and one that cannot be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.bert: Any = transformers.BertModel(
            transformers.BertConfig(vocab_size=50, **SIZES), add_pooling_layer=False
        )
        self.top = nn.TransformerEncoderLayer(32, 4, 16, batch_first=True)
        self.odd = Linearised()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.odd(self.top(self.bert(ids).last_hidden_state))
        return found


BERT = ("bert.encoder.layer.0.attention", "bert.encoder.layer.1.attention")
TOP = "top.self_attn"
IDS = torch.randint(0, 50, (2, 5))


def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def bert_class() -> type:
    kind: type = type(model().bert.encoder.layer[0].attention)
    return kind


def inner_class() -> type:
    kind: type = type(model().bert.encoder.layer[0].attention.self)
    return kind


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "include a class": ({"include": nn.MultiheadAttention}, (TOP,)),
    "exclude a class": ({"exclude": nn.MultiheadAttention}, BERT),
    "include the class of the whole": ({"include": bert_class()}, BERT),
    "include the class that splits heads": ({"include": inner_class()}, BERT),
    "a class of all": ({"include": nn.Module}, (*BERT, TOP)),
    "a function": ({"include": lambda name, module: name.endswith("0.attention")}, BERT[:1]),
    "a function of the module": (
        {"exclude": lambda name, module: getattr(module, "batch_first", False)},
        BERT,
    ),
    "a list": ({"include": [nn.MultiheadAttention, "*.0.*"]}, (BERT[0], TOP)),
    "both": ({"include": (bert_class(), nn.MultiheadAttention), "exclude": lambda name, _: ".1." in name},
             (BERT[0], TOP)),
    "a class that is not there": ({"exclude": nn.Conv2d}, (*BERT, TOP)),
    "a pattern": ({"include": "bert.*"}, BERT),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attention that is not pruned")
@pytest.mark.parametrize("name", CASES)
def test_every_verb_means_the_same(name: str) -> None:
    options, expected = CASES[name]
    given = model()
    assert tuple(spec.name for spec in find_attention(given, **options)) == expected
    assert tuple(layer.spec.name for layer in make_plan(given, 0.5, **options)) == expected
    assert tuple(score_attention(given, scorer="magnitude", **options)) == expected
    report = prune_attention(given, 0.5, **options)
    assert tuple(layer.spec.name for layer in report.layers) == expected
    assert tuple(spec.name for spec in find_attention(given, **options)) == expected  # pruned ones are still of a class


@pytest.mark.filterwarnings("ignore:Attention that is not pruned")
def test_verbs_with_data_mean_the_same() -> None:
    given = model()
    found = calibrate(given, [IDS], include=nn.MultiheadAttention, progress=False)
    assert {key.split("/")[0] for key in found.state_dict() if key.startswith(("top", "bert"))} == {TOP}
    pruner = AttentionPruner(given, 0.5, steps=2, scorer="magnitude", exclude=bert_class())
    for _ in range(2):
        pruner.step()
    assert [layer.spec.name for layer in pruner.plan] == [TOP]
    assert attnprune.pack_qkv(given, include=lambda name, module: name == TOP) == (TOP,)


@pytest.mark.parametrize("exclude", [Linearised, "odd", lambda name, module: isinstance(module, Linearised)])
def test_what_cannot_be_pruned_is_excluded_without_a_warning(exclude: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune_attention(model(), 0.5, exclude=exclude, strict=True)
        assert report.skipped == ()
        make_plan(model(), 0.5, include=[nn.MultiheadAttention, bert_class()], strict=True)
    with pytest.raises(NoAttentionError, match="odd"):
        prune_attention(model(), 0.5, include=lambda name, module: True, strict=True)


@pytest.mark.filterwarnings("ignore:Attention that is not pruned")
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_what_is_none_of_these_is_an_error(option: str) -> None:
    for odd in (3, [3], {"a": 1}, [nn.MultiheadAttention, None], "nothing.*"):
        with pytest.raises(OptionError, match=option):
            make_plan(model(), 0.5, **{option: odd})
        with pytest.raises(AttnPruneError, match=option):
            find_attention(model(), **{option: odd})
    with pytest.raises(ZeroDivisionError):  # an error of the function itself
        make_plan(model(), 0.5, **{option: lambda name, module: 1 / 0})
    with pytest.raises(NoAttentionError, match="include and exclude"):
        make_plan(model(), 0.5, include=nn.Conv2d)


def test_a_request_holds_them() -> None:
    request = Request.parse(0.5, include=nn.MultiheadAttention, exclude=["a", len])
    assert (request.include, request.exclude) == ((nn.MultiheadAttention,), ("a", len))
