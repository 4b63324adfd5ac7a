"""The flat options of :func:`attnprune.prune_attention` and its kin, typed and described once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

from .method import Basis, Compensate
from .recovery import Recovery
from .rules import Granularity, Heads, Rounding, RoundTo, Scope, Split

if TYPE_CHECKING:
    from torch import Tensor, nn

LossFn = Callable[["nn.Module", Any], "Tensor"]
"""``loss_fn(model, batch)`` gives a scalar."""
OutputFn = Callable[[Any], Any]
"""``output_fn(output)`` takes what a model returns and gives the tensor or tensors of it to compare."""
YesNoAuto = Literal["auto"] | bool


@runtime_checkable
class Latencies(Protocol):
    """What :func:`attnprune.latency.measure` gives."""

    def predict(self, after: Any, /) -> float:
        """Latency over the dense model's."""

    def share(self, spec: Any, /) -> float:
        """The time of one attention, as a share of the dense model's."""


@runtime_checkable
class Calibrated(Protocol):
    """What :func:`attnprune.calibrate` gives."""

    def merge(self, other: Any, /) -> Any:
        """Of both samples together."""

    def state_dict(self) -> Any:
        """Tensors alone."""


class _Scoring(TypedDict, total=False):
    split: Split
    """``"fixed"`` (the default): every projection loses its own ratio. ``"auto"``: the ratios' total is one budget of
    attention weights, and the method finds who bears it: qk or vo, which layer, which head. ``"all"``: input features
    of Q, K and V and output features of O bear it too, where they lose much less per weight than channels do; that
    takes ``data`` and no scorer by name, and may pay where most is to go. ``"measured"``: as ``"auto"``, with scores at
    the height of what each layer was seen to lose when it alone was pruned to several depths; takes ``data`` and twelve
    forward passes over 64 samples for each attention, and pays where half or more is to go, above all in decoders."""
    basis: Basis
    """``"channels"`` removes channels as they stand. ``"rotated"`` rotates every head into the basis in which the
    fewest directions carry the most, and removes directions; the result is plain Linears all the same. ``"auto"`` (the
    default): rotated if there are ``data`` (or a ``calibration``), channels are to go and no scorer is named."""
    loss_fn: LossFn | None
    """``loss_fn(model, batch)`` gives a scalar; None for the model's own loss, or for a pair cross entropy (integer
    targets) or square error."""
    output_fn: OutputFn | None
    """``output_fn(output)`` takes what the model returns, and gives the tensor, or a tuple or mapping of tensors, that
    stand for it: in losses without ``loss_fn`` and where the pruned model is verified. None:
    :func:`attnprune.scorers.outputs_of` finds them."""
    seed: int
    """For ``scorer="random"`` and projections of the output; 0 by default."""
    progress: bool
    """Whether to show how far it has come: a bar in a terminal or a notebook; elsewhere, where it takes more than 10 s,
    lines of the logger ``attnprune`` at level INFO. True by default."""


class ScoreOptions(_Scoring, total=False):
    """What :func:`attnprune.score_attention` takes beside the scorer, the data and which modules."""

    calibration: Calibrated | None
    """What :func:`attnprune.calibrate` gave for this model, in place of its pass over ``data``."""


