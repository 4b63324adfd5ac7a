"""attnprune removes heads and channels from attention modules of PyTorch models.

>>> import torch, attnprune
>>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
>>> report = attnprune.prune_attention(model, qkvo_ratios=0.5)
>>> model.self_attn.q_proj.weight.shape
torch.Size([32, 64])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import adapters, errors
from .adapters import Adapter, register_adapter, unregister_adapter
from .allocate import Rules, allocate
from .api import apply_plan, find_attention, make_plan, masked, prune_attention
from .layer_plan import LayerPlan
from .plan import Plan
from .ratios import Ratios
from .report import Report
from .scores import Scores
from .spec import AttentionSpec
from .surgery import ParamMap, Surgeon
from .views import AttentionView, Slot

if TYPE_CHECKING:
    from . import latency, plots, scorers
    from .by_hand import prune_channels, prune_heads
    from .calibration import calibrate
    from .checkpoint.describe import load_skeleton, read_report
    from .checkpoint.load import from_pretrained, load_pruned
    from .checkpoint.save import save_pruned
    from .checkpoint.stock import export_stock
    from .checkpoint.stream import apply_to_checkpoint
    from .distillation import capture, distillation_loss, hidden_loss, teacher_loss
    from .distributed import rewrap
    from .export import export_onnx
    from .moments import Calibration
    from .packing import pack_qkv, unpack_qkv
    from .processes import across_processes
    from .pruner import AttentionPruner
    from .scorers import Scorer
    from .scoring import score_attention
    from .target import energy_curves
    from .timetable import LatencyTable

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AttentionPruner",
    "AttentionSpec",
    "AttentionView",
    "Calibration",
    "LatencyTable",
    "LayerPlan",
    "ParamMap",
    "Plan",
    "Ratios",
    "Report",
    "Rules",
    "Scorer",
    "Scores",
    "Slot",
    "Surgeon",
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
    "export_onnx",
    "export_stock",
    "find_attention",
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
    "read_report",
    "register_adapter",
    "rewrap",
    "save_pruned",
    "score_attention",
    "scorers",
    "teacher_loss",
    "unpack_qkv",
    "unregister_adapter",
]

_LATER = {  # loaded when asked for
    "AttentionPruner": "pruner",
    "Calibration": "moments",
    "LatencyTable": "timetable",
    "Scorer": "scorers",
    "across_processes": "processes",
    "apply_to_checkpoint": "checkpoint.stream",
    "calibrate": "calibration",
    "capture": "distillation",
    "distillation_loss": "distillation",
    "energy_curves": "target",
    "export_onnx": "export",
    "export_stock": "checkpoint.stock",
    "from_pretrained": "checkpoint.load",
    "hidden_loss": "distillation",
    "load_pruned": "checkpoint.load",
    "load_skeleton": "checkpoint.describe",
    "pack_qkv": "packing",
    "prune_channels": "by_hand",
    "prune_heads": "by_hand",
    "read_report": "checkpoint.describe",
    "rewrap": "distributed",
    "save_pruned": "checkpoint.save",
    "score_attention": "scoring",
    "teacher_loss": "distillation",
    "unpack_qkv": "packing",
}
_MODULES = {
    "blocks",
    "budgets",
    "calibration",
    "checkpoint",
    "closed_form",
    "distillation",
    "export",
    "integrations",
    "latency",
    "moments",
    "packing",
    "planning",
    "plots",
    "pruner",
    "scorers",
    "scoring",
    "target",
    "timetable",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
