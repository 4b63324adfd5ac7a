"""Wrong calls: which error, what it says, and that the model is bitwise as it was."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers import ASTConfig, ASTForAudioClassification, BertConfig, BertForSequenceClassification

from attnprune import (
    Adapter,
    AttentionSpec,
    AttentionView,
    Calibration,
    LatencyTable,
    LayerPlan,
    Plan,
    Scorer,
    Scores,
    apply_plan,
    errors,
    export_stock,
    find_attention,
    freeze,
    from_pretrained,
    load_pruned,
    make_plan,
    masked,
    prune_attention,
    prune_channels,
    prune_heads,
    register_adapter,
    unregister_adapter,
)
from attnprune.cost.rounding import liked_multiple
from attnprune.errors import (
    AdapterError,
    AllocationError,
    AttnPruneError,
    CalibrationError,
    CheckpointError,
    DataError,
    FrozenError,
    LatencyError,
    MetaTensorError,
    NoAttentionError,
    NonFiniteError,
    NotExpressibleError,
    OptimizerStateError,
    OptionError,
    ParametrizedError,
    PlanFormatError,
    PlanMismatchError,
    QuantizedError,
    RatioError,
    ScorerError,
    ShardedError,
    StateDictError,
    TiedWeightsError,
    UnknownUnitError,
    WrappedModelError,
)
from attnprune.planning import scorers

# the models

AUDIO = {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def alone(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder that always gives the same weights and leaves the random state alone."""

    @wraps(build)
    def built(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(*args, **kwargs)

    return built


def mixed(model: nn.Module) -> nn.Module:
    """Modes, flags and gradients that differ between parts, so that a change of any of them shows."""
    model.train()
    list(model.children())[-1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if i % 3 == 1 else None
    return model


@alone
def ast(**changes: Any) -> nn.Module:
    return mixed(ASTForAudioClassification(ASTConfig(**SIZES, **AUDIO, num_labels=3, **changes)))


@alone
def bert() -> nn.Module:
    config = BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16)
    return mixed(BertForSequenceClassification(config))


@alone
def mha(**changes: Any) -> nn.Module:
    return nn.MultiheadAttention(**{"embed_dim": 32, "num_heads": 4, **changes})


class Home(nn.Module):
    """An attention class that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out"):
            setattr(self, name, nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def home() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), Home(), nn.Linear(32, 8))


NAME = "audio_spectrogram_transformer.layers.{}.attention"
X = torch.linspace(-1, 1, 2 * 24 * 16).reshape(2, 24, 16)
PAIR = (X, torch.tensor([0, 2]))


def part(model: nn.Module, path: str = NAME.format(1) + ".q_proj") -> Any:
    return model.get_submodule(path)


def changed(change: Callable[[nn.Module], None], build: Callable[[], nn.Module] = ast) -> Callable[[], nn.Module]:
    """A builder whose model was changed afterwards."""

    def built() -> nn.Module:
        model = build()
        change(model)
        return model

    return built


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    """A builder of an AST with one projection replaced."""

    def change(model: nn.Module) -> None:
        attention = part(model, NAME.format(1))
        attention.q_proj = make(attention.q_proj)

    return changed(change)


@torch.no_grad()
def spoil(value: float, bias: bool, model: nn.Module) -> None:
    linear = part(model)
    (linear.bias[3:4] if bias else linear.weight[3:4, 5]).fill_(value)


class Steps(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


class LowRank(nn.Module):
    """What LoRA wrappers look like, without the attributes of a Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Posing(LowRank):
    """Another, which passes on the attributes of its Linear."""

    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)


def patched(path: str, model: nn.Module) -> None:
    module = part(model, path)
    module.forward = partial(type(module).forward, module)


def tie_embedding(model: nn.Module) -> None:
    model.extra = nn.Embedding(32, 32)  # type: ignore[assignment]
    model.extra.weight = part(model).weight


def tie_layers(model: nn.Module) -> None:
    part(model, NAME.format(0)).q_proj.weight = part(model).weight


def tied_root() -> nn.Module:
    """A model that is a Linear and holds an attention that shares its weight."""
    model = nn.Linear(32, 32)
    model.attention = mha()
    model.attention.out_proj.weight = model.weight
    return model


def tie_storage(model: nn.Module) -> None:
    model.extra = nn.Linear(32, 32)  # type: ignore[assignment]
    model.extra.weight = nn.Parameter(part(model).weight.detach())


def quantised(build: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
        for parameter in model.parameters():
            parameter.grad = None
        return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, torch.qint8)


def as_int8(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    return linear


def plain(linear: nn.Linear) -> nn.Linear:
    """A Linear whose weight is a buffer, as removing a parametrisation of a frozen weight leaves it."""
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)
    return linear


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return ast()


def uniform_plan(model: nn.Module, gone: int = 4) -> Plan:
    """The first channels of every head of every layer."""
    lists = (tuple(range(gone)),) * 4
    return Plan(tuple(LayerPlan(spec, (), lists, lists) for spec in find_attention(model)))


def different_rows(model: nn.Module) -> object:
    """Layers 0 and 1 lose other channels."""
    plan = {NAME.format(i): {"qk": [[i]] * 4, "vo": [[i]] * 4} for i in range(2)}
    return prune_channels(model, plan)


