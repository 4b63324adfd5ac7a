"""What pruned models are turned into computes what they compute: export, ONNX, compile, trace, int8."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from attnprune import export_onnx, find_attention, prune_attention, prune_channels, prune_heads
from attnprune.checkpoint.onnx import _attention
from attnprune.errors import DataError, ExportError, OptionError
from attnprune.nn import execution
from attnprune.nn.policy import Execution

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 12}
Built = tuple[nn.Module, dict[str, Tensor], frozenset[str]]


def ast() -> Built:
    config = transformers.ASTConfig(**SMALL, num_mel_bins=24, max_length=24, patch_size=16, time_stride=8,
                                    frequency_stride=8, num_labels=5)  # fmt: skip
    return transformers.ASTForAudioClassification(config), {"input_values": torch.randn(2, 24, 24)}, frozenset()


def vit() -> Built:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}, frozenset()


def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(24, 4, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return model, {"src": torch.randn(2, 6, 24)}, frozenset({"src"})


class SelfAttention(nn.Module):
    """Attention and nothing else: the least to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, src: Tensor) -> Tensor:
        return self.inner(src, src, src, need_weights=False)[0]  # type: ignore[no-any-return]


def attention() -> Built:
    return SelfAttention(), {"src": torch.randn(2, 6, 24)}, frozenset({"src"})


def bert() -> Built:
    config = transformers.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=32)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {"input_ids": torch.randint(0, 20, (2, 6)), "attention_mask": mask}
    return transformers.BertModel(config, add_pooling_layer=False), inputs, frozenset(inputs)


MODELS: dict[str, Callable[[], Built]] = {
    "AST": ast, "ViT": vit, "TransformerEncoder": encoder, "BERT": bert, "attention": attention,
}  # fmt: skip
PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "uniform": (0.5, {"scope": "local"}),
    "decoupled": ({"qk": 2 / 3, "vo": 1 / 3}, {"scope": "local"}),
    "ragged": (0.5, {"heads": "ragged", "granularity": "joint", "scorer": "random", "split": "auto"}),
}
CASES = [pytest.param(model, plan, id=f"{model}-{plan}") for model in ("AST", "ViT", "TransformerEncoder")
         for plan in PLANS]  # fmt: skip
few = pytest.mark.covering(1)  # to trace takes seconds


@lru_cache(maxsize=None)
def _pruned(name: str, plan: str) -> Built:
    torch.manual_seed(0)
    model, inputs, lengths = MODELS[name]()
    ratios, options = PLANS[plan]
    report = prune_attention(model, ratios, **options)
    after = report.layers[0].after
    assert after.ragged == (plan == "ragged")
    assert (after.qk_dims == after.vo_dims) == (plan == "uniform")
    return model.eval(), inputs, lengths


def pruned(name: str, plan: str) -> Built:
    model, inputs, lengths = _pruned(name, plan)
    return copy.deepcopy(model), inputs, lengths


def other(inputs: dict[str, Tensor], lengths: frozenset[str], batch: int = 3, more: int = 4) -> dict[str, Tensor]:
    """Inputs of another batch size and, where it may vary, another length."""
    found = {}
    for key, value in inputs.items():
        wider = torch.cat([value, value[:, :more]], dim=1) if key in lengths else value
        found[key] = wider.repeat(batch, *[1] * (value.dim() - 1))[:batch]
    return found


def output(found: Any) -> Tensor:
    for key in ("logits", "last_hidden_state"):
        found = found[key] if isinstance(found, dict) and key in found else getattr(found, key, found)
    return found


