"""Decoupled forwards: attention whose heads have their own dims, qk apart from vo."""

from .attend import attend
from .decoupled import Decoupled, State, decoupled_class, host_class
from .fused import DecoupledFusedAttention
from .hf import HFCrossAttention, HFEagerSelfAttention, HFLegacySelfAttention, HFSelfAttention
from .layouts import execution
from .mha import DecoupledMultiheadAttention
from .products import Plain

__all__ = [
    "Decoupled",
    "DecoupledFusedAttention",
    "DecoupledMultiheadAttention",
    "HFCrossAttention",
    "HFEagerSelfAttention",
    "HFLegacySelfAttention",
    "HFSelfAttention",
    "Plain",
    "State",
    "attend",
    "decoupled_class",
    "execution",
    "host_class",
]