def pruned(build: Callable[[], nn.Module], **how: Any) -> Callable[[], nn.Module]:
    return changed(lambda model: (prune_attention(model, 0.5, **how), None)[1], build)


# scorers, losses and data that go wrong


class Fixed(Scorer):
    """Gives what it was told to."""

    def __init__(self, make: Callable[[AttentionView], Any], spared: int = 0) -> None:
        self.make, self.spared = make, spared

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> Any:
        return {view.name: self.make(view) for view in views[self.spared :]}


class Whole(Fixed):
    """Gives one thing instead of a mapping."""

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> Any:
        return self.make(views[0])


def ones(view: AttentionView, value: float = 1.0, more: int = 0) -> Scores:
    heads, qk, vo = view.spec.heads, view.spec.qk_dim, view.spec.vo_dim
    scores = Scores(torch.ones(heads, qk + more), torch.ones(heads, vo), torch.ones(heads))
    scores.vo[1, 2] = value
    return scores


def logits(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch[0]).logits
    return found


def aside(model: nn.Module, batch: Any) -> Tensor:
    """A loss that runs the model and then does not use it."""
    return logits(model, batch).detach().sum() * torch.ones((), requires_grad=True)


def elsewhere(model: nn.Module, batch: Any) -> Tensor:
    """A loss of another parameter, without a run of the model."""
    return torch.ones((), requires_grad=True) * 2


def steep(model: nn.Module, batch: Any) -> Tensor:
    """A finite loss with NaN gradients."""
    return (logits(model, batch).sum() * 0).sqrt()


def halfway(model: nn.Module, batch: Any) -> Tensor:
    """Fails at the second batch."""
    if batch[2] == 1:
        raise ZeroDivisionError("the loss itself")
    return logits(model, batch).sum()


class Never:
    """Data that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("data were read before the options were checked")


# the calls


@dataclass(frozen=True)
class Case:
    """A wrong call: its error, words of the message (lower case), the call, and the model it is made on."""

    error: type[AttnPruneError]
    words: tuple[str, ...]
    call: Callable[[Any], object]
    build: Callable[[], Any] = ast


def _ragged(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    prune_attention(copied, 0.5, heads="ragged")
    return copied


def _frozen(model: nn.Module) -> nn.Module:
    freeze(model)
    return model


def wrong(error: type[AttnPruneError], words: str, call: Callable[[Any], object] | None = None, **more: Any) -> Case:
    """A case; ``words`` are parted by ``|``; keywords other than ``build`` are options of ``prune_attention``."""
    build, ratios = more.pop("build", ast), more.pop("ratios", 0.5)
    return Case(error, tuple(words.lower().split("|")), call or partial(_prune, ratios, more), build)


def _prune(ratios: Any, options: dict[str, Any], model: nn.Module) -> object:
    return prune_attention(model, ratios, **options)


def scored(error: type[AttnPruneError], words: str, data: Any, how: str) -> Case:
    """A case with data, for one of the scorers that read them."""
    scorer: Any = scorers.Fisher(per_sample=True) if how == "per sample" else how
    return wrong(error, words, scorer=scorer, data=data)


def first_order() -> Any:
    return torch_pruning.importance.GroupTaylorImportance()


READERS = ("fisher", "taylor", "per sample", "auto")


class Bare(Adapter):
    """An adapter without a decoupled forward."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Home)

    def view(self, name: str, module: nn.Module) -> AttentionView:
        m: Any = module
        return self.of_linears(name, m, q=m.q_proj, k=m.k_proj, v=m.v_proj, o=m.out, heads=self.heads)

    heads = 4


def with_adapter(adapter: Adapter, call: Callable[[Any], object], model: nn.Module) -> object:
    register_adapter(adapter)
    try:
        return call(model)
    finally:
        unregister_adapter(adapter)


class Odd(Bare):
    heads = 5


