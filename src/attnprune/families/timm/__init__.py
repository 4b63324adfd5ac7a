"""Attention with one fused ``qkv`` Linear, as in timm."""
