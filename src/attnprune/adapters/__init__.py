"""Families of attention modules, and how to find them."""

from .base import Adapter
from .fused import FusedQKVAdapter
from .hf_encoder import HFEncoderAdapter, HFTwoModuleAdapter
from .mha import MultiheadAttentionAdapter
from .registry import find_views, register_adapter, unregister_adapter

__all__ = [
    "Adapter",
    "FusedQKVAdapter",
    "HFEncoderAdapter",
    "HFTwoModuleAdapter",
    "MultiheadAttentionAdapter",
    "find_views",
    "register_adapter",
    "unregister_adapter",
]
