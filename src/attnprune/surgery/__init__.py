"""Changing a model: all of a plan, or none of it."""

from .called import as_called
from .check import check_expressible, check_fit, check_views
from .mask import masked_views
from .optimizer import Assignment, OptimizerPatch, Step, check_held, commit_all, optimizers_of
from .patch import ParamChange, ParamMap, Surgeon
from .verify import Verification, Verified

__all__ = [
    "Assignment",
    "OptimizerPatch",
    "ParamChange",
    "ParamMap",
    "Step",
    "Surgeon",
    "Verification",
    "Verified",
    "as_called",
    "check_expressible",
    "check_fit",
    "check_held",
    "check_views",
    "commit_all",
    "masked_views",
    "optimizers_of",
]
