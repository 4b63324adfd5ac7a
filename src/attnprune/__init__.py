"""attnprune removes heads and channels from attention modules of PyTorch models.

>>> import torch, attnprune
>>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
>>> report = attnprune.prune_attention(model, qkvo_ratios=0.5)
>>> model.self_attn.q_proj.weight.shape
torch.Size([32, 64])
"""

from . import adapters, errors, plots, scorers
from .adapters import Adapter, register_adapter, unregister_adapter
from .allocate import Rules, allocate
from .api import apply_plan, find_attention, make_plan, masked, prune_attention, prune_channels, prune_heads
from .calibrate import calibrate
from .io import export_stock, load_pruned, save_pruned
from .moments import Calibration
from .plan import LayerPlan, Plan
from .pruner import AttentionPruner
from .ratios import Ratios
from .report import Report
from .scorers import Scorer
from .scores import Scores
from .spec import AttentionSpec
from .surgery import ParamMap, Surgeon
from .target import energy_curves
from .views import AttentionView, Slot

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AttentionPruner",
    "AttentionSpec",
    "AttentionView",
    "Calibration",
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
    "adapters",
    "allocate",
    "apply_plan",
    "calibrate",
    "energy_curves",
    "errors",
    "export_stock",
    "find_attention",
    "load_pruned",
    "make_plan",
    "masked",
    "plots",
    "prune_attention",
    "prune_channels",
    "prune_heads",
    "register_adapter",
    "save_pruned",
    "scorers",
    "unregister_adapter",
]