CASES: dict[str, Case] = {
    # ratios
    "ratio 1": wrong(RatioError, "[0, 1)|1.0|half", ratios=1.0),
    "ratio int 1": wrong(RatioError, "[0, 1)|found 1", ratios=1),
    "ratio negative": wrong(RatioError, "[0, 1)|-0.1", ratios=-0.1),
    "ratio NaN": wrong(RatioError, "[0, 1)|nan", ratios=math.nan),
    "ratio infinite": wrong(RatioError, "[0, 1)|inf", ratios=math.inf),
    "ratio bool": wrong(RatioError, "number|true", ratios=True),
    "ratio string": wrong(RatioError, "number|'0.5'", ratios="0.5"),
    "ratio bytes": wrong(RatioError, "number|b'0.5'", ratios=b"0.5"),
    "ratio None": wrong(RatioError, "number|none", ratios=None),
    "ratio complex": wrong(RatioError, "number|0.5j", ratios=0.5j),
    "ratio tensor": wrong(RatioError, "number|tensor", ratios=torch.tensor(0.5)),
    "ratio too large to be a float": wrong(RatioError, "[0, 1)|1000", ratios=10**400),
    "ratio in a mapping": wrong(RatioError, "qkvo_ratios[qk]|1.5", ratios={"qk": 1.5}),
    "ratio in a sequence": wrong(RatioError, "qkvo_ratios[v]|-1", ratios=[0.1, 0.1, -1, 0.1]),
    "ratio of unknown key": wrong(RatioError, "q, k, v, o, qk, vo|'x'", ratios={"x": 0.5}),
    "ratio of key kq": wrong(RatioError, "q, k, v, o, qk, vo|'kq'", ratios={"kq": 0.5}),
    "ratio of key 0": wrong(RatioError, "q, k, v, o, qk, vo|0", ratios={0: 0.5}),
    "ratio qk and q": wrong(RatioError, "one ratio for q|two|drop", ratios={"qk": 0.5, "q": 0.5}),
    "ratio o and vo": wrong(RatioError, "one ratio for o|two|drop", ratios={"o": 0.5, "vo": 0.5}),
    "ratios three": wrong(RatioError, "four|q, k, v, o|3 values", ratios=[0.5, 0.5, 0.5]),
    "ratios five": wrong(RatioError, "four|5 values", ratios=(0.5,) * 5),
    "ratios none": wrong(RatioError, "four|0 values", ratios=[]),
    "q unlike k, stock": wrong(OptionError, "stock|one ratio for all four|q=0.5, k=0", ratios={"q": 0.5}, stock=True),
    "q unlike k, stock, before data": wrong(
        OptionError, "stock|q=0.5", ratios={"q": 0.5}, stock=True, data=Never(), scorer="fisher"
    ),
    # options
    "granularity": wrong(OptionError, "granularity|head, channel, joint|'heads'", granularity="heads"),
    "granularity None": wrong(OptionError, "granularity|head, channel, joint|none", granularity=None),
    "scope": wrong(OptionError, "scope|local, global|'layer'", scope="layer"),
    "heads": wrong(OptionError, "heads|uniform, ragged|4", heads=4),
    "split": wrong(OptionError, "split|fixed, auto|'free'", split="free"),
    "basis": wrong(OptionError, "basis|'eigen'", basis="eigen"),
    "compensate": wrong(OptionError, "compensate|'yes'", compensate="yes"),
    "compensate 0": wrong(OptionError, "compensate|0", compensate=0),
    "basis None": wrong(OptionError, "basis|none", basis=None),
    "compensate without data": wrong(OptionError, "compensate|none|data=", compensate=True),
    "sequential without data": wrong(OptionError, "sequential|none|data=", sequential=True),
    "sequential 1": wrong(OptionError, "sequential|1", sequential=1),
    "target 0": wrong(OptionError, "target_error|(0, 1)|0", ratios=None, target_error=0),
    "target and ratios": wrong(OptionError, "target_error|qkvo_ratios|0.5", target_error=0.1),
    "target for heads": wrong(
        OptionError, 'target_error|granularity="head"', ratios=None, target_error=0.1, granularity="head"
    ),
    "calibration of another type": wrong(OptionError, "calibration|dict|calibrate", calibration={}),
    "calibration of another model": wrong(
        CalibrationError, "layers.0.attention|none|calibrate", calibration=Calibration({})
    ),
    "latency of another model": wrong(
        LatencyError,
        "layers.0.attention|latency table|measure",
        ratios=None,
        target_latency=0.5,
        latency=LatencyTable({}, 1.0, 0.5, (), (), 1, 3),
    ),
    "frozen": wrong(FrozenError, "attention|frozen|attnprune.thaw(model)", build=lambda: _frozen(ast())),
    "no saved model": wrong(CheckpointError, "/nowhere|a directory|nothing|path", lambda m: load_pruned("/nowhere", m)),
    "device": wrong(
        OptionError, "device|of this machine|'toaster'|cpu", lambda m: load_pruned("/nowhere", m, device="toaster")
    ),
    "device that is not there": wrong(
        OptionError, "device|of this machine|'cuda:99'|cpu", lambda m: load_pruned("/nowhere", m, device="cuda:99")
    ),
    "device whose backend is not installed": wrong(
        OptionError, "device|'hpu'|cpu", lambda _: from_pretrained("/nowhere", device="hpu")
    ),
    "device of another type": wrong(OptionError, "device|3.5", lambda _: from_pretrained("/nowhere", device=3.5)),
    "device to round for": wrong(OptionError, "device|'toaster'|cpu", lambda _: liked_multiple("toaster", torch.half)),
    "optimizer of another type": wrong(
        OptimizerStateError, "optimizer|int|itself", lambda m: apply_plan(m, make_plan(m, 0.5), optimizer=3)
    ),
    "gate: samples": wrong(OptionError, "samples|at least 1|0", lambda m: scorers.Gate(samples=0)),
    "gate: metric": wrong(OptionError, "metric|kl|'l2'", lambda m: scorers.Gate(metric="l2")),
    "round_to": wrong(OptionError, "round_to|at least 1|0", round_to=0),
    "round_to bool": wrong(OptionError, "round_to|whole|true", round_to=True),
    "min_heads": wrong(OptionError, "min_heads|at least 1|0", min_heads=0),
    "min_channels": wrong(OptionError, "min_channels|whole|1.5", min_channels=1.5),
    "scorer": wrong(ScorerError, "scorer|magnitude, taylor, fisher, gate, random|'l2'", scorer="l2"),
    "scorer class": wrong(ScorerError, "scorer|magnitude|instance", scorer=scorers.Magnitude),
    "scorer None": wrong(ScorerError, "scorer|magnitude|none", scorer=None),
    "norm": wrong(OptionError, "magnitude: p|1 or 2|3", lambda m: scorers.Magnitude(p=3)),
    "damping": wrong(OptionError, "damping|-1", lambda m: scorers.Fisher(damping=-1)),
    "damping NaN": wrong(OptionError, "damping|nan", lambda m: scorers.Fisher(damping=math.nan)),
    "floor of channels": wrong(AllocationError, "50.0%|min_channels=6|lower", min_channels=6),
    "floor of channels above the dim": wrong(AllocationError, "at most 0.0%|min_channels=99", min_channels=99),
    "floor of heads": wrong(AllocationError, "50.0%|min_heads=4|lower", min_heads=4, granularity="head"),
    "floor in one layer": wrong(
        AllocationError, "layers.0.attention: qk|min_channels=6", min_channels=6, scope="local"
    ),
    "floor under auto": wrong(AllocationError, "all|min_channels=6", min_channels=6, split="auto"),
    "uniform on ragged": wrong(
        OptionError,
        'layers|heads="ragged"|exclude',
        build=changed(lambda model: (prune_channels(model, {0: {"qk": [[0], [], [], []]}}), None)[1]),
    ),
    # which attention
    "no attention": wrong(NoAttentionError, "none|1 (home)|register", build=home),
    "no attention, nothing like it": wrong(NoAttentionError, "look like one: none", build=lambda: nn.Linear(4, 4)),
    "no attention, found": wrong(NoAttentionError, "home", find_attention, build=home),
    "include without match": wrong(OptionError, "include|'layer.*'|layers.0.attention", include="layer.*"),
    "exclude without match": wrong(OptionError, "exclude|'nothing'|layers", exclude=["*layers.0*", "nothing"]),
    "include a number": wrong(OptionError, "include|pattern|0", include=0),
    "exclude numbers": wrong(OptionError, "exclude|pattern|1", exclude=[1]),
    "exclude all": wrong(NoAttentionError, "include and exclude|layers.0|loosen", exclude="*"),
    "include none": wrong(NoAttentionError, "include and exclude|layers.0", include=[]),
    # the model
    "a class": wrong(OptionError, "torch.nn.module|a type", build=lambda: nn.MultiheadAttention),
    "a state dict": wrong(OptionError, "torch.nn.module|dict", build=lambda: dict(mha().state_dict())),
    "None": wrong(OptionError, "torch.nn.module|none", find_attention, build=lambda: None),
    "NaN weight": wrong(
        NonFiniteError, "layers.1.attention: q.weight|1 of 1024", build=changed(partial(spoil, math.nan, False))
    ),
    "inf weight": wrong(NonFiniteError, "q.weight|1 of 1024", build=changed(partial(spoil, math.inf, False))),
    "NaN bias": wrong(NonFiniteError, "q.bias|1 of 32", build=changed(partial(spoil, math.nan, True))),
    "NaN weight, by hand": wrong(
        NonFiniteError, "q.weight", lambda m: prune_heads(m, {1: [0]}), build=changed(partial(spoil, -math.inf, False))
    ),
    "meta": wrong(MetaTensorError, "meta|load", build=on_meta),
    "meta, by hand": wrong(MetaTensorError, "meta", lambda m: prune_heads(m, {0: [1]}), build=on_meta),
    "quantised AST": wrong(QuantizedError, "q.weight|nn.quantized|prune first", build=partial(quantised, ast)),
    "quantised BERT": wrong(QuantizedError, "bert.encoder.layer.0|prune first", build=partial(quantised, bert)),
    "int8 weight": wrong(QuantizedError, "q.weight|int8", build=replaced(as_int8)),
    "weight norm": wrong(
        ParametrizedError, "q.weight|parametrizations|remove", build=replaced(parametrizations.weight_norm)
    ),
    "masked weight": wrong(
        ParametrizedError, "weight_orig|remove", build=replaced(lambda x: prune.l1_unstructured(x, "weight", 0.5))
    ),
    "old spectral norm": wrong(ParametrizedError, "weight_orig|remove", build=replaced(spectral_norm)),
    "masked packed weight": wrong(
        ParametrizedError,
        "in_proj_weight|remove",
        build=changed(lambda m: (prune.l1_unstructured(m, "in_proj_weight", 0.5), None)[1], mha),
    ),
    "Linear with its own forward": wrong(
        WrappedModelError, "q.weight|steps|forward of its own|exclude", build=replaced(lambda x: Steps(32, 32))
    ),
    "LoRA": wrong(WrappedModelError, "q|lowrank|unwrap, merge", build=replaced(LowRank)),
    "LoRA that poses as a Linear": wrong(WrappedModelError, "q.weight|posing|merge", build=replaced(Posing)),
    "forward set on the attention": wrong(
        WrappedModelError, "layers.1.attention|instance", build=changed(partial(patched, NAME.format(1)))
    ),
    "forward set on a projection": wrong(
        WrappedModelError, "q.weight|forward", build=changed(partial(patched, NAME.format(1) + ".q_proj"))
    ),
    "tied to an embedding": wrong(TiedWeightsError, "extra.weight|untie", build=changed(tie_embedding)),
    "tied storage": wrong(TiedWeightsError, "extra.weight|untie", build=changed(tie_storage)),
    "tied layers": wrong(TiedWeightsError, "q.weight|same channels|untie", different_rows, build=changed(tie_layers)),
    "tied to a layer left alone": wrong(
        TiedWeightsError,
        "layers.0.attention.q_proj.weight|untie",
        lambda m: prune_heads(m, {1: [0]}),
        build=changed(tie_layers),
    ),
    "weight a plain tensor": wrong(WrappedModelError, "q.weight|plain tensor|nn.parameter", build=replaced(plain)),
    "NaN in the model itself": wrong(
        NonFiniteError, ": q.weight|3072 of 3072", build=changed(lambda m: m.in_proj_weight.data.fill_(math.nan), mha)
    ),
    "tied to the model itself": wrong(TiedWeightsError, ".weight|untie", build=tied_root),
    # scores
    "NaN scores": wrong(NonFiniteError, "scores.vo|1 of 32", scorer=Fixed(partial(ones, value=math.nan))),
    "infinite scores": wrong(NonFiniteError, "scores.vo|1 of 32", scorer=Fixed(partial(ones, value=math.inf))),
    "scores of wrong shape": wrong(ScorerError, "scores.qk|(4, 8)|(4, 9)", scorer=Fixed(partial(ones, more=1))),
    "scores without a layer": wrong(ScorerError, "layers.0.attention|every attention", scorer=Fixed(ones, spared=1)),
    "scores are tensors": wrong(
        ScorerError, "layers.0.attention|scores|tensor", scorer=Fixed(lambda v: torch.ones(4, 8))
    ),
    "scores are None": wrong(ScorerError, "mapping|none", scorer=Whole(lambda v: None)),
    "scores without a mapping": wrong(ScorerError, "mapping|scores", scorer=Whole(ones)),
    # data
    "no data for fisher": wrong(DataError, "iterable of batches|fisher|none|data=", scorer="fisher"),
    "no data for taylor": wrong(DataError, "iterable of batches|taylor|none", scorer="taylor"),
    "no data per sample": wrong(DataError, "iterable of batches|none", scorer=scorers.Fisher(per_sample=True)),
    "loss is a float": wrong(DataError, "scalar loss|1.5", data=[PAIR], loss_fn=lambda m, b: 1.5),
    "no gradients for Torch-Pruning": wrong(
        ScorerError,
        "weight.grad|data=",
        lambda m: prune_attention(m, 0.5, scorer=first_order()),
        build=changed(lambda m: m.zero_grad()),
    ),
    # plans
    "plan for other names": wrong(
        PlanMismatchError,
        "self_attn|of this name|layers.0.attention",
        lambda m: apply_plan(m, uniform_plan(alone(nn.TransformerEncoderLayer)(32, 4))),
    ),
    "plan for a model without attention": wrong(
        PlanMismatchError, "layers.0.attention|no attention", lambda m: apply_plan(m, uniform_plan(ast())), build=home
    ),
    "plan for other heads": wrong(
        PlanMismatchError,
        "4 heads of 8|2 heads of 16",
        lambda m: apply_plan(m, uniform_plan(ast())),
        build=lambda: ASTForAudioClassification(ASTConfig(**{**SIZES, "num_attention_heads": 2}, **AUDIO)),
    ),
    "plan for another bias": wrong(
        PlanMismatchError,
        "bias: |then",
        lambda m: apply_plan(m, uniform_plan(ast(qkv_bias=False))),
    ),
    "plan for another width": wrong(
        PlanMismatchError,
        "d_model 32|d_model 64",
        lambda m: apply_plan(m, uniform_plan(mha())),
        build=lambda: mha(embed_dim=64, num_heads=8),
    ),
    "plan applied twice": wrong(
        PlanMismatchError,
        "4 heads of 8|4 heads of 4|then",
        lambda m: apply_plan(m, uniform_plan(ast())),
        build=pruned(ast),
    ),
    "plan masked twice": wrong(
        PlanMismatchError,
        "4 heads of 8|4 heads of 4|then",
        lambda m: masked(m, uniform_plan(ast())).__enter__(),
        build=pruned(ast),
    ),
    "plan as text": wrong(OptionError, "plan|from_json", lambda m: apply_plan(m, uniform_plan(m).to_json())),
    "plan as text, masked": wrong(
        OptionError, "plan|from_json", lambda m: masked(m, uniform_plan(m).to_json()).__enter__()
    ),
    "plan cut": wrong(PlanFormatError, "json", lambda m: apply_plan(m, Plan.from_json(uniform_plan(m).to_json()[:-9]))),
    "plan hostile": wrong(PlanFormatError, "json", lambda m: apply_plan(m, Plan.from_json("[" * 100_000))),
    # by hand: heads
    "heads of layer 99": wrong(UnknownUnitError, "[0, 2)|99|layers", lambda m: prune_heads(m, {99: [0]})),
    "heads of layer -1": wrong(UnknownUnitError, "[0, 2)|-1", lambda m: prune_heads(m, {-1: [0]})),
    "heads of layer True": wrong(UnknownUnitError, "[0, 2)|true", lambda m: prune_heads(m, {True: [0]})),
    "heads of no layer": wrong(
        UnknownUnitError, "'layers.0'|layers.0.attention", lambda m: prune_heads(m, {"layers.0": [0]})
    ),
    "heads of a layer named twice": wrong(
        UnknownUnitError, "once|both", lambda m: prune_heads(m, {0: [0], NAME.format(0): [1]})
    ),
    "head 4 of 4": wrong(UnknownUnitError, "[0, 4)|(4,)|pruned before", lambda m: prune_heads(m, {0: [1], 1: [4]})),
    "head -1": wrong(UnknownUnitError, "[0, 4)|(-1,)", lambda m: prune_heads(m, {0: [-1]})),
    "all heads": wrong(
        UnknownUnitError, "layers.1.attention: heads|at most 3 of 4|all", lambda m: prune_heads(m, {1: range(4)})
    ),
    "heads pruned before": wrong(
        UnknownUnitError,
        "[0, 3)|(3,)|then",
        lambda m: prune_heads(m, {0: [3]}),
        build=changed(lambda m: (prune_heads(m, {0: [3]}), None)[1]),
    ),
    "heads a string": wrong(UnknownUnitError, "list of numbers|'01'", lambda m: prune_heads(m, {0: "01"})),
    "heads a number": wrong(UnknownUnitError, "list of numbers|1", lambda m: prune_heads(m, {0: 1})),
    "heads None": wrong(UnknownUnitError, "list of numbers|none", lambda m: prune_heads(m, {0: None})),
    "heads floats": wrong(UnknownUnitError, "whole|[1.0]", lambda m: prune_heads(m, {0: [1.0]})),
    "heads bools": wrong(UnknownUnitError, "whole|[true]", lambda m: prune_heads(m, {0: [True]})),
    "heads float tensor": wrong(UnknownUnitError, "whole|tensor", lambda m: prune_heads(m, {0: torch.tensor([1.0])})),
    "heads without layers": wrong(UnknownUnitError, "mapping|[0, 1]", lambda m: prune_heads(m, [0, 1])),
    "head of the model itself": wrong(
        UnknownUnitError, ": head|[0, 4)|(9,)", lambda m: prune_heads(m, {0: [9]}), build=mha
    ),
    "all heads of the model itself": wrong(
        UnknownUnitError, ": heads|all", lambda m: prune_heads(m, {"": range(4)}), build=mha
    ),
    # by hand: channels
    "channels in three lists": wrong(
        UnknownUnitError, "layers.0.attention: qk|4 heads|3 lists", lambda m: prune_channels(m, {0: {"qk": [[0]] * 3}})
    ),
    "channels in no lists": wrong(
        UnknownUnitError, "layers.0.attention: qk|4 heads|0 lists", lambda m: prune_channels(m, {0: {"qk": []}})
    ),
    "channels of unknown kind": wrong(
        UnknownUnitError, '"qk" and "vo"|kv', lambda m: prune_channels(m, {0: {"kv": [[0]] * 4}})
    ),
    "channels without kind": wrong(UnknownUnitError, '"qk" and "vo"|[[0]', lambda m: prune_channels(m, {0: [[0]] * 4})),
    "channel 8 of 8": wrong(
        UnknownUnitError,
        "vo channel of head 2|[0, 8)|(8,)",
        lambda m: prune_channels(m, {1: {"vo": [[], [], [8], []]}}),
    ),
    "all channels of a head": wrong(
        UnknownUnitError,
        "qk channel of head 0|at most 7 of 8|prune_heads",
        lambda m: prune_channels(m, {0: {"qk": [range(8), [], [], []]}}),
    ),
    "channels as a number": wrong(UnknownUnitError, "qk|list|5", lambda m: prune_channels(m, {0: {"qk": 5}})),
    "channels as numbers": wrong(
        UnknownUnitError, "qk|list of numbers|0", lambda m: prune_channels(m, {0: {"qk": [0, 1, 2, 3]}})
    ),
    "channels as floats": wrong(
        UnknownUnitError, "qk|whole|0.5", lambda m: prune_channels(m, {0: {"qk": [[0.5]] * 4}})
    ),
    # adapters
    "adapter class": wrong(AdapterError, "instance|bare", lambda m: register_adapter(Bare)),  # type: ignore[arg-type]
    "adapter function": wrong(AdapterError, "instance", lambda m: register_adapter(ast)),  # type: ignore[arg-type]
    "adapter of wrong heads": wrong(
        AdapterError,
        "1|divisible by 5 heads|(32, 32)|adapter",
        partial(with_adapter, Odd(), find_attention),
        build=home,
    ),
    "heads that no stock config says": wrong(
        NotExpressibleError,
        'heads of equal dims|"uniform"|save_pruned',
        lambda m: export_stock(_ragged(m), "nowhere"),
        build=ast,
    ),
    "spec without heads": wrong(
        AdapterError, "at least one|adapter", lambda m: AttentionSpec.of("a", heads=0, head_dim=1, d_model=1)
    ),
    # state dicts
    "dense state dict": wrong(
        StateDictError,
        "in_proj_weight|q_proj.weight|apply the plan",
        lambda m: m.load_state_dict(mha().state_dict()),
        build=pruned(mha),
    ),
    "dense state dict with separate weights": wrong(
        StateDictError,
        "q_proj_weight, k_proj_weight|apply the plan",
        lambda m: m.load_state_dict(mha(kdim=16).state_dict()),
        build=pruned(lambda: mha(kdim=16)),
    ),
}
for how in READERS:
    CASES |= {
        f"{how}: empty data": scored(DataError, "at least one batch|none", [], how),
        f"{how}: exhausted": scored(DataError, "at least one batch|used up", iter([]), how),
        f"{how}: tensor": scored(DataError, "iterable of batches|single batch|[batch]", X, how),
        f"{how}: scalar tensor": scored(DataError, "iterable of batches|[batch]", torch.ones(()), how),
        f"{how}: mapping": scored(DataError, "iterable of batches|single batch|[batch]", {"input_values": X}, how),
        f"{how}: string": scored(DataError, "iterable of batches|'train'", "train", how),
        f"{how}: number": scored(DataError, "iterable of batches|5", 5, how),
        f"{how}: three in a batch": scored(
            DataError, "mapping|pair|forward(input_values|a tuple|loss_fn", [(X, X, X)], how
        ),
        f"{how}: batch is a set": scored(DataError, "mapping|pair|tensor|a set|loss_fn", [{1, 2}], how),
        f"{how}: batch is None": scored(DataError, "mapping|pair|tensor|nonetype|loss_fn", [None], how),
    }
    named: Any = scorers.Fisher(per_sample=True) if how == "per sample" else how
    given = {"scorer": named, "data": [PAIR]}
    CASES |= {
        f"{how}: vector loss": wrong(DataError, "scalar|(2, 3)", **given, loss_fn=logits),
        f"{how}: no loss": wrong(DataError, "scalar|none", **given, loss_fn=lambda m, b: None),
        f"{how}: NaN loss": wrong(
            DataError, "finite loss|nan", **given, loss_fn=lambda m, b: logits(m, b).sum() * math.nan
        ),
        f"{how}: detached loss": wrong(
            DataError,
            "batch 0|depends on|no gradient|detach",
            **given,
            loss_fn=lambda m, b: logits(m, b).sum().detach(),
        ),
        f"{how}: loss aside": wrong(DataError, "batch 0|depends on|no gradient", **given, loss_fn=aside),
        f"{how}: loss elsewhere": wrong(DataError, "batch 0|depends on|no gradient", **given, loss_fn=elsewhere),
        f"{how}: NaN gradient": wrong(NonFiniteError, "attention|batch 0|finite gradients", **given, loss_fn=steep),
    }
