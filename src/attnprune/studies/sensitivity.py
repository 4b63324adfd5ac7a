"""What each layer and each projection costs alone: :func:`sensitivity`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..api import masked, plan_for
from ..bars import bar
from ..calibration.batches import device_of, forward, to_device
from ..calibration.losses import token_mask
from ..calibration.quiet import evaluated
from ..calibration.taps import calibrate
from ..errors import DataError, OptionError
from ..families.registry import plain
from ..nn.kept import ordinary
from ..nn.outputs import outputs_of
from ..nn.unfused import Unfused
from ..report.sensitivity import Cost, Sensitivity
from ..values.choices import Choices
from ..values.faults import Faults
from ..values.layer_plan import LayerPlan
from ..values.layout import PROJECTIONS
from ..values.options import ScoreOptions
from ..values.plan import Plan
from ..values.request import Request
from .repeatable import repeatable
from .sweep import Evaluate, read_data, scored

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Unpack

ASIDE = 4
"""Every so manieth batch is kept aside to measure distortion on."""
PARTS = ("layer", "qk", "vo")


@ordinary
def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Evaluate | None = None,
    *,
    ratio: float = 0.5,
    parts: Sequence[str] = PARTS,
    include: Choices | None = None,
    exclude: Choices | None = None,
    higher_is_better: bool = True,
    **options: Unpack[ScoreOptions],
) -> Sensitivity:
    """What it costs to take a share from one layer alone, and from its queries and keys, or values and outputs, alone.

    The rest of the model is as it was each time, so the figures say where pruning hurts; they do not add up. The model
    stays bitwise as it is.

    Args:
        model: any module with attention of a known family.
        data: batches, as in :func:`attnprune.prune_attention`; read once. Without ``evaluate`` every fourth of them is
            kept aside, and the others decide what goes; so there are at least two.
        evaluate: ``evaluate(model)`` gives a score; the cost is how much it drops. None: the cost is the distortion of
            the output on the batches kept aside, which needs no labels: the sum of squares of the difference over that
            of the dense output, of several outputs the mean. Padded tokens do not count.
        ratio: the share of a part's weights that goes, in (0, 1).
        parts: ``"layer"`` (all four projections of an attention), ``"qk"``, ``"vo"``, or another key that
            ``qkvo_ratios`` takes.
        include: as in :func:`attnprune.prune_attention`; only these are tried.
        exclude: what to leave out.
        higher_is_better: False where a lower score is a better one.
        options: of :class:`attnprune.values.options.ScoreOptions`: ``basis``, ``loss_fn``, ``output_fn``, ``seed``,
            ``progress``. By default heads are rotated and refitted, as in :func:`attnprune.prune_attention` with data.

    Raises:
        OptionError: an option that nobody knows, or a ratio outside (0, 1); nothing has run by then.
        DataError: no data, a single batch without ``evaluate``, or no finite score.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    >>> found = sensitivity(model, torch.randn(32, 5, 32).split(4))
    >>> found.parts, [len(found.ranked(part)) for part in found.parts]
    (('layer', 'qk', 'vo'), [2, 2, 2])
    >>> 0 < found.of("layers.0.self_attn", "qk") < 1
    True
    """
    faults = Faults()
    known = faults.known("sensitivity", options, ScoreOptions.__optional_keys__)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        faults.add(OptionError("ratio", "a number in (0, 1)", repr(ratio), "write 0.5 for half"))
    if evaluate is not None and not callable(evaluate):
        remedy = "write evaluate(model), which returns a number"
        faults.add(OptionError("evaluate", "a function of a model", f"a {type(evaluate).__name__}", remedy))
    found = faults.attempt(read_data, data)
    if found is not None and evaluate is None and len(found) < 2:
        remedy = "split it, so that a part can be kept aside"
        faults.add(DataError("data", "at least two batches", "one", remedy))
    tried = () if faults else parts
    wanted: dict[str, Any] = {part: {part: ratio} if part != "layer" else ratio for part in tried}
    seed, shown = int(known.get("seed", 0)), bool(known.get("progress", True))

    def ask(amount: Any, batches: Any) -> Request:
        asked = {**known, "scope": "local", "progress": False, "include": include, "exclude": exclude}
        return Request.parse(amount, data=batches, **asked)

    for amount in wanted.values():
        faults.attempt(ask, amount, found)
    faults.throw()
    assert found is not None
    places = [] if evaluate is not None else list(range(ASIDE - 1, len(found), ASIDE)) or [len(found) - 1]
    used = [batch for place, batch in enumerate(found) if place not in places]
    with repeatable(model, seed):
        copy = deepcopy(plain(model)).eval()
        plans = _plans(copy, {part: ask(amount, used) for part, amount in wanted.items()})
        judge: Callable[[nn.Module], float]
        if evaluate is None:
            judge = _Distortion(copy, [found[place] for place in places], known)
        else:
            judge = partial(scored, evaluate=evaluate, seed=seed)
        dense, sign = judge(copy), -1.0 if evaluate is None or not higher_is_better else 1.0
        costs: dict[tuple[str, str], Cost] = {}
        for part, layer in bar(plans, what="sensitivity", shown=shown):
            with masked(copy, Plan((layer,))):
                cost = sign * (dense - judge(copy))
            costs[layer.spec.name, part] = Cost(layer.spec.name, part, _share(layer), cost)
    names = dict.fromkeys(name for name, _ in costs)
    unit = "distortion" if evaluate is None else "drop of the score"
    whole = tuple(costs[name, part] for name in names for part in wanted)
    return Sensitivity(whole, float(ratio), unit, None if evaluate is None else dense)


def _plans(model: nn.Module, requests: Mapping[str, Request]) -> list[tuple[str, LayerPlan]]:
    """For every part what each layer loses; layers do not compete, so all of a part are decided in one plan."""
    calibration: Any = None
    found = []
    for part, request in requests.items():
        evidence = request.evidence
        if evidence.calibration is None and request.decided.needs_maps:
            calibration = calibration or calibrate(
                model, evidence.data or (), include=request.include, exclude=request.exclude,
                loss_fn=evidence.loss_fn, across_heads=request.decided.refits, progress=False,
            )  # fmt: skip
            request = replace(request, evidence=replace(evidence, calibration=calibration))
        found += [(part, layer) for layer in plan_for(model, request)]
    return found


def _share(layer: LayerPlan) -> float:
    """The share of an attention's weights that goes."""
    before, after = (sum(spec.weights(p) for p in PROJECTIONS) for spec in (layer.spec, layer.after))
    return 1 - after / before if before else 0.0


