"""What a model's outputs are, how it is called with a batch, and losses of both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers import modeling_outputs as hf
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.models.clap.modeling_clap import ClapOutput
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.sam.modeling_sam import SamImageSegmentationOutput
from transformers.models.siglip.modeling_siglip import SiglipOutput

import attnprune
from attnprune.calibration.batches import call_of, forward
from attnprune.calibration.losses import loss_of
from attnprune.errors import DataError, OptionError
from attnprune.planning.scorers import outputs_of, projection_loss

SIZES: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
QUIET: Any = {"progress": False}


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


def encoder(layers: int = 1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def clip() -> CLIPModel:
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 2}
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def pairs(images: int = 4, texts: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return {"input_ids": torch.randint(3, 20, (texts, 6), generator=generator), "pixel_values": pixels}


# outputs


def filled(kind: Any, *keys: str) -> Any:
    """An output of a class of transformers with all that a forward might put there."""
    x = torch.zeros(2, 3, 4)
    usual: dict[str, Any] = {
        "loss": x.sum(), "hidden_states": (x, x), "attentions": (x, x), "past_key_values": ((x, x), (x, x)),
        "last_hidden_state": x, "pooler_output": x[:, 0], "encoder_last_hidden_state": x, "decoder_hidden_states": (x,),
        "auxiliary_outputs": [{"logits": x}], "auxiliary_logits": [{"masks": x}], "loss_dict": {"a": x},
        "transformer_decoder_last_hidden_state": x,
        "text_model_output": {"last_hidden_state": x}, "vision_model_output": {"last_hidden_state": x},
        "audio_model_output": {"last_hidden_state": x}, "logits_per_image": x, "logits_per_text": x,
        "logits_per_audio": x,
    }  # fmt: skip
    known = kind.__dataclass_fields__
    return kind(**{key: value for key, value in usual.items() if key in known}, **dict.fromkeys(keys, x))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (hf.BaseModelOutput, "last_hidden_state"),
        (hf.BaseModelOutputWithPooling, "last_hidden_state pooler_output"),
        (hf.Seq2SeqModelOutput, "last_hidden_state"),
        (hf.Seq2SeqLMOutput, "logits"),
        (hf.CausalLMOutputWithPast, "logits"),
        (hf.CausalLMOutput, "logits"),
        (hf.MaskedLMOutput, "logits"),
        (hf.SequenceClassifierOutput, "logits"),
        (hf.QuestionAnsweringModelOutput, "start_logits end_logits"),
        (hf.SemanticSegmenterOutput, "logits"),
        (hf.DepthEstimatorOutput, "predicted_depth"),
        (hf.XVectorOutput, "logits embeddings"),
        (hf.MaskedImageModelingOutput, "reconstruction"),
        (BertForPreTrainingOutput, "prediction_logits seq_relationship_logits"),
        (DetrObjectDetectionOutput, "logits pred_boxes"),
        (MaskFormerForInstanceSegmentationOutput, "class_queries_logits masks_queries_logits"),
        (SamImageSegmentationOutput, "iou_scores pred_masks"),
        (CLIPOutput, "text_embeds image_embeds"),
        (SiglipOutput, "text_embeds image_embeds"),
        (ClapOutput, "text_embeds audio_embeds"),
    ],
)
def test_outputs_of_classes_of_transformers(kind: Any, names: str) -> None:
    keys = [key for key in names.split() if "hidden_state" not in key and key != "pooler_output"]
    assert [one.name for one in outputs_of(filled(kind, *keys))] == names.split()


class Two(NamedTuple):
    boxes: Tensor
    loss: Tensor


def test_outputs_of_other_things() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2, 4)
    cache = ((torch.zeros(2, 1, 3, 4),) * 2,) * 2
    for output, expected in (
        (x, [x]),
        (x.sum(), [x.sum()]),
        ((x, y), [x, y]),
        ([x, None, y.long()], [x]),
        ((x.sum(), x, cache), [x]),
        ((x, DynamicCache(), (y, y)), [x, y, y]),
        ({"a": {"b": x}, "c": [y]}, [x, y]),
        (Two(x, y), [x]),
        (SimpleNamespace(logits=x, last_hidden_state=y), [x]),
        ({"token_embeddings": y, "sentence_embedding": x, "attention_mask": y.long()}, [x]),
        ((x, y, torch.tensor(3.0)), [x, y]),
    ):
        found = [one.tensor for one in outputs_of(output)]
        assert len(found) == len(expected), output
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True)), output
    for output in (None, x.long(), {"loss": x.sum()}, (), {"past_key_values": cache}):
        with pytest.raises(DataError, match="output_fn="):
            outputs_of(output)


def test_output_fn_says_what_is_taken() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2, 4)
    assert [one.name for one in outputs_of({"loss": x}, lambda output: output)] == ["loss"]
    assert len(outputs_of((x, (y,)), lambda output: output[1])) == 1
    with pytest.raises(DataError, match=r"output_fn: .* a str\."):
        outputs_of(x, lambda _: "x")


# losses without labels


def derivatives(model: nn.Module, batch: Any, metric: str, draws: int, read: Any = None) -> Tensor:
    """The mean square of the derivative of projections, with respect to one weight."""
    loss = projection_loss(0, metric, read)
    weight = next(model.parameters())
    squares = [torch.autograd.grad(loss(model, batch), weight)[0].square() for _ in range(draws)]
    return torch.stack(squares).mean(0)


class Heads(nn.Module):
    """One weight and several outputs of it."""

    def __init__(self, **outputs: Any) -> None:
        super().__init__()
        self.w, self.outputs = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), outputs

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {key: fn(self.w, x) for key, fn in self.outputs.items()}


def test_every_output_is_projected() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Heads(boxes=lambda w, x: w * x, depth=lambda w, x: w * x.square(), loss=lambda w, x: 100 * w * x)
    expected = (x.square().sum() + x.square().square().sum()) / 16
    torch.testing.assert_close(derivatives(model, x, "output", 800), expected, rtol=0.2, atol=0)
    only = derivatives(model, x, "output", 800, lambda output: output["depth"])
    torch.testing.assert_close(only, x.square().square().sum() / 16, rtol=0.2, atol=0)


def test_kl_of_each_of_several_logits() -> None:
    """The Fisher information of their softmax, beside the square of what has no classes."""
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Heads(start_logits=lambda w, x: w * x, end_logits=lambda w, x: -w * x, boxes=lambda w, x: w * x)
    fisher = []
    for sign in (1, -1):
        p = (sign * 0.7 * x).softmax(-1)
        fisher.append((p * x.square()).sum(-1) - (p * x).sum(-1).square())
    expected = (sum(fisher).sum() + x.square().sum()) / 9
    for metric in ("auto", "kl"):
        torch.testing.assert_close(derivatives(model, x, metric, 800), expected, rtol=0.2, atol=0)


def test_pixels_have_their_classes_in_dimension_one() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = (0.7 * x).softmax(1)
    expected = ((p * x.square()).sum(1) - (p * x).sum(1).square()).sum() / 4
    found = derivatives(Heads(logits=lambda w, x: w * x), x, "auto", 4000)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_what_depends_on_no_weight_is_not_projected() -> None:
    model = Heads(a=lambda w, x: w * x, mask=lambda w, x: x)
    x = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(projection_loss(0)(model, x), projection_loss(0, "output", lambda o: o["a"])(model, x))


def test_padding_of_answers_does_not_count() -> None:
    model = seeded(lambda: BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=20)))
    tokens = torch.randint(3, 20, (2, 6))
    batch = {"input_ids": tokens, "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    said = model(**batch)
    model.forward = lambda **_: said  # type: ignore[method-assign]
    start, _ = torch.autograd.grad(projection_loss()(model, batch), (said.start_logits, said.end_logits))
    assert start[0].all()
    assert start[1, :3].all()
    assert not start[1, 3:].any()


@pytest.mark.parametrize("options", [{}, {"split": "auto", "heads": "ragged"}, {"scorer": "gate"}], ids=str)
def test_models_of_several_outputs_need_no_loss_fn(options: Any) -> None:
    """Two towers with other numbers of samples, start and end of answers, an attention in the pooler."""
    question = BertConfig(**SIZES, vocab_size=20)
    for build, batch, count in (
        (clip, pairs(), 2),
        (lambda: BertForQuestionAnswering(question), {"input_ids": torch.randint(3, 20, (4, 6))}, 1),
        (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=8, patch_size=4)),
         {"pixel_values": torch.randn(4, 3, 8, 8)}, 2),
    ):  # fmt: skip
        report = attnprune.prune_attention(seeded(build), 0.5, data=[batch], verify=True, **QUIET, **options)
        assert len(report.layers) == count
        assert report.verified is not None


def test_towers_count_alike_whatever_their_samples() -> None:
    """Scores of the image tower do not depend on how many texts are beside the images."""
    model = seeded(clip)

    def images(model: nn.Module, batch: Any) -> Tensor:
        out = model(**batch)
        return (out.image_embeds.sum() / len(out.image_embeds)) + (out.text_embeds.sum() / len(out.text_embeds))

    scores = [
        attnprune.score_attention(model, "gate", data=[pairs(4, texts)], loss_fn=images, **QUIET) for texts in (4, 8, 2)
    ]
    name = next(name for name in scores[0] if "vision" in name)
    for other in scores[1:]:
        torch.testing.assert_close(other[name].vo, scores[0][name].vo)


def test_output_fn_is_an_option_everywhere() -> None:
    model, data = seeded(clip), [pairs(4, 4)]

    def by_image(output: Any) -> Any:
        return {"logits": output.logits_per_image}

    plans = [attnprune.make_plan(model, 0.5, split="auto", data=data, output_fn=fn, **QUIET) for fn in (None, by_image)]
    scores = attnprune.score_attention(model, data=data, output_fn=by_image, **QUIET)
    usual = attnprune.score_attention(model, data=data, **QUIET)
    name = next(iter(scores))
    assert not torch.equal(scores[name].vo, usual[name].vo)
    assert all(attnprune.Plan.from_json(plan.to_json()) == plan for plan in plans)
    pruner = attnprune.AttentionPruner(copy.deepcopy(model), 0.5, steps=1, data=data, output_fn=by_image, **QUIET)
    pruner.step()
    with pytest.raises(OptionError, match="output_fn: expected a function"):
        attnprune.make_plan(model, 0.5, output_fn="logits")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no loss_fn beside it"):
        attnprune.make_plan(model, 0.5, output_fn=by_image, loss_fn=lambda m, b: m(b))


def test_verification_compares_what_losses_look_at() -> None:
    model, seen = seeded(clip), []

    def by_text(output: Any) -> Tensor:
        seen.append(output)
        return output.text_embeds

    attnprune.prune_attention(model, 0.5, example_inputs=pairs(), output_fn=by_text, verify=True)
    assert len(seen) >= 2
    report = attnprune.prune_attention(seeded(lambda: Wrapped(lambda x: {"loss": x.sum()})), 0.5, example_inputs=X)
    assert any("returns tensors" in note for note in report.notes), report.notes


# how models are called

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))


class Wrapped(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.inner, self.change = encoder(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.inner(x, src_key_padding_mask=mask)
        return found


class Features(nn.Sequential):
    """Takes one dict, as sentence-transformers do."""

    def forward(self, input: dict[str, Tensor], **_: Any) -> dict[str, Any]:
        return {**input, "token_embeddings": self[0](input["features"])}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, both: Any) -> Tensor:
        found: Tensor = self.inner(both[0] + both[1])
        return found


MASK = torch.zeros(4, 5, dtype=torch.bool)
Y = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("build", "batch", "targets"),
    [
        (encoder, X, False),
        (encoder, [X], False),
        (encoder, (X, Y), True),
        (encoder, {"src": X}, False),
        (encoder, ({"src": X}, Y), True),
        (Masked, (X, MASK), False),
        (Masked, (X, MASK, Y), True),
        (Masked, ((X, MASK), Y), True),
        (Masked, [[X, MASK], Y], True),
        (Masked, {"x": X, "mask": MASK}, False),
        (lambda: Features(encoder()), {"features": X}, False),
        (lambda: Features(encoder()), ({"features": X}, Y), True),
        (Listed, ((X, X), Y), True),
        (lambda: nn.Transformer(16, 2, 1, 1, 16, batch_first=True), (X, Y), False),
        (lambda: nn.Transformer(16, 2, 1, 1, 16, batch_first=True), ((X, Y), Y), True),
    ],
)
def test_models_are_called_as_their_signature_allows(build: Any, batch: Any, targets: bool) -> None:
    model = seeded(build)
    assert (call_of(model, batch).targets is not None) == targets
    assert attnprune.calibrate(model, [batch], **QUIET)
    attnprune.prune_attention(model, 0.5, data=[batch], verify=True, **QUIET)
    if targets and not isinstance(forward(model, batch), Mapping):
        attnprune.make_plan(model, 0.5, data=[batch], scorer="fisher", **QUIET)


class Labelled(nn.Module):
    """Labels are an argument, so they are not given as a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        found: Tensor = self.inner(x)
        return found


