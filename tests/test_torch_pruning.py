"""attnprune and Torch-Pruning on one model, in either order, against models that were sliced by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch_pruning as tp
import transformers
from torch import Tensor, nn

import attnprune
from attnprune import apply_plan, find_attention, load_skeleton, make_plan, masked
from attnprune.errors import CheckpointError, NoAttentionError, NotExpressibleError, TiedWeightsError
from attnprune.families.registry import all_views
from attnprune.integrations.torch_pruning import pruner_options
from attnprune.nn.projection import side_by_side

from .families import normal, randomised, timm_module
from .test_read import Reads

Model = Any
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}


class Case(NamedTuple):
    """A model, its inputs, and where its width and its MLP's lie."""

    build: Callable[[], Model]
    inputs: Callable[[], dict[str, Any]]
    width: dict[str, str]
    """By axis, a pattern for names of parameters that have the model's width there."""
    inner: str
    """A pattern for the weight that writes the MLP's hidden units."""
    outer: str
    """The weight that reads them, in the block that the first group of the pattern names."""
    last: Sequence[str] = ()
    """Layers whose outputs stay."""

    def model(self) -> Model:
        torch.manual_seed(0)
        return randomised(self.build())

    def options(self, model: Model, **more: Any) -> dict[str, Any]:
        return pruner_options(model, ignored_layers=[model.get_submodule(name) for name in self.last], **more)


def pixels() -> dict[str, Any]:
    return {"pixel_values": normal(torch.Generator().manual_seed(1), 2, 3, 16, 16)}


def words() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))}


def vit() -> Model:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


def bert() -> Model:
    config = transformers.BertConfig(**SMALL, vocab_size=40, max_position_embeddings=9)
    return transformers.BertForSequenceClassification(config)


