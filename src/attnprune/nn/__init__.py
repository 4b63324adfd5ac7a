"""Decoupled forwards: attention whose heads have their own dims, qk apart from vo."""

from .attend import Decoupled, attend, decoupled_class, host_class
from .hf import HFCrossAttention, HFEagerSelfAttention, HFLegacySelfAttention, HFSelfAttention
from .mha import DecoupledMultiheadAttention

__all__ = [
    "Decoupled",
    "DecoupledMultiheadAttention",
    "HFCrossAttention",
    "HFEagerSelfAttention",
    "HFLegacySelfAttention",
    "HFSelfAttention",
    "attend",
    "decoupled_class",
    "host_class",
]