@pytest.mark.parametrize(
    ("build", "batch", "words"),
    [
        (encoder, {"nothing": X}, r"forward\(src, .*a dict \{nothing: \(4, 5, 16\)\}"),
        (encoder, {1: X}, r"a dict \{1: "),
        (encoder, {"src": X, "more": Y}, "more: "),
        (Masked, X, r"forward\(x, mask\).*a Tensor \(4, 5, 16\)"),
        (Masked, [X], r"forward\(x, mask\).*a list \[\(4, 5, 16\)\]"),
        (Labelled, (X, X, X), r"labels=None\).*a tuple"),
        (encoder, None, "a NoneType"),
        (encoder, "text", "a str"),
        (encoder, {1, 2}, "a set"),
        (lambda: BertForQuestionAnswering(BertConfig(**SIZES)), {"ids": MASK.long()}, r"input_ids=None.*ids: \(4, 5\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_shown_with_the_signature(build: Any, batch: Any, words: str) -> None:
    model = seeded(build)
    for call in (
        lambda: attnprune.calibrate(model, [batch], **QUIET),
        lambda: attnprune.make_plan(model, 0.5, data=[batch], scorer="fisher", **QUIET),
        lambda: attnprune.make_plan(model, 0.5, data=[batch], **QUIET),
    ):
        with pytest.raises(DataError, match=rf"{words}.*loss_fn") as caught:
            call()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("build", "given", "words"),
    [
        (encoder, {"src": X, "more": Y}, r"forward\(src, .*a dict \{src: \(4, 5, 16\), more: "),
        (Masked, X, r"forward\(x, mask\)"),
        (lambda: BertForQuestionAnswering(BertConfig(**SIZES)), {"ids": MASK.long()}, r"input_ids=None.*ids: \(4, 5\)"),
    ],
)
def test_example_inputs_that_do_not_fit_are_shown_with_the_signature(
    build: Any, given: Any, words: str, tmp_path: Path
) -> None:
    model = seeded(build)
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: attnprune.prune_attention(model, 0.5, example_inputs=given),
        lambda: attnprune.make_plan(model, target_macs=0.9, example_inputs=given),
        lambda: attnprune.sweep(model, lambda _: 1.0, ratios=[0.5], example_inputs=given, **QUIET),
        lambda: attnprune.export_onnx(model, tmp_path / "model.onnx", given),
    ):
        with pytest.raises(DataError, match=rf"^example_inputs: .*{words}"):
            call()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_errors_of_the_model_itself_pass() -> None:
    def broken(_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attnprune.calibrate(Wrapped(broken), [X], **QUIET)
    with pytest.raises(ZeroDivisionError):
        attnprune.prune_attention(Wrapped(broken), 0.5, example_inputs=X)
    with pytest.raises(AssertionError):  # labels may be given by their place
        attnprune.prune_attention(Labelled(), 0.5, example_inputs=(X, Y))


# losses of targets


class Fixed(nn.Module):
    """Gives what it is given."""

    def forward(self, x: Any) -> Any:
        return x


def test_losses_of_targets() -> None:
    x, pixels = torch.randn(4, 3), torch.randn(2, 3, 4, 5)
    for output, targets, expected in (
        (x, torch.tensor([0, 1, 2, -100]), F.cross_entropy(x[:3], torch.tensor([0, 1, 2]))),
        (x, x + 1, torch.tensor(1.0)),
        (pixels, torch.zeros(2, 4, 5).long(), F.cross_entropy(pixels, torch.zeros(2, 4, 5).long())),
        ({"logits": x, "boxes": x}, x, torch.tensor(0.0)),
        ((x, x.sum()), x, torch.tensor(0.0)),
    ):
        torch.testing.assert_close(loss_of(Fixed(), (output, targets), None), expected)
    picked = loss_of(Fixed(), ({"a": x, "b": x + 1}, x), None, lambda output: output["b"])
    torch.testing.assert_close(picked, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("output", "targets"),
    [
        (torch.zeros(4, 1), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(4, 1)),
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])),
        (torch.zeros(4), torch.tensor([0, 1, 0, 1])),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3])),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, -1])),
        (torch.zeros(4, 3), torch.zeros(4, 2).long()),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)),
        ((torch.zeros(4, 3), torch.zeros(4, 2)), torch.zeros(4).long()),
        (torch.zeros(4, 3), [0, 1, 2, 3]),
    ],
)
def test_targets_that_do_not_fit_are_not_broadcast(output: Any, targets: Any) -> None:
    with pytest.raises(DataError, match="Pass loss_fn"):
        loss_of(Fixed(), (output, targets), None)