for how in ("fisher", "taylor", "per sample"):  # with "auto" a batch without labels is fine
    CASES[f"{how}: no labels"] = scored(DataError, "scalar loss|labels|loss_fn", [X], how)


def bits(value: Any) -> Any:
    """A tensor's bytes (and what else a state dict may hold), so that NaN equals NaN."""
    if isinstance(value, (tuple, list)):
        return tuple(bits(each) for each in value)
    if not isinstance(value, Tensor):
        return str(value)
    value = value.detach()
    value = value.to_local() if hasattr(value, "to_local") else value
    facts = value.dtype, tuple(value.shape)
    if value.is_meta:
        return facts
    value = value.int_repr() if value.is_quantized else value
    return (*facts, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def snapshot(model: Any) -> Any:
    """All that a failed call may not change: values, storage, classes, modes, flags, gradients, attributes, hooks."""
    if not isinstance(model, nn.Module):
        return repr(model)
    return {
        "state": {key: bits(value) for key, value in model.state_dict().items()},
        "parameters": [
            (key, id(p), p.data_ptr(), type(p), p.requires_grad, bits(p.grad)) for key, p in model.named_parameters()
        ],
        "modules": [
            (key, id(m), type(m), m.training, sorted(m.__dict__), sorted(m._parameters), sorted(m._modules))
            for key, m in model.named_modules()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random": torch.get_rng_state().numpy().tobytes(),
    }


def check(case: Case, model: Any) -> None:
    before = snapshot(model)
    with pytest.raises(AttnPruneError) as caught:
        case.call(model)
    error = caught.value
    assert type(error) is case.error, f"{type(error).__name__}: {error}"
    assert all(isinstance(each, str) and each for each in (error.where, error.expected, error.found, error.remedy))
    assert error.where[0] not in ":.", "the model itself, whose name is empty, needs a name in messages"
    missing = [word for word in case.words if word not in str(error).lower()]
    assert not missing, f"{missing} not in: {error}"
    assert re.search(r"\. [A-Z\"'].*\.$", str(error), re.DOTALL), f"no sentence that says what to do: {error}"
    assert len(str(error)) < 600, "short enough to read"
    assert snapshot(model) == before


@pytest.mark.parametrize("name", CASES)
def test_wrong_call(name: str) -> None:
    check(CASES[name], CASES[name].build())


def test_there_is_a_case_for_every_error() -> None:
    # below, test_deploy.py, test_distributed.py, test_expanded.py, test_threads.py
    elsewhere = {ShardedError, errors.BusyError, errors.ExportError, errors.ProcessError, errors.VerificationError}
    covered = {case.error for case in CASES.values()} | elsewhere
    every = {getattr(errors, name) for name in errors.__all__} - {AttnPruneError}
    assert covered == every


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_what_callers_already_catch(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, AttnPruneError)
    assert kind is AttnPruneError or issubclass(kind, (ValueError, TypeError, LookupError, RuntimeError))
    assert kind.__doc__


# process groups


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, met in a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("call", [partial(_prune, 0.5, {}), lambda m: prune_heads(m, {0: [1]})])
def test_distributed_data_parallel(call: Callable[[Any], object]) -> None:
    model = DistributedDataParallel(ast())
    check(Case(WrappedModelError, ("distributeddataparallel", "model.module", "wrap"), call), model)
    inside = nn.Sequential(model)
    check(Case(WrappedModelError, ("0:", "distributeddataparallel", "wrap"), call), inside)


@pytest.mark.usefixtures("group")
def test_sharded_parameter() -> None:
    model = ast()
    linear = part(model)
    mesh = init_device_mesh("cpu", (1,))
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Replicate()]))
    words = ("layers.1.attention: q.weight", "dtensor", "before sharding")
    check(Case(ShardedError, words, partial(_prune, 0.5, {})), model)
    check(Case(ShardedError, words, lambda m: prune_heads(m, {1: [1]})), model)


