"""Hosts that repeat a mask for the heads of the dense model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprune import apply_plan, make_plan, masked, prune_attention

transformers = pytest.importorskip("transformers")


@pytest.mark.long
def test_heads_of_grounding_dino_go_without_inputs() -> None:
    """Its decoder repeats the text's mask for as many heads as its config says, whatever its attention has left."""
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoDecoder

    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig(
        d_model=16, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=16, num_queries=5,
        num_feature_levels=1, decoder_n_points=1,
    )  # fmt: skip
    decoder = GroundingDinoDecoder(config).eval()
    inputs = {
        "inputs_embeds": torch.randn(1, 5, 16),
        "vision_encoder_hidden_states": torch.randn(1, 6, 16),
        "text_encoder_hidden_states": torch.randn(1, 3, 16),
        "text_encoder_attention_mask": torch.tensor([[False, False, True]]),
        "reference_points": torch.rand(1, 5, 4),
        "spatial_shapes": torch.tensor([[2, 3]]),
        "spatial_shapes_list": [(2, 3)],
        "level_start_index": torch.tensor([0]),
        "valid_ratios": torch.ones(1, 1, 2),
    }
    plan = make_plan(decoder, 0.5, granularity="head", scope="local", scorer="magnitude", exclude="*.encoder_attn")
    with torch.no_grad(), masked(decoder, plan):
        expected = decoder(**inputs).last_hidden_state
    report = apply_plan(decoder, plan)
    assert set(report.ways) == {"layers.0.self_attn", "layers.0.encoder_attn_text"}
    assert [spec.heads for spec in report.plan.after] == [2, 2]
    with torch.no_grad():
        torch.testing.assert_close(decoder(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
BIASED: dict[str, tuple[str, dict[str, object]]] = {
    "a table for each layer": ("Beit", {**VISION, "use_relative_position_bias": True}),
    "a table for all layers": ("Beit", {**VISION, "use_shared_relative_position_bias": True}),
    "the same in a copied class": ("Data2VecVision", {**VISION, "use_shared_relative_position_bias": True}),
    "of the first layer, for all": (
        "T5Encoder",
        {"vocab_size": 20, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4},
    ),
    "slopes": ("Bloom", {"vocab_size": 20, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "slopes, made anew": ("Mpt", {"vocab_size": 20, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}),
}


@pytest.mark.parametrize("granularity", ["head", "joint"])
@pytest.mark.parametrize("kind", BIASED)
def test_heads_go_where_masks_are_made_for_dense_heads(kind: str, granularity: Any) -> None:
    name, settings = BIASED[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**settings)
    model = getattr(transformers, f"{name}Model")(config).eval().double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "bias" in key:  # tables that begin as zeros tell no head from another
                p.normal_()
    x = torch.randn(2, 3, 16, 16).double() if "image_size" in settings else torch.randint(1, 20, (2, 5))
    plan = make_plan(model, 0.5, granularity=granularity, scorer="random", example_inputs=x)
    with torch.no_grad(), masked(model, plan):
        expected = model(x)[0]
    apply_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-9, atol=1e-9)


class Attention(nn.Module):
    """Which may itself run with fewer heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        q, k, v = (
            projection(hidden_states).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        context = scores.softmax(-1) @ v
        found: Tensor = self.o_proj(context.transpose(1, 2).reshape(batch, tokens, -1))
        return found


class Repeats(nn.Module):
    """A host of one's own that repeats a mask for heads."""

    def __init__(self, said: str) -> None:
        super().__init__()
        self.query = nn.Embedding(2, 16)  # a model of EoMT has one, and is no attention for that
        self.attention = Attention()
        self.said = said
        if said == "config":
            self.config = SimpleNamespace(n_head=4)
        elif said != "once":
            self.num_heads = 4

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.attention(x, self.repeated(mask))
        return found

    def repeated(self, mask: Tensor) -> Tensor:
        def times(heads: int) -> Tensor:
            return mask[:, None].repeat(1, heads, 1, 1)

        return times(self.config.n_head if self.said == "config" else self.num_heads)


class Plain(Repeats):
    """Attention of as many heads, whose host knows of none; neither does the mask."""

    def repeated(self, mask: Tensor) -> Tensor:
        return mask[:, None]


@pytest.mark.parametrize("said", ["attribute", "config"])
@pytest.mark.parametrize("granularity", ["head", "joint"])
def test_a_host_of_ones_own_that_repeats_masks(said: str, granularity: Any) -> None:
    torch.manual_seed(0)
    model, x = Repeats(said).eval().double(), torch.randn(3, 5, 16).double()
    mask = torch.rand(3, 5, 5).double().log()
    plan = make_plan(model, 0.5, granularity=granularity, scorer="random")
    with torch.no_grad(), masked(model, plan):
        expected = model(x, mask)
    report = apply_plan(model, plan)
    assert report.plan.after[0].heads == 2 or granularity == "joint"
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), expected, rtol=1e-10, atol=1e-10)


def test_other_hosts_keep_their_own_attention() -> None:
    torch.manual_seed(0)
    model, x = Plain("once").eval(), torch.randn(3, 5, 16)
    report = prune_attention(model, 0.5, granularity="head", scorer="magnitude")
    assert report.ways == {"attention": "stock"}
    assert type(model.attention) is Attention
    with torch.no_grad():
        assert model(x, torch.zeros(3, 5, 5)).shape == x.shape


class Broken(Plain):
    """What its forward reads are properties that work nowhere else."""

    def repeated(self, mask: Tensor) -> Tensor:
        if len(mask) > 99:
            return super().repeated(mask).repeat(1, self.config.num_heads, 1, self.n_heads)
        return super().repeated(mask)

    @property
    def n_heads(self) -> int:
        raise RuntimeError("n_heads outside of forward")

    @property
    def config(self) -> Any:
        raise KeyError("config outside of forward")


def test_properties_that_do_not_work_say_nothing_of_masks() -> None:
    model = Broken("once").eval()
    report = prune_attention(model, 0.5, granularity="head", scorer="magnitude")
    assert report.ways == {"attention": "stock"}


def test_a_property_that_lacks_memory_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing about the model."""

    def lacks(self: nn.Module) -> int:
        raise MemoryError("in a property")

    monkeypatch.setattr(Broken, "n_heads", property(lacks))
    with pytest.raises(MemoryError, match="in a property"):
        prune_attention(Broken("once"), 0.5, granularity="head", scorer="magnitude")