@pytest.mark.parametrize("targets", [torch.randn(4), torch.tensor([0, 1, 0, 1])], ids=["numbers", "classes"])
@pytest.mark.parametrize("make", [encoder, lambda: Embedded(bert())], ids=["encoder", "BERT"])
def test_one_output_for_each_sample_is_refused_wherever_losses_are(make: Any, targets: Tensor) -> None:
    model = seeded(lambda: nn.Sequential(make(), nn.Flatten(), nn.Linear(80, 1)))
    data, dense = [(X, targets)] * 2, copy.deepcopy(model)
    calls: list[Any] = [
        lambda: attnprune.make_plan(model, 0.5, data=data, scorer="fisher", **QUIET),
        lambda: attnprune.make_plan(model, 0.5, data=data, scorer="taylor", **QUIET),
        lambda: attnprune.AttentionPruner(model, 0.5, data=data, scorer="fisher", **QUIET).step(),
        lambda: attnprune.recover(model, dense, data, 1, labels=1.0, **QUIET),
    ]
    for call in calls:
        with pytest.raises(DataError, match="Pass loss_fn"):
            call()
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in model.state_dict().items())


class Embedded(nn.Module):
    """A model of transformers on what its first layer is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(inputs_embeds=x).last_hidden_state


# data that do not reach all


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, vocab_size=20), add_pooling_layer=False)


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


class Towers(nn.Module):
    def __init__(self, make: Any = encoder) -> None:
        super().__init__()
        self.image, self.text = make(), make()

    def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        found: list[Any] = [self.image(image)] + ([] if text is None else [self.text(text)])
        return sum(getattr(one, "last_hidden_state", one) for one in found)  # type: ignore[no-any-return]


IDS = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(0))
TOWERS = [
    (encoder, X, r"text\.layers\.0\.self_attn"),
    (bert, IDS, r"text\.encoder\.layer\.0\.attention"),
    (t5, IDS, r"text\.encoder\.block\.0\.layer\.0\.SelfAttention"),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("make", "x", "name"), TOWERS, ids=["encoder", "BERT", "T5, expanded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"split": "auto"}, {"target_error": 0.1}, {"basis": "channels"}]
    + [{"scorer": name} for name in ("gate", "taylor", "fisher")]
    + [{"scorer": "magnitude", "basis": "rotated"}],
    ids=str,
)
def test_attention_that_data_do_not_reach_is_named(options: Any, make: Any, x: Tensor, name: str) -> None:
    model = seeded(lambda: Towers(make))
    loss_fn: Any = {"loss_fn": lambda m, b: m(b).square().mean()} if "scorer" in options else {}
    ratio = None if "target_error" in options else 0.5
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=rf"1 of 2 .*: {name}\. .*exclude="):
        attnprune.prune_attention(model, ratio, data=[x], **QUIET, **options, **loss_fn)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    attnprune.make_plan(model, ratio, data=[x], exclude="text.*", **QUIET, **options, **loss_fn)
    if loss_fn:
        loss_fn = {"loss_fn": lambda m, b: forward(m, b).square().mean()}
    attnprune.make_plan(model, ratio, data=[x, {"image": x, "text": x}], **QUIET, **options, **loss_fn)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("make", "x", "name"), TOWERS, ids=["encoder", "BERT", "T5, expanded"])
@pytest.mark.parametrize("options", [{}, {"scorer": "taylor"}, {"scope": "local", "granularity": "head"}], ids=str)
def test_attention_of_which_a_loop_saw_zeros_alone_is_named(options: Any, make: Any, x: Tensor, name: str) -> None:
    """As ``zero_grad(set_to_none=False)`` leaves gradients of what a batch does not reach."""
    model = seeded(lambda: Towers(make))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = attnprune.AttentionPruner(model, 0.5, steps=1, **options)
    model(x, x).square().mean().backward()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        pruner.observe()
    before = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    with pytest.raises(DataError, match=rf"1 of 2 .*: {name}\."):
        pruner.step(optimizer)
    assert str((model.state_dict(), pruner.state_dict())) == str(before)
    model(x, x).square().mean().backward()
    pruner.observe()
    pruner.step(optimizer)


def test_a_given_calibration_must_have_reached_all() -> None:
    model = seeded(Towers)
    known = attnprune.calibrate(model, [X], **QUIET)
    with pytest.raises(DataError, match="text"):
        attnprune.make_plan(model, 0.5, calibration=known)
    assert attnprune.make_plan(model, 0.5, calibration=known, exclude="text.*")
    whole = attnprune.calibrate(model, [{"image": X, "text": X}], resume=known, **QUIET)
    assert attnprune.make_plan(model, 0.5, calibration=whole)