def llama() -> Model:
    config = transformers.LlamaConfig(**SMALL, vocab_size=40, num_key_value_heads=2, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def timm_vit(**options: Any) -> Model:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm_module("timm.models").VisionTransformer(**sizes, mlp_ratio=1.5, **options)


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(24, 4, 36, batch_first=True)
    return nn.Sequential(nn.Linear(8, 24), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


NORM = r"(layer)?norm\w*\.(weight|bias)$"
TIMM = Case(
    timm_vit,
    lambda: {"x": pixels()["pixel_values"]},
    {
        "0": r"norm\d?\.|patch_embed\.proj\.|(attn\.proj|mlp\.fc2)\.(weight|bias)$",
        "1": r"(qkv|fc1|head)\.weight$",
        "-1": r"cls_token|pos_embed",
    },
    r"(blocks\.\d+\.mlp)\.fc1\.weight$",
    "{}.fc2.weight",
    ("head",),
)
CASES = {
    "vit": Case(
        vit,
        pixels,
        {
            "0": r"layernorm\w*\.|projection\.|(o_proj|fc2)\.(weight|bias)$",
            "1": r"(q_proj|k_proj|v_proj|fc1|classifier)\.weight$",
            "-1": r"cls_token|position_embeddings",
        },
        r"(.*\.mlp)\.fc1\.weight$",
        "{}.fc2.weight",
        ("classifier",),
    ),
    "bert": Case(
        bert,
        words,
        {
            "0": r"LayerNorm\.|output\.dense\.(weight|bias)$",
            "1": r"(query|key|value|intermediate\.dense|pooler\.dense)\.weight$|_embeddings\.weight$",
        },
        r"(.*layer\.\d+)\.intermediate\.dense\.weight$",
        "{}.output.dense.weight",
        ("bert.pooler", "classifier"),
    ),
    "llama": Case(
        llama,
        words,
        {
            "0": r"norm\.weight$|(o_proj|down_proj)\.weight$",
            "1": r"(q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head|embed_tokens)\.weight$",
        },
        r"(.*\.mlp)\.(gate|up)_proj\.weight$",
        "{}.down_proj.weight",
        ("lm_head",),
    ),
    "timm": TIMM,
    "timm, expanded": TIMM._replace(
        build=lambda: timm_vit(qk_norm=True),
        width={**TIMM.width, "0": r"(?<![qk]_)norm\d?\.|patch_embed\.proj\.|(attn\.proj|mlp\.fc2)\.(weight|bias)$"},
    ),
}
PLANS: dict[str, dict[str, Any]] = {
    "channels": {"qkvo_ratios": 0.5},
    "heads": {"qkvo_ratios": 0.5, "granularity": "head", "scope": "local"},
    "ragged": {"qkvo_ratios": 0.5, "heads": "ragged"},
    "qk unlike vo": {"qkvo_ratios": {"qk": 0.5, "vo": 0.2}},
    "rotated and compensated": {"qkvo_ratios": 0.5, "data": True},
    "ragged, rotated and compensated": {"qkvo_ratios": 0.5, "heads": "ragged", "split": "auto", "data": True},
}


def planned(model: Model, case: Case, how: str) -> attnprune.Plan:
    options = dict(PLANS[how])
    if options.pop("data", False):
        options.update(data=[case.inputs()], progress=False, seed=0)
    return make_plan(model, **options)


def pruned(model: Model, case: Case, ratio: float = 0.25, **options: Any) -> Model:
    """By Torch-Pruning, in place."""
    importance = tp.importance.GroupMagnitudeImportance()
    more = case.options(model, **options)
    tp.pruner.BasePruner(model, case.inputs(), importance, pruning_ratio=ratio, **more).step()
    return model


def places(left: Tensor, all_: Tensor) -> Tensor:
    """Which rows of a tensor are left."""
    same = (all_.flatten(1)[None] == left.flatten(1)[:, None]).all(-1)
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1)


def sliced(dense: Model, left: Model, case: Case) -> Model:
    """The dense model, its width cut by hand as in what is left, the outputs of units that went at zero."""
    model = copy.deepcopy(dense)
    before, after = (dict(one.named_parameters()) for one in (dense, left))
    norm = next(name for name in before if re.search(r"(?i)norm\w*\.weight$", name) and name in after)
    width = places(after[norm][:, None], before[norm][:, None])
    for name, parameter in list(model.named_parameters()):
        for axis, pattern in case.width.items():
            if re.search(pattern, name):
                owner, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(owner, key, nn.Parameter(parameter.detach().index_select(int(axis), width)))
                if isinstance(owner, nn.LayerNorm):
                    owner.normalized_shape = (len(width),)
                if isinstance(owner, nn.Linear):
                    owner.out_features, owner.in_features = owner.weight.shape
    for name in before:
        block = re.match(case.inner, name)
        if block:
            kept = places(after[name], before[name][:, width])
            outer = model.get_parameter(case.outer.format(block[1])).data
            gone = [unit for unit in range(outer.shape[1]) if unit not in set(kept.tolist())]
            outer[:, gone] = 0
    return model


@torch.no_grad()
def output(model: Model, case: Case) -> Tensor:
    found = model.eval()(**case.inputs())
    return found if isinstance(found, Tensor) else found.logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_ours_then_theirs(name: str, how: str) -> None:
    case = CASES[name]
    model, dense = case.model(), case.model()
    plan = planned(model, case, how)
    apply_plan(model, plan)
    dims = [(spec.qk_dims, spec.vo_dims) for spec in find_attention(model)]
    pruned(model, case)
    with masked(dense, plan):
        oracle = sliced(dense, model, case)
    close(output(model, case), output(oracle, case))
    specs = find_attention(model)
    assert [(spec.qk_dims, spec.vo_dims) for spec in specs] == dims
    assert {(spec.d_model, spec.q_in, spec.k_in, spec.v_in) for spec in specs} == {(18, 18, 18, 18)}


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_theirs_then_ours(name: str, how: str) -> None:
    case = CASES[name]
    dense = case.model()
    model = pruned(case.model(), case)
    oracle = sliced(dense, model, case)
    close(output(model, case), output(oracle, case))
    plan = planned(model, case, how)
    report = apply_plan(model, plan, example_inputs=case.inputs())
    with masked(oracle, plan):
        close(output(model, case), output(oracle, case))
    assert report.verified is not None
    assert report.model_parameters[1] == sum(p.numel() for p in model.parameters())


class Reference(nn.Module):
    """What nn.MultiheadAttention computes of one sequence in eval mode, from weights of any width."""

    def __init__(self, dense: Any, width: Tensor) -> None:
        super().__init__()
        self.heads, self.batch_first = dense.num_heads, True
        self.weights = [weight[:, width] for weight in dense.in_proj_weight.detach().chunk(3)]
        self.biases = dense.in_proj_bias.detach().chunk(3)
        self.o = dense.out_proj.weight.detach()[width], dense.out_proj.bias.detach()[width]

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        both = zip(self.weights, self.biases, strict=True)
        q, k, v = ((x @ w.T + b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w, b in both)
        heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return heads.transpose(1, 2).flatten(2) @ self.o[0].T + self.o[1], None


ENCODER = Case(
    encoder,
    lambda: {"input": normal(torch.Generator().manual_seed(1), 2, 5, 8)},
    {"0": r"norm\d\.|^0\.|linear2\.(weight|bias)$", "1": r"linear1\.weight$"},
    r"(.*layers\.\d+)\.linear1\.weight$",
    "{}.linear2.weight",
)


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("how", ["channels", "ragged", "ragged, rotated and compensated"])
def test_multihead_attention(how: str, first: str) -> None:
    """Torch-Pruning's own pruner of it would take the width out of the heads."""
    dense, model = ENCODER.model(), ENCODER.model()
    plan = planned(model, ENCODER, how)
    if first == "ours":
        apply_plan(model, plan)
    pruned(model, ENCODER)
    with masked(dense, plan) if first == "ours" else masked(dense, attnprune.Plan(())):
        oracle = sliced(dense, model, ENCODER)
        width = places(model[0].weight.detach(), dense[0].weight.detach())
        for block in oracle[1].layers:
            block.self_attn = Reference(block.self_attn, width)
            block.self_attn.in_proj_bias = None  # no fast path
    close(output(model, ENCODER), output(oracle, ENCODER))
    if first == "theirs":
        plan = planned(model, ENCODER, how)
        with masked(model, plan):
            expected = output(model, ENCODER)
        apply_plan(model, plan)
        close(output(model, ENCODER), expected)
    (spec, _) = find_attention(model)
    assert (spec.d_model, spec.heads, model[1].layers[0].self_attn.embed_dim) == (18, 4, 18)


class Block(nn.Module):
    """Attention whose host reads weights, in a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Reads()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


def test_hosts_that_read_weights() -> None:
    def build() -> Model:
        return nn.Sequential(nn.Linear(8, 24), Block(), nn.Linear(24, 5))

    case = ENCODER._replace(build=build, last=("2",))
    model, dense = case.model(), case.model()
    plan = planned(model, case, "ragged")
    apply_plan(model, plan)
    pruned(model, case)
    assert find_attention(model)[0].d_model == 18
    width = places(model[0].weight.detach(), dense[0].weight.detach())
    with masked(dense, plan):
        oracle = copy.deepcopy(dense)
    for name, axis in {"0.weight": 0, "0.bias": 0, "1.attn.qkv.weight": 1, "1.attn.proj.weight": 0,
                       "1.attn.proj.bias": 0, "2.weight": 1}.items():  # fmt: skip
        parameter = oracle.get_parameter(name)
        parameter.data = parameter.data.index_select(axis, width)
    close(output(model, case), output(oracle, case))


@pytest.mark.parametrize("name", [*CASES, "encoder"])
def test_the_mlp_alone(name: str) -> None:
    """The width stays, and what is left computes what the dense model does without the units that went."""
    case = {**CASES, "encoder": ENCODER}[name]
    model, dense = case.model(), case.model()
    plan = planned(model, case, "ragged")
    apply_plan(model, plan)
    specs = find_attention(model)
    pruned(model, case, 1 / 3, width=False)
    assert find_attention(model) == specs
    assert {len(p) for name, p in model.named_parameters() if re.match(case.inner, name)} == {24}
    with masked(dense, plan):
        oracle = sliced(dense, model, case._replace(width={}))
    close(output(model, case), output(oracle, case))


def test_ours_between_two_steps_of_theirs() -> None:
    """Modules get other classes in between; a pruner goes by classes."""
    for name, how in (("vit", "ragged"), ("bert", "channels"), ("timm", "channels"), ("llama", "qk unlike vo")):
        case = CASES[name]
        model, dense = case.model(), case.model()
        importance = tp.importance.GroupMagnitudeImportance()
        pruner = tp.pruner.BasePruner(
            model, case.inputs(), importance, pruning_ratio=0.5, iterative_steps=2, **case.options(model)
        )
        pruner.step()
        halfway = sliced(dense, model, case)
        plan = planned(model, case, how)
        apply_plan(model, plan)
        pruner.step()
        with masked(halfway, plan):
            oracle = sliced(halfway, model, case)
        close(output(model, case), output(oracle, case))
        assert find_attention(model)[0].d_model == 12


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_packed_weights_stay_packed(name: str) -> None:
    case = CASES[name]
    model, apart = (pruned(packed(case, pack), case) for pack in (True, False))
    close(output(model, case), output(apart, case))
    for view in all_views(model):
        assert view.state is not None
        assert view.state.packed
        assert side_by_side([view.slots[f"{p}.weight"].values for p in "qkv"]) is not None
    assert attnprune.unpack_qkv(model)
    close(output(model, case), output(apart, case))


def packed(case: Case, pack: bool) -> Model:
    model = case.model()
    apply_plan(model, planned(model, case, "ragged"))
    if pack:
        assert attnprune.pack_qkv(model)
    return model


@pytest.mark.parametrize("name", ["vit", "bert", "timm, expanded"])
def test_pruned_twice_by_us(name: str) -> None:
    """Before and after Torch-Pruning; masks of the second plan hold on what it left."""
    case = CASES[name]
    model = case.model()
    apply_plan(model, planned(model, case, "ragged"))
    pruned(model, case)
    plan = planned(model, case, "ragged, rotated and compensated")
    with masked(model, plan):
        expected = output(model, case)
    report = apply_plan(model, plan, example_inputs=case.inputs())
    close(output(model, case), expected)
    assert "d_model 18" in report.layers[0].after.describe()
    assert report.attention_parameters[1] == sum(spec.parameters for spec in find_attention(model))


def test_gradients_and_flags_come_along() -> None:
    case = CASES["bert"]
    model = case.model()
    apply_plan(model, planned(model, case, "channels"))
    query = model.bert.encoder.layer[0].attention.self.query
    query.bias.requires_grad_(False)
    model(**case.inputs()).logits.sum().backward()
    before, grad = query.weight.detach().clone(), query.weight.grad.clone()
    pruned(model, case)
    kept = [column for column in before.T if any(torch.equal(column, one) for one in query.weight.T)]
    assert len(kept) == 18
    index = [int((before == column[:, None]).all(0).int().argmax()) for column in query.weight.detach().T]
    assert torch.equal(query.weight.grad, grad[:, index])
    assert not query.bias.requires_grad
    assert query.weight.requires_grad


def test_frozen_models_are_seen_whole() -> None:
    """Torch-Pruning reads the graph of gradients, which frozen weights are not in."""
    case = CASES["vit"]
    frozen, usual = case.model().requires_grad_(False), pruned(case.model(), case)
    options = case.options(frozen)
    tp.DependencyGraph().build_dependency(frozen, case.inputs(), **{**options, "ignored_layers": None})
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    pruned(frozen, case)
    assert shapes(frozen) == shapes(usual)


def test_generation_with_a_cache() -> None:
    case = CASES["llama"]
    model = case.model()
    apply_plan(model, planned(model, case, "ragged"))
    pruned(model, case)
    tokens = case.inputs()["input_ids"]
    found = [
        model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*found)


def test_a_scorer_of_theirs_for_both() -> None:
    """Gradients are theirs to accumulate on the model as it is."""
    case = CASES["vit"]
    model = case.model()
    importance = tp.importance.GroupTaylorImportance()
    model(**case.inputs()).logits.square().sum().backward()
    attnprune.prune_attention(model, 0.5, scorer=importance)
    pruner = tp.pruner.BasePruner(model, case.inputs(), importance, pruning_ratio=0.25, **case.options(model))
    pruner.step()
    assert find_attention(model)[0].describe() == "4 heads of 3 (qk) and 3 (vo), d_model 18"


# what is refused


class Gated(nn.Module):
    """Attention with a gate that reads the model's width beside the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            one(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o_proj(heads) * self.gate(hidden_states).sigmoid()


def test_what_cannot_run_at_another_width_is_refused_before_anything_moves() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Gated(), nn.Linear(8, 3))
    with pytest.raises(NotExpressibleError, match=r"^1: .*another width.*width=False"):
        pruner_options(model)
    assert "ignored_layers" in pruner_options(model, width=False)


def test_widths_of_two_streams_are_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(NotExpressibleError, match=r"^0: .*widths of 8, 4 and 4"):
        pruner_options(model)


def test_shared_projections_are_refused() -> None:
    case = CASES["vit"]
    model = case.model()
    first, second = (layer.attention for layer in model.vit.layers)
    second.o_proj = first.o_proj
    with pytest.raises(TiedWeightsError, match=r"o\.weight.*several places"):
        pruner_options(model)
    second.o_proj = copy.deepcopy(first.o_proj)
    second.o_proj.weight = first.o_proj.weight
    with pytest.raises(TiedWeightsError, match=r"o\.weight.*several places"):
        pruner_options(model)
    pruner_options(model, width=False)


def test_channels_of_heads_are_ours() -> None:
    case = CASES["bert"]
    model = case.model()
    graph = tp.DependencyGraph().build_dependency(model, case.inputs(), **pruner_options(model))
    dense = model.bert.encoder.layer[0].attention.output.dense
    group = graph.get_pruning_group(dense, tp.prune_linear_in_channels, [0])
    with pytest.raises(NotExpressibleError, match="channels of heads"):
        group.prune()


def test_a_model_without_attention() -> None:
    with pytest.raises(NoAttentionError):
        pruner_options(nn.Sequential(nn.Linear(3, 3)))


# saved and loaded


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", ["channels", "heads", "ragged, rotated and compensated"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_models_of_transformers_load_from_their_directory(name: str, how: str, tmp_path: Path) -> None:
    """Their configs say nothing of other widths, and so does the skeleton that is built from them."""
    case = CASES[name]
    model = case.model()
    apply_plan(model, planned(model, case, how))
    pruned(model, case)
    attnprune.save_pruned(model, tmp_path / "one")
    again = attnprune.from_pretrained(tmp_path / "one")
    assert torch.equal(output(again, case), output(model, case))
    assert find_attention(again) == find_attention(model)
    assert shapes(load_skeleton(tmp_path / "one")) == shapes(model)
    plan = make_plan(model, {"vo": 0.3}, heads="ragged")
    attnprune.apply_to_checkpoint(tmp_path / "one", plan, tmp_path / "two")
    apply_plan(model, plan)
    assert torch.equal(output(attnprune.from_pretrained(tmp_path / "two"), case), output(model, case))
    apply_plan(
        pruned(again, case), make_plan(again, {"vo": 0.3}, heads="ragged")
    )  # attributes of layers are as they were
    attnprune.save_pruned(again, tmp_path / "three")
    assert torch.equal(output(attnprune.from_pretrained(tmp_path / "three"), case), output(again, case))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", ["timm", "timm, expanded", "encoder"])
def test_other_models_are_loaded_into_dense_ones(name: str, meta: bool, tmp_path: Path) -> None:
    case = {**CASES, "encoder": ENCODER}[name]
    model = case.model()
    apply_plan(model, planned(model, case, "ragged"))
    pruned(model, case)
    attnprune.save_pruned(model, tmp_path)
    dense = case.model().to("meta") if meta else case.model()
    before = shapes(dense)
    with pytest.raises(CheckpointError, match="narrower=True"):
        attnprune.load_pruned(tmp_path, dense)
    assert shapes(dense) == before
    again = attnprune.load_pruned(tmp_path, dense, narrower=True)
    assert torch.equal(output(again, case), output(model, case))
    assert find_attention(again) == find_attention(model)


def test_dense_attention_of_another_width_is_saved_too(tmp_path: Path) -> None:
    """Torch-Pruning alone was there."""
    case = CASES["vit"]
    model = pruned(case.model(), case)
    attnprune.save_pruned(model, tmp_path / "vit")
    assert torch.equal(output(attnprune.from_pretrained(tmp_path / "vit"), case), output(model, case))
    model = pruned(ENCODER.model(), ENCODER)
    attnprune.save_pruned(model, tmp_path / "encoder")
    again = attnprune.load_pruned(tmp_path / "encoder", ENCODER.model(), narrower=True)
    assert torch.equal(output(again, ENCODER), output(model, ENCODER))


def test_wider_ones_are_refused(tmp_path: Path) -> None:
    case = CASES["timm"]
    attnprune.save_pruned(case.model(), tmp_path)
    with pytest.raises(CheckpointError):
        attnprune.load_pruned(tmp_path, pruned(case.model(), case), narrower=True)


def test_tied_embeddings(tmp_path: Path) -> None:
    """Torch-Pruning unties what it cuts; the model as it is then is saved."""
    config = transformers.LlamaConfig(**SMALL, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True)
    case = CASES["llama"]._replace(build=lambda: transformers.LlamaForCausalLM(config))
    model = pruned(case.model(), case)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.tie_weights()
    attnprune.save_pruned(model, tmp_path / "tied")
    again = attnprune.from_pretrained(tmp_path / "tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(output(again, case), output(model, case))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    plan = planned(model, case, "channels")
    attnprune.save_pruned(model, tmp_path / "apart")
    again = attnprune.from_pretrained(tmp_path / "apart")
    assert torch.equal(output(again, case), output(model, case))
    attnprune.apply_to_checkpoint(tmp_path / "apart", plan, tmp_path / "streamed")
    apply_plan(model, plan)
    assert torch.equal(output(attnprune.from_pretrained(tmp_path / "streamed"), case), output(model, case))


def test_no_config_of_plain_transformers_says_it() -> None:
    case = CASES["vit"]
    model = pruned(case.model(), case, width=False)
    with pytest.raises(NotExpressibleError, match=r"mlp\.fc1\.weight: .*as another tool left it"):
        make_plan(model, 0.5, stock=True)
    apply_plan(model, make_plan(model, 0.5, scope="local"))
    with pytest.raises(NotExpressibleError, match="as another tool left it"):
        attnprune.export_stock(model, "nowhere")
