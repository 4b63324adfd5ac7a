"""Recovery without labels: losses against a teacher, and what they leave behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnprune import capture, distillation_loss, hidden_loss, prune_attention, teacher_loss
from attnprune.errors import DataError, OptionError
from attnprune.recovery.blocks import find_blocks

from .conformance import fresh, inputs
from .families import FAMILIES


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_is_that_of_the_divergence(temperature: float) -> None:
    student, teacher = logits(0, 3, 4, 5).requires_grad_(), logits(1, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, temperature=temperature), student)
    loss = distillation_loss(student, teacher, temperature=temperature)
    p, q = (x / temperature for x in (teacher, student.detach()))
    by_hand = (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1).mean() * temperature**2
    assert abs(float(loss.detach()) - float(by_hand)) < 1e-12
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.allclose(grad, (q.softmax(-1) - p.softmax(-1)) * temperature / 12)


def test_outputs_without_classes_are_compared_by_squares() -> None:
    a, b = logits(0, 3, 4, 5), logits(1, 3, 4, 5)
    one, other = SimpleNamespace(last_hidden_state=a), SimpleNamespace(last_hidden_state=b)
    assert torch.allclose(distillation_loss(one, other), F.mse_loss(a, b))
    assert torch.allclose(distillation_loss(a[..., :1], b[..., :1]), F.mse_loss(a[..., :1], b[..., :1]))
    carried = distillation_loss(SimpleNamespace(logits=a), SimpleNamespace(logits=b))
    assert torch.equal(carried, distillation_loss(a, b))


def test_masked_tokens_do_not_count_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(0, 2, 4, 5).requires_grad_(), logits(1, 2, 4, 5).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    loss = distillation_loss(student, teacher, mask=mask)
    short = torch.cat([student[0], student[1, :2]]), torch.cat([teacher[0], teacher[1, :2]])
    assert torch.allclose(loss, distillation_loss(*short))
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not student.grad[1, 2:].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_models_lose_nothing_and_pruned_ones_do(name: str) -> None:
    """Outputs of Hugging Face models, tensors, keyword and positional batches; hooks and modes come back."""
    teacher, student = fresh(name, 0), fresh(name, 0, train=True)
    batch = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs(name, 0).items()}
    loss_fn = teacher_loss(teacher, hidden=2.0)
    before = [(m, m.training, dict(m._forward_hooks)) for one in (teacher, student) for m in one.modules()]
    student.eval()
    assert 0 <= float(loss_fn(student, batch).detach()) < 1e-12  # kernels differ where gradients are off
    student.train()
    assert before == [(m, m.training, dict(m._forward_hooks)) for one in (teacher, student) for m in one.modules()]
    prune_attention(student, 0.5, scorer="random")
    loss = loss_fn(student, batch)
    assert float(loss.detach()) > 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in teacher.parameters())
    assert sum(p.grad is not None for p in student.parameters()) > len(list(student.parameters())) / 2


def test_hidden_loss_is_the_mean_relative_square() -> None:
    ours = {"a": logits(0, 2, 3, 4), "b": logits(1, 2, 3, 4)}
    theirs = {"a": logits(2, 2, 3, 4), "b": logits(3, 2, 3, 4)}
    expected = sum(((ours[k] - theirs[k]).square().sum() / theirs[k].square().sum()) for k in ours) / 2
    assert torch.allclose(hidden_loss(ours, theirs), torch.as_tensor(expected))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    real = {k: v[mask.bool()] for k, v in ours.items()}, {k: v[mask.bool()] for k, v in theirs.items()}
    assert torch.allclose(hidden_loss(ours, theirs, mask=mask), hidden_loss(*real))


def test_the_teacher_has_neither_dropout_nor_a_say_in_random_state() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    student = copy.deepcopy(teacher).eval()
    state = torch.get_rng_state()
    assert float(teacher_loss(teacher, hidden=1.0)(student, torch.randn(3, 4, 16)).detach()) < 1e-6
    assert teacher.training
    torch.set_rng_state(state)
    _ = torch.randn(3, 4, 16)
    after = torch.get_rng_state()
    teacher_loss(teacher)(student, torch.zeros(3, 4, 16))
    assert torch.equal(torch.get_rng_state(), after)


def test_recovery_without_labels() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 5))
    student = copy.deepcopy(teacher)
    prune_attention(student, 0.5, scorer="random")
    x, loss_fn = torch.randn(32, 6, 16), teacher_loss(teacher, temperature=2.0, hidden=0.5)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_fn(student, x)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4


def test_hooks_go_when_a_forward_fails() -> None:
    model = fresh("ViT", 0)

    def fail() -> None:
        with capture(model) as seen:
            assert seen == {}
            assert sum(len(m._forward_hooks) for m in model.modules()) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(m._forward_hooks for m in model.modules())


def test_blocks() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32)
    (block,) = find_blocks(nn.Sequential(layer, nn.Linear(16, 5)))
    assert (block.name, block.linears) == ("0", ("0.linear1", "0.linear2"))
    assert block.attention == (
        "0.self_attn", "0.self_attn.out_proj", "0.multihead_attn", "0.multihead_attn.out_proj",
    )  # fmt: skip
    bare = nn.Sequential(nn.Sequential(nn.MultiheadAttention(16, 2)), nn.Linear(16, 5))
    assert [(block.name, block.linears) for block in find_blocks(bare)] == [("0.0", ())]  # no MLP: not the head
    (alone,) = find_blocks(nn.MultiheadAttention(16, 2))
    assert (alone.name, alone.linears) == ("", ())
    bert = find_blocks(fresh("Bert", 1))  # with cross-attention
    assert [block.name for block in bert] == ["encoder.layer.0", "encoder.layer.1"]
    assert len(bert[0].attention) == 8
    assert len(bert[0].linears) == 2


def test_what_is_refused() -> None:
    a = logits(0, 2, 3)
    model: Any = fresh("ViT", 0)
    for call, error, words in (
        (lambda: distillation_loss(a, a, temperature=0), OptionError, "temperature"),
        (lambda: distillation_loss(a, a[:1]), DataError, r"shape \(1, 3\)"),
        (lambda: distillation_loss({"loss": a}, a), DataError, "a dict with loss"),
        (lambda: distillation_loss({"logits": a, "boxes": a}, a), DataError, "boxes"),
        (lambda: hidden_loss({}, {}), DataError, "same blocks"),
        (lambda: hidden_loss({"a": a}, {"a": a[:1]}), DataError, r"a: .*shape \(1, 3\)"),
        (lambda: teacher_loss(model, hidden=-1.0), OptionError, "hidden"),
        (lambda: teacher_loss("model"), OptionError, "teacher"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=words):
            call()
