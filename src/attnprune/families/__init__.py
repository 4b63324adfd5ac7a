"""Families of attention modules, and how to find them."""

from .base import Adapter
from .hf.family import HFEncoderAdapter, HFTwoModuleAdapter
from .mha.family import MultiheadAttentionAdapter
from .registry import find_views, skipped_attention
from .table import register_adapter, unregister_adapter
from .timm.family import FusedQKVAdapter

__all__ = [
    "Adapter",
    "FusedQKVAdapter",
    "HFEncoderAdapter",
    "HFTwoModuleAdapter",
    "MultiheadAttentionAdapter",
    "find_views",
    "register_adapter",
    "skipped_attention",
    "unregister_adapter",
]
