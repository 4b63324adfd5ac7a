"""attnprune removes heads and channels from attention modules of PyTorch models.

>>> import torch, attnprune
>>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
>>> report = attnprune.prune_attention(model, qkvo_ratios=0.5)
>>> model.self_attn.q_proj.weight.shape
torch.Size([32, 64])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from . import families as adapters
    from .api import apply_plan, find_attention, make_plan, masked, prune_attention
    from .by_hand import prune_channels, prune_heads
    from .calibration.moments import Calibration
    from .calibration.processes import across_processes
    from .calibration.taps import calibrate
    from .checkpoint.describe import load_skeleton, read_report
    from .checkpoint.hub import push_to_hub
    from .checkpoint.load import from_pretrained, load_pruned
    from .checkpoint.onnx import export_onnx
    from .checkpoint.save import save_pruned
    from .checkpoint.stock import export_stock
    from .checkpoint.stream import apply_to_checkpoint
    from .cost import latency
    from .cost.latency import LatencyTable
    from .families import Adapter, register_adapter, skipped_attention, unregister_adapter
    from .families.base import AttentionView
    from .families.slots import Slot
    from .planning import scorers
    from .planning.allocate import allocate
    from .planning.by_error import energy_curves
    from .planning.scorers import Scorer
    from .planning.scoring import score_attention
    from .recovery.distillation import capture, distillation_loss, hidden_loss, teacher_loss
    from .recovery.recover import estimate_recovery, recover
    from .report import plots
    from .report.report import Report
    from .report.sensitivity import Sensitivity
    from .report.sweep import Sweep
    from .studies.sensitivity import sensitivity
    from .studies.sweep import sweep
    from .surgery import ParamMap, Surgeon
    from .surgery.freeze import freeze, thaw
    from .surgery.pack import pack_qkv, unpack_qkv
    from .training.ddp import rewrap
    from .training.pruner import AttentionPruner
    from .values.layer_plan import LayerPlan
    from .values.method import Method
    from .values.options import Options
    from .values.plan import Plan
    from .values.ratios import Ratios
    from .values.recovery import Recovered, Recovery, RecoveryOptions
    from .values.request import Request
    from .values.rules import Rules
    from .values.scores import Scores
    from .values.spec import AttentionSpec

__version__ = "0.1.0"

_NAMES = {  # by the module that holds them; each is loaded when it is asked for
    "api": "apply_plan find_attention make_plan masked prune_attention",
    "by_hand": "prune_channels prune_heads",
    "calibration.moments": "Calibration",
    "calibration.processes": "across_processes",
    "calibration.taps": "calibrate",
    "checkpoint.describe": "load_skeleton read_report",
    "checkpoint.hub": "push_to_hub",
    "checkpoint.load": "from_pretrained load_pruned",
    "checkpoint.onnx": "export_onnx",
    "checkpoint.save": "save_pruned",
    "checkpoint.stock": "export_stock",
    "checkpoint.stream": "apply_to_checkpoint",
    "cost.latency": "LatencyTable",
    "families": "Adapter register_adapter skipped_attention unregister_adapter",
    "families.base": "AttentionView",
    "families.slots": "Slot",
    "planning.allocate": "allocate",
    "planning.by_error": "energy_curves",
    "planning.scorers": "Scorer",
    "planning.scoring": "score_attention",
    "recovery.distillation": "capture distillation_loss hidden_loss teacher_loss",
    "recovery.recover": "estimate_recovery recover",
    "report.report": "Report",
    "report.sensitivity": "Sensitivity",
    "report.sweep": "Sweep",
    "studies.sensitivity": "sensitivity",
    "studies.sweep": "sweep",
    "surgery": "ParamMap Surgeon",
    "surgery.freeze": "freeze thaw",
    "surgery.pack": "pack_qkv unpack_qkv",
    "training.ddp": "rewrap",
    "training.pruner": "AttentionPruner",
    "values.layer_plan": "LayerPlan",
    "values.method": "Method",
    "values.options": "Options",
    "values.plan": "Plan",
    "values.ratios": "Ratios",
    "values.recovery": "Recovered Recovery RecoveryOptions",
    "values.request": "Request",
    "values.rules": "Rules",
    "values.scores": "Scores",
    "values.spec": "AttentionSpec",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = {
    "adapters": "families",
    "checkpoint": "checkpoint",
    "cli": "cli",
    "errors": "errors",
    "integrations": "integrations",
    "latency": "cost.latency",
    "nn": "nn",
    "plots": "report.plots",
    "scorers": "planning.scorers",
    "surgery": "surgery",
    "testing": "testing",
}

__all__ = [
    "Adapter",
    "AttentionPruner",
    "AttentionSpec",
    "AttentionView",
    "Calibration",
    "LatencyTable",
    "LayerPlan",
    "Method",
    "Options",
    "ParamMap",
    "Plan",
    "Ratios",
    "Recovered",
    "Recovery",
    "RecoveryOptions",
    "Report",
    "Request",
    "Rules",
    "Scorer",
    "Scores",
    "Sensitivity",
    "Slot",
    "Surgeon",
    "Sweep",
    "across_processes",
    "adapters",
    "allocate",
    "apply_plan",
    "apply_to_checkpoint",
    "calibrate",
    "capture",
    "distillation_loss",
    "energy_curves",
    "errors",
    "estimate_recovery",
    "export_onnx",
    "export_stock",
    "find_attention",
    "freeze",
    "from_pretrained",
    "hidden_loss",
    "latency",
    "load_pruned",
    "load_skeleton",
    "make_plan",
    "masked",
    "pack_qkv",
    "plots",
    "prune_attention",
    "prune_channels",
    "prune_heads",
    "push_to_hub",
    "read_report",
    "recover",
    "register_adapter",
    "rewrap",
    "save_pruned",
    "score_attention",
    "scorers",
    "sensitivity",
    "skipped_attention",
    "sweep",
    "teacher_loss",
    "thaw",
    "unpack_qkv",
    "unregister_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        found = import_module(f".{_MODULES[name]}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