class PrunerOptions(_Scoring, total=False):
    """What :class:`attnprune.AttentionPruner` takes as :func:`attnprune.prune_attention` does."""

    granularity: Granularity
    """``"channel"`` (the default) removes channels inside heads (the paper's PH), ``"head"`` whole heads (EH),
    ``"joint"`` lets heads and channels compete by score per weight. ``"auto"`` measures over ``example_inputs`` which
    of the first two is faster here, and raises where the plan is slower than the dense model (not for
    :class:`attnprune.AttentionPruner`, as a run that is resumed may be on another machine)."""
    scope: Scope
    """``"global"`` (the default) lets layers compete, ``"local"`` removes the same fraction in every layer."""
    heads: Heads
    """``"uniform"`` (the default): every head of a layer keeps as many channels. ``"ragged"``: each its own number."""
    round_to: RoundTo
    """Channels that a head keeps (heads that a layer keeps, with head granularity) are a multiple of this; 1 by
    default. ``"auto"``: with ``example_inputs`` the finest multiple than which no coarser one is faster here, measured;
    else, with ``measure=False``, or where times vary too much to tell, what devices of this kind like
    (:func:`attnprune.cost.rounding.rounding`; so too for :class:`attnprune.AttentionPruner`). 1 for heads."""
    rounding: Rounding
    """Whether as many units go as come nearest to the ratio (``"nearest"``, the default), or the first number that is
    not below it (``"up"``), or the last that is not above (``"down"``)."""
    min_heads: int
    """Heads that every layer keeps at least; 1 by default."""
    min_channels: int
    """qk and vo channels that every head keeps at least; 1 by default."""
    match_dims: bool
    """Every head keeps as many qk as vo channels, so that layers with uniform heads keep their own forward and fused
    kernels; layers still differ."""
    stock: bool
    """Plans whose result :func:`attnprune.export_stock` can write for plain transformers: every layer keeps as many
    heads and channels as every other, and as many qk as vo. Implies ``scope="local"`` and ``match_dims``."""
    scorer: Any
    """``"auto"`` (the default): the best for what was given (see :doc:`/explanation/closed_form`). ``"magnitude"``,
    ``"magnitude-l1"``, ``"taylor"``, ``"fisher"``, ``"gate"``, ``"random"``, a :class:`attnprune.Scorer`, or an
    importance of Torch-Pruning: a scorer that you name keeps channels as they stand and refits nothing, unless
    ``basis`` or ``compensate`` say so."""
    compensate: Compensate
    """``False`` nothing but removal; ``True`` what stays is refitted in closed form to make up for what went (needs
    data); ``"auto"`` (the default): if there are data and no scorer is named."""
    sequential: bool
    """Moments and refits layer by layer, each from what the pruned layers before it hand on; takes a forward pass over
    the data per layer."""
    recover: Recovery | Mapping[str, Any] | int | str | None
    """How long what is left of attention is tuned, after it was pruned, towards what the dense model does, without
    labels (:func:`attnprune.recover`): a number of steps, or ``"60s"``, ``"10min"``, ``"2 epochs"``; or a
    :class:`attnprune.Recovery`, or a mapping of its fields. Needs ``data``, of which a share is kept aside: the model
    is never worse on it than pruning left it. None (the default): not at all."""
    latency: Latencies | None
    """What :func:`attnprune.latency.measure` gave, for ``target_latency``."""
    target_latency: float | str | None
    """In place of ``qkvo_ratios``: the forward pass over ``example_inputs`` is to take this share of what it takes now,
    in (0, 1), or at most so long (``"20ms"``); what each shape takes is measured first, or given (see
    :doc:`/how_to/latency`)."""
    target_macs: float | None
    """In place of ``qkvo_ratios``: the share of the whole model's multiply-adds over ``example_inputs``, or, above 1,
    how many there may be (``4e9``)."""
    target_params: float | None
    """In place of ``qkvo_ratios``: the share of the whole model's parameters, or, above 1, how many there may be. Of
    these budgets the plan of least loss is taken; they set ``split="auto"``."""


class Options(PrunerOptions, ScoreOptions, total=False):
    """The options of :func:`attnprune.prune_attention` and :func:`attnprune.make_plan` beyond their signature."""

    target_error: float | None
    """In place of ``qkvo_ratios``: the share of the energy of logits (qk) and outputs (vo) that every layer (with
    ragged heads every head) may lose, in (0, 1)."""
    measure: YesNoAuto
    """Whether the report has latency, measured in turns before and after; ``"auto"`` (the default): with
    ``target_latency`` and ``example_inputs``. A plan is the same with and without; False also keeps ``round_to="auto"``
    and ``preset="fast"`` from measuring."""
