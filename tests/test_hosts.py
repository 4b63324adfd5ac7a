"""Hosts with the habits of many versions of transformers, written out here, so that any version shows how they fare."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnprune import apply_plan, calibrate, load_pruned, make_plan, masked, save_pruned, skipped_attention
from attnprune.families import looks
from attnprune.families.names import HEADS
from attnprune.families.registry import Survey, all_views


class Apart(nn.Module):
    """Q, K and V as in transformers 4; subclasses say what they do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 6, 24
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)


class Scaling(Apart):
    """Makes its softmax scale from its head dim (4.48)."""

    def forward(
        self, hidden_states: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        q, k, v = self.split(self.query(hidden_states)), self.split(self.key(hidden_states)), self.value(hidden_states)
        weights = self.dropout((q @ k.mT / math.sqrt(self.attention_head_size)).softmax(-1))
        weights = weights if head_mask is None else weights * head_mask
        context = (weights @ self.split(v)).transpose(1, 2).flatten(2)
        return (context, weights) if output_attentions else (context,)


class Whole(Apart):
    """With O."""

    def __init__(self) -> None:
        super().__init__()
        self.out_lin = nn.Linear(24, 24)


class Returning(Whole):
    """Takes its cache as a tuple, and returns it (4.48)."""

    def forward(self, hidden_states: Tensor, past_key_value: Any = None) -> tuple[Tensor, Any]:
        q, k, v = (self.split(part(hidden_states)) for part in (self.query, self.key, self.value))
        if past_key_value is not None:
            k, v = torch.cat([past_key_value[0], k], 2), torch.cat([past_key_value[1], v], 2)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.out_lin(context.transpose(1, 2).flatten(2)), (k, v)


class Padded(Whole):
    """Cannot do without a mask of keys (DistilBERT in 4)."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor]:
        q, k, v = (self.split(part(hidden_states)) for part in (self.query, self.key, self.value))
        hidden = (mask == 0).view(len(mask), 1, 1, -1)
        weights = (q @ k.mT).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1)
        return (self.out_lin((weights @ v).transpose(1, 2).flatten(2)),)


class Halves(nn.Module):
    """The layer around Q, K and V, with O in a module of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.attention, self.output = inner, nn.Sequential()
        self.output.dense = nn.Linear(24, 24)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        context, *rest = self.attention(hidden_states, *args, **kwargs)
        return (self.output.dense(context), *rest)


class Interleaved(nn.Module):
    """Q, K and V of a head side by side in one projection, and queries turned by place (GPT-NeoX)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (4, 18)).transpose(1, 2).chunk(3, -1)
        q = q * torch.arange(1, 7, dtype=q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Misplaced(Interleaved):
    """Queries of a head lie beside the keys and values of the next one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (4, 18)).transpose(1, 2).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q.roll(1, 1), k, v).transpose(1, 2).flatten(2))


def model_of(inner: nn.Module) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": Halves(inner) if isinstance(inner, Scaling) else inner}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def hidden() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_scale_from_the_head_dim(tmp_path: Path) -> None:
    """Smaller attributes, then a forward of ours, then a file: always the scale of the dense model."""
    model, dense = model_of(Scaling()), model_of(Scaling())
    for options, way in (({"scope": "local"}, "stock"), ({"heads": "ragged"}, "decoupled")):
        plan = make_plan(model, 0.5, scorer="random", **options)
        with masked(model, plan), torch.no_grad():
            expected = model.layer(hidden())[0]
        apply_plan(model, plan)
        (view,) = all_views(model)
        assert view.way(view.spec) == way
        torch.testing.assert_close(model.layer(hidden())[0], expected, rtol=0, atol=1e-10)
    save_pruned(model, tmp_path)
    load_pruned(tmp_path, dense)
    assert torch.equal(dense.layer(hidden())[0], model.layer(hidden())[0])


class Adding(Scaling):
    """Does something that no forward of ours does."""

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        (context,) = super().forward(hidden_states)
        return (context if bias is None else context + bias.mean(),)


def test_a_scale_from_the_head_dim_on_dense_dims(tmp_path: Path) -> None:
    """The same where the host's own forward goes on; its file is read into a host of the head dim that it had."""
    model, dense = model_of(Adding()), model_of(Adding())
    for options, way in (({"scope": "local"}, "stock"), ({"heads": "ragged"}, "expanded")):
        plan = make_plan(model, 0.5, scorer="random", **options)
        with masked(model, plan), torch.no_grad():
            expected = model.layer(hidden())[0]
        apply_plan(model, plan)
        (view,) = all_views(model)
        assert view.way(view.spec) == way
        torch.testing.assert_close(model.layer(hidden())[0], expected, rtol=0, atol=1e-10)
    save_pruned(model, tmp_path)
    before = copy.deepcopy(dense)
    load_pruned(tmp_path, dense)
    assert torch.equal(dense.layer(hidden())[0], model.layer(hidden())[0])
    assert not torch.equal(dense.layer(hidden())[0], before.layer(hidden())[0])


