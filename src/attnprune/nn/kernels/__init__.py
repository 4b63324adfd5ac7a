"""Attention over heads of any dims by one launch of a kernel of ours, where Triton is: :func:`heads_attention`."""

from .operator import available, heads_attention

__all__ = ["available", "heads_attention"]