# what the remedies say works


@pytest.mark.parametrize("make", [LowRank, Posing, lambda x: Steps(32, 32), parametrizations.weight_norm])
def test_a_wrapped_layer_can_be_excluded(make: Callable[[nn.Linear], nn.Module]) -> None:
    model = replaced(make)()
    before = bits(list(part(model, NAME.format(1)).state_dict().values()))
    report = prune_attention(model, 0.5, exclude="*layers.1.*")
    assert report.achieved["q"] == 0.5
    assert part(model, NAME.format(0)).q_proj.out_features == 16
    assert bits(list(part(model, NAME.format(1)).state_dict().values())) == before
    assert torch.isfinite(model(X).logits).all()


def test_a_parametrisation_can_be_removed() -> None:
    model = replaced(lambda x: parametrizations.weight_norm(x.requires_grad_()))()
    nn.utils.parametrize.remove_parametrizations(part(model), "weight")
    assert prune_attention(model, 0.5).achieved["q"] == 0.5


def test_plans_for_a_pruned_model_compose() -> None:
    model, both = ast(), uniform_plan(ast(), 4)
    both = both.then(Plan(tuple(LayerPlan(spec, (0,)) for spec in both.after)))
    apply_plan(model, both)
    assert part(model).out_features == 12


# errors of others pass through and leave no trace


