"""Encoders of transformers, from 4.48 on: ``make test-compat`` runs this file under several versions of it."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnprune import (
    AttentionView,
    LayerPlan,
    Plan,
    apply_plan,
    apply_to_checkpoint,
    export_stock,
    find_attention,
    from_pretrained,
    load_pruned,
    make_plan,
    save_pruned,
)
from attnprune.errors import NotExpressibleError
from attnprune.families.registry import all_views

SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 4}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {**SMALL, **QUIET, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, **QUIET, "vocab_size": 20, "max_position_embeddings": 12}
CLIP_TEXT = {**SMALL, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 19}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ast": ("AST", {**SMALL, **QUIET, "num_mel_bins": 24, "max_length": 24, "time_stride": 8, "frequency_stride": 8}),
    "vit": ("ViT", IMAGE),
    "deit": ("DeiT", IMAGE),
    "dinov2": ("Dinov2", {**IMAGE, "mlp_ratio": 1}),
    "clip-text": ("CLIPText", CLIP_TEXT),
    "clip-vision": ("CLIPVision", {**SMALL, "image_size": 16, "patch_size": 8}),
    "bert": ("Bert", TEXT),
    "bert-decoder": ("Bert", {**TEXT, "num_hidden_layers": 1, "is_decoder": True, "add_cross_attention": True}),
    "roberta": ("Roberta", TEXT),
    "electra": ("Electra", {**TEXT, "embedding_size": 24}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 20, "max_position_embeddings": 12, "dim": 24, "hidden_dim": 12, "n_layers": 2, "n_heads": 4,
         "dropout": 0.0, "attention_dropout": 0.0},
    ),
}  # fmt: skip
"""Of a kind, what its classes' names begin with, and a tiny config."""
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
MODES = list(itertools.product(("head", "channel", "joint"), ("local", "global"), ("uniform", "ragged")))
WHOLE = ("ast", "vit")  # in every mode; the others in a few
FEW = [("head", "global", "ragged"), ("channel", "local", "uniform"), ("joint", "local", "ragged")]
CASES = [(kind, mode) for kind in KINDS for mode in (MODES if kind in WHOLE else FEW)]


