"""What modes of PyTorch see of a pruned model, and leave behind: fake tensors, traces, vmap, inference, threads."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import attnprune
from attnprune import (
    AttentionPruner,
    calibrate,
    load_pruned,
    pack_qkv,
    prune_attention,
    prune_channels,
    prune_heads,
    save_pruned,
    unpack_qkv,
)
from attnprune.errors import WrappedModelError
from attnprune.nn import execution
from attnprune.nn.kept import kept
from attnprune.nn.policy import asked_once, forced

from .families import timm_module


class Embedded(nn.Module):
    """A model of transformers on what its first layer is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def attending() -> nn.Module:
    layer = nn.TransformerEncoderLayer(40, 4, 24, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def rotary() -> nn.Module:
    sizes = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 5, "head_dim": 8}
    config = transformers.LlamaConfig(vocab_size=50, intermediate_size=16, num_key_value_heads=5, **sizes)
    return Embedded(transformers.LlamaModel(config))


def expanded() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=40, d_kv=10, d_ff=8, num_layers=1, num_heads=4)
    return Embedded(transformers.T5EncoderModel(config).eval())


def fused() -> nn.Module:
    return timm_module("timm.models.vision_transformer").Attention(40, 4)


MADE = [attending, rotary, expanded, fused]


def ragged(make: Callable[[], nn.Module] = attending) -> nn.Module:
    """A pruned model of shapes that no other test has run."""
    model, seed = make(), int(torch.randint(1 << 30, ()))
    prune_attention(model, 0.5, heads="ragged", scorer="random", seed=seed, granularity="joint", split="auto")
    return model


