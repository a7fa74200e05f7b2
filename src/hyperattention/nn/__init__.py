"""Modules: layers of a network that compute attention by any method of this library."""

from hyperattention.nn.multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