@torch.no_grad()
def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return output(model(**inputs)).detach()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@few
@pytest.mark.parametrize(("name", "plan"), CASES + [pytest.param("BERT", "ragged", id="BERT-ragged")])
def test_torch_export_with_dynamic_batch_and_length(name: str, plan: str) -> None:
    model, inputs, lengths = pruned(name, plan)
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=30)
    dims = {key: {0: batch, 1: length} if key in lengths else {0: batch} for key in inputs}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dims).module()
    for given in (inputs, other(inputs, lengths), other(inputs, lengths, batch=1)):
        close(run(program, given), run(model, given))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_need_nothing_of_this_library(strict: bool) -> None:
    model, inputs, _ = pruned("TransformerEncoder", "decoupled")
    x = inputs["src"].repeat(1, 100, 1)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        assert "attnprune" not in program.module().code
        close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "plan"),
    [pytest.param(*one.values, id=one.id, marks=pytest.mark.long) for one in CASES]
    + [pytest.param("BERT", "ragged", id="BERT-ragged")],
)
@pytest.mark.long
def test_onnx_at_other_sizes_than_exported(name: str, plan: str, tmp_path: Path) -> None:
    import onnxruntime

    model, inputs, lengths = pruned(name, plan)
    model.train()
    found = export_onnx(model, tmp_path / "model.onnx", inputs)
    assert model.training
    model.eval()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert found.error is not None
    assert found.error < 1e-5
    assert list(found.outputs) == [{"BERT": "last_hidden_state", "TransformerEncoder": "output"}.get(name, "logits")]
    for key, sizes in found.inputs.items():
        assert sizes[:2] == ("batch", "length" if key in lengths else inputs[key].shape[1])
        assert sizes[2:] == inputs[key].shape[2:]
    session = onnxruntime.InferenceSession(str(found.path), providers=["CPUExecutionProvider"])
    for batch, more in ((3, 4), (1, 5), (7, 0)):
        given = other(inputs, lengths, batch, more)
        ours = session.run(None, {key: value.numpy() for key, value in given.items()})[0]
        close(torch.from_numpy(ours), run(model, given), 1e-4)


@few
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_compile_without_a_graph_break(name: str, plan: str) -> None:
    model, inputs, lengths = pruned(name, plan)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, more in ((4, 4), (5, 5), (7, 3)):  # 3 would be taken for the number of colours
        given = other(inputs, lengths, batch, more)
        close(run(compiled, given), run(model, given))
    assert counter.frame_count == 1  # other sizes do not compile again


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=() if how in ("auto", "kernel", "products") else pytest.mark.long)
        for how in get_args(Execution)
    ],
)
@pytest.mark.parametrize(
    "name", ["attention", *(pytest.param(name, marks=pytest.mark.long) for name in ("AST", "TransformerEncoder"))]
)
def test_every_layout_compiles_without_a_graph_break(name: str, how: Any) -> None:
    model, inputs, _ = pruned(name, "ragged")
    expected = run(model, inputs)
    for grad in (False, True):
        torch._dynamo.reset()
        with execution(how), torch.set_grad_enabled(grad):
            found = output(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs))
        close(found.detach(), expected)


def ragged_attention() -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    prune_channels(layer, {"": {"qk": [[0], [0], [0, 1], [0, 1, 2]], "vo": [[0, 1], [0, 1], [0, 1, 2], []]}})
    return layer


def test_compiled_heads_run_by_themselves_or_are_arranged_at_run_time() -> None:
    """On a CPU, for inference: the former if tokens are few and fixed. In training heads are padded."""
    layer, x = ragged_attention(), torch.randn(2, 5, 32)
    calls: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        kernel = F.scaled_dot_product_attention
        places = [node.args[2].meta["example_value"] for node in graph.graph.nodes if node.target is kernel]
        queries = [node.args[0].meta["example_value"] for node in graph.graph.nodes if node.target is kernel]
        calls.append(sorted((*map(int, q.shape[1::2]), int(v.shape[-1])) for q, v in zip(queries, places, strict=True)))
        calls[-1] += [str(node.target) for node in graph.graph.nodes if "attnprune.attention" in str(node.target)]
        return graph.forward

    for grad, dynamic in ((False, True), (False, False), (True, False)):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
            found = compiled(x, x, x, need_weights=False)[0]
            close(found.detach(), layer(x, x, x, need_weights=False)[0].detach())
    assert calls[0] == ["attnprune.attention.default"]
    assert calls[1] == [(1, 5, 8), (1, 6, 5), (2, 7, 6)]
    assert all(qk == vo for _, qk, vo in calls[2])