@pytest.fixture(params=["auto", "padded"])
def how(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", MADE)
def test_fake_tensors_leave_nothing(make: Any, how: Any) -> None:
    model, x = ragged(make), torch.randn(2, 5, 40)
    with execution(how):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(model(mode.from_tensor(x)), FakeTensor)
        found = model(x)
        assert type(found) is Tensor
        found.square().mean().backward()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # nor does eager code
            assert isinstance(model(mode.from_tensor(x)), FakeTensor)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]  # tokens have none
    assert len(grads) >= 4
    assert all(type(grad) is Tensor for grad in grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.covering(1)
@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("grad", [False, True])
def test_the_first_trace_is_the_graph(grad: bool, make: Any, how: Any) -> None:
    """The check of ``torch.jit.trace`` compares it with a second one."""
    model, x = ragged(make).eval(), torch.randn(2, 5, 40)
    with torch.set_grad_enabled(grad), execution(how):
        traced = torch.jit.trace(model, x)
        for given in (x, torch.randn(3, 7, 40)):
            assert torch.allclose(traced(given), model(given), atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_and_grad_leave_nothing(how: Any) -> None:
    model, x = ragged(), torch.randn(3, 2, 5, 40)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().mean()  # type: ignore[no-any-return]

    with execution(how):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        for i, one in enumerate(x):
            model.zero_grad()
            loss(weights, one).backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                assert torch.allclose(each[name][i], parameter.grad, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", MADE)
def test_inference_mode_leaves_nothing(make: Any, how: Any) -> None:
    model, x = ragged(make), torch.randn(2, 5, 40)
    with execution(how):
        with torch.inference_mode():
            model(x)
        model(x).square().mean().backward()


def bert() -> nn.Module:
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(**config, intermediate_size=16)).eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 24, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def some(model: nn.Module) -> Tensor:
    return torch.randn(2, 5, 32) if isinstance(model, nn.TransformerEncoder) else torch.randint(0, 50, (2, 5))


def told(model: nn.Module) -> torch.Tensor:
    """A loss that depends on attention: the sum of what a LayerNorm gives is the same whatever it reads."""
    out = last(model(some(model)))
    return (out * torch.arange(out.shape[-1])).sum()


def last(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return found


def by_data(model: nn.Module, _: Path) -> None:
    prune_attention(model, 0.5, data=[some(model) for _ in range(3)], split="auto", progress=False)


def by_a_loss(model: nn.Module, _: Path) -> None:
    data = [some(model) for _ in range(3)]
    prune_attention(
        model, 0.5, data=data, scorer="fisher", progress=False, loss_fn=lambda m, x: last(m(x))[..., 0].sum()
    )


def by_calibration(model: nn.Module, _: Path) -> None:
    found = calibrate(model, [some(model) for _ in range(3)], progress=False)
    with torch.inference_mode(False):
        assert not any(value.is_inference() for value in found.state_dict().values())
    prune_attention(model, 0.5, calibration=found)


def by_hand(model: nn.Module, _: Path) -> None:
    prune_heads(model, {0: [1]})
    prune_channels(model, {0: {"qk": [[0], [], []]}})
    assert pack_qkv(model) == unpack_qkv(model) == pack_qkv(model)


def by_a_file(model: nn.Module, folder: Path) -> None:
    with torch.inference_mode(False):
        dense = copy.deepcopy(model)
    prune_attention(model, 0.5, heads="ragged")
    loaded = load_pruned(save_pruned(model, folder), dense)
    model.__dict__.update(loaded.__dict__)


def by_a_pruner(model: nn.Module, _: Path) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters())
        told(model).backward()
        optimizer.step()
        average = copy.deepcopy(model)
    pruner = AttentionPruner(model, 0.5, steps=1)
    pruner.observe()
    pruner.step(optimizer, averages=[average])
    assert not any(value.is_inference() for state in optimizer.state.values() for value in state.values())
    assert not any(parameter.is_inference() for parameter in average.parameters())
    with torch.inference_mode(False), torch.enable_grad():
        told(model).backward()
        optimizer.step()


@pytest.mark.parametrize("way", [by_data, by_a_loss, by_calibration, by_hand, by_a_file, by_a_pruner])
@pytest.mark.parametrize("make", [encoder, bert])
def test_what_is_made_in_inference_mode_can_be_trained(make: Any, way: Any, tmp_path: Path) -> None:
    model = make()
    with torch.inference_mode():
        way(model, tmp_path)
        assert torch.is_inference_mode_enabled()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    last(model(some(model))).sum().backward()


def test_a_model_that_can_never_be_trained_is_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = encoder()
        with pytest.raises(WrappedModelError, match="inference_mode"):
            prune_attention(model, 0.5, data=[some(model)], progress=False)
    folder = save_pruned(encoder(), tmp_path)
    with torch.inference_mode():
        loaded = load_pruned(folder, encoder())  # every value is a new one
    loaded(some(model)).sum().backward()
    model = copy.deepcopy(model)  # the remedy
    prune_attention(model, 0.5, data=[some(model)], progress=False)
    last(model(some(model))).sum().backward()


@pytest.mark.parametrize("make", [encoder, bert])
def test_a_teacher_may_be_one_that_can_never_be_trained(make: Any) -> None:
    model, data = make(), [some(make()) for _ in range(4)]
    with torch.inference_mode():
        dense = make()
    flags = [parameter.requires_grad for parameter in dense.parameters()]
    prune_attention(model, 0.5)
    attnprune.recover(model, dense, data, 1, progress=False)
    attnprune.teacher_loss(dense)(model, data[0]).backward()
    assert [parameter.requires_grad for parameter in dense.parameters()] == flags


def test_what_is_kept_belongs_to_no_mode() -> None:
    made: list[Tensor] = []

    @kept
    def ramp(count: int) -> Tensor:
        made.append(torch.arange(count))
        return made[-1]

    with FakeTensorMode():
        assert isinstance(ramp(3), FakeTensor)
        assert ramp(3) is not ramp(3)
    with torch.inference_mode(), torch.device("meta"):
        assert not ramp(3).is_inference()
        assert ramp(3).device.type == "cpu"
    assert ramp(3) is ramp(3)
    assert len(made) == 4


def test_a_layout_is_forced_in_its_own_thread_and_task() -> None:
    seen = []
    with execution("padded"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
        with execution("groups"):
            seen.append(forced())
        seen.append(forced())
    assert seen == ["auto", "groups", "padded"]
    assert forced() == "auto"

    async def task(how: Any) -> str:
        with execution(how):
            await asyncio.sleep(0)
            return forced()

    async def both() -> list[str]:
        return await asyncio.gather(task("padded"), task("groups"))

    assert asyncio.run(both()) == ["padded", "groups"]


def test_a_layout_is_no_longer_forced_after_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), execution("padded"):
        raise KeyboardInterrupt
    assert forced() == "auto"


def test_compiled_code_follows_what_is_forced() -> None:
    def wide(x: Tensor) -> Tensor:
        return x + 1 if forced() == "padded" else x

    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.zeros(())
    compiled = torch.compile(wide, fullgraph=True, backend=counter)
    found = [float(compiled(x))]
    for how in ("padded", "groups", "padded"):
        with execution(how):  # type: ignore[arg-type]
            found.append(float(compiled(x)))
    assert [*found, float(compiled(x))] == [0, 1, 0, 1, 0]


def test_the_mark_of_constants_is_the_compilers_own() -> None:
    def marked() -> None: ...

    assert vars(torch.compiler.assume_constant_result(marked)) == vars(asked_once(lambda: None))


# models that hand every layer a mask with a row for each head of the dense model


def by_head(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    image = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    ids = {"input_ids": torch.randint(1, 50, (2, 5))}
    if name in ("Beit", "Data2VecVision"):
        config = getattr(transformers, f"{name}Config")(**image, use_shared_relative_position_bias=True)
        return getattr(transformers, f"{name}Model")(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    mpt = transformers.MptConfig(vocab_size=50, d_model=32, n_layers=2, n_heads=4, expansion_ratio=1)
    return transformers.MptModel(mpt).eval(), ids


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as torch fakes buffers
@pytest.mark.parametrize("name", ["Beit", "Data2VecVision", "Mpt"])
def test_masks_by_dense_head_and_fake_tensors(name: str) -> None:
    """Whole heads go, the other rows are picked; fake tensors leave nothing behind."""
    model, given = by_head(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    other = copy.deepcopy(model)
    report = attnprune.prune_heads(model, {0: [1, 2], 1: [0]})
    model(**given)  # transformers keeps indices of its own, dense models' too, from the first call
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(**{key: mode.from_tensor(x) for key, x in given.items()})
    with attnprune.masked(other, report.plan), torch.no_grad():
        expected = other(**given).last_hidden_state
    found = model(**given).last_hidden_state
    assert type(found.detach()) is Tensor
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    assert all(type(p.grad) in (Tensor, type(None)) for p in model.parameters())
