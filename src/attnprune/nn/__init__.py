"""Decoupled forwards: attention whose heads have their own dims, qk apart from vo."""

from .attend import attend
from .decoupled import Decoupled, State, decoupled_class, host_class
from .policy import execution
from .products import Plain

__all__ = [
    "Decoupled",
    "Plain",
    "State",
    "attend",
    "decoupled_class",
    "execution",
    "host_class",
]