@few
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.long), 9])
def test_what_is_arranged_at_run_time_is_exact(backend: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of masks with a row, or one per head, present or dense; causal; by products and, on many threads, by kernels."""
    layer, x = ragged_attention(), torch.randn(2, 520, 32)
    prune_heads(layer, {"": [1]})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole, heads, dense = (torch.randn(*rows, 520, 520) for rows in ((), (6,), (8,)))
    hidden = torch.rand(520, 520) < 0.3
    hidden[7] = True  # attends to nothing
    later = nn.Transformer.generate_square_subsequent_mask(520)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for mask, causal in ((None, False), (whole, False), (heads, False), (dense, False), (later, True)):
            found = compiled(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)[0]
            expected = layer(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)[0]
            loops = layer(x, x, x, attn_mask=mask)[0]
            close(found, expected)
            close(found, loops)
        found, expected = (one(x, x, x, need_weights=False, attn_mask=hidden)[0] for one in (compiled, layer))
        close(found, expected)


def test_the_operator_holds_what_operators_promise() -> None:
    q, k, v = torch.randn(2, 6, 15), torch.randn(2, 9, 15), torch.randn(2, 9, 12)
    mask = torch.randn(1, 3, 6, 9)
    torch.library.opcheck(torch.ops.attnprune.attention, (q, k, v, [5, 3, 5, 3, 5, 6], mask, False, 0.5))


@pytest.mark.long
def test_compile_more_layers_of_other_shapes_than_the_limit() -> None:
    """One graph for a whole model; one for each layer where layers are compiled one by one and the limit allows it."""
    number = 4
    layer = nn.TransformerEncoderLayer(64, 4, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, number, enable_nested_tensor=False).eval()
    prune_attention(model, 0.5, heads="ragged", scorer="random")
    shapes = {(spec.qk_dims, spec.vo_dims) for spec in find_attention(model)}
    assert len(shapes) == number
    x, counter = torch.randn(2, 5, 64), CompileCounter()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=number - 1), torch.no_grad():
        expected = model(x)
        close(torch.compile(model, fullgraph=True, backend=counter)(x), expected)
        assert counter.frame_count == 1
        torch._dynamo.reset()
        counter.clear()
        for one in model.layers:
            one.compile(backend=counter, recompile_limit=len(model.layers))
        close(model(x), expected)
        assert counter.frame_count == number


@pytest.mark.parametrize("name", [pytest.param("AST", marks=pytest.mark.long), "TransformerEncoder"])
def test_compile_forward_and_backward(name: str) -> None:
    model, inputs, _ = pruned(name, "ragged")
    key = next(iter(inputs))
    grads = []
    torch._dynamo.reset()
    for one in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x = inputs[key].clone().requires_grad_()
        output(one(**{key: x})).square().sum().backward()
        grads.append(x.grad)
    close(grads[1], grads[0], 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.long
def test_compile_with_inductor() -> None:
    layer, x = ragged_attention(), torch.randn(2, 5, 32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    with torch.no_grad():
        close(compiled(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_trace(name: str, plan: str) -> None:
    model, inputs, lengths = pruned(name, plan)
    with torch.no_grad():
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
    for given in (inputs, other(inputs, lengths), other(inputs, lengths, batch=700)):
        close(run(traced, given), run(model, given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_dynamic_int8_after_pruning(name: str, plan: str) -> None:
    """Every Linear runs in int8, the four projections too, as a float model with the rounded weights would."""
    model, inputs, lengths = pruned(name, plan)
    before = run(model, inputs)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    linears = {key: one for key, one in model.named_modules() if isinstance(one, nn.Linear)}
    rounded = copy.deepcopy(model)
    called = set()
    for key in linears:
        one = quantised.get_submodule(key)
        assert isinstance(one, torch.ao.nn.quantized.dynamic.Linear), key
        rounded.get_submodule(key).weight.data = one.weight().dequantize()
        one.register_forward_hook(lambda *_, key=key: called.add(key))
    given = other(inputs, lengths)
    found, expected = run(quantised, given), run(rounded, given)
    assert called == set(linears)
    assert len(linears) >= 4 * len(find_attention(model)) + 2
    assert float((found - expected).norm() / expected.norm()) < 0.1  # what is left: activations in 8 bits
    assert not torch.equal(found, expected)
    close(run(model, inputs), before, 0)


class _Looped(nn.Module):
    """Runs as often as its input says, which no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum())):
            x = x + 1
        return x