class _Distortion:
    """How far a model's outputs are from those that it gave at first.

    Args:
        model: as it is at first.
        data: batches to run it on.
        options: of them ``loss_fn`` and ``output_fn``.
    """

    def __init__(self, model: nn.Module, data: Sequence[Any], options: Mapping[str, Any]) -> None:
        self.data, self.options = data, options
        with evaluated(model):
            self.dense = [[x.cpu() for x in self._outputs(model, given)] for given in data]

    def __call__(self, model: nn.Module) -> float:
        apart, whole = ([0.0] * len(self.dense[0]) for _ in range(2))
        with evaluated(model):
            for before, given in zip(self.dense, self.data, strict=True):
                for place, (x, y) in enumerate(zip(before, self._outputs(model, given), strict=True)):
                    apart[place] += float((y.cpu() - x).double().square().sum())
                    whole[place] += float(x.double().square().sum())
        shares = [a / b for a, b in zip(apart, whole, strict=True) if b]
        return sum(shares) / len(shares) if shares else 0.0

    def _outputs(self, model: nn.Module, given: Any) -> list[Tensor]:
        """The tensors of the output, padded tokens left out."""
        loss_fn, output_fn = self.options.get("loss_fn"), self.options.get("output_fn")
        batch = to_device(given, device_of(model))
        with Unfused():
            output = forward(model, batch) if loss_fn is None else loss_fn(model, batch)
        mask = token_mask(batch)
        found = [one.tensor for one in outputs_of(output, output_fn)]
        if mask is not None:
            found = [x[mask != 0] if x.dim() == 3 and mask.shape == x.shape[:2] else x for x in found]
        return found