def build(kind: str, kernel: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    stem, options = KINDS[kind]
    config: Any = getattr(transformers, f"{stem}Config")(**options)
    if kernel is not None:
        config._attn_implementation = kernel
    cls: Any = getattr(transformers, f"{stem}Model")
    pooled = "add_pooling_layer" in inspect.signature(cls).parameters
    model: nn.Module = cls(config, **({"add_pooling_layer": False} if pooled else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.double().eval()


def example(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "ast":
        return {"input_values": normal(2, 24, 24)}
    if "image_size" in KINDS[kind][1]:
        return {"pixel_values": normal(2, 3, 16, 16)}
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    found = {"input_ids": torch.randint(2, 20, (2, 6), generator=generator), "attention_mask": mask}
    return found | ({"encoder_hidden_states": normal(2, 5, 24)} if kind == "bert-decoder" else {})


def projections(model: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Of an attention: the letter of each projection, ``weight`` or ``bias``, and the parameter; by their names."""
    for key, parameter in model.named_parameters():
        part, _, field = key.removeprefix(f"{name}.").rpartition(".")
        letter = {"q": "q", "k": "k", "v": "v", "o": "o", "d": "o"}.get(part.split(".")[-1][:1])
        if key.startswith(f"{name}.") and letter is not None:
            yield letter, field, parameter


def rows_of(layer: LayerPlan, letter: str, kept: bool) -> list[int]:
    """Rows of a dense projection that stay, or go: head times dim plus channel."""
    kind = "qk" if letter in "qk" else "vo"
    dim, found = layer.spec.dims("qk" if letter in "qk" else "vo")[0], []
    for head in range(layer.spec.heads):
        gone = set(range(dim)) if head in layer.heads else set(getattr(layer, kind)[head])
        found += [head * dim + channel for channel in range(dim) if (channel in gone) != kept]
    return found


def zero(model: nn.Module, plan: Plan) -> None:
    """The oracle: removed rows of Q, K, V and columns of O become zero, found by the names of the parameters."""
    with torch.no_grad():
        for layer in plan:
            for letter, field, parameter in projections(model, layer.spec.name):
                if letter != "o":
                    parameter[rows_of(layer, letter, kept=False)] = 0
                elif field == "weight":
                    parameter[:, rows_of(layer, letter, kept=False)] = 0


@contextmanager
def float64() -> Iterator[None]:
    """transformers 4 makes causal masks of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= 1e-10 * max(1, expected.abs().max()), what


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def of(view: AttentionView, key: str, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What is read of a pruned projection, channels first, in the order of the dense one."""
    found = view.slots[key].cut(read(view.slots[key].parameter))
    return torch.cat([found[slice(*span)] for span in view.spans(view.side(key))])


def check(model: nn.Module, inputs: dict[str, Tensor], plan: Plan) -> None:
    """Law 1: output and gradients are those of the oracle. Uses the model up."""
    oracle = copy.deepcopy(model)
    zero(oracle, plan)
    apply_plan(model, plan)
    outputs = []
    for one in (oracle, model):
        with float64():
            output = one(**inputs).last_hidden_state
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        outputs.append(output.detach())
    close(outputs[1], outputs[0], "output")
    inside = set()
    for view in all_views(model):
        inside |= {id(slot.parameter) for slot in view.slots.values()}
        layer = plan[view.name]
        for letter, field, parameter in projections(oracle, view.name):
            if (letter, field) != ("o", "bias"):
                rows = rows_of(layer, letter, kept=True)
                gained = [of(view, f"{letter}.{field}", read) for read in (Tensor.detach, gradient)]
                values = [
                    (read(parameter).T if letter == "o" else read(parameter))[rows]
                    for read in (Tensor.detach, gradient)
                ]
                gain = gained[0].norm() / values[0].norm()  # Q's, where the host makes the scale from its head dim
                assert letter == "q" or (gain - 1).abs() < 1e-12
                close(gained[0], values[0] * gain, f"{view.name} {letter}.{field}")
                close(gained[1] * gain, values[1], f"gradient of {view.name} {letter}.{field}")
    others = dict(oracle.named_parameters())
    for key, parameter in model.named_parameters():
        if id(parameter) not in inside and parameter.grad is not None:
            close(parameter.grad, others[key].grad, f"gradient of {key}")


@pytest.mark.covering(1)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "mode"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_exact(kind: str, mode: tuple[str, str, str], kernel: str) -> None:
    granularity, scope, heads = mode
    ratios: list[Any] = [0.25, 0.5] if granularity == "head" else [0.25, 0.5, 0.7, {"qk": 0.5}, {"qk": 0.6, "vo": 0.3}]
    ratios = ratios if kind in WHOLE else [0.5, ratios[-1]] if granularity != "head" else [0.5]
    if VERSION < (5,) and (kind, kernel) == ("electra", "sdpa"):
        pytest.skip("transformers 4 has only an eager ELECTRA")
    model, inputs = build(kind, kernel), example(kind)
    assert len(find_attention(model)) == 2
    for seed, ratio in enumerate(ratios):
        plan = make_plan(model, ratio, granularity=granularity, scope=scope, heads=heads, scorer="random", seed=seed)
        check(copy.deepcopy(model), inputs, plan)


@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_attention_weights(kind: str) -> None:
    """Weights of heads that stay are those of the dense model's same heads."""
    model = build(kind, "eager")
    plan = make_plan(model, 0.5, granularity="joint", heads="ragged", scorer="random", seed=4)
    oracle = copy.deepcopy(model)
    zero(oracle, plan)
    apply_plan(model, plan)
    with torch.no_grad():
        expected, found = (one(**example(kind), output_attentions=True).attentions for one in (oracle, model))
    for layer, before, after in zip(plan, expected, found, strict=True):
        assert (before[:, list(layer.kept_heads)] - after).abs().max() < 1e-10


def classifier(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "ast":
        config: Any = transformers.ASTConfig(**KINDS["ast"][1])
        return transformers.ASTForAudioClassification(config).double().eval()
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)).eval()


def logits(model: Any, kind: str) -> Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{key: value.to(dtype) for key, value in example(kind).items()}).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{"heads": "ragged"}, {"scope": "local"}, {"granularity": "head"}], ids=str)
@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every way to a directory and back gives the same bits."""
    model = classifier(kind)
    model.save_pretrained(tmp_path / "dense")
    plan = make_plan(model, 0.5, **options)
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "ours", max_shard_size="5KB")
    model.save_pretrained(tmp_path / "theirs")
    apply_to_checkpoint(tmp_path / "dense", plan, tmp_path / "streamed")
    loaded = [from_pretrained(tmp_path / name) for name in ("ours", "theirs", "streamed")]
    loaded.append(load_pruned(tmp_path / "ours", classifier(kind)))
    for again in loaded:
        assert find_attention(again) == find_attention(model)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert torch.equal(logits(again, kind), logits(model, kind))
    apply_plan(loaded[1], make_plan(loaded[1], 0.3, heads="ragged"))
    loaded[1].save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again"), kind), logits(loaded[1], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_two_prunings(kind: str, tmp_path: Path) -> None:
    """First what the host's attributes can say, where they can say anything, then what they cannot."""
    model = build(kind)
    apply_plan(model, make_plan(model, 0.5, scope="local"))
    apply_plan(model, make_plan(model, 0.3, heads="ragged"))
    save_pruned(model, tmp_path)
    again = from_pretrained(tmp_path)
    with torch.no_grad(), float64():
        found, expected = (one(**example(kind)).last_hidden_state for one in (again, model))
    close(found, expected, "output")


@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_stock(kind: str, tmp_path: Path) -> None:
    """Either transformers loads it and gives the same, or it cannot be said in a config and an error says so."""
    model = classifier(kind)
    if VERSION < (5,):
        with pytest.raises(NotExpressibleError, match="all that its class can have"):
            make_plan(model, 0.5, stock=True)
        return
    apply_plan(model, make_plan(model, 0.5, stock=True))
    export_stock(model, tmp_path)
    assert (logits(type(model).from_pretrained(tmp_path).eval(), kind) - logits(model, kind)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["ast", "vit"])
def test_by_transformers_own_loader(kind: str, tmp_path: Path) -> None:
    if VERSION < (4, 57):  # it would mark models as quantised
        with pytest.raises(ImportError, match=r"transformers 4\.57"):
            import_module("attnprune.integrations.auto")
        return
    from attnprune.integrations.auto import AttnPruneConfig

    model = classifier(kind)
    apply_plan(model, make_plan(model, 0.5, heads="ragged"))
    model.save_pretrained(tmp_path)
    dtype = {"dtype" if hasattr(model.config, "dtype") else "torch_dtype": "auto"}
    again = type(model).from_pretrained(tmp_path, quantization_config=AttnPruneConfig(), **dtype)
    assert (logits(again, kind) - logits(model, kind)).abs().max() < 1e-6