class _Widths(nn.Module):
    """A length that is also the width of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), pairs.softmax(-1) @ x


def test_onnx_finds_what_may_vary(tmp_path: Path) -> None:
    x, pairs = torch.randn(2, 6, 6), torch.randn(2, 5, 6)
    found = export_onnx(_Widths(), tmp_path / "a.onnx", (x[:1], pairs[:1]))
    assert found.inputs == {"x": ("batch", 6, 6), "pairs": ("batch", "length", 6)}
    assert [len(sizes) for sizes in found.outputs.values()] == [3, 3]
    fixed = export_onnx(_Widths(), tmp_path / "b.onnx", {"x": x, "pairs": pairs}, dynamic=(), check=False)
    assert fixed.inputs == {"x": (2, 6, 6), "pairs": (2, 5, 6)}
    assert fixed.error is None
    assert export_onnx(nn.Linear(6, 2), tmp_path / "c.onnx", x, dynamic=("batch",)).inputs == {"input": ("batch", 6, 6)}


@pytest.mark.long
def test_onnx_is_compared_at_other_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    sizes = []

    class Spy(onnxruntime.InferenceSession):
        def run(self, names: Any, given: dict[str, Any]) -> Any:
            sizes.append({key: value.shape for key, value in given.items()})
            return super().run(names, given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Spy)
    export_onnx(_Widths(), tmp_path / "a.onnx", {"x": torch.randn(2, 6, 6), "pairs": torch.randn(2, 5, 6)})
    assert sizes == [{"x": (2, 6, 6), "pairs": (2, 5, 6)}, {"x": (3, 6, 6), "pairs": (3, 4, 6)}]


@pytest.mark.parametrize(("name", "plan"), [("ViT", "uniform"), ("TransformerEncoder", "decoupled"), ("AST", "ragged")])
def test_onnx_metadata_tell_what_the_graph_has(name: str, plan: str) -> None:
    """Not what the config of the dense model says."""
    model, _, _ = pruned(name, plan)
    prune_heads(model, {0: [0]})
    (spec,) = find_attention(model)
    told = _attention(model)
    (found,) = json.loads(told["attnprune.attention"])
    assert int(told["num_heads"]) == found["num_heads"] == found["num_key_value_heads"] == spec.heads == 3
    assert (found["name"], found["qk_dims"], found["vo_dims"]) == (spec.name, [*spec.qk_dims], [*spec.vo_dims])


def test_onnx_writes_nothing_unless_all_is_well(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    model, x = nn.Linear(6, 2), torch.randn(2, 5, 6)
    with pytest.raises(ExportError, match=r"follow, found Could not guard on data-dependent expression"):
        export_onnx(_Looped(), target, x)
    with pytest.raises(ExportError, match="difference"):
        export_onnx(model, target, x, tolerance=-1.0)
    with pytest.raises(DataError, match="tensor"):
        export_onnx(model, target, {"input": 3})
    with pytest.raises(DataError, match="no dimension"):
        export_onnx(model, target, torch.tensor(3.0))
    with pytest.raises(DataError, match="at most 1"):
        export_onnx(model, target, (x, x))
    with pytest.raises(OptionError, match="dynamic"):
        export_onnx(model, target, x, dynamic="batch")
    with pytest.raises(OptionError, match="check"):
        export_onnx(model, target, x, check="maybe")
    with pytest.raises(OptionError, match="directory"):
        export_onnx(model, tmp_path / "none" / "a.onnx", x)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_text() == "old"


@pytest.mark.long
def test_onnx_weights_beside_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnprune.checkpoint.onnx

    monkeypatch.setattr(attnprune.checkpoint.onnx, "_LARGEST", 100)
    found = export_onnx(_Widths(), tmp_path / "model.onnx", (torch.randn(2, 6, 6), torch.randn(2, 5, 6)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert found.error is not None


@pytest.mark.long
def test_the_dense_model_exports_too(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, inputs, _ = encoder()
        found = export_onnx(model.eval(), tmp_path / "model.onnx", inputs)
    assert found.inputs == {"src": ("batch", "length", 24)}