@pytest.mark.parametrize("how", READERS)
def test_an_error_of_the_loss_itself(how: str) -> None:
    model = ast()
    before = snapshot(model)
    scorer: Any = scorers.Fisher(per_sample=True) if how == "per sample" else how
    with pytest.raises(ZeroDivisionError, match="the loss itself"):
        prune_attention(model, 0.5, scorer=scorer, data=[(*PAIR, i) for i in range(3)], loss_fn=halfway)
    assert snapshot(model) == before


def test_an_error_of_the_scorer_itself() -> None:
    def fail(view: AttentionView) -> Scores:
        raise ZeroDivisionError("the scorer itself")

    model = ast()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError, match="the scorer itself"):
        prune_attention(model, 0.5, scorer=Fixed(fail))
    assert snapshot(model) == before


def test_an_error_of_the_data() -> None:
    def batches() -> Iterable[Any]:
        yield PAIR
        raise ZeroDivisionError("the data themselves")

    for scorer in ("fisher", "auto"):
        model = ast()
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError, match="the data themselves"):
            prune_attention(model, 0.5, scorer=scorer, data=batches())
        assert snapshot(model) == before


def test_a_dense_state_dict_loads_nothing_of_the_attention() -> None:
    """Also inside a larger model, and where missing keys are allowed."""
    model, dense = (nn.TransformerEncoderLayer(32, 4) for _ in range(2))
    prune_attention(model, 0.5)
    before = snapshot(model)
    for strict in (True, False):
        with pytest.raises(StateDictError, match=r"self_attn.*in_proj_weight"):
            model.load_state_dict(dense.state_dict(), strict=strict)
    assert snapshot(model) == before


def test_make_plan_raises_the_same_and_changes_nothing() -> None:
    options: Mapping[str, Any] = {"granularity": "x"}, {"round_to": 0}, {"scorer": "fisher"}, {"include": "x"}
    for option in options:
        model = ast()
        before, found = snapshot(model), []
        for call in (make_plan, prune_attention):
            with pytest.raises(AttnPruneError) as caught:
                call(model, 0.5, **option)
            found.append((type(caught.value), str(caught.value)))
        assert found[0] == found[1]
        assert snapshot(model) == before