@pytest.mark.parametrize("kind", [Returning, Padded])
def test_run_on_dense_dims(kind: type[Whole]) -> None:
    model = model_of(kind())
    given = {"mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])} if kind is Padded else {}
    for options in ({"heads": "ragged"}, {"granularity": "head"}):
        plan = make_plan(model, 0.25, scorer="random", **options)
        with masked(model, plan), torch.no_grad():
            expected = model.layer(hidden(), **given)[0]
        apply_plan(model, plan)
        torch.testing.assert_close(model.layer(hidden(), **given)[0], expected, rtol=0, atol=1e-10)


def test_interleaved_projections_are_not_taken_for_three_blocks() -> None:
    (view,) = Survey(model_of(Interleaved())).views
    assert view.verdict is not None
    assert view.verdict.order == "h qkv d"
    survey = Survey(model_of(Misplaced()))
    assert not survey.views
    (skipped,) = survey.skipped()
    assert "heads do not lie" in skipped.why


class Wrapper(nn.Module):
    """What stands around an attention and has no projections itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(24)


class SelfAttention(Wrapper):
    pass


def test_the_reason_is_that_of_the_attention_inside() -> None:
    """Not that of what stands around it (T5 in transformers 4)."""
    (skipped,) = Survey(nn.Sequential(SelfAttention(Misplaced().double()))).skipped()
    assert skipped.name == "0.inner"
    assert "heads do not lie" in skipped.why


class Clipping(nn.Module):
    """A Linear inside a module that clips (Gemma 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.clamp(-9, 9)).clamp(-9, 9)  # type: ignore[no-any-return]


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Clipping() for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            part(hidden_states).unflatten(-1, (4, 6)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Sparse(Scaling):
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states)[0]


class Sibling(nn.Module):
    """O is a sibling of the module that splits heads (BigBird-Pegasus, LED)."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = Sparse(), nn.Linear(24, 24)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.output(self.self(hidden_states))  # type: ignore[no-any-return]


class Grid(nn.Module):
    """Takes rows and columns of patches (Segment Anything)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, height, width, _ = hidden_states.shape
        q, k, v = self.qkv(hidden_states).reshape(batch, height * width, 3, 4, 6).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(out.reshape(batch, height, width, -1))  # type: ignore[no-any-return]


class OnePack(nn.Module):
    """Takes sequences one after the other as a batch of one (MiniCPM-V)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        q, k, v = (
            part(hidden_states).unflatten(-1, (4, 6)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(y.split(lengths, 2) for y in (q, k, v)), strict=True)
        return self.out_proj(
            torch.cat([F.scaled_dot_product_attention(*p) for p in parts], 2).transpose(1, 2).flatten(2)
        )  # type: ignore[no-any-return]


GIVEN: dict[type[nn.Module], tuple[Any, ...]] = {
    Clipped: (torch.randn(2, 5, 24).double(),),
    Sibling: (torch.randn(2, 5, 24).double(),),
    Grid: (torch.randn(2, 3, 4, 24).double(),),
    OnePack: (torch.randn(1, 5, 24).double(), torch.tensor([0, 2, 5]), 3),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_habits_of_parts_and_inputs(kind: type[nn.Module], tmp_path: Path) -> None:
    """Found without example inputs, exact, and read back."""
    torch.manual_seed(0)
    model, given = kind().double(), GIVEN[kind]
    plan = make_plan(model, 0.5, heads="ragged", scorer="random")
    with masked(model, plan):
        expected = model(*given)
    apply_plan(model, plan)
    torch.testing.assert_close(model(*given), expected, rtol=1e-10, atol=1e-10)
    again = load_pruned(save_pruned(model, tmp_path / "pruned"), kind().double())
    assert torch.equal(again(*given), model(*given))


class ConvMixer(nn.Module):
    """A state space model, whose parts have names of attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.in_proj, self.out_proj = 4, nn.Linear(24, 100), nn.Linear(48, 24)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.out_proj(self.in_proj(hidden_states)[..., :48])  # type: ignore[no-any-return]


class SampledAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.sampling_offsets, self.attention_weights = 4, nn.Linear(24, 8), nn.Linear(24, 8)


class ConvAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Conv2d(24, 72, 1), nn.Conv2d(24, 24, 1)


def test_other_kinds_of_attention_are_called_by_name() -> None:
    model = nn.ModuleDict({"mixer": ConvMixer(), "sampled": SampledAttention(), "convolved": ConvAttention()})
    why = {one.name: one.why for one in skipped_attention(model)}
    assert why.keys() == {"sampled", "convolved"}  # a state space model does not attend
    assert why == {"sampled": looks.DEFORMABLE, "convolved": looks.CONVOLVED}


class Caching(Whole):
    """Keeps what it computed of a parameter (LeViT), so that copying it as it stands fails."""

    def __init__(self) -> None:
        super().__init__()
        self.biases, self.kept = nn.Parameter(torch.randn(4, 5, 5)), {}  # type: ignore[var-annotated]

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        tokens = hidden_states.shape[-2]
        if tokens not in self.kept:
            self.kept[tokens] = self.biases[:, :1, :1].expand(-1, tokens, tokens) * 1.5
        q, k, v = (self.split(part(hidden_states)) for part in (self.query, self.key, self.value))
        context = (0.3 * q @ k.mT + self.kept[tokens]).softmax(-1) @ v
        return self.out_lin(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_host_that_keeps_what_it_computed() -> None:
    """Found after a run as before it, and planning changes nothing."""
    model, x = nn.Sequential(Caching()).double(), torch.randn(2, 5, 24).double()
    expected = model(x)
    plan = make_plan(model, 0.5, heads="ragged", scorer="random")
    assert torch.equal(model(x), expected)
    with masked(model, plan):
        expected = model(x)
    apply_plan(model, plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


class ChannelMixer(nn.Module):
    """Named as attention, and its softmax mixes the channels of a head (DaViT, XCiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 4, 1)
        return self.proj(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))  # type: ignore[no-any-return]


class TrainsOnlyLargeBatches(Grid):
    """Fails in training on small inputs, as hosts with groups of queries do (RF-DETR)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.training and len(hidden_states) < 64:
            raise RuntimeError("too small")
        return super().forward(hidden_states)


def test_a_softmax_over_channels_is_no_attention() -> None:
    (found,) = skipped_attention(nn.ModuleDict({"ChannelAttn": type("ChannelAttention", (ChannelMixer,), {})()}))
    assert found.why == "no softmax over keys was seen in its forward"


def test_a_host_that_does_not_train_on_what_proof_gives_it() -> None:
    assert all_views(nn.Sequential(TrainsOnlyLargeBatches().double()))


class GroupedInTraining(nn.Module):
    """In training queries attend inside groups of eight tokens, and no other number will do (RF-DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.training:
            x = x.unflatten(1, (-1, 8)).flatten(0, 1) if x.shape[1] % 8 == 0 else x.view(-1, 8, 24)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view(shape)  # type: ignore[no-any-return]


def test_what_proof_cannot_train_runs_by_no_forward_of_ours() -> None:
    """In evaluation a forward of ours computes the same; in training it would be another function."""
    model, x = nn.Sequential(GroupedInTraining()).double(), torch.randn(2, 16, 24).double()
    (view,) = all_views(model)
    assert view.verdict is not None
    assert view.verdict.decoupled is None
    assert "does not train" in view.verdict.reasons["decoupled DecoupledFusedAttention"]
    plan = make_plan(model, 0.5, heads="ragged", scorer="random")
    with masked(model, plan):
        expected = [model.train(mode)(x) for mode in (True, False)]
    apply_plan(model, plan)
    for mode, one in zip((True, False), expected, strict=True):
        torch.testing.assert_close(model.train(mode)(x), one, rtol=1e-10, atol=1e-10)


def test_tables_of_biases_and_gates() -> None:
    bias = type("RelativeAttentionBias", (nn.Module,), {"__init__": lambda self: _table(self)})
    gate = type("GatedAttention", (nn.Module,), {"__init__": lambda self: _gate(self)})
    why = {one.name: one.why for one in skipped_attention(nn.ModuleDict({"bias": bias(), "gate": gate()}))}
    assert why == {"gate": looks.GATE}


def _table(module: nn.Module) -> None:
    nn.Module.__init__(module)
    module.values = nn.Embedding(8, 4)


def _gate(module: nn.Module) -> None:
    nn.Module.__init__(module)
    module.layer = nn.Linear(8, 8)


class Positioned(Whole):
    """Adds positions to what queries and keys are made of, and cannot do without them (DETR)."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, object_queries: Tensor | None = None, key_value_states: Tensor | None = None
    ) -> Tensor:
        if object_queries is None:
            raise UnboundLocalError("hidden_states_original")
        source = hidden_states + object_queries if key_value_states is None else key_value_states
        q, k = self.split(self.query(hidden_states + object_queries)), self.split(self.key(source))
        v = self.split(self.value(hidden_states if key_value_states is None else key_value_states))
        context = F.scaled_dot_product_attention(q, k, v)
        return self.out_lin(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_positions_that_are_added() -> None:
    model, x, where = Positioned().double(), torch.randn(2, 5, 24).double(), torch.randn(2, 5, 24).double()
    plan = make_plan(model, 0.5, heads="ragged", scorer="random")
    with masked(model, plan):
        expected = model(x, where)
    apply_plan(model, plan)
    torch.testing.assert_close(model(x, where), expected, rtol=1e-10, atol=1e-10)


def test_attention_without_one_of_the_four() -> None:
    class PoolingAttention(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.num_heads = 4
            for name in names:
                self.add_module(name, nn.Linear(8, 8))

    model = nn.ModuleDict(
        {"learned": PoolingAttention("k_proj", "v_proj", "out_proj"), "pointer": PoolingAttention("q_proj", "k_proj")}
    )
    why = {one.name: one.why for one in skipped_attention(model)}
    assert why == {"learned": looks.LEARNED, "pointer": looks.VALUELESS}


@pytest.mark.parametrize("heads", ["four", [4], {"all": 4}, nn.Linear(1, 1), torch.zeros(3), None, math.nan, math.inf])
def test_attributes_that_are_no_numbers(heads: Any) -> None:
    """Names that usually hold a number of heads, or their dim, may hold anything."""
    model = nn.ModuleDict({"attention": Returning()})
    attention = model["attention"]
    attention.__class__ = type("Named", (Returning,), {"num_attention_heads": 4})
    del attention.__dict__["num_attention_heads"]
    attention.__dict__[HEADS[-1]] = 4  # its number is found under the last of these names alone
    expected = all_views(model)[0].spec
    assert expected.heads == 4
    for name in (*(one for one in HEADS[:-1] if one != "num_attention_heads"), "head_dim", "scale"):
        changed = copy.deepcopy(model)
        changed["attention"].__dict__[name] = heads
        assert [view.spec for view in all_views(changed)] == [expected], name


class Stand(nn.Module):
    """Computes what nn.Linear computes, and is none."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self.out_features, self.in_features = inner.out_features, inner.in_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_projections_of_a_class_of_ones_own_know_their_new_sizes(granularity: Any) -> None:
    module = Returning()
    for name in ("query", "key", "value", "out_lin"):
        setattr(module, name, Stand(getattr(module, name)))
    model = nn.ModuleDict({"attention": module})
    plan = make_plan(model, 0.5, granularity=granularity)
    apply_plan(model, plan)
    (spec,) = (view.spec for view in all_views(model))
    assert spec == plan.layers[0].after
    for name, (rows, columns) in (("query", (sum(spec.qk_dims), 24)), ("out_lin", (24, sum(spec.vo_dims)))):
        linear = model["attention"].get_submodule(name)
        assert (linear.out_features, linear.in_features) == (rows, columns) == linear.weight.shape
    apply_plan(model, make_plan(model, 0.5, granularity=granularity))
    assert model["attention"](torch.randn(2, 3, 24))[0].shape == (2, 3, 24)


class OfPositions(Whole):
    """Its Q takes positions too, of another number (SEW-D), or its O writes a second context (Pegasus-X)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Buffer(torch.randn(9, 24))

    def forward(self, hidden_states: Tensor) -> Any:  # type: ignore[override]
        q, k, v = (self.split(part(hidden_states)) for part in (self.query, self.key, self.value))
        if self.kind == "positions":
            self.query(self.table[None])
        context = ((0.4 * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = self.out_lin(context)
        return (out, self.out_lin(context[:, :1])) if self.kind == "a second context" else out


@pytest.mark.parametrize("kind", ["positions", "a second context", "plain"])
def test_moments_are_those_of_the_tokens_that_attend(kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"attention": OfPositions(kind)}).eval(), torch.randn(2, 5, 24)
    moments = calibrate(model, [x], loss_fn=lambda model, x: model["attention"](x), progress=False)["attention"]
    q = model["attention"].query(x).flatten(0, 1).double().unflatten(1, (4, 6)).transpose(0, 1)
    expected = q.mT @ q / 10
    for head, found in enumerate(moments.queries()):
        torch.testing.assert_close(found, expected[head], rtol=1e-4, atol=1e-5)
    assert moments.tokens["vo"] == (12 if kind == "a second context" else 10)
