"""What modes of PyTorch see of a pruned model, and leave behind: fake tensors, traces, vmap, inference, threads."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attnprune import prune_attention
from attnprune.nn import execution
from attnprune.nn.kept import kept
from attnprune.nn.policy import asked_once, forced


def ragged(layers: int = 2) -> nn.Module:
    """A pruned encoder of shapes that no other test has run."""
    layer = nn.TransformerEncoderLayer(40, 4, 24, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    seed = int(torch.randint(1 << 30, ()))
    prune_attention(model, 0.5, heads="ragged", scorer="random", seed=seed, granularity="joint", split="auto")
    return model


@pytest.fixture(params=["auto", "padded"])
def how(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_fake_tensors_leave_nothing(how: Any) -> None:
    model, x = ragged(), torch.randn(2, 5, 40)
    with execution(how):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(model(mode.from_tensor(x)), FakeTensor)
        found = model(x)
        assert type(found) is Tensor
        found.square().mean().backward()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # nor does eager code
            assert isinstance(model(mode.from_tensor(x)), FakeTensor)
    assert all(type(parameter.grad) is Tensor for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_the_first_trace_is_the_graph(grad: bool, how: Any) -> None:
    """The check of ``torch.jit.trace`` compares it with a second one."""
    model, x = ragged().eval(), torch.randn(2, 5, 40)
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


def test_inference_mode_leaves_nothing(how: Any) -> None:
    model, x = ragged(), torch.randn(2, 5, 40)
    with execution(how):
        with torch.inference_mode():
            model(x)
        model(x).square().mean().backward()


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
