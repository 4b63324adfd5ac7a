"""A fault at any line of ours leaves the old state of everything, and every setting: what is reported as failed did not
happen."""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import attnprune
from attnprune import AttentionPruner, apply_plan, load_pruned, make_plan, pack_qkv, prune_attention, save_pruned
from attnprune.nn import attempt
from attnprune.nn.policy import forced

from .conformance import family, fresh, inputs
from .selection import ALL
from .test_pruner import train

OURS = str(Path(attnprune.__file__).parent)
SHARE = 300
FAULTS = (KeyboardInterrupt, MemoryError, OSError)
pytestmark = [  # files that a fault left open, which the collector closes
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def digest(value: Any) -> Any:
    """Something to compare that no longer changes: of tensors dtype, shape and bits."""
    if isinstance(value, Tensor):
        bits = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if not value.is_meta else b""
        grad = digest(value.grad) if value.is_leaf and value.grad is not None else None
        return str(value.dtype), tuple(value.shape), hashlib.md5(bits).hexdigest(), value.requires_grad, grad
    if isinstance(value, Mapping):
        return {str(key): digest(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [digest(one) for one in value]
    return repr(value)


def of_model(model: nn.Module) -> Any:
    """Classes, attributes, hooks and tensors of all modules."""
    hidden = ("_parameters", "_buffers", "_modules")
    return [
        (name, type(module), digest({key: value for key, value in vars(module).items() if key not in hidden}),
         digest(module._parameters), digest(module._buffers), list(module._modules))
        for name, module in model.named_modules()
    ]  # fmt: skip


def of_optimizer(optimizer: Any, model: nn.Module) -> Any:
    held = [[p is q for p in group["params"]] for group in optimizer.param_groups for q in model.parameters()]
    return held, [digest(optimizer.state[p]) for p in model.parameters() if p in optimizer.state], len(optimizer.state)


def of_pruner(pruner: AttentionPruner) -> Any:
    return digest(pruner.state_dict())


def of_folder(folder: Path) -> Any:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def settings() -> Any:
    """What is the process's or the thread's."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), forced(),
        torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable, [*warnings.filters],
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), torch.get_default_device(),
        torch.is_autocast_enabled("cpu"), attempt._TURN, getattr(attempt._RUNNING, "attempt", None),
        attnprune.calibration.processes._sharing.get(), hashlib.md5(torch.get_rng_state().numpy()).hexdigest(),
        nn.modules.module._global_parameter_registration_hooks,
    )  # fmt: skip


class Trial(NamedTuple):
    """What may be interrupted."""

    call: Callable[[], object]
    state: Callable[[], Any]


def faulted(
    call: Callable[[], object], place: Any = None, kind: type[BaseException] = OSError, *, last: int = 0
) -> tuple[bool, dict[Any, int]]:
    """Calls with a fault before a line of ours.

    Args:
        call: what is called.
        place: the line: file, function and number.
        kind: the fault.
        last: how often the line is passed before.

    Returns:
        Whether it came, and how often every line was passed, in the order of their first turns.
    """
    passed: dict[Any, int] = {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(OURS) or (place is not None and code.co_name != place[1]):
            return None
        if event == "line":
            here = code.co_filename[len(OURS) + 1 :], code.co_name, frame.f_lineno
            if here == place and passed.get(here, 0) == last:
                raise kind("injected")
            passed[here] = passed.get(here, 0) + 1
        return trace

    sys.settrace(trace)
    try:
        call()
    except kind as error:
        if "injected" not in str(error):
            raise
        return True, passed
    finally:
        sys.settrace(None)
    return False, passed


def check(make: Callable[[], Trial], share: int) -> None:
    """Of the lines that are passed every ``share``-th, and the last few; with ATTNPRUNE_ALL=1 all of them, each in its
    first turn and in its last."""
    make().call()  # what is cached takes fewer lines the second time
    trial = make()
    before = trial.state()
    torch.manual_seed(0)
    _, passed = faulted(trial.call)
    after = trial.state()
    lines = [*passed]
    ends = lines[-4:]
    chosen = lines if ALL else sorted({*lines[::share], *ends}, key=lines.index)
    problems = []
    for number, place in enumerate(chosen):
        turns = {0, passed[place] - 1} if ALL or place in ends else {passed[place] - 1 if number % 2 else 0}
        for turn in sorted(turns):
            trial = make()
            torch.manual_seed(0)
            then, kind = settings(), FAULTS[number % len(FAULTS)]
            came, _ = faulted(trial.call, place, kind, last=turn)
            if came and settings() != then:
                problems.append(f"a setting changed by {kind.__name__} at {place}, turn {turn}")
            now = trial.state()
            if now != (before if came else after):
                what = "done all the same" if now == after else "a mixture"
                problems.append(f"{what} after {kind.__name__} at {place}, turn {turn}")
            attempt._TURN.clear()
    assert not problems, "\n".join(problems[:20])


def pruned_folder(name: str, tmp_path: Path, **options: Any) -> Path:
    model = fresh(name, 0)
    prune_attention(model, 0.5, **options)
    return save_pruned(model, tmp_path / "pruned")


@pytest.mark.parametrize(("name", "ragged"), [("Encoder", True), pytest.param("ViT", False, marks=pytest.mark.long)])
def test_loading_into_a_dense_model(name: str, ragged: bool, tmp_path: Path) -> None:
    folder = pruned_folder(name, tmp_path, heads="ragged" if ragged else "uniform")

    def make() -> Trial:
        model = fresh(name, 0)
        return Trial(lambda: load_pruned(folder, model), lambda: of_model(model))

    check(make, SHARE)


def test_loading_into_a_pruned_model_of_another_dtype(tmp_path: Path) -> None:
    folder = pruned_folder("ViT", tmp_path, heads="ragged")

    def make() -> Trial:
        model = fresh("ViT", 0)
        prune_attention(model, 0.25, heads="ragged")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
                parameter.grad = parameter.clone()
        return Trial(lambda: load_pruned(folder, model, dtype=torch.float32), lambda: of_model(model))

    folder = save_pruned(make().state.__closure__[0].cell_contents, tmp_path / "other")  # type: ignore[index]
    check(make, SHARE)


def stepped(name: str) -> tuple[nn.Module, Any, Any, AttentionPruner]:
    model = fresh(name, 0)
    average, optimizer = AveragedModel(model), torch.optim.Adam(model.parameters())
    pruner = AttentionPruner(model, 0.5, steps=2, scope="local", scorer="fisher")
    train(name, model, optimizer, range(2))
    pruner.observe()
    return model, optimizer, average, pruner


def of_all(model: nn.Module, optimizer: Any, average: Any, pruner: AttentionPruner) -> Any:
    return of_model(model), of_optimizer(optimizer, model), of_model(average), of_pruner(pruner)


@pytest.mark.parametrize("name", ["MHA", pytest.param("ViT", marks=pytest.mark.long)])
def test_a_step_of_a_pruner(name: str) -> None:
    whole = stepped(name)

    def make() -> Trial:
        model, optimizer, average, pruner = tried = copy.deepcopy(whole)
        return Trial(lambda: pruner.step(optimizer, averages=[average]), lambda: of_all(*tried))

    check(make, SHARE)


def test_the_state_of_a_pruner() -> None:
    whole = stepped("MHA")
    whole[3].step(whole[1], averages=[whole[2]])
    saved, fresh_one = whole[3].state_dict(), stepped("MHA")

    def make() -> Trial:
        model, optimizer, average, pruner = tried = copy.deepcopy(fresh_one)
        return Trial(
            lambda: pruner.load_state_dict(saved, optimizer=optimizer, averages=[average]), lambda: of_all(*tried)
        )

    check(make, SHARE)


WAYS: dict[str, dict[str, Any]] = {
    "rotated": {"split": "auto", "heads": "ragged"},
    "in sequence": {"sequential": True},
    "fisher": {"scorer": "fisher", "scope": "local"},
}


def data_of(name: str) -> list[Any]:
    given = {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs(name, 0).items()}
    return [given]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("Encoder", "fisher"),
        pytest.param("ViT", "rotated", marks=pytest.mark.long),
        pytest.param("Encoder", "in sequence", marks=pytest.mark.long),
    ],
)
def test_planning_with_data(name: str, way: str) -> None:
    data = data_of(name)

    def loss(model: Any, batch: Any) -> Tensor:
        return family(name).run(model, batch).square().mean()

    def make() -> Trial:
        model = fresh(name, 0, train=True)
        return Trial(
            lambda: make_plan(model, 0.5, data=data, loss_fn=loss, progress=False, **WAYS[way]), lambda: of_model(model)
        )

    check(make, SHARE)


@pytest.mark.parametrize("name", ["Encoder", pytest.param("ViT", marks=pytest.mark.long)])
def test_packing(name: str) -> None:
    whole = fresh(name, 0)
    prune_attention(whole, 0.5, scope="local")

    def make() -> Trial:
        model = copy.deepcopy(whole)
        return Trial(lambda: pack_qkv(model), lambda: of_model(model))

    check(make, SHARE)

    def back() -> Trial:
        model = copy.deepcopy(whole)
        pack_qkv(model)
        return Trial(lambda: attnprune.unpack_qkv(model), lambda: of_model(model))

    check(back, SHARE)


def test_pruning_a_checkpoint(tmp_path: Path) -> None:
    model = fresh("ViT", 0)
    source, plan = save_pruned(model, tmp_path / "dense"), make_plan(model, 0.5, heads="ragged")
    numbers, other = iter(range(10**6)), nn.Linear(2, 2)

    def make() -> Trial:
        target = tmp_path / str(next(numbers))
        skeleton = copy.deepcopy(model).to("meta")
        save_pruned(other, target)
        return Trial(
            lambda: attnprune.apply_to_checkpoint(source, plan, target, model=skeleton),
            lambda: (of_model(skeleton), of_folder(target)),
        )

    check(make, 2 * SHARE)


def test_exporting_to_stock(tmp_path: Path) -> None:
    model = fresh("ViT", 0)
    prune_attention(model, 0.5, stock=True)
    numbers = iter(range(10**6))

    def make() -> Trial:
        target = tmp_path / str(next(numbers))
        return Trial(
            lambda: attnprune.export_stock(model, target),
            lambda: (of_model(model), of_folder(target) if target.exists() else None),
        )

    check(make, 3 * SHARE)


@pytest.mark.long
@pytest.mark.parametrize("name", ["Encoder", pytest.param("ViT", marks=pytest.mark.long)])
def test_pruning_with_an_optimizer(name: str) -> None:
    data, model = data_of(name), fresh(name, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    train(name, model, optimizer, range(1))
    whole = model, optimizer, AveragedModel(model)

    def make() -> Trial:
        model, optimizer, average = copy.deepcopy(whole)
        return Trial(
            lambda: prune_attention(
                model, 0.5, data=data, optimizer=optimizer, averages=[average], progress=False, example_inputs=data[0]
            ),
            lambda: (of_model(model), of_optimizer(optimizer, model), of_model(average)),
        )

    check(make, SHARE)


def test_pruning_in_inference_mode() -> None:
    def make() -> Trial:
        model = fresh("MHA", 0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def call() -> None:
            with torch.inference_mode():
                apply_plan(model, plan, optimizer=optimizer)

        return Trial(call, lambda: (of_model(model), of_optimizer(optimizer, model)))

    plan = make_plan(fresh("MHA", 0), 0.5)
    check(make, SHARE)
