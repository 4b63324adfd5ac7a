"""Every error that attnprune raises on purpose: where it happened, what was expected, what was found, what to do.

All derive from :class:`AttnPruneError` and from the built-in that callers already catch for the same mistake
(``ValueError``, ``TypeError``, ``LookupError`` or ``RuntimeError``). The model is then bitwise as it was.
"""

import os

__all__ = [
    "AdapterError",
    "AllocationError",
    "AttnPruneError",
    "BusyError",
    "CalibrationError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "FrozenError",
    "LatencyError",
    "MetaTensorError",
    "NoAttentionError",
    "NonFiniteError",
    "NotExpressibleError",
    "OptimizerStateError",
    "OptionError",
    "ParametrizedError",
    "PlanFormatError",
    "PlanMismatchError",
    "ProcessError",
    "QuantizedError",
    "RatioError",
    "ScorerError",
    "ShardedError",
    "StateDictError",
    "TiedWeightsError",
    "UnknownUnitError",
    "VerificationError",
    "WrappedModelError",
]


class AttnPruneError(Exception):
    """Base of every error raised on purpose.

    >>> str(AttnPruneError("encoder.3", "12 heads", "10 heads", "compose plans with plan.then(...)"))
    'encoder.3: expected 12 heads, found 10 heads. Compose plans with plan.then(...).'
    """

    def __init__(self, where: str, expected: str, found: str, remedy: str) -> None:
        # the name of an attention that is the model itself is empty
        self.where = where if where[:1] not in ("", ":", ".") else f"the model itself{where}"
        self.expected, self.found, self.remedy = expected, found, remedy
        super().__init__(where, expected, found, remedy)

    def __str__(self) -> str:
        remedy = self.remedy[:1].upper() + self.remedy[1:].rstrip(".")
        return f"{self.where}: expected {self.expected}, found {self.found}. {remedy}."


class AttnPruneWarning(UserWarning):
    """What works, but not as it was meant: a plan that makes a model slower, a cache file that is malformed."""


class OptionError(AttnPruneError, ValueError):
    """An option has a value that it cannot take, or two options contradict each other."""

    faults: tuple[AttnPruneError, ...] = ()
    """Each fault by itself, where the error lists several."""

    @classmethod
    def of(cls, faults: tuple[AttnPruneError, ...]) -> "OptionError":
        """One error that lists several faults: where each is, what was expected, found, and what to do."""
        listed = " ".join(f"({number}) {fault}" for number, fault in enumerate(faults, 1))
        error = cls("options", "no fault", f"{len(faults)}: {listed.rstrip('.')}", "see each of them")
        error.faults = faults
        return error


class RatioError(OptionError):
    """A pruning ratio is not a number in [0, 1), or names no projection."""


class AllocationError(AttnPruneError, ValueError):
    """The ratios asked for cannot be reached within the floors and the rounding."""


class NoAttentionError(AttnPruneError, LookupError):
    """No attention module was found, or none is left after include and exclude."""


class UnknownUnitError(AttnPruneError, LookupError):
    """A layer, head or channel is named that does not exist, or that was pruned before."""


class AdapterError(AttnPruneError, TypeError):
    """An adapter describes an attention module inconsistently, or does not fit it."""


class NotExpressibleError(AdapterError):
    """The plan gives shapes that neither the host module nor its adapter can run."""


class PlanFormatError(AttnPruneError, ValueError):
    """A serialised plan is malformed."""


class PlanMismatchError(AttnPruneError, ValueError):
    """A plan was made for another model, or for the same model in another state."""


class ScorerError(AttnPruneError, ValueError):
    """A scorer is unknown, or gave scores of the wrong shape."""


class DataError(AttnPruneError, ValueError):
    """The calibration data are missing, empty, or of a form that the model or the loss cannot take."""


class CheckpointError(AttnPruneError, ValueError):
    """A saved model is missing, malformed, altered, or does not fit the model it is loaded into."""

    @classmethod
    def no_directory(cls, path: "os.PathLike[str] | str") -> "CheckpointError":
        """The error of a path that is no directory to read from."""
        found = "a file" if os.path.exists(path) else "nothing"
        remedy = "check the path; a model of the Hugging Face Hub is named owner/model"
        return cls(str(path), "a directory", found, remedy)


class ExportError(AttnPruneError, RuntimeError):
    """A model cannot be written in another format, or runs there otherwise."""


class FrozenError(AttnPruneError, RuntimeError):
    """A frozen model is pruned, trained, or given other weights: it has to thaw first (:func:`attnprune.thaw`)."""


class LatencyError(AttnPruneError, ValueError):
    """A latency table is malformed, or of another model, or of other shapes than a plan needs."""


class CalibrationError(AttnPruneError, ValueError):
    """A calibration is of another model, malformed, or lacks what a plan needs."""


class NonFiniteError(AttnPruneError, ValueError):
    """A weight, gradient or score is NaN or infinite."""


class OptimizerStateError(AttnPruneError, ValueError):
    """An optimizer's state cannot follow its parameters."""


class StateDictError(AttnPruneError, RuntimeError):
    """A state dict of a dense module, or of other heads and channels, is loaded into a pruned module.

    As always in ``load_state_dict``, modules before this one may have been loaded by then.
    """


class BusyError(AttnPruneError, RuntimeError):
    """Another thread is at work on the same model."""


class ProcessError(AttnPruneError, RuntimeError):
    """Planning failed in another process of ``torch.distributed``, so it ends here too."""


class VerificationError(AttnPruneError, RuntimeError):
    """The pruned model does not compute what the masked one does; it was put back as it was."""


class WrappedModelError(AttnPruneError, TypeError):
    """The model or a layer is wrapped by something that holds on to the old parameters."""


class ShardedError(WrappedModelError):
    """A parameter is a shard of a distributed one."""


class QuantizedError(WrappedModelError):
    """A projection is quantised."""


class ParametrizedError(WrappedModelError):
    """A projection's weight is computed by a parametrisation."""


class TiedWeightsError(WrappedModelError):
    """A projection shares its parameter with something that does not lose the same rows."""


class MetaTensorError(WrappedModelError):
    """A projection has no data: its weight lies on the meta device."""
